"""TODO: rotdistill_core.data.packed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rotdistill_core.data.questions import Question

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Text:
    """One tokenised conversation; `answer` is the index of the first answer token."""

    id: str
    language: str
    split: str
    tokens: tuple[int, ...]
    answer: int
    plain: bool = False
    """It does not begin with the prefix that the others share."""


@dataclass(frozen=True)
class PackedTexts:
    """Which row of a `[rows, d]` matrix holds which token. The prefix that all texts but plain ones share comes first, once."""

    texts: tuple[Text, ...]
    prefix: int

    @cached_property
    def starts(self) -> list[int]:
        """First row of each text's own tokens, and the number of rows at the end."""
        starts = [self.prefix]
        for text in self.texts:
            starts.append(starts[-1] + len(text.tokens) - self.prefix_length(text))
        return starts

    def prefix_length(self, text: Text) -> int:
        """Return how many leading tokens of a text have their rows in the prefix."""
        return 0 if text.plain else self.prefix

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.starts[-1]

    @cached_property
    def tokens(self) -> Tensor:
        """Token id of each row [rows]."""
        import torch

        own = [t for text in self.texts for t in text.tokens[self.prefix_length(text) :]]
        return torch.tensor(
            [*next((t.tokens[: self.prefix] for t in self.texts if not t.plain), ()), *own]
        )

    def split(self, *splits: str) -> Tensor:
        """Return the mask [rows] of rows in these splits; prefix rows count as `fit`."""
        import torch

        mask = torch.zeros(self.rows, dtype=torch.bool)
        mask[: self.prefix] = "fit" in splits
        for k, text in enumerate(self.texts):
            if text.split in splits:
                mask[self.starts[k] : self.starts[k + 1]] = True
        return mask

    def prediction_rows(self, split: str) -> tuple[Tensor, Tensor, list[Text]]:
        """Return the rows that predict answer tokens, those tokens, and the text of each, one per row."""
        import torch

        rows: list[int] = []
        targets: list[int] = []
        texts: list[Text] = []
        for k, text in enumerate(self.texts):
            if text.split == split:
                own = range(text.answer - 1, len(text.tokens) - 1)
                prefix_length = self.prefix_length(text)
                rows += [
                    self.starts[k] + p - prefix_length if p >= prefix_length else p for p in own
                ]
                targets += [text.tokens[p + 1] for p in own]
                texts += [text] * len(own)
        return torch.tensor(rows, dtype=torch.long), torch.tensor(targets, dtype=torch.long), texts

    def select(self, *splits: str, most: int | None = None) -> PackedTexts:
        """Return the layout of the texts in these splits (the first `most` of them), with the prefix where any of them has it."""
        texts = tuple(t for t in self.texts if t.split in splits)[:most]
        return PackedTexts(texts, 0 if texts and all(t.plain for t in texts) else self.prefix)

    def row_indices_in(self, full: PackedTexts) -> Tensor:
        """Return, for each row here, its row in the layout that this one was selected from."""
        import torch

        where = {text.id: k for k, text in enumerate(full.texts)}
        parts = [torch.arange(self.prefix)]
        parts += [
            torch.arange(full.starts[where[t.id]], full.starts[where[t.id] + 1]) for t in self.texts
        ]
        return torch.cat(parts)

    def batches(self, budget: int = 1536) -> list[list[int]]:
        """Return text indices in batches of about `budget` padded tokens, texts of like length together, plain ones by themselves."""
        batches: list[list[int]] = []
        for k in sorted(
            range(len(self.texts)), key=lambda k: (self.texts[k].plain, -len(self.texts[k].tokens))
        ):
            first = self.texts[batches[-1][0] if batches else k]
            room = (
                (len(batches[-1]) + 1) * (len(first.tokens) - self.prefix_length(first)) <= budget
                if batches
                else False
            )
            if room and first.plain == self.texts[k].plain:
                batches[-1].append(k)
            else:
                batches.append([k])
        return batches

    def digest(self) -> str:
        """Return the sha256 of ids, splits and tokens."""
        value = [self.prefix, [[t.id, t.split, t.answer, t.tokens, t.plain] for t in self.texts]]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Samples:
    """All texts of a run, tokenised."""

    layout: PackedTexts
    """As the student reads them."""
    questions: tuple[Question, ...]
    style: str
    theirs: PackedTexts | None = None
    """As the teacher reads them, where it has another tokenizer."""

    @property
    def teacher(self) -> PackedTexts:
        """The texts as the teacher reads them."""
        return self.theirs or self.layout

    def teacher_answered(self) -> frozenset[str]:
        """Return the ids of the questions that the teacher answers: those without an answer."""
        return frozenset(question.id for question in self.questions if question.answer is None)

    def digest(self) -> str:
        """Return the sha256 of all tokens."""
        return self.layout.digest() + (self.theirs.digest() if self.theirs else "")
