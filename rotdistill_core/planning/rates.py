"""How fast a machine works: the rates that turn the counts of a `Cost` into seconds.

`rotdistill_core.planning.calibration` measures and keeps them. Those of a GPU that is not here are
assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""So much in a second."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the processors of a machine, or one GPU, do in a second. Fields named like a `Kernel`
    are those of its operations."""

    float32: Rate
    """Operations of products in float32."""
    bfloat16: Rate
    """Operations of products in bfloat16."""
    float64: Rate
    """Operations of products in float64."""
    solves: Rate
    """Operations of Cholesky factors and triangular solves."""
    decompositions: Rate
    """Operations of a singular value decomposition, as `SVD_OPERATIONS` counts them."""
    activations: Rate
    """Numbers beside the products of a layer, as `Cost.activations` counts them."""
    streamed_bytes: Rate
    """Bytes of weights that are read for one token."""
    exact_terms: Rate
    """Numbers that are added to an exact sum."""
    layer_call: Seconds
    """Seconds of a layer's call with next to no rows."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How fast a machine works while it does nothing else."""

    host: Rates
    gpu: Rates
    gpu_measured: bool
    """Whether the rates of the GPU were measured; else they are assumed."""
    written_bytes: Rate
    """Bytes in a second that are hashed, written and synced."""
    read_bytes: Rate
    """Bytes in a second that are read and hashed."""
    copied_bytes: Rate
    """Bytes in a second between host and GPU."""
    loading: Seconds
    """Seconds until libraries are loaded."""
    in_use: float = 0.0
    """Share of the processors that other programs used when it was measured."""

    def on_gpu(self, operations: float) -> Profile:
        """Return the profile with an assumed GPU of so many operations in a second, in bfloat16.

        Each of its rates is that of `ASSUMED_GPU`, larger or smaller by one factor.
        """
        factor = operations / ASSUMED_GPU.bfloat16
        scaled = {
            name: value * factor for name, value in vars(ASSUMED_GPU).items() if name != LAYER_CALL
        }
        return replace(self, gpu=replace(ASSUMED_GPU, **scaled), gpu_measured=False)


LAYER_CALL = "layer_call"
"""The field of `Rates` that is no rate."""
ASSUMED_GPU = Rates(
    float32=1.5e13,
    bfloat16=5e13,
    float64=5e11,
    solves=2e11,
    decompositions=3e10,
    activations=5e10,
    streamed_bytes=5e11,
    exact_terms=1e10,
    layer_call=3e-4,
)
"""Rates of a middling GPU. Assumed: none was at hand when they were written."""
ASSUMED = Profile(
    host=Rates(
        float32=1e11,
        bfloat16=2e10,
        float64=5e10,
        solves=3e10,
        decompositions=1e10,
        activations=4e8,
        streamed_bytes=1.5e10,
        exact_terms=2e8,
        layer_call=4e-4,
    ),
    gpu=ASSUMED_GPU,
    gpu_measured=False,
    written_bytes=5e8,
    read_bytes=1e9,
    copied_bytes=1e10,
    loading=5.0,
)
"""Rates of about two processor cores. They stand in for measured ones where the environment asks
for them: in tests, whose plans have to be the same everywhere."""
