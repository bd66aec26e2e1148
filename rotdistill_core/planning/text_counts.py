"""The number of token rows that the texts make, before they are tokenised.

The tokenizer's file counts them if the model's folder has one; else their bytes give an estimate.
transformers is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.data.batching import SAMPLE_TEXTS
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError

if TYPE_CHECKING:
    from rotdistill_core.data.conversations import Conversation
    from rotdistill_core.recipe.document import Lessons, SamplesRef


TEMPLATE_TOKENS = 8
"""Tokens that a chat template puts around one message."""
QUESTION_TOKENS = 24
"""Tokens of a lesson's question."""
BYTES_PER_TOKEN = {100_000: 3.5, 0: 2.5}
"""Smallest vocabulary -> bytes of UTF-8 in a token, over the fourteen shipped languages."""

TokenCounter = Callable[[str], int]


@dataclass(frozen=True)
class TextCounts:
    """Token rows and texts by split. An answer that the teacher has yet to write counts in full."""

    prefix: int
    """Rows of the system prompt, which all texts share and which counts once. Where it is baked in,
    the student reads those of the template alone."""
    rows: dict[str, int]
    """Split -> rows of its texts, without the shared prompt."""
    texts: dict[str, int]
    """Split -> number of texts."""
    questions_asked: int
    """Questions that the teacher answers itself."""
    answer_tokens: int
    """Tokens that it may write in all these answers together."""
    lessons: int = 0
    """Lessons that it writes; their texts and rows count as fit texts."""
    lesson_tokens: int = 0
    """Tokens that it may write for them, proposed questions included."""
    lesson_prompts: int = 0
    """Prompts that it is given for them: those of proposals, and those of answers."""
    teacher_prefix: int | None = None
    """Rows of the system prompt as the teacher reads it; None if the student reads the same."""

    def rows_of(self, *splits: str, limit: int | None = None) -> int:
        """Return the rows of some splits, with the shared prompt.

        Args:
            splits: names of splits.
            limit: count only this many of their texts, at their mean length.
        """
        rows = sum(self.rows.get(split, 0) for split in splits)
        texts = sum(self.texts.get(split, 0) for split in splits)
        if limit is None or limit >= texts:
            return self.prefix + rows
        return self.prefix + round(rows * limit / max(texts, 1))

    def texts_of(self, *splits: str) -> int:
        """Return the number of texts of some splits."""
        return sum(self.texts.get(split, 0) for split in splits)

    @property
    def sampled(self) -> TextCounts:
        """The texts whose rows every capture keeps, see `PackedTexts.sample`, at mean length."""
        rows, texts = dict(self.rows), dict(self.texts)
        for split in (Split.FIT, Split.VALIDATION):
            count = texts.get(split, 0)
            if count > SAMPLE_TEXTS:
                rows[split] = round(rows[split] * SAMPLE_TEXTS / count)
                texts[split] = SAMPLE_TEXTS
        return replace(self, rows=rows, texts=texts)

    @property
    def total(self) -> int:
        """Rows of all splits, with the shared prompt."""
        return self.rows_of(*self.rows)

    @property
    def as_teacher_reads(self) -> TextCounts:
        """The same texts as the teacher reads them."""
        return self if self.teacher_prefix is None else replace(self, prefix=self.teacher_prefix)


def token_counter(folder: Path | None, vocabulary: int) -> TokenCounter:
    """Return a function that counts the tokens of a text.

    Args:
        folder: the model's folder; without a `tokenizer.json` there, bytes are counted.
        vocabulary: number of tokens of the model, which decides how many bytes a token has.

    Raises:
        SetupError: the tokenizer cannot be loaded. The function raises it for a token that the
            model does not have.
    """
    if folder and (folder / "tokenizer.json").is_file():
        # A plan without local models needs no tokenizer.
        from tokenizers import Tokenizer  # noqa: PLC0415

        with reading(folder / "tokenizer.json", "the tokenizer"):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Its file may keep them from its training; transformers asks for neither in a run.
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def count(text: str) -> int:
            with reading(folder / "tokenizer.json", "the tokens of a text"):
                ids = tokenizer.encode(text, add_special_tokens=False).ids
            if max(ids, default=0) >= vocabulary:
                raise SetupError(
                    f"{folder}/tokenizer.json: makes token {max(ids)}, and the model has "
                    f"{vocabulary} tokens. The tokenizer belongs to another model, or the model "
                    "was not resized when tokens were added."
                )
            return len(ids)

        return count
    size = next(size for least, size in BYTES_PER_TOKEN.items() if vocabulary >= least)
    return lambda text: round(len(text.encode()) / size)


def count_texts(
    conversations: Iterable[Conversation],
    style: str,
    settings: SamplesRef,
    count: TokenCounter,
    lessons: Lessons | None = None,
) -> TextCounts:
    """Return the rows of all texts, as `rotdistill_core.data.tokenization` packs them.

    Args:
        conversations: the questions and texts of the recipe.
        style: the system prompt.
        settings: the recipe's [samples].
        count: counts the tokens of a text.
        lessons: the recipe's [lessons], if it has any.
    """
    prefix = count(style) + TEMPLATE_TOKENS
    rows: dict[str, int] = {}
    texts: dict[str, int] = {}
    questions_asked = answer_tokens = 0
    for question in conversations:
        split = question.split
        rows[split] = rows.get(split, 0) + _rows_of(question, settings, count, prefix)
        texts[split] = texts.get(split, 0) + 1
        if question.answer is None and not Split(split).outside_domain:
            questions_asked += 1
            answer_tokens += _longest_answer(question, settings)
    counts = TextCounts(
        prefix=TEMPLATE_TOKENS if settings.bake_prompt else prefix,
        rows=rows,
        texts=texts,
        questions_asked=questions_asked,
        answer_tokens=answer_tokens,
        teacher_prefix=prefix if settings.bake_prompt else None,
    )
    return _with_lessons(counts, lessons, settings) if lessons and lessons.count else counts


def _with_lessons(counts: TextCounts, lessons: Lessons, settings: SamplesRef) -> TextCounts:
    """Return the counts with lessons, each as long as it may be; see `execution.lessons`."""
    general = int(lessons.count * lessons.general)
    texts = general if lessons.general_from == "texts" else 0
    asked = lessons.count - texts
    proposed = texts + (asked if lessons.source == "teacher" else general - texts)
    longest = max(settings.max_tokens - counts.prefix, 1)
    row = min(QUESTION_TOKENS + TEMPLATE_TOKENS + lessons.tokens, longest)
    rows = asked * row + texts * (lessons.tokens + 1)
    fit = Split.FIT.value
    return replace(
        counts,
        rows={**counts.rows, fit: counts.rows.get(fit, 0) + rows},
        texts={**counts.texts, fit: counts.texts.get(fit, 0) + lessons.count},
        lessons=lessons.count,
        lesson_prompts=asked + proposed,
        lesson_tokens=asked * lessons.tokens + proposed * max(lessons.tokens, QUESTION_TOKENS),
    )


def _rows_of(question: Conversation, settings: SamplesRef, count: TokenCounter, prefix: int) -> int:
    """Return the rows of one text after the shared prompt of `prefix` rows."""
    if question.is_plain:  # without prompt and template
        return count(question.answer or "")
    if question.answer is None:
        answer = _longest_answer(question, settings)
    else:
        answer = count(question.answer) + 1  # and the token that ends it
    texts = [turn.content for turn in question.turns]
    if question.system:  # the shared prompt does not stand for it
        texts.append(question.system)
    rows = sum(count(text) + TEMPLATE_TOKENS for text in texts) + answer
    if question.split == Split.HELDOUT or question.split.outside_domain:  # these are never cut
        return rows
    return min(rows, settings.max_tokens - prefix)


def _longest_answer(question: Conversation, settings: SamplesRef) -> int:
    """Return how many tokens the teacher may write in answer to a question."""
    if question.split == Split.HELDOUT:
        return settings.answer_tokens
    return settings.own_answers
