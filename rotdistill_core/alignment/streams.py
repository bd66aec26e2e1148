"""Residual streams of two models: paired rows, their sums, one solve per stage, and diagnostics.

A stage is a run of layer boundaries that share one map. Rows are divided by their RMS. Position 0
and massive-activation rows are left out, because they would dominate every sum.

An aligner that is one solve from sums calls `solve_stages`, which does all the rest. One that needs
the rows themselves, or another map for each boundary, uses the parts: `sum_fit_rows` to fit,
`paired_streams` for the rows, and `diagnose` to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.spaces import residual
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.row_rms import rms_normalise
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.linalg.paired_sums import RowSums
from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import require_finite

__all__ = [
    "MeanCosines",
    "PairedStreams",
    "StageSolution",
    "StreamSums",
    "cosine",
    "diagnose",
    "mean_cosines",
    "orthogonality",
    "paired_streams",
    "random_orthogonal",
    "solve_stages",
    "spectral_gap",
    "sum_fit_rows",
]


@dataclass(frozen=True)
class StageSolution:
    """The rotation of a stage, and how well its rows determine it."""

    R: Tensor
    """`[d_s, d_t]` with `R Rᵀ = I`, float64, on the host."""
    spectrum: Tensor
    """Singular values of the matrix that was solved, falling; for people, beside their null."""
    k: int
    """Number of directions that the fit itself determines: all of them, or a rank below."""
    gap: float
    """Gap of the spectrum at k, as a share of its largest value: `spectral_gap(spectrum, k)`."""


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

    @classmethod
    def of(cls, boundaries: Sequence[RowSums], device: torch.device = CPU) -> StreamSums:
        """Return the sums of a stage from those of its boundaries."""
        rows = torch.tensor([float(each.rows) for each in boundaries], dtype=torch.float64)
        return cls(
            C_st=reduce(add, (each.C_st for each in boundaries)),
            C_st_shuffled=reduce(add, (each.C_st_shuffled for each in boundaries)),
            C_ss=reduce(add, (each.C_ss for each in boundaries)),
            C_tt=reduce(add, (each.C_tt for each in boundaries)),
            student_energy=float(sum(each.student_energy for each in boundaries)),
            rows=rows,
            student_means=torch.stack([each.student_sum / each.rows for each in boundaries]),
            teacher_means=torch.stack([each.teacher_sum / each.rows for each in boundaries]),
            device=device,
        )

    def shuffled(self) -> StreamSums:
        """Return the sums of the shuffled rows: what a solve makes of them is its null."""
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

    This is a whole aligner but for its solve. For each stage it

    1. adds up the fit rows of its boundaries, each row divided by its RMS (`sum_fit_rows`);
    2. calls `solve` for these sums, and again for the same with shuffled rows of the teacher: the
       null, a map that can have learned nothing;
    3. gives the rotation its least-squares scale (`StreamSums.scale`);
    4. measures it on the validation rows of each boundary, beside its nulls: the shuffled map, a
       random rotation and the teacher's mean (`diagnose`).

    Args:
        activations: the captured streams.
        maps: the maps of earlier steps; they are kept.
        pair: teacher and student.
        progress: called after each boundary.
        use: name of the aligner, for errors and diagnostics.
        tie: boundaries of a stage, or all of them. With 1 every boundary has its own map.
        solve: returns the rotation of a stage from its sums. Its second argument names the stage
            (`my-aligner: stage 0`), for errors of solvers. It is called twice a stage, so it should
            depend on its arguments alone.
        squares: whether `solve` reads C_ss and C_tt (also by `centred`); they are zero otherwise,
            and cost as much again to add up.

    Returns:
        `maps` with a `Rotation` for each `residual.{boundary}`, the same one in a whole stage, and
        a `LayerDiagnostics` for each boundary. Boundaries are those of the student, 0 after the
        embeddings.

    Raises:
        RecipeError: the student is wider than the teacher, or a boundary has no rows.
        RotdistillError: a stream is not finite, or a solve fails.
    """
    # The width at capture counts: `chop` may have cut the stream since the student was opened.
    width = activations.width(Side.STUDENT)
    if width > pair.teacher.width:
        raise RecipeError(
            f"{use}: the student is wider ({width}) than the teacher ({pair.teacher.width}). Take "
            "a teacher that is as wide or wider."
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
    """Both raw streams at one layer boundary, and the rows of them to take.

    `S` and `T` hold the rows of all splits, as the models computed them. What is measured or fitted
    is `rms_normalise(S[taken])` beside `rms_normalise(T[taken])`
    (`rotdistill_core.forward.row_rms`).
    """

    boundary: int
    """Layer boundary of the student; 0 follows the embeddings."""
    S: Tensor
    """The student's stream `[rows, d_s]`."""
    T: Tensor
    """The teacher's stream, a row for each of the student's `[rows, d_t]`."""
    taken: Tensor
    """Numbers of the rows to take `[n]`, an index into both: the rows of the split that was asked
    for, without position 0, massive activations, and rows that have none of the teacher's."""


def paired_streams(
    activations: ActivationStore, pair: Pair, boundaries: list[int], split: Split, use: str
) -> Iterator[PairedStreams]:
    """Yield the streams of one boundary after the other, with their rows of a split.

    The rows are those of the sample that every capture keeps (`ActivationStore.sample`): of fit
    texts a part only, so fit on sums (`sum_fit_rows`) where sums are enough.

    Args:
        activations: the captured streams.
        pair: teacher and student; named in errors.
        boundaries: layer boundaries of the student.
        split: the texts whose rows `taken` lists; `Split.VALIDATION` to measure a map.
        use: name of the step, for errors.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: no row of this split is left.
    """
    sample = activations.sample
    wanted = sample.split(split) & activations.paired_mask(sample)
    wanted[0] = False
    for boundary in boundaries:
        thresholds = activations.thresholds(boundary)
        S, T = activations.paired(sample, boundary)
        numbers = (boundary, activations.teacher_boundaries[activations.depths[boundary]])
        for X, name, number in zip((S, T), _names(pair, use), numbers, strict=True):
            require_finite(X, f"{name}, layer boundary {number}, site residual")
        mask = wanted & thresholds.usable(S, T)
        if not mask.any():
            raise _no_rows(use, boundary, split)
        yield PairedStreams(boundary, S, T, mask.nonzero().flatten())


def _names(pair: Pair, use: str) -> tuple[str, str]:
    """Return how errors of a step name the streams of both models."""
    return f"{use}: student {pair.student.ref.model}", f"{use}: teacher {pair.teacher.ref.model}"


def _no_rows(use: str, boundary: int, split: Split) -> RecipeError:
    return RecipeError(
        f"{use}: boundary {boundary} has no {split} rows to work on; "
        "capture the student on more texts."
    )


def sum_fit_rows(
    activations: ActivationStore, pair: Pair, boundaries: list[int], use: str, squares: bool
) -> StreamSums:
    """Return the sums over the fit rows of some boundaries; see `ActivationStore.sums`.

    Args:
        activations: the captured streams.
        pair: teacher and student; the student's device does the products.
        boundaries: layer boundaries of the student: a stage.
        use: name of the step, for errors.
        squares: whether C_ss and C_tt are wanted; they are zero otherwise.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: a boundary has no fit rows.
    """
    device, names = pair.student.device, _names(pair, use)
    found: list[RowSums] = []
    for boundary in boundaries:
        sums = activations.sums(boundary, squares=squares, device=device, names=names)
        if not sums.rows:
            raise _no_rows(use, boundary, Split.FIT)
        found.append(sums)
    return StreamSums.of(found, device)


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
