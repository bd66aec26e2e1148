"""Let variants answer the held-out questions, and compare what they say with the teacher's own answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, generation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


LANGUAGES = ("ar", "de", "el", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "zh")
"""Told apart beside those of the questions: a model may drift into a language that nobody asked in."""
UNKNOWN = "und"


@step
class Answers:
    """Let each saved variant answer the held-out questions, greedily, and compare with the teacher's answers.

    `answer_chrf` (chrF, 0 to 100), `answer_length` (characters over the teacher's), `answer_length_gap` (mean |ln| of that),
    `answer_language` (share in the question's language) and `answer_language_teacher` (share in the language of the teacher's
    answer); `factual_completeness` (share of the expected facts that answers state) and `hallucination_rate` (share of answers that
    assert a known error), with `_teacher` those of the teacher's answers.
    Needs no capture. In the tour guides it is a toggle: `base` and `full` answer.
    """

    use: Literal["answers"] = "answers"
    tokens: PositiveInt | None = None
    """Longest answer; without it, as long as the teacher's longest."""

    def cost(self, context: CostContext) -> Cost:
        """The whole student answers the held-out questions."""
        texts = context.texts
        questions = texts.texts.get("heldout", 0)
        tokens = round(texts.answer_tokens * questions / max(texts.questions_asked, 1))
        return generation_cost(context.student, texts, questions, tokens, context.student_bytes)

    @hookimpl
    def evaluate(
        self, variant: Variant, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> list[MetricRow]:
        """See `Specs.evaluate`."""
        from rotdistill_answers._facts import judge
        from rotdistill_core.evaluation.rows import MetricRow
        from rotdistill_core.forward.generate import greedy_answers
        from rotdistill_core.store.results import Answer

        texts = [text for text in samples.layout.texts if text.split == "heldout"]
        most = self.tokens or max(len(text.tokens) - text.answer for text in texts)
        asked = {text.id: text.tokens[: text.answer] for text in texts}
        made = greedy_answers(
            variant.folder, asked, most, pair.student.device, pair.student.dtype, progress
        )
        questions = {question.id: question for question in samples.questions}
        known, language_of = identifier(text.language for text in texts)
        kept: dict[str, dict[str, Any]] = {}
        found: dict[str, list[MetricRow]] = {}
        for text in texts:
            teacher, said = (
                words(pair.student.tokenizer, tokens)
                for tokens in (text.tokens[text.answer :], made[text.id])
            )
            about = questions[text.id]
            figures = {
                m: (v, 1)
                for m, v in compared(
                    teacher, said, text.language if text.language in known else None, language_of
                ).items()
            }
            kept[text.id] = {
                "language": text.language,
                "question": about.question,
                "teacher": teacher,
                "student": said,
            }
            for who, answer in (("teacher", teacher), ("student", said)):
                spoken = language_of(answer)  # denied in the words of its own language
                judged = judge(
                    answer,
                    about.facts,
                    about.falsehoods,
                    text.language if spoken == UNKNOWN else spoken,
                )
                kept[text.id][f"{who}_facts"] = tuple(judged.named)
                kept[text.id][f"{who}_errors"] = tuple(judged.asserted)
                end = "_teacher" if who == "teacher" else ""
                if about.facts:
                    figures[f"factual_completeness{end}"] = (
                        len(judged.named) / len(about.facts),
                        len(about.facts),
                    )
                if about.falsehoods:
                    figures[f"hallucination_rate{end}"] = (float(bool(judged.asserted)), 1)
            for metric, (value, n) in figures.items():
                found.setdefault(metric, []).append(
                    MetricRow(
                        variant.name, metric, value, "heldout", None, text.language, n, text.id
                    )
                )
        out.report.answers = {name: Answer(**about) for name, about in kept.items()}
        if lost := sorted({text.language for text in texts} - known):
            out.notes["languages that cannot be identified"] = lost
        means = [_mean(rows) for rows in found.values()]
        return means + [row for rows in found.values() for row in rows]


def compared(
    teacher: str, said: str, language: str | None, language_of: Callable[[str], str]
) -> dict[str, float]:
    """Return the figures of one answer beside the teacher's; `language` is the question's, None where it cannot be identified.

    Where the teacher's answer is in no language there is nothing that another could be in as well, and so no figure of that.
    """
    from sacrebleu.metrics.chrf import CHRF

    ratio = max(len(said), 1) / max(
        len(teacher), 1
    )  # an empty answer counts as one character: its logarithm stays finite
    figures = {
        "answer_chrf": CHRF().sentence_score(said, [teacher]).score,
        "answer_length": ratio,
        "answer_length_gap": abs(math.log(ratio)),
    }
    spoken = language_of(said)
    goals = {
        "answer_language": language or UNKNOWN,
        "answer_language_teacher": language_of(teacher),
    }
    return figures | {
        metric: float(spoken == goal) for metric, goal in goals.items() if goal != UNKNOWN
    }


def identifier(languages: Iterable[str]) -> tuple[frozenset[str], Callable[[str], str]]:
    """Return the languages that are told apart, and a function from text to the code of its language.

    The model comes with py3langid. What is in no language (empty, or signs alone) is `und`.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)
    known = frozenset({*LANGUAGES, *languages} & set(model.labels))
    model.set_languages(sorted(known))
    return known, lambda text: str(model.classify(text)[0])


def words(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Return the text of an answer's tokens; a last character that is only there in part is left out."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip().rstrip("\ufffd")


def _mean(rows: list[MetricRow]) -> MetricRow:
    """Return the row of the mean of rows, weighted by their `n`."""
    n = sum(row.n or 1 for row in rows)
    return rows[0]._replace(
        value=sum(row.value * (row.n or 1) for row in rows) / n, language=None, n=n, text=None
    )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Answers]
