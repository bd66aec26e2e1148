"""Residual streams of two models: paired rows, their sums, one solve per stage, and diagnostics.

A stage is a run of layer boundaries that share one map. Rows are divided by their RMS. Position 0
and massive-activation rows are left out, because they would dominate every sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.spaces import residual
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import (
    CHUNK_ROWS,
    ActivationStore,
    massive_activation_mask,
    rms_normalise,
)
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.linalg.precision import CPU, SUM_DTYPE, float64_device
from rotdistill_core.linalg.solvers import require_finite


@dataclass(frozen=True)
class StageSolution:
    """The rotation of a stage, and how well its rows determine it."""

    R: Tensor
    """`[d_s, d_t]` with `R Rᵀ = I`."""
    spectrum: Tensor
    """Singular values of the matrix that was solved, falling."""
    k: int
    """Number of directions that the fit itself determines."""
    gap: float
    """Gap of the spectrum at k, as a share of its largest value."""


@dataclass(frozen=True, kw_only=True)
class StreamSums:
    """Uncentred second moments of paired rows X_s `[n, d_s]`, X_t `[n, d_t]`, float64."""

    C_st: Tensor
    """`Σ x_sᵀ x_t [d_s, d_t]`."""
    C_st_shuffled: Tensor
    """The null: the same, each student row paired with another row of the teacher."""
    C_ss: Tensor
    """`Σ x_sᵀ x_s [d_s, d_s]`; zero where nobody asked for it."""
    C_tt: Tensor
    """`Σ x_tᵀ x_t [d_t, d_t]`; zero where nobody asked for it."""
    student_energy: float
    """`‖X_s‖²`."""
    rows: Tensor
    """Rows of each boundary `[boundaries]`."""
    student_means: Tensor
    """Mean student row of each boundary `[boundaries, d_s]`."""
    teacher_means: Tensor
    """Mean teacher row of each boundary `[boundaries, d_t]`."""
    device: torch.device = CPU
    """The device of the student, where solves may run. The sums themselves are on the host."""

    def shuffled(self) -> StreamSums:
        """Return the sums of the shuffled rows."""
        return replace(self, C_st=self.C_st_shuffled, C_st_shuffled=self.C_st)

    def scale(self, R: Tensor) -> float:
        """Return the factor s of least `‖s X_s R - X_t‖²`: `tr(Rᵀ C_st) / ‖X_s‖²`."""
        return float((R * self.C_st).sum()) / self.student_energy

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariances `C_ss, C_st, C_tt`, centred within each boundary."""
        n = self.rows.sum()
        # Σ_b n_b mean_bᵀ mean_b is what the means contribute to the uncentred sums.
        s = self.student_means * self.rows[:, None]
        t = self.teacher_means * self.rows[:, None]
        return (
            (self.C_ss - self.student_means.T @ s) / n,
            (self.C_st - self.student_means.T @ t) / n,
            (self.C_tt - self.teacher_means.T @ t) / n,
        )


class RowChunk(NamedTuple):
    """Paired rows in float64, each divided by its RMS."""

    student: Tensor
    """`[n, d_s]`."""
    teacher: Tensor
    """`[n, d_t]`."""
    other_teacher: Tensor
    """`[n, d_t]`: teacher rows of other tokens, for the null."""


def sum_streams(
    boundaries: Iterable[Iterable[RowChunk]],
    d_s: int,
    d_t: int,
    squares: bool = True,
    device: torch.device = CPU,
) -> StreamSums:
    """Return the sums over the chunks of each boundary.

    Args:
        boundaries: for each boundary its chunks of rows.
        d_s: width of the student's stream.
        d_t: width of the teacher's stream.
        squares: whether to add up C_ss and C_tt too.
        device: the student's device. Chunks are on its `float64_device`, and so are sums until
            the end.
    """
    place = float64_device(device)
    zeros = partial(torch.zeros, dtype=SUM_DTYPE, device=place)
    C_st, C_st_shuffled = zeros(d_s, d_t), zeros(d_s, d_t)
    C_ss, C_tt = zeros(d_s, d_s), zeros(d_t, d_t)
    energy = zeros(())
    rows: list[float] = []
    student_means: list[Tensor] = []
    teacher_means: list[Tensor] = []
    for chunks in boundaries:
        n = 0
        student_sum, teacher_sum = zeros(d_s), zeros(d_t)
        for S, T, T_other in chunks:
            C_st += S.T @ T
            C_st_shuffled += S.T @ T_other
            if squares:
                C_ss += S.T @ S
                C_tt += T.T @ T
            n += len(S)
            student_sum += S.sum(0)
            teacher_sum += T.sum(0)
            energy += S.pow(2).sum()
        rows.append(float(n))
        student_means.append(student_sum / n)
        teacher_means.append(teacher_sum / n)
    return StreamSums(
        C_st=C_st.cpu(),
        C_st_shuffled=C_st_shuffled.cpu(),
        C_ss=C_ss.cpu(),
        C_tt=C_tt.cpu(),
        student_energy=float(energy),
        rows=torch.tensor(rows, dtype=torch.float64),
        student_means=torch.stack(student_means).cpu(),
        teacher_means=torch.stack(teacher_means).cpu(),
        device=device,
    )


def solve_stages(
    activations: ActivationStore,
    maps: Maps,
    pair: Pair,
    progress: Progress,
    *,
    use: str,
    tie: int | Literal["all"],
    solve: Callable[[StreamSums, str], StageSolution],
    squares: bool,
) -> Maps:
    """Add one rotation per stage, solved on fit rows, with diagnostics on validation rows.

    Args:
        activations: the captured streams.
        maps: the maps of earlier steps; they are kept.
        pair: teacher and student.
        progress: called after each boundary.
        use: name of the aligner, for errors and diagnostics.
        tie: boundaries of a stage, or all of them.
        solve: returns the rotation of a stage from its sums; its second argument names the stage.
        squares: whether `solve` reads C_ss and C_tt.

    Raises:
        RecipeError: the student is wider than the teacher, or a boundary has no rows.
        RotdistillError: a stream is not finite, or a solve fails.
    """
    # The width at capture counts: `chop` may have cut the stream since the student was opened.
    width = activations.width(Side.STUDENT)
    if width > pair.teacher.width:
        raise RecipeError(
            f"{use}: the student is wider ({width}) than the teacher ({pair.teacher.width})."
        )
    boundaries = list(range(len(activations.depths)))
    stage_size = len(boundaries) if tie == "all" else tie
    random = random_orthogonal(width, pair.teacher.width)
    rotations: dict[str, Map] = {}
    diagnostics: dict[int, LayerDiagnostics] = {}
    for stage, start in enumerate(range(0, len(boundaries), stage_size)):
        group = boundaries[start : start + stage_size]
        sums = sum_fit_rows(activations, pair, group, use, squares)
        fit = _fit_stage(solve, sums, use, stage)
        validation = paired_streams(activations, pair, group, Split.VALIDATION, use)
        for mean, streams in zip(sums.teacher_means, validation, strict=True):
            measured = diagnose(
                streams, fitted=fit.rotation.matrix, shuffled=fit.shuffled, random=random, mean=mean
            )
            boundary = streams.boundary
            rotations[residual(boundary)] = fit.rotation
            diagnostics[boundary] = replace(fit.figures.merge(measured), layer=boundary)
            progress(boundary + 1, len(boundaries), f"stage {stage}")
    return maps.add(rotations, diagnostics)


class _StageFit(NamedTuple):
    """The rotation of a stage, its null, and the figures that its boundaries share."""

    rotation: Rotation
    shuffled: Tensor
    """`[d_s, d_t]`: the same solve on shuffled rows."""
    figures: LayerDiagnostics


def _fit_stage(
    solve: Callable[[StreamSums, str], StageSolution], sums: StreamSums, use: str, stage: int
) -> _StageFit:
    fitted = solve(sums, f"{use}: stage {stage}")
    null = solve(sums.shuffled(), f"{use}: stage {stage}, shuffled")
    rotation = Rotation(fitted.R, sums.scale(fitted.R))
    figures = LayerDiagnostics(
        aligner=use,
        stage=stage,
        k=fitted.k,
        gap_at_k=fitted.gap,
        scale=rotation.scale,
        singular_values=tuple(fitted.spectrum.tolist()),
        singular_values_shuffled=tuple(null.spectrum.tolist()),
    )
    return _StageFit(rotation, null.R, figures.merge(orthogonality(rotation)))


class PairedStreams(NamedTuple):
    """Both raw streams at one layer boundary, and the rows of them to take."""

    boundary: int
    S: Tensor
    """The student's stream `[rows, d_s]`."""
    T: Tensor
    """The teacher's stream, a row for each of the student's `[rows, d_t]`."""
    taken: Tensor
    """Numbers of the rows to take, without position 0 and massive activations."""


def paired_streams(
    activations: ActivationStore, pair: Pair, boundaries: list[int], split: Split, use: str
) -> Iterator[PairedStreams]:
    """Yield the streams of one boundary after the other, with their rows of a split.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: no row of this split is left.
    """
    layout = activations.layouts[Side.STUDENT]
    for boundary in boundaries:
        depth = activations.depths[boundary]
        S = activations.rows(Side.STUDENT, boundary)
        T = activations.teacher_states(layout, depth)
        teacher_boundary = activations.teacher_boundaries[depth]
        _require_finite_stream(S, f"{use}: student {pair.student.ref.model}", boundary)
        _require_finite_stream(T, f"{use}: teacher {pair.teacher.ref.model}", teacher_boundary)
        mask = (
            layout.split(split)
            & ~massive_activation_mask(S)
            & ~massive_activation_mask(T)
            & activations.paired_mask(layout)
        )
        mask[0] = False
        if not mask.any():
            raise RecipeError(
                f"{use}: boundary {boundary} has no {split} rows to work on; "
                "capture the student on more texts."
            )
        yield PairedStreams(boundary, S, T, mask.nonzero().flatten())


def _require_finite_stream(X: Tensor, whose: str, boundary: int) -> None:
    require_finite(X, f"{whose}, layer boundary {boundary}, site residual")


def sum_fit_rows(
    activations: ActivationStore, pair: Pair, boundaries: list[int], use: str, squares: bool
) -> StreamSums:
    """Return the sums over the fit rows of some boundaries; see `sum_streams`."""
    streams = paired_streams(activations, pair, boundaries, Split.FIT, use)
    device = pair.student.device
    chunks = (_chunks(each, float64_device(device)) for each in streams)
    width = activations.width(Side.STUDENT)
    return sum_streams(chunks, width, pair.teacher.width, squares, device)


def _chunks(streams: PairedStreams, device: torch.device) -> Iterator[RowChunk]:
    """Yield the rows to take, some at a time; the null pairs rows that are half of all apart."""
    _, S, T, taken = streams
    shuffled = taken.roll(len(taken) // 2)
    for start in range(0, len(taken), CHUNK_ROWS):
        here = taken[start : start + CHUNK_ROWS]
        elsewhere = shuffled[start : start + CHUNK_ROWS]
        rows = (S[here], T[here], T[elsewhere])
        yield RowChunk(*(rms_normalise(X.to(device)) for X in rows))


def spectral_gap(spectrum: Tensor, k: int) -> float:
    """Return `(σ_k - σ_{k+1}) / σ_1` of a falling spectrum; values after its end count as 0."""
    if k == 0:
        return 0.0
    after = float(spectrum[k]) if k < len(spectrum) else 0.0
    return (float(spectrum[k - 1]) - after) / max(float(spectrum[0]), 1e-300)


def random_orthogonal(d_s: int, d_t: int) -> Tensor:
    """Return one random `R [d_s, d_t]` with `R Rᵀ = I`, always the same."""
    noise = torch.randn(d_t, d_s, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q: Tensor = torch.linalg.qr(noise).Q
    return Q.T


def cosine(A: Tensor, B: Tensor) -> float:
    """Return the mean cosine of paired rows; a row of zeros has cosine 0."""
    return float((A * B).sum(-1).div((A.norm(dim=-1) * B.norm(dim=-1)).clamp_min(1e-30)).mean())


class MeanCosines(NamedTuple):
    """Mean cosines of paired rows, as they are and with each side's mean taken off."""

    raw: float
    centred: float


def mean_cosines(A: Tensor, B: Tensor) -> MeanCosines:
    """Return the mean cosines of paired rows `[n, d]`."""
    return MeanCosines(cosine(A, B), cosine(A - A.mean(0), B - B.mean(0)))


def diagnose(
    streams: PairedStreams, *, fitted: Tensor, shuffled: Tensor, random: Tensor, mean: Tensor
) -> LayerDiagnostics:
    """Return the cosines of one boundary before and after a map, with its nulls.

    Args:
        streams: both streams and the rows to measure on.
        fitted: the map `[d_s, d_t]`.
        shuffled: the map that was fitted on shuffled rows.
        random: a random rotation.
        mean: the teacher's mean fit row `[d_t]`.
    """
    S = streams.S[streams.taken]
    T = streams.T[streams.taken]
    X, Y = rms_normalise(S), rms_normalise(T)
    # Streams of different width have no common coordinates before the map.
    before = mean_cosines(X, Y) if X.shape == Y.shape else None
    after = mean_cosines(X @ fitted, Y)
    null = mean_cosines(X @ shuffled, Y)
    chance = mean_cosines(X @ random, Y)
    return LayerDiagnostics(
        rows=len(S),
        cosine_before=before.raw if before else None,
        cosine_after=after.raw,
        cosine_shuffled=null.raw,
        cosine_random=chance.raw,
        cosine_mean=cosine(mean.expand_as(Y), Y),
        centred_before=before.centred if before else None,
        centred_after=after.centred,
        centred_shuffled=null.centred,
        centred_random=chance.centred,
        centred_mean=0.0,  # a constant has no direction once it is centred
        # No rotation changes it.
        rms_ratio=float((S.double().pow(2).sum() / T.double().pow(2).sum()).sqrt()),
    )


def orthogonality(rotation: Rotation) -> LayerDiagnostics:
    """Return how far a rotation `R` is from `R Rᵀ = I` and from `Rᵀ R` being a projector."""
    R = rotation.matrix
    P = R.T @ R
    if not rotation.square:
        return LayerDiagnostics(max_rrt=rotation.error(), rank_rtr=float(P.trace()))
    off_identity = float((P - torch.eye(len(P), dtype=P.dtype)).abs().max())
    return LayerDiagnostics(max_rrt=rotation.error(), max_rtr=off_identity)
