"""The number of token rows that the texts make, before they are tokenised.

The tokenizer's file counts them if the model's folder has one; else their bytes give an estimate.
transformers is not loaded.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.data.batching import SAMPLE_TEXTS
from rotdistill_core.data.conversations import OWN_ANSWER
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError
from rotdistill_core.store.plain import read_bytes

if TYPE_CHECKING:
    from rotdistill_core.data.conversations import Conversation
    from rotdistill_core.recipe.document import Lessons, SamplesRef


TEMPLATE_TOKENS = 8
"""Tokens that a chat template puts around one message."""
QUESTION_TOKENS = 24
"""Tokens of a lesson's question."""
Count = Callable[[str], int]
"""Counts the tokens of a text."""
BYTES_PER_TOKEN = {100_000: 3.5, 0: 2.5}
"""Smallest vocabulary -> bytes of UTF-8 in a token, over the fourteen shipped languages."""

COUNTED_TEXTS = 2_000
"""Texts of a split whose tokens are counted; those of others follow from their characters."""
REMEMBERED_PARTS = 1024
"""Parts of prompts whose tokens are remembered: system prompts, and what templates write."""
LONG_PART = 256
"""Bytes of a part from which its tokens are counted where a bound would do."""
COMPOSED = (None, "NFC")
"""Types of normalizers that change no part of a text because of another."""


class TokenCounter:
    """Counts the tokens of texts by a tokenizer's file.

    Args:
        path: the file.
        vocabulary: number of tokens of the model.

    Raises:
        SetupError: the tokenizer cannot be loaded.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        # A plan without local models needs no tokenizer.
        from tokenizers import Tokenizer  # noqa: PLC0415

        self._path = path
        self._vocabulary = vocabulary
        with reading(path, "the tokenizer"):
            self._tokenizer = Tokenizer.from_file(str(path))
            settings = json.loads(read_bytes(path))
        # Its file may keep them from its training; transformers asks for neither in a run.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._part = lru_cache(REMEMBERED_PARTS)(self._whole)
        self._special = _special_tokens(settings)
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        self.takes_every_text = self._special is not None and largest < vocabulary
        """Whether no text can be refused: byte by byte all are read, and the model has all tokens.
        Then some of many texts tell how many tokens all have."""

    def __call__(self, text: str) -> int:
        """Return the number of tokens of a text.

        Raises:
            SetupError: it has a token that the model does not have, or none for a part of it.
        """
        if self._special is None:
            return self._whole(text)
        # Special tokens are cut out first, whatever is around them, so that parts add up.
        return sum(map(self._part, filter(None, self._special.split(text))))

    def most(self, text: str) -> int:
        """Return a number of tokens that a text has at most, mostly without its tokens.

        A token is a byte of the composed text at least.

        Raises:
            SetupError: see `__call__`.
        """
        if self._special is None:
            return self._whole(text)
        if not _is_composed(text):
            return sum(map(self._most_of_part, self._special.split(text)))
        size = len(text.encode())
        if size < LONG_PART:
            return size
        # Few parts are long, and the bytes of all parts are those of the text.
        long = [part for part in self._special.split(text) if 4 * len(part) >= LONG_PART]
        return size + sum(self._most_of_part(part) - len(part.encode()) for part in long)

    def _most_of_part(self, part: str) -> int:
        size = _composed_bytes(part)
        return size if size < LONG_PART else self._part(part)

    def _whole(self, text: str) -> int:
        with reading(self._path, "the tokens of a text"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self._vocabulary:
            raise SetupError(
                f"{self._path}: makes token {max(ids)}, and the model has {self._vocabulary} "
                "tokens. The tokenizer belongs to another model, or the model was not resized "
                "when tokens were added."
            )
        return len(ids)


def _special_tokens(settings: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return what finds the special tokens in texts, if what is between them counts by itself.

    It does where a BPE reads bytes. The pattern has one group, so that `split` keeps the tokens.

    Args:
        settings: the content of a tokenizer.json.
    """
    steps = settings.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    reads_bytes = any(
        step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps
    )
    normalizer = (settings.get("normalizer") or {}).get("type")
    added = settings.get("added_tokens", [])
    is_plain = not any(
        token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")
    )
    is_plain = is_plain and all(token.get("special") for token in added)
    is_bpe = settings.get("model", {}).get("type") == "BPE"
    if not (is_bpe and reads_bytes and is_plain and normalizer in COMPOSED):
        return None
    # As the library does it: the leftmost one, and of those the longest.
    names = sorted((token["content"] for token in added), key=lambda name: -len(name))
    return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")


def _is_composed(text: str) -> bool:
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def _composed_bytes(text: str) -> int:
    return len((text if _is_composed(text) else unicodedata.normalize("NFC", text)).encode())


class ByteCounter:
    """Estimates the tokens of texts by their bytes, where no tokenizer is at hand.

    Args:
        vocabulary: number of tokens of the model, which decides how many bytes a token has.
    """

    takes_every_text = False
    """It counts all texts: that takes no time."""

    def __init__(self, vocabulary: int) -> None:
        self._size = next(size for least, size in BYTES_PER_TOKEN.items() if vocabulary >= least)

    def __call__(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return round(len(text.encode()) / self._size)

    def most(self, text: str) -> int:
        """Return the same."""
        return self(text)


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
    estimated: bool = False
    """Whether the rows of some splits follow from those of some of their texts."""
    teacher_prefix: int | None = None
    """Rows of the system prompt as the teacher reads it; None if the student reads the same."""
    own_answers: Mapping[str, int] = field(default_factory=dict)
    """Split -> those of its texts that are a question once more, for the teacher to answer."""

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

    def with_fit_share(self, share: float) -> TextCounts:
        """Return the counts with a share of the texts to fit on, and all others."""
        rows, texts = dict(self.rows), dict(self.texts)
        others = texts.get(Split.FIT, 0) - self.lessons
        validation = texts.get(Split.VALIDATION, 0)
        asked = max(self.questions_asked - texts.get(Split.HELDOUT, 0), 0)
        asked_to_fit = asked * others / max(others + validation, 1)
        for counts in (rows, texts):
            counts[Split.FIT] = round(share * counts.get(Split.FIT, 0))
        return replace(
            self,
            rows=rows,
            texts=texts,
            lessons=round(share * self.lessons),
            questions_asked=self.questions_asked - round((1 - share) * asked_to_fit),
        )

    @property
    def sampled(self) -> TextCounts:
        """The texts whose rows every capture keeps, see `PackedTexts.sample`, at mean length."""
        rows, texts = dict(self.rows), dict(self.texts)
        for split, most in SAMPLE_TEXTS.items():
            count = texts.get(split, 0)
            if count > most:
                rows[split] = round(rows[split] * most / count)
                texts[split] = most
        return replace(self, rows=rows, texts=texts)

    @property
    def total(self) -> int:
        """Rows of all splits, with the shared prompt."""
        return self.rows_of(*self.rows)

    @property
    def as_teacher_reads(self) -> TextCounts:
        """The same texts as the teacher reads them."""
        return self if self.teacher_prefix is None else replace(self, prefix=self.teacher_prefix)


def token_counter(folder: Path | None, vocabulary: int) -> TokenCounter | ByteCounter:
    """Return what counts the tokens of a text.

    Args:
        folder: the model's folder; without a `tokenizer.json` there, bytes are counted.
        vocabulary: number of tokens of the model.

    Raises:
        SetupError: the tokenizer cannot be loaded.
    """
    if folder and (folder / "tokenizer.json").is_file():
        return TokenCounter(folder / "tokenizer.json", vocabulary)
    return ByteCounter(vocabulary)


def upper_bounds(texts: Mapping[str, str], count: TokenCounter | ByteCounter) -> dict[str, int]:
    """Return how many tokens each text has at most, by name."""
    return {name: count.most(text) for name, text in texts.items()}


def lengths_above(
    texts: Mapping[str, str], bounds: Mapping[str, int], count: Count, most: int
) -> dict[str, int]:
    """Return the tokens of those texts that have more than `most`, by name.

    Args:
        texts: the texts by name.
        bounds: how many tokens each has at most.
        count: counts the tokens of a text.
        most: so many are allowed.
    """
    return {
        name: length
        for name, text in texts.items()
        if bounds[name] > most and (length := count(text)) > most
    }


def count_texts(
    conversations: Iterable[Conversation],
    style: str,
    settings: SamplesRef,
    count: Count,
    lessons: Lessons | None = None,
    most: int | None = None,
) -> TextCounts:
    """Return the rows of all texts, as `rotdistill_core.data.tokenization` packs them.

    Args:
        conversations: the questions and texts of the recipe.
        style: the system prompt.
        settings: the recipe's [samples].
        count: counts the tokens of a text.
        lessons: the recipe's [lessons], if it has any.
        most: count so many texts of a split, spread over all of them, and estimate the others by
            their characters; None counts all.
    """
    prefix = count(style) + TEMPLATE_TOKENS
    by_split: dict[str, list[Conversation]] = {}
    own_answers: Counter[str] = Counter()
    questions_asked = answer_tokens = 0
    for question in conversations:
        if question.id.endswith(OWN_ANSWER):
            own_answers[question.split] += 1
        by_split.setdefault(question.split, []).append(question)
        if question.answer is None and not Split(question.split).outside_domain:
            questions_asked += 1
            answer_tokens += _longest_answer(question, settings)

    def rows_of(question: Conversation) -> int:
        return _rows_of(question, settings, count, prefix)

    counts = TextCounts(
        prefix=TEMPLATE_TOKENS if settings.bake_prompt else prefix,
        rows={split: _sum_of(asked, rows_of, most) for split, asked in by_split.items()},
        texts={split: len(asked) for split, asked in by_split.items()},
        questions_asked=questions_asked,
        answer_tokens=answer_tokens,
        estimated=most is not None and any(len(asked) > most for asked in by_split.values()),
        teacher_prefix=prefix if settings.bake_prompt else None,
        own_answers=own_answers,
    )
    return _with_lessons(counts, lessons, settings) if lessons and lessons.count else counts


def _sum_of(
    questions: Sequence[Conversation],
    rows_of: Callable[[Conversation], int],
    most: int | None,
) -> int:
    """Return the rows of all texts, from those of some if there are more than `most`.

    Every n-th text counts, of those with an answer and of those without.
    """
    if most is None or len(questions) <= most:
        return sum(map(rows_of, questions))
    total = 0.0
    for is_answered in (True, False):
        alike = [each for each in questions if (each.answer is not None) == is_answered]
        some = alike[:: max(len(alike) // most, 1)]
        # Texts of one character have rows too, so each counts as some characters more.
        sizes = [sum(each.characters + 1 for each in texts) for texts in (alike, some)]
        total += sum(map(rows_of, some)) * sizes[0] / max(sizes[1], 1)
    return round(total)


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


def _rows_of(question: Conversation, settings: SamplesRef, count: Count, prefix: int) -> int:
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
