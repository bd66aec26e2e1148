"""Answers that grow together token by token, greedy or drawn, in the slots of `forward.slots`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rotdistill_core.forward.slots import SLOTS, Slots
from rotdistill_core.plugin.engine import Asked

REFILL = 8
"""New prompts are read when at least one slot in so many is free: a pass for few rows costs as much
as one for many."""


@dataclass
class GrowingAnswer:
    """An answer and what is known of its text."""

    name: str
    asked: Asked
    length: int
    """Tokens of its text in its slot."""
    tokens: list[int] = field(default_factory=list)

    def is_over(self, stops: AbstractSet[int]) -> bool:
        """Return whether its last token ends it, or it may have no more."""
        return self.tokens[-1] in stops or len(self.tokens) >= self.asked.max_tokens

    @cached_property
    def chances(self) -> Sequence[float]:
        """A number in [0, 1) for each token that is drawn; they follow from its seed alone."""
        drawn = np.random.Generator(np.random.Philox(self.asked.seed))
        return drawn.random(self.asked.max_tokens).tolist()  # type: ignore[no-any-return]


def add_tokens(growing: Sequence[GrowingAnswer], logits: Tensor) -> None:
    """Add the next token to each answer.

    A drawn token is the first whose cumulative probability is above the answer's own number. So it
    is the same whatever else is answered at once, up to rounding.

    Args:
        growing: the answers.
        logits: [B, V], a row for each of them.
    """
    tokens = logits.argmax(-1).tolist()
    for row, each in enumerate(growing):
        if each.asked.temperature:
            chance = each.chances[len(each.tokens)]
            tokens[row] = _drawn(logits[row], each.asked.temperature, chance)
        each.tokens.append(tokens[row])


def _drawn(logits: Tensor, temperature: float, chance: float) -> int:
    """Return the token of a row of logits [V] at which cumulative probability passes `chance`."""
    values = logits.float().cpu().double() / temperature
    cumulative = values.softmax(-1).cumsum(-1)
    place = torch.tensor(chance, dtype=torch.float64) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, place, right=True)), len(logits) - 1)


class Growth:
    """Answers prompts with a model in a number of slots.

    Args:
        model: a causal model of transformers that fits slots.
        asked: the prompts by name; at least one.
        width: slots.
        shared: tokens that all prompts begin with; each prompt has more.
        stops: tokens that end an answer.
    """

    def __init__(
        self,
        model: Any,
        asked: Mapping[str, Asked],
        width: int,
        shared: int,
        stops: AbstractSet[int],
    ) -> None:
        self.model = model
        self.waiting = [GrowingAnswer(name, each, 0) for name, each in asked.items()]
        self.width = width
        self.shared = shared
        self.stops = stops
        longest = max(len(each.prompt) + each.max_tokens for each in asked.values())
        self.slots = Slots(width, longest - shared)
        self.growing: list[GrowingAnswer] = []
        """The answers in the first slots, in order."""

    def run(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the name and the tokens of each answer as it ends.

        Raises:
            torch.OutOfMemoryError: the device has no memory for so many slots.
        """
        with attention_by_slots(self.model):
            if self.shared:
                self._read_shared()
            while self.waiting or self.growing:
                free = self.width - len(self.growing)
                if self.waiting and free >= max(1, self.width // REFILL):
                    self._read_prompts(free)
                else:
                    self._grow()
                yield from self._taken_out()

    def _read_shared(self) -> None:
        tokens = list(self.waiting[0].asked.prompt)[: self.shared]
        self.slots.begin_shared(self.shared, self.model.device)
        self._logits(torch.tensor([tokens]))

    def _read_prompts(self, count: int) -> None:
        """Let the first waiting prompts take free slots; each gets the first token of its answer.

        They end in the last column of the pass; padding before them is put aside.
        """
        new, self.waiting = self.waiting[:count], self.waiting[count:]
        texts = [list(each.asked.prompt)[self.shared :] for each in new]
        longest = max(map(len, texts))
        ids = torch.zeros(len(new), longest, dtype=torch.long)
        columns = torch.full((len(new), longest), self.slots.spare)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            columns[row, longest - len(text) :] = torch.arange(len(text))
            new[row].length = len(text)
        self.slots.place(len(self.growing), columns.to(self.model.device), longest)
        add_tokens(new, self._logits(ids))
        self.growing += new

    def _grow(self) -> None:
        """Add a token to each answer."""
        ids = torch.tensor([[each.tokens[-1]] for each in self.growing])
        columns = torch.tensor([[each.length] for each in self.growing])
        longest = max(each.length for each in self.growing) + 1
        self.slots.place(0, columns.to(self.model.device), longest)
        logits = self._logits(ids)
        for each in self.growing:
            each.length += 1
        add_tokens(self.growing, logits)

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        """Return the logits [B, V] after the last column of tokens [B, S]."""
        is_shared = self.slots.fills_shared
        offset = 0 if is_shared else self.shared
        output = self.model(
            input_ids=ids.to(self.model.device),
            position_ids=self.slots.positions + offset,
            past_key_values=self.slots,
            slots=self.slots,
            logits_to_keep=1,
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _taken_out(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the answers that are over; the last growing one moves into each free slot."""
        row = 0
        while row < len(self.growing):
            each = self.growing[row]
            if not each.is_over(self.stops):
                row += 1
                continue
            last = self.growing.pop()
            if last is not each:
                self.growing[row] = last
                self.slots.move(len(self.growing), row, last.length)
            yield each.name, each.tokens


@contextmanager
def attention_by_slots(model: Any) -> Iterator[None]:
    """Let a model attend to slots; afterwards it attends as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(SLOTS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def one_by_one(
    model: Any, asked: Mapping[str, Asked], stops: AbstractSet[int]
) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and the tokens of each answer of a model that does not fit slots."""
    for name, each in asked.items():
        answer = GrowingAnswer(name, each, 0)
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([list(each.prompt)])
        while not answer.tokens or not answer.is_over(stops):
            output = model(ids.to(model.device), past_key_values=cache, logits_to_keep=1)
            add_tokens([answer], output.logits[:, -1])
            ids = torch.tensor([answer.tokens[-1:]])
        yield name, answer.tokens
