"""How many rows the texts will be, told by the tokenizer's file where it is there, else by their bytes. transformers is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rotdistill_core.data.questions import Question
    from rotdistill_core.recipe.document import SamplesRef


TEMPLATE = 8
"""Tokens that a chat template puts around one message."""
BYTES = {100_000: 3.5, 0: 2.5}
"""Size of a vocabulary from which on -> bytes of UTF-8 in a token, over the fourteen languages of the shipped texts."""

Count = Callable[[str], int]


@dataclass(frozen=True)
class TextCounts:
    """Rows by split. The prompt that all share is counted once; what the teacher has yet to write at its longest."""

    prefix: int
    rows: dict[str, int]
    texts: dict[str, int]
    questions_asked: int
    """Questions that the teacher answers itself."""
    answer_tokens: int
    """Tokens that it may write in answer to them."""

    def rows_of(self, *splits: str, limit: int | None = None) -> int:
        """Return how many rows the texts of some splits are, or the first `most` of them, with the shared prompt."""
        rows, texts = (
            sum(kept.get(split, 0) for split in splits) for kept in (self.rows, self.texts)
        )
        return self.prefix + (
            rows if limit is None or limit >= texts else round(rows * limit / max(texts, 1))
        )

    @property
    def total(self) -> int:
        """All rows."""
        return self.rows_of(*self.rows)


def token_counter(folder: Path | None, vocabulary: int) -> Count:
    """Return what counts the tokens of a text: the tokenizer of a model's folder, or a guess by its bytes."""
    if folder and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    each = next(size for least, size in BYTES.items() if vocabulary >= least)
    return lambda text: round(len(text.encode()) / each)


def count_texts(
    questions: Iterable[Question], style: str, settings: SamplesRef, tokens: Count
) -> TextCounts:
    """Return the rows of all texts, as `rotdistill_core.samples.tokenize` lays them out."""
    prefix = tokens(style) + TEMPLATE
    rows: dict[str, int] = {}
    texts: dict[str, int] = {}
    asked = said = 0
    for q in questions:
        if q.split.startswith("guard"):
            own = tokens(q.answer or "")
        else:
            most = settings.answer_tokens if q.split == "heldout" else settings.own_answers
            own = (
                tokens(q.question)
                + TEMPLATE
                + (tokens(q.answer) + 1 if q.answer is not None else most)
            )
            own = own if q.split == "heldout" else min(own, settings.max_tokens - prefix)
            asked, said = asked + (q.answer is None), said + (most if q.answer is None else 0)
        rows[q.split], texts[q.split] = rows.get(q.split, 0) + own, texts.get(q.split, 0) + 1
    return TextCounts(prefix, rows, texts, asked, said)
