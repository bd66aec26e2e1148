"""Answers of a variant, scored next to the teacher's: language, length, chrF, facts and errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from py3langid.langid import MODEL_FILE
from py3langid.langid import LanguageIdentifier as LangidModel
from sacrebleu.metrics.chrf import CHRF

from rotdistill_answers._facts import named_claims, undenied_claims
from rotdistill_answers._normalize import normalize, primary_language
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import answer_after_thoughts, is_thought_mark
from rotdistill_core.evaluation.metrics import teacher_metric
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.answers import asked_greedily, kept_answers
from rotdistill_core.forward.generate import AnsweringModel, AnswerWriter
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import Answer

if TYPE_CHECKING:
    from rotdistill_answers.step import Answers

LANGUAGES = ("ar", "de", "el", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "zh")
"""Languages that are identified besides those of the questions. A model may drift into a language
in which nobody asked."""
REPEATED_LENGTH = 8
"""Characters of the pieces by which an answer is searched for repetitions."""
MOST_REPEATED = 1 / 4
"""Share of pieces that stood before, from which an answer repeats itself. Of the 200 shipped blurbs
in thirteen languages none has a share above 0.05. Short answers that end in circles have 0.25 and
more, those that are nothing else 0.4 to 0.9."""
UNKNOWN = "und"
"""Code of a text in no language, such as an empty one or signs alone."""


class AnswerScore(NamedTuple):
    """What one answer contains."""

    answer: str
    language: str
    """ISO 639-1 code, or `UNKNOWN`."""
    facts: tuple[str, ...]
    """Expected facts that the answer states."""
    errors: tuple[str, ...]
    """Known errors that the answer asserts."""


class Figure(NamedTuple):
    """A metric of one answer."""

    value: float
    n: int = 1
    """Weight in the mean over answers."""


class LanguageIdentifier:
    """Identifies the language of a text, with the model in the wheel of py3langid."""

    def __init__(self, languages: Iterable[str]) -> None:
        self._model = _langid_model(frozenset([*LANGUAGES, *map(primary_language, languages)]))
        self.languages = frozenset(self._model.labels)
        """Codes of the languages that it identifies; the model does not know every language."""

    def language_of(self, text: str) -> str:
        """Return the code of a text's language, or `UNKNOWN`."""
        return str(self._model.classify(text)[0])


@lru_cache(maxsize=4)
def _langid_model(languages: frozenset[str]) -> Any:
    """Return the model of py3langid for those of some languages that it knows.

    Loading it takes half a second, and each variant of a run asks for the same languages.
    """
    model = LangidModel.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)
    model.set_languages(sorted(languages & set(model.labels)))
    return model


def evaluate(
    step: Answers,
    variant: Variant,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
) -> list[MetricRow]:
    """Let a variant answer the held-out questions and score both models' answers.

    What a model thinks before it answers is no part of the scored answer; the report keeps it.

    Returns:
        A row for each metric, the mean over all answers, and then a row for each metric and answer.

    Raises:
        SetupError: the student's device has no memory for a single answer.
    """
    texts = [text for text in samples.layout.texts if text.split == Split.HELDOUT]
    questions = {question.id: question for question in samples.conversations}
    generated = _generate(step, variant, pair, texts, out, progress)
    identifier = LanguageIdentifier(text.language for text in texts)
    tokenizer = pair.student.tokenizer
    rows: dict[str, list[MetricRow]] = {}
    unfinished: Counter[str] = Counter()
    for text in texts:
        question = questions[text.id]
        prompt = text.tokens[: text.answer]
        teacher_answer = decode_answer(tokenizer, text.tokens[text.answer :])
        student_answer = decode_answer(tokenizer, generated[text.id])
        teacher, student = (
            score_answer(answer_after_thoughts(tokenizer, prompt, each), question, identifier)
            for each in (teacher_answer, student_answer)
        )
        unfinished["teacher"] += bool(teacher_answer) > bool(teacher.answer)
        unfinished["student"] += bool(student_answer) > bool(student.answer)
        out.report.answers[text.id] = Answer(
            language=text.language,
            question=_as_asked(question),
            teacher=teacher_answer,
            student=student_answer,
            teacher_facts=teacher.facts,
            student_facts=student.facts,
            teacher_errors=teacher.errors,
            student_errors=student.errors,
        )
        language = primary_language(text.language)
        asked_language = language if language in identifier.languages else None
        figures = {
            **similarity(student, teacher, asked_language),
            **repetition(student.answer),
            **of_teacher({**repetition(teacher.answer), **claim_figures(teacher, question)}),
            **claim_figures(student, question),
        }
        for metric, figure in figures.items():
            row = MetricRow(
                variant=variant.name,
                metric=metric,
                value=figure.value,
                split=Split.HELDOUT,
                language=text.language,
                n=figure.n,
                text=text.id,
            )
            rows.setdefault(metric, []).append(row)
    asked = {primary_language(text.language) for text in texts}
    unidentified = sorted(asked - identifier.languages)
    if unidentified:
        out.notes["languages that cannot be identified"] = unidentified
    without_facts = sum(not questions[text.id].facts for text in texts)
    if without_facts:
        out.notes["questions without expected facts, left out of the scores of facts"] = (
            without_facts
        )
    if unfinished.total():
        out.notes["answers that end inside their thoughts, scored as empty"] = dict(unfinished)
    means = [_mean(of_metric) for of_metric in rows.values()]
    return means + [row for of_metric in rows.values() for row in of_metric]


def _as_asked(question: Conversation) -> str:
    """Return a question as a report shows it; turns before it are counted, not shown."""
    turns = len(question.earlier)
    return f"[after {turns} turns] {question.question}" if turns else question.question


def score_answer(
    answer: str, question: Conversation, identifier: LanguageIdentifier
) -> AnswerScore:
    """Return what an answer to a question contains, whoever wrote it.

    Denials are read in the answer's own language, which need not be the question's.
    """
    language = identifier.language_of(answer)
    reading_language = primary_language(question.language) if language == UNKNOWN else language
    text = normalize(answer, reading_language)
    return AnswerScore(
        answer=answer,
        language=language,
        facts=named_claims(text, question.facts, reading_language),
        errors=undenied_claims(text, question.falsehoods, reading_language),
    )


def similarity(
    student: AnswerScore, teacher: AnswerScore, asked_language: str | None
) -> dict[str, Figure]:
    """Return how similar an answer is to the teacher's: chrF, length and language.

    Args:
        student: the answer.
        teacher: the teacher's answer to the same question.
        asked_language: the question's language; None if it cannot be identified.

    Returns:
        Metric -> figure. There is no `answer_language` without `asked_language`, and no
        `answer_language_teacher` if the teacher's answer is in no language.
    """
    # An empty answer counts as one character, so that the logarithm is finite.
    ratio = max(len(student.answer), 1) / max(len(teacher.answer), 1)
    figures = {
        "answer_chrf": Figure(CHRF().sentence_score(student.answer, [teacher.answer]).score),
        "answer_length": Figure(ratio),
        "answer_length_gap": Figure(abs(math.log(ratio))),
    }
    if asked_language is not None:
        figures["answer_language"] = Figure(float(student.language == asked_language))
    if teacher.language != UNKNOWN:
        figures["answer_language_teacher"] = Figure(float(student.language == teacher.language))
    return figures


def repeated_share(answer: str) -> float:
    """Return the share of an answer's pieces of eight characters that stood in it before.

    It needs no words, so it is the same measure in every script. Case and blanks do not count.
    """
    text = " ".join(answer.lower().split())
    pieces = [text[k : k + REPEATED_LENGTH] for k in range(len(text) - REPEATED_LENGTH + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def repetition(answer: str) -> dict[str, Figure]:
    """Return whether an answer repeats itself, as a figure."""
    return {"answer_repeats": Figure(float(repeated_share(answer) > MOST_REPEATED))}


def of_teacher(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """Return figures of the teacher's own answer, under the names of such metrics."""
    return {teacher_metric(name): figure for name, figure in figures.items()}


def claim_figures(score: AnswerScore, question: Conversation) -> dict[str, Figure]:
    """Return the figures of facts and errors in an answer; without claims there are none."""
    figures = {}
    if question.facts:
        share = len(score.facts) / len(question.facts)
        figures["factual_completeness"] = Figure(share, n=len(question.facts))
    if question.falsehoods:
        figures["hallucination_rate"] = Figure(float(bool(score.errors)))
    return figures


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, without a last character that is incomplete.

    Special tokens are left out, except for those that begin or end a thinking block.
    """
    special = set(tokenizer.all_special_ids)
    parts = groupby(tokens, lambda token: token in special and is_thought_mark(tokenizer, token))
    text = "".join(
        tokenizer.decode(list(part), skip_special_tokens=not is_mark) for is_mark, part in parts
    )
    return text.strip().rstrip("\ufffd")


def _generate(
    step: Answers,
    variant: Variant,
    pair: Pair,
    texts: Sequence[Text],
    out: StepOutput,
    progress: Progress,
) -> Mapping[str, Sequence[int]]:
    """Return the tokens of the variant's answer to each question."""
    prompts = {text.id: text.tokens[: text.answer] for text in texts}
    longest_of_teacher = max(len(text.tokens) - text.answer for text in texts)
    asked = asked_greedily(prompts, step.max_tokens or longest_of_teacher)
    student = pair.student
    model = AnsweringModel(variant.folder, variant.weights, student.device, student.dtype)
    # The scores and the text of every answer are in the ledger; the files only survive a kill.
    aside, series = out.aside(), f"variant-{variant.name}"
    return kept_answers(AnswerWriter, model, asked, aside, series, progress).tokens


def _mean(rows: Sequence[MetricRow]) -> MetricRow:
    """Return the row of the mean of rows, weighted by their `n`."""
    n = sum(row.n or 1 for row in rows)
    value = sum(row.value * (row.n or 1) for row in rows) / n
    return rows[0]._replace(value=value, language=None, n=n, text=None)
