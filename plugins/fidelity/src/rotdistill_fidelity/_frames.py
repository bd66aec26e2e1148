"""The rotation of each layer in which hidden states of two bases are compared.

Orthogonal Procrustes with scale from the unedited student's stream to the teacher's, on fit rows,
without attention sinks and position 0: they would dominate `SᵀT`. It does not depend on the
variant, so it is solved once for all variants, and found again by every run on the same captured
states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.solvers import polar
from rotdistill_core.plugin.source_code import package_digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput


class Frame(NamedTuple):
    """A rotation with scale: rows X of the student become `scale X R`."""

    R: Tensor
    """`[d_s, d_t]`, float64."""
    scale: Tensor
    """A number."""


@dataclass(frozen=True)
class Frames:
    """The frames of all boundaries, committed under the hash of what they are solved from."""

    pair: Pair
    activations: ActivationStore
    shared: StepOutput
    """Files under that hash."""

    @classmethod
    def of(cls, pair: Pair, activations: ActivationStore, out: StepOutput) -> Frames:
        """Return the frames of a capture."""
        shared = out.shared(
            "fidelity frames",
            activations.digest(),
            pair.student.device.type,
            code=package_digest("rotdistill_fidelity"),
        )
        return cls(pair, activations, shared)

    def at(self, depth: int) -> Frame:
        """Return the frame of a boundary of the original student, solved if nobody has yet."""
        name = RunLayout.frame(depth)
        path = self.shared.find(name) or self.shared.tensors(name, self._solved(depth)._asdict())
        stored = open_tensors(path)
        return Frame(stored["R"].read(), stored["scale"].read())

    def _solved(self, depth: int) -> Frame:
        activations, device = self.activations, self.pair.student.device
        sums = activations.raw_sums(activations.depths.index(depth), device)
        R, spectrum = polar(sums.C_st, f"fidelity: boundary {depth}", device)
        return Frame(R, spectrum.sum() / sums.student_energy)
