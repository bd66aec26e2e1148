"""Improve a rotation by one or two reflections, in closed form.

Problem: `min_v ‖H (I - 2 v vᵀ) - T‖²` over unit vectors `v [d_t]`. `H = X R` are the mapped student
rows, T the teacher's rows, both `[n, d_t]`.
Closed form: the error changes by `4 vᵀ G v`, `G = sym(Hᵀ T) [d_t, d_t]`. By Rayleigh's quotient the
best v is the eigenvector of the lowest eigenvalue of G, worth taking only when that is negative.
Then `R <- R (I - 2 v vᵀ)`. (Householder, Journal of the ACM 5, 1958.)

After a free Procrustes `Hᵀ T = V S Vᵀ` has no negative eigenvalue, so no reflection is taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.alignment.streams import (
    StreamSums,
    cosine,
    diagnose,
    mean_cosines,
    orthogonality,
    paired_streams,
    random_orthogonal,
    sum_fit_rows,
)
from rotdistill_core.architecture.spaces import residual
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.row_rms import rms_normalise
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import eigh, require_finite

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_householder.step import Householder

ROUNDING = 1e-9
"""Share of the largest eigenvalue that counts as zero."""


class StopReason(StrEnum):
    """Why a stage takes no further reflection."""

    NOTHING_TO_GAIN = "the lowest eigenvalue is not negative"
    TARGET_REACHED = "the validation cosine is at its target"
    LIMIT_REACHED = "no more reflections are allowed"
    NO_VALIDATION_GAIN = "another reflection would not raise the validation cosine"


@dataclass(frozen=True, kw_only=True)
class ReflectionFigures:
    """What was done to a stage. Eigenvalues are those of G, per fit row."""

    reflections: int
    stopped: str
    """A `StopReason`."""
    lowest_eigenvalue: float
    """After the reflections."""
    lowest_eigenvalue_before: float
    lowest_eigenvalue_shuffled: float
    """The null: that of shuffled teacher rows."""
    cosine_before: float
    """Mean cosine of validation rows."""
    cosine_after: float


class Stage(NamedTuple):
    """A run of layer boundaries that share their rotation."""

    boundaries: list[int]
    R: Tensor
    """`[d_s, d_t]`, float64."""


def solve(
    options: Householder,
    activations: ActivationStore,
    maps: Maps,
    pair: Pair,
    out: StepOutput,
    progress: Progress,
) -> Maps:
    """Reflect the rotations of all stages if that helps, and add the figures of each boundary.

    Raises:
        RecipeError: there is no rotation of the stream.
    """
    stages = stages_of(maps, len(activations.depths))
    if not stages:
        raise RecipeError(
            "householder: needs an aligner of the residual stream (procrustes, cca) before it."
        )
    rotations: dict[str, Map] = {}
    diagnostics: dict[int, LayerDiagnostics] = {}
    for number, stage in enumerate(stages):
        sums = sum_fit_rows(activations, pair, stage.boundaries, options.use, squares=False)
        R, figures = reflect_stage(options, activations, pair, stage, sums)
        measured = LayerDiagnostics(extra={"householder": asdict(figures)})
        if figures.reflections:
            rotation = Rotation(R, sums.scale(R))
            rotations |= {residual(boundary): rotation for boundary in stage.boundaries}
            measured = measured.merge(replace(orthogonality(rotation), scale=rotation.scale))
            cosines = diagnose_stage(options, activations, pair, stage, sums, R)
            diagnostics |= {b: measured.merge(cosines[b]) for b in stage.boundaries}
        else:
            diagnostics |= dict.fromkeys(stage.boundaries, measured)
        first, last = stage.boundaries[0], stage.boundaries[-1]
        out.notes[f"boundaries {first} to {last}"] = asdict(figures)
        done = f"{figures.reflections} reflections, {figures.stopped}"
        progress(number + 1, len(stages), done)
    return maps.add(rotations, diagnostics)


def stages_of(maps: Maps, boundaries: int) -> list[Stage]:
    """Return the stages of maps, in order; boundaries without a rotation belong to none."""
    stages: list[Stage] = []
    for boundary in range(boundaries):
        rotation = maps.rotation(boundary)
        if rotation is None:
            continue
        R = rotation.matrix.double()
        last = stages[-1] if stages else None
        if last and last.boundaries[-1] == boundary - 1 and torch.equal(last.R, R):
            last.boundaries.append(boundary)
        else:
            stages.append(Stage([boundary], R))
    return stages


def reflect_stage(
    options: Householder,
    activations: ActivationStore,
    pair: Pair,
    stage: Stage,
    sums: StreamSums,
) -> tuple[Tensor, ReflectionFigures]:
    """Return the rotation `[d_s, d_t]` of a stage after its reflections, and what was done."""
    R = stage.R
    lowest = lowest_eigenpair(R.T @ sums.C_st, sums.device)
    eigenvalue_before = lowest.value
    shuffled = lowest_eigenpair(R.T @ sums.C_st_shuffled, sums.device)
    cosine_before = validation_cosine(options, activations, pair, stage.boundaries, R)
    cosine_after = cosine_before
    reflections = 0
    while True:
        if lowest.value >= -lowest.rounding:
            stopped = StopReason.NOTHING_TO_GAIN
            break
        if cosine_after >= options.target:
            stopped = StopReason.TARGET_REACHED
            break
        if reflections == options.max_reflections:
            stopped = StopReason.LIMIT_REACHED
            break
        candidate = reflect(R, lowest.v)
        candidate_cosine = validation_cosine(
            options, activations, pair, stage.boundaries, candidate
        )
        if candidate_cosine <= cosine_after:
            stopped = StopReason.NO_VALIDATION_GAIN
            break
        R, cosine_after = candidate, candidate_cosine
        reflections += 1
        lowest = lowest_eigenpair(R.T @ sums.C_st, sums.device)
    rows = float(sums.rows.sum())
    return R, ReflectionFigures(
        reflections=reflections,
        stopped=stopped.value,
        lowest_eigenvalue=lowest.value / rows,
        lowest_eigenvalue_before=eigenvalue_before / rows,
        lowest_eigenvalue_shuffled=shuffled.value / rows,
        cosine_before=cosine_before,
        cosine_after=cosine_after,
    )


def validation_cosine(
    options: Householder,
    activations: ActivationStore,
    pair: Pair,
    boundaries: list[int],
    R: Tensor,
) -> float:
    """Return the mean cosine of the mapped validation rows of some boundaries."""
    total = 0.0
    rows = 0
    for _, S, T, taken in paired_streams(
        activations, pair, boundaries, Split.VALIDATION, options.use
    ):
        total += len(taken) * cosine(rms_normalise(S[taken]) @ R, rms_normalise(T[taken]))
        rows += len(taken)
    return total / rows


def diagnose_stage(
    options: Householder,
    activations: ActivationStore,
    pair: Pair,
    stage: Stage,
    sums: StreamSums,
    R: Tensor,
) -> dict[int, LayerDiagnostics]:
    """Return the cosines of a stage's boundaries after its reflections, with their nulls.

    `cosine_shuffled` is that of a reflection fitted on shuffled rows, `cosine_unreflected` that of
    the rotation as it came.
    """
    shuffled = reflect(stage.R, lowest_eigenpair(stage.R.T @ sums.C_st_shuffled, sums.device).v)
    random = random_orthogonal(*R.shape)
    diagnostics: dict[int, LayerDiagnostics] = {}
    validation = paired_streams(activations, pair, stage.boundaries, Split.VALIDATION, options.use)
    for mean, streams in zip(sums.teacher_means, validation, strict=True):
        X = rms_normalise(streams.S[streams.taken])
        Y = rms_normalise(streams.T[streams.taken])
        unreflected = mean_cosines(X @ stage.R, Y)
        figures = diagnose(streams, fitted=R, shuffled=shuffled, random=random, mean=mean)
        diagnostics[streams.boundary] = replace(
            figures,
            cosine_unreflected=unreflected.raw,
            centred_unreflected=unreflected.centred,
        )
    return diagnostics


class LowestEigenpair(NamedTuple):
    """The lowest eigenvalue of a symmetric matrix, its eigenvector, and the rounding in it."""

    value: float
    v: Tensor
    """Unit vector `[d_t]`."""
    rounding: float
    """How far from 0 rounding may bring an eigenvalue that is 0."""


def lowest_eigenpair(G: Tensor, device: torch.device = CPU) -> LowestEigenpair:
    """Return the lowest eigenpair of `sym(G)`, `G [d_t, d_t]`.

    Raises:
        RotdistillError: a value is not finite.
    """
    require_finite(G, "householder")  # before the symmetric part counts a value twice
    values, vectors = eigh((G + G.T) / 2, "householder", device)
    return LowestEigenpair(
        value=float(values[0]), v=vectors[:, 0], rounding=ROUNDING * float(values.abs().max())
    )


def reflect(R: Tensor, v: Tensor) -> Tensor:
    """Return `R (I - 2 v vᵀ)` for a unit vector `v [d_t]`."""
    return R - 2 * (R @ v)[:, None] * v
