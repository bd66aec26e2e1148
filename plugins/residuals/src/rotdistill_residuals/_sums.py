"""The capture of sums: student and partner walk side by side over one block of texts at a time.

Nothing of a block stays but what it adds to the sums of each boundary, so neither memory nor disk
grows with the number of texts. Sums are committed every few blocks: a capture that is killed goes
on after the last committed block. They are exact, so the result has the same bits, and several
processes may deal the blocks among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Side
from rotdistill_core.forward.activations import ActivationStore, span_means
from rotdistill_core.forward.boundary_sums import BoundarySums, Kinds, rows_of_blocks
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.precision import float64_device
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_residuals._cost import COMMIT_BLOCKS
from rotdistill_residuals._finite import require_finite_states

BLOCKS = "blocks"
"""Name of the number of blocks among the tensors of sums that were begun."""


class Reading(NamedTuple):
    """A block of texts as the partner reads it."""

    layout: PackedTexts
    spans: Tensor | None
    """For each row of the student the partner's rows `[start, end)`; None if both read the same."""


@dataclass(frozen=True, kw_only=True)
class Walker:
    """A model whose stream is summed."""

    model: Model
    weights: Weights
    """The model's weights, edited or not."""
    dtype: torch.dtype
    """Dtype that rows are rounded to, as in shards."""

    def over(self, layout: PackedTexts) -> LayerwiseForward:
        """Return a forward pass over some texts."""
        return LayerwiseForward(self.weights, layout, self.model.device, self.model.dtype)

    def rows(self, walk: LayerwiseForward) -> Tensor:
        """Return the stream of a walk at its boundary `[rows, d]`.

        Raises:
            RotdistillError: a state is NaN or Inf.
        """
        require_finite_states(self.model.ref.model, walk.boundary, walk.states)
        return walk.states.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class SumCapture:
    """The sums of the student's stream with that of one partner."""

    side: Side
    """The partner: the teacher, or an anchor."""
    student: Walker
    partner: Walker
    activations: ActivationStore
    """The rows of the sample, with this partner as the teacher."""
    layout: PackedTexts
    """The student's texts, of which those to fit on are summed."""
    read: Callable[[PackedTexts], Reading]
    """Returns a block as the partner reads it."""
    raw: bool
    """Whether to keep sums of rows as they are, too."""
    out: StepOutput

    @property
    def boundaries(self) -> list[int]:
        """The partner's boundary that each captured boundary of the student is paired with."""
        return [self.activations.teacher_boundaries[depth] for depth in self.activations.depths]

    def capture(self, progress: Progress, ranks: Ranks = ALONE) -> tuple[str, ...]:
        """Add up and commit what is not committed yet; the leading process commits.

        Returns:
            The file of each boundary's sums, relative to the folder of runs.

        Raises:
            RotdistillError: a state is NaN or Inf.
        """
        names = [RunLayout.sums(self.side, b) for b in range(len(self.boundaries))]

        def committed() -> list[str]:
            paths = [self.out.find(name) for name in names]
            return [self.out.relative(path) if path else "" for path in paths]

        found = ranks.lead(committed)
        if not all(found):
            sums = self._add_up(progress, ranks)
            found = ranks.lead(lambda: self._commit_values(sums, found))
        return tuple(found)

    def _commit_values(self, sums: Sequence[BoundarySums], found: Sequence[str]) -> list[str]:
        """Commit the sums of the boundaries that have no file yet; return the files of all."""
        files = [
            path or self.out.relative(self.out.tensors(RunLayout.sums(self.side, b), each.values()))
            for b, (path, each) in enumerate(zip(found, sums, strict=True))
        ]
        # What was begun has served its purpose, and is as large as the sums.
        begun = self.out.aside()
        begun.tensors(RunLayout.begun_sums(self.side), {BLOCKS: torch.tensor(0)})
        return files

    def _add_up(self, progress: Progress, ranks: Ranks) -> list[BoundarySums]:
        """Return the sums of all blocks, which only the leading process needs to have."""
        sums = self._empty()
        done = ranks.lead(lambda: self._go_on(sums))
        count = len(self.layout.fit_blocks())
        todo = islice(rows_of_blocks(self.layout), done, None)
        while wave := list(islice(todo, COMMIT_BLOCKS * ranks.count)):
            # The leading process goes on with what all have added up, the others begin anew.
            own = sums if ranks.leads else self._empty()
            for number, (block, counted) in enumerate(ranks.mine(wave), 1):
                self._add_block(own, block, counted.rows)
                finished = min(done + number * ranks.count, count)
                progress(finished, count, f"{self.side}: sums of {len(block.texts)} texts")
            for each in own if ranks.count > 1 else ():
                each.combine(ranks.add_up, float64_device(self.student.model.device))
            done += len(wave)
            if done < count:
                ranks.lead(partial(self._commit, sums, done))
        return sums

    def _empty(self) -> list[BoundarySums]:
        kinds = Kinds(squares=True, raw=self.raw)
        d_s, d_t = self.student.weights.width, self.partner.weights.width
        return [
            BoundarySums(
                d_s,
                d_t,
                self.layout.rows,
                self.activations.thresholds(boundary),
                kinds,
                f"boundary {boundary}",
            )
            for boundary in range(len(self.boundaries))
        ]

    def _go_on(self, sums: Sequence[BoundarySums]) -> int:
        """Load the sums that a killed capture committed; return how many blocks they hold."""
        path = self.out.aside().find(RunLayout.begun_sums(self.side))
        if path is None:
            return 0
        stored = open_tensors(path)
        blocks = int(stored[BLOCKS].read())
        for boundary, each in enumerate(sums if blocks else ()):
            begin = f"{boundary}."
            own = {name: lazy for name, lazy in stored.items() if name.startswith(begin)}
            each.load({name.removeprefix(begin): lazy.read() for name, lazy in own.items()})
        return blocks

    def _commit(self, sums: Sequence[BoundarySums], blocks: int) -> None:
        tensors = {
            f"{boundary}.{name}": tensor
            for boundary, each in enumerate(sums)
            for name, tensor in each.state().items()
        }
        tensors[BLOCKS] = torch.tensor(blocks)
        self.out.aside().tensors(RunLayout.begun_sums(self.side), tensors)

    def _add_block(self, sums: Sequence[BoundarySums], block: PackedTexts, rows: Tensor) -> None:
        """Send a block through both models; add its rows [n] that count to each boundary."""
        reading = self.read(block)
        device = float64_device(self.student.model.device)
        if reading.spans is not None:
            paired = reading.spans[:, 1] > reading.spans[:, 0]
            rows = rows[paired[rows]]
        own, partner = self.student.over(block), self.partner.over(reading.layout)
        for boundary in side_by_side(own, partner, self.boundaries):
            S, T = self.student.rows(own), self.partner.rows(partner)
            if reading.spans is not None:
                T = span_means(T.cpu(), reading.spans)
            sums[boundary].add(S, T, rows, device)


def side_by_side(
    student: LayerwiseForward, partner: LayerwiseForward, boundaries: Sequence[int]
) -> Iterator[int]:
    """Move both to one boundary of the student after the other; yield its number.

    Args:
        student: the student's pass, at its embeddings.
        partner: the partner's.
        boundaries: the partner's boundary for each of the student's, rising.
    """
    with closing(iter(student)) as own_layers, closing(iter(partner)) as layers:
        for boundary, matched in enumerate(boundaries):
            if boundary:
                next(own_layers)
                student.run()
            while partner.boundary < matched:
                next(layers)
                partner.run()
            yield boundary
