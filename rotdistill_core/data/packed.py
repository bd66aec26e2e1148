"""Tokenised texts and their packing: which row of a `[rows, d]` matrix holds which token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rotdistill_core.data.batching import BLOCK_TEXTS, SAMPLE_TEXTS
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.store.hashing import digest


@dataclass(frozen=True)
class Text:
    """One tokenised conversation."""

    id: str
    language: str
    split: Split
    tokens: tuple[int, ...]
    answer: int
    """Index of the first answer token."""
    plain: bool = False
    """The text does not begin with the shared prefix, because it is outside the domain. Most such
    texts have no chat template around them."""


@dataclass(frozen=True)
class PackedTexts:
    """Texts packed into rows, one row a token.

    Every text but the plain ones begins with the same tokens. This prefix is stored once, in the
    first rows; the remaining tokens of each text follow, text after text.
    """

    texts: tuple[Text, ...]
    prefix: int
    """Number of tokens in the shared prefix."""

    @cached_property
    def starts(self) -> list[int]:
        """First row after the prefix of each text; the last entry is the number of rows."""
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
        """Token id of each row `[rows]`."""
        ids: list[int] = []
        for text in self.texts:
            if not text.plain:
                ids += text.tokens[: self.prefix]
                break
        for text in self.texts:
            ids += text.tokens[self.prefix_length(text) :]
        return torch.tensor(ids, dtype=torch.long)

    def split(self, *splits: str) -> Tensor:
        """Return the mask `[rows]` of the rows in these splits; prefix rows belong to `fit`."""
        mask = torch.zeros(self.rows, dtype=torch.bool)
        mask[: self.prefix] = Split.FIT in splits
        for k, text in enumerate(self.texts):
            if text.split in splits:
                mask[self.starts[k] : self.starts[k + 1]] = True
        return mask

    def prediction_rows(self, split: str) -> tuple[Tensor, Tensor, list[Text]]:
        """Return the rows of a split that predict answer tokens.

        Returns:
            The rows `[n]`, the token that each should predict `[n]`, and the text of each.
        """
        rows: list[int] = []
        targets: list[int] = []
        texts: list[Text] = []
        for k, text in enumerate(self.texts):
            if text.split != split:
                continue
            prefix_length = self.prefix_length(text)
            # The row before an answer token predicts it.
            for position in range(text.answer - 1, len(text.tokens) - 1):
                in_prefix = position < prefix_length
                rows.append(position if in_prefix else self.starts[k] + position - prefix_length)
                targets.append(text.tokens[position + 1])
                texts.append(text)
        return torch.tensor(rows, dtype=torch.long), torch.tensor(targets, dtype=torch.long), texts

    def select(self, *splits: str, limit: int | None = None) -> PackedTexts:
        """Return the packing of the texts in these splits, or of the first `limit` of them.

        It keeps the prefix unless all of its texts are plain.
        """
        return self.of(tuple(text for text in self.texts if text.split in splits)[:limit])

    def where(self, keep: Callable[[Text], bool]) -> PackedTexts:
        """Return the packing of the texts to keep; the prefix stays unless all are plain."""
        return self.of(tuple(text for text in self.texts if keep(text)))

    def of(self, texts: tuple[Text, ...]) -> PackedTexts:
        """Return the packing of these texts; the prefix stays unless all are plain."""
        all_plain = bool(texts) and all(text.plain for text in texts)
        return PackedTexts(texts, 0 if all_plain else self.prefix)

    def sample(self) -> PackedTexts:
        """Return the texts whose rows every capture keeps.

        Those are the first `SAMPLE_TEXTS` to fit on and for validation, and all others. Of a
        sample it is the sample itself. Texts are in shuffled order, so the first are any.
        """
        room = dict(SAMPLE_TEXTS)
        kept = []
        for text in self.texts:
            if text.split in room:
                if not room[text.split]:
                    continue
                room[text.split] -= 1
            kept.append(text)
        return self.of(tuple(kept))

    def with_first(self, ids: AbstractSet[str]) -> PackedTexts:
        """Return these texts in another order: those with these ids come first."""
        return self.of(tuple(sorted(self.texts, key=lambda text: text.id not in ids)))

    def fit_blocks(self) -> list[PackedTexts]:
        """Return the texts to fit on in blocks of `BLOCK_TEXTS`; a function of the texts alone.

        Each block begins with the shared prefix, unless all of its texts are plain.
        """
        return self.select(Split.FIT).blocks()

    def blocks(self) -> list[PackedTexts]:
        """Return the texts in blocks of `BLOCK_TEXTS`, with the prefix unless all are plain."""
        texts = self.texts
        return [self.of(texts[k : k + BLOCK_TEXTS]) for k in range(0, len(texts), BLOCK_TEXTS)]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Id of each text -> its number."""
        return {text.id: k for k, text in enumerate(self.texts)}

    def row_indices_in(self, full: PackedTexts) -> Tensor:
        """Return the row in `full` of each row here `[rows]`; `full` holds all of these texts.

        The two may share prefixes of different length.
        """
        index = full.numbers
        parts = []
        if self.prefix:
            first = next((index[text.id] for text in self.texts if not text.plain), None)
            in_prefix = slice(0, self.prefix)
            parts.append(
                torch.arange(self.prefix) if first is None else full._rows(first, in_prefix)
            )
        for text in self.texts:
            rest = slice(self.prefix_length(text), len(text.tokens))
            parts.append(full._rows(index[text.id], rest))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def _rows(self, k: int, positions: slice) -> Tensor:
        """Return the rows of a run of token positions of text k."""
        return self.rows_at(k, torch.arange(positions.start, positions.stop))

    def rows_at(self, k: int, positions: Tensor) -> Tensor:
        """Return the rows of the tokens at some positions [n] of text k, `[n]`."""
        prefix = self.prefix_length(self.texts[k])
        return torch.where(positions < prefix, positions, positions - prefix + self.starts[k])

    def batches(
        self, budget: int = 1536, apart: Callable[[Text], Hashable] = lambda _: None
    ) -> list[list[int]]:
        """Return indices of texts in batches of at most `budget` padded tokens.

        Texts of similar length go together, so that little is padded. Plain texts have batches of
        their own, as they do not continue the prefix. A text longer than the budget is alone.

        Args:
            budget: most padded tokens of a batch.
            apart: texts for which it differs never share a batch.
        """

        def plain_last_and_long_first(k: int) -> tuple[bool, int]:
            return self.texts[k].plain, -len(self.texts[k].tokens)

        batches: list[list[int]] = []
        for k in sorted(range(len(self.texts)), key=plain_last_and_long_first):
            joins = batches and self._fits(k, batches[-1], budget)
            if joins and apart(self.texts[k]) == apart(self.texts[batches[-1][0]]):
                batches[-1].append(k)
            else:
                batches.append([k])
        return batches

    def padded_tokens(self, batch: list[int]) -> int:
        """Return how many tokens a batch of texts has, padded; the first text is its longest."""
        longest = self.texts[batch[0]]
        return len(batch) * (len(longest.tokens) - self.prefix_length(longest))

    def _fits(self, k: int, batch: list[int], budget: int) -> bool:
        """Return whether text `k` may join a batch; the batch's first text is its longest."""
        longest = self.texts[batch[0]]
        within_budget = self.padded_tokens([*batch, k]) <= budget
        return within_budget and longest.plain == self.texts[k].plain

    def digest(self) -> str:
        """Return the sha256 of ids, splits and tokens."""
        value = [self.prefix, [[t.id, t.split, t.answer, t.tokens, t.plain] for t in self.texts]]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Samples:
    """All texts of a run, tokenised."""

    layout: PackedTexts
    """As the student's tokenizer reads them."""
    conversations: tuple[Conversation, ...]
    style: str
    """The system prompt."""
    theirs: PackedTexts | None = None
    """As the teacher reads them: by its own tokenizer, or with a system prompt that the student's
    texts lack (`baked`). None if both models read the same."""
    chat: ChatFormat | None = None
    """How the conversations of `layout` are written; None for texts of tests, which have none."""
    baked: bool = False
    """Whether `layout` leaves out the system prompt, and `theirs` has it, in one vocabulary; see
    `samples.bake_prompt`."""

    @property
    def teacher(self) -> PackedTexts:
        """The texts as the teacher reads them."""
        return self.theirs or self.layout

    def read_by_teacher(self, layout: PackedTexts) -> PackedTexts:
        """Return some texts of `layout` as the teacher reads them, in the same order."""
        if self.theirs is None:
            return layout
        texts, numbers = self.theirs.texts, self.theirs.numbers
        return self.theirs.of(tuple(texts[numbers[text.id]] for text in layout.texts))

    @cached_property
    def _conversation_of(self) -> dict[str, Conversation]:
        return {conversation.id: conversation for conversation in self.conversations}

    def part(self, layout: PackedTexts) -> Samples:
        """Return the samples of some texts of `layout`, in the same order."""
        found = (self._conversation_of.get(text.id) for text in layout.texts)
        return replace(
            self,
            layout=layout,
            theirs=None if self.theirs is None else self.read_by_teacher(layout),
            conversations=tuple(conversation for conversation in found if conversation),
        )

    def teacher_answered(self) -> frozenset[str]:
        """Return the ids of the questions that the teacher answers: those without an answer."""
        return frozenset(question.id for question in self.conversations if question.answer is None)

    def digest(self) -> str:
        """Return the sha256 of all tokens, and of what steps are told of texts besides."""
        told = [(each.id, each.language, each.topic) for each in self.conversations]
        theirs = self.theirs.digest() if self.theirs else ""
        return self.layout.digest() + theirs + digest(told)
