"""How far training is, committed now and then, so that a killed one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.forward.ranks import Ranks
from rotdistill_core.store.layout import RunLayout

if TYPE_CHECKING:
    from rotdistill_core.store.output import StepOutput

NUMBER = "number"
"""Counts what was saved, from 1; 0 is a file that was emptied."""
FILES = (0, 1)
"""Written in turn: while one is replaced, the other is whole."""


class SavedTraining:
    """The tensors that a killed training goes on from, in two files that are replaced in turn.

    The leading process reads and writes them; what is loaded is the same in all processes. The
    files are no part of the step's result.

    Args:
        out: output of the step.
        ranks: the processes that train together.
    """

    def __init__(self, out: StepOutput, ranks: Ranks) -> None:
        self.out = out.aside()
        self.ranks = ranks
        self.number = 0
        """Of what was saved last."""

    def load(self) -> dict[str, Tensor]:
        """Return what was saved last; empty if nothing was."""
        path = self.ranks.lead(self._newest)
        if not path:
            return {}
        stored = open_tensors(self.out.store.root / path)
        self.number = int(stored[NUMBER].read())
        # Memory of their own: the files are replaced meanwhile.
        return {name: lazy.read().clone() for name, lazy in stored.items() if name != NUMBER}

    def _newest(self) -> str:
        """Return the file of the highest number, relative to all runs; empty if there is none."""
        numbers: dict[int, Path] = {}
        for file in FILES:
            if path := self.out.find(self._name(file)):
                numbers[int(open_tensors(path)[NUMBER].read())] = path
        newest = max(numbers, default=0)
        return self.out.relative(numbers[newest]) if newest else ""

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Commit tensors, in place of the last but one."""
        self.number += 1
        own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self.ranks.lead(lambda: self._write(self.number % len(FILES), self.number, own))

    def clear(self) -> None:
        """Empty the files: they have served their purpose, and are large."""

        def empty() -> None:
            for file in FILES:
                if self.out.names(self._name(file)):
                    self._write(file, 0, {})

        self.ranks.lead(empty)

    def _write(self, file: int, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.out.tensors(self._name(file), {NUMBER: torch.tensor(number), **tensors})

    def _name(self, file: int) -> str:
        return RunLayout.training(self.out.step, file)
