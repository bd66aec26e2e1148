"""Which layers to cut: the run of least angular change, or the layers that cost least KL.

Angles: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887.
The search by KL is a dynamic programme over layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_chop._rows import mean_kl, select_texts
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.head import head_for, log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.linalg.precision import float64_device
from rotdistill_core.store.output import StepOutput

if TYPE_CHECKING:
    from rotdistill_chop.step import Chop

ANGLE_ROWS = 2048
"""About how many rows angles are measured on."""


class LayerCut(NamedTuple):
    """Layers to cut, and the price."""

    dropped: list[int]
    kl: float
    """KL without them to the uncut student, nats per row."""


class LayerSelector:
    """Selects the layers to keep, given how many. Searches are shared between calls."""

    def __init__(
        self,
        step: Chop,
        weights: Weights,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> None:
        self.step = step
        self.weights = weights
        self.device = pair.student.device
        self.dtype = pair.student.dtype
        self.samples = samples
        self.notes = out.notes
        self.progress = progress
        self.keep = cache(self._keep)
        """Number of layers -> which of them to keep."""
        self._found: dict[int, list[int]] = {}
        """Number of cut layers -> which layers are kept, from searches by KL."""

    def _keep(self, count: int) -> list[int]:
        cut = self.weights.depth - count
        if cut == 0 or count < 2:
            return list(range(count))
        return self._keep_by_kl(cut) if self.step.criterion == "kl" else self._keep_by_angle(cut)

    def _keep_by_kl(self, cut: int) -> list[int]:
        if cut not in self._found:
            loss = PruningLoss(
                self.weights, self.samples, self.step.max_kl_rows, self.device, self.dtype
            )
            cuts = least_kl(loss, cut, self.progress)
            for number, found in cuts.items():
                self._found[number] = [
                    i for i in range(self.weights.depth) if i not in found.dropped
                ]
            self.notes["KL by number of layers cut"] = {
                str(number): found.kl for number, found in cuts.items()
            }
        return self._found[cut]

    def _keep_by_angle(self, cut: int) -> list[int]:
        depth = self.weights.depth
        layout = self.samples.layout.select(Split.FIT, limit=self.step.max_angle_texts)
        forward = LayerwiseForward(self.weights, layout, self.device, self.dtype)
        angles = run_angles(forward, cut, self.progress)
        self.notes["angle between the states around a cut, by the first layer cut"] = angles
        first = min(range(1, depth - cut), key=angles.__getitem__, default=1)
        return [*range(first), *range(first + cut, depth)]


class PruningLoss:
    """KL of streams of a cut student to the uncut student, on validation rows."""

    def __init__(
        self,
        weights: Weights,
        samples: Samples,
        max_rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = select_texts(samples, Split.VALIDATION, max_rows)
        self.forward = LayerwiseForward(weights, layout, device, dtype)
        self.embedded = self.forward.states.clone()
        """The stream at boundary 0 `[rows, d]`."""
        self.rows = layout.prediction_rows(Split.VALIDATION)[0]
        self.head = head_for(weights, self.forward.states_of(self.rows[:0]))
        self.reference = self.log_probs(self.propagate([self.embedded], 0)[0])
        """Log-probabilities of the uncut student `[n, V]`."""

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the log-probabilities `[n, V]` of the scored rows of final states `[rows, d]`."""
        rows = states[self.rows.to(states.device)].to(self.forward.device)
        return log_probs(self.forward.weights, rows, self.head)

    def kl(self, states: Tensor) -> float:
        """Return the mean KL of final states `[rows, d]`, nats per row."""
        return mean_kl(self.reference, self.log_probs(states))

    def propagate(
        self, streams: Iterable[Tensor], first: int, last: int | None = None
    ) -> list[Tensor]:
        """Send streams `[rows, d]` from boundary `first` to boundary `last`, or to the end."""
        moved = list(streams)
        if not moved:
            return moved
        self.forward.boundary = first
        for i in self.forward:
            if i == last:
                break
            for k, states in enumerate(moved):
                self.forward.states = states.clone()
                self.forward.boundary = i
                self.forward.run()
                moved[k] = self.forward.states
        return moved


class PartialCut(NamedTuple):
    """The stream after some layers of which some were dropped."""

    states: Tensor
    """The stream `[rows, d]`."""
    dropped: tuple[int, ...]
    kl: float
    """KL if all layers that follow are kept, nats per row."""


def least_kl(loss: PruningLoss, max_cut: int, progress: Progress) -> dict[int, LayerCut]:
    """Return for every number of layers up to `max_cut` which of them to cut.

    `D[l][r]` is the stream of least KL at boundary l with r layers dropped, where the stream goes
    through all layers from l on. It comes from `D[l-1][r]` through layer l-1, at a known KL, or
    from `D[l-1][r-1]` as it is. First and last layer are kept. This takes about
    `max_cut * depth² / 2` passes of the rows through a layer.
    """
    depth = loss.forward.weights.depth
    best = {0: PartialCut(loss.embedded, (), 0.0)}
    for i in range(depth):
        # Drop layer i from every stream that may lose one more layer.
        inside = 0 < i < depth - 1
        sources = [r for r in best if r < max_cut] if inside else []
        ends = loss.propagate([best[r].states for r in sources], i + 1)
        without: dict[int, PartialCut] = {}
        for r, end in zip(sources, ends, strict=True):
            dropped = (*best[r].dropped, i)
            without[r + 1] = PartialCut(best[r].states, dropped, loss.kl(end))
        # Or keep it: the KL does not change.
        moved = loss.propagate([stream.states for stream in best.values()], i, i + 1)
        best = {
            r: stream._replace(states=states)
            for (r, stream), states in zip(best.items(), moved, strict=True)
        }
        for r, stream in without.items():
            if r not in best or stream.kl < best[r].kl:
                best[r] = stream
        progress(i + 1, depth, f"KL without layers, on {len(loss.rows)} rows")
    return {r: LayerCut(list(stream.dropped), stream.kl) for r, stream in best.items()}


def run_angles(forward: LayerwiseForward, length: int, progress: Progress) -> dict[int, float]:
    """Return the mean angle between input and output of each run of layers, by its first layer.

    Rows of the shared prompt are left out: they are few, and position 0 is an attention sink.

    Args:
        forward: a forward pass at boundary 0.
        length: number of layers in a run.
        progress: called after each layer.
    """
    rows = torch.arange(forward.layout.prefix, forward.layout.rows)
    rows = rows[:: max(1, len(rows) // ANGLE_ROWS)]
    recent = [forward.states_of(rows)]
    angles: dict[int, float] = {}
    for i in forward:
        forward.run()
        recent.append(forward.states_of(rows))
        if len(recent) > length:
            place = float64_device(forward.device)
            before = recent.pop(0).to(place, torch.float64)
            after = recent[-1].to(place, torch.float64)
            cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
            angles[i + 1 - length] = float(cosine.acos().mean())
        progress(i + 1, forward.weights.depth, f"angles on {len(rows)} rows")
    return angles
