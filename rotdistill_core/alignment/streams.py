"""What aligners of residual streams share: paired rows, their sums, one solve per stage, and diagnostics beside their nulls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps, Rotation


CHUNK = 4096
"""Rows that are widened to float64 at a time."""


@dataclass(frozen=True)
class StageSolution:
    """The rotation `R [d_s, d_t]` of a stage, the spectrum it comes from, how much of it is its own (k), and the gap there."""

    R: Tensor
    spectrum: Tensor
    k: int
    gap: float


@dataclass(frozen=True)
class StreamSums:
    """Uncentred second moments of paired rows: all that a solve needs. `null` pairs a student's row with another row's teacher."""

    M: Tensor
    null: Tensor
    ss: Tensor
    tt: Tensor
    energy: float
    counts: Tensor
    """Rows of each boundary `[boundaries]`, and their means `s [boundaries, d_s]`, `t [boundaries, d_t]`."""
    s: Tensor
    t: Tensor

    def shuffled(self) -> StreamSums:
        """Return the sums of the shuffled rows."""
        return replace(self, M=self.null, null=self.M)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariances `C_s, C_st, C_t` within boundaries."""
        n, s, t = self.counts.sum(), self.s * self.counts[:, None], self.t * self.counts[:, None]
        return (
            (self.ss - self.s.T @ s) / n,
            (self.M - self.s.T @ t) / n,
            (self.tt - self.t.T @ t) / n,
        )


Parts = Iterable[tuple["Tensor", "Tensor", "Tensor"]]


def sum_streams(
    boundaries: Iterable[Parts], d_s: int, d_t: int, squares: bool = True
) -> StreamSums:
    """Add up chunks of (student rows, teacher rows, other teacher rows); the squares of each side only when asked for."""
    import torch

    M, null, ss, tt = (
        torch.zeros(a, b, dtype=torch.float64)
        for a, b in ((d_s, d_t), (d_s, d_t), (d_s, d_s), (d_t, d_t))
    )
    counts, means_s, means_t, energy = [], [], [], 0.0
    for parts in boundaries:
        n, s, t = 0, torch.zeros(d_s, dtype=torch.float64), torch.zeros(d_t, dtype=torch.float64)
        for S, T, other in parts:
            M += S.T @ T
            null += S.T @ other
            if squares:
                ss += S.T @ S
                tt += T.T @ T
            n, s, t, energy = n + len(S), s + S.sum(0), t + T.sum(0), energy + float(S.pow(2).sum())
        counts.append(float(n))
        means_s.append(s / n)
        means_t.append(t / n)
    return StreamSums(
        M,
        null,
        ss,
        tt,
        energy,
        torch.tensor(counts, dtype=torch.float64),
        torch.stack(means_s),
        torch.stack(means_t),
    )


def solve_stages(
    activations: ActivationStore,
    maps: Maps,
    pair: Pair,
    progress: Progress,
    use: str,
    tie: int | str,
    solve: Callable[[StreamSums, str], StageSolution],
    squares: bool,
) -> Maps:
    """Solve one rotation per stage with `solve`, on fit rows, and add it with its diagnostics, on validation rows."""
    from rotdistill_core.errors import RecipeError
    from rotdistill_core.linalg.diagnostics import LayerDiagnostics
    from rotdistill_core.linalg.maps import Rotation

    width = activations.width(
        "student"
    )  # of the student as it was captured: `chop` may have cut its stream
    if width > pair.teacher.width:
        raise RecipeError(
            f"{use}: the student is wider ({width}) than the teacher ({pair.teacher.width})."
        )
    boundaries = list(range(len(activations.depths)))
    size = int(tie) if tie != "all" else len(boundaries)
    random = random_orthogonal(width, pair.teacher.width)
    found, diagnostics = {}, {}
    for stage, start in enumerate(range(0, len(boundaries), size)):
        group = boundaries[start : start + size]
        sums = fit_sums(activations, pair, group, use, squares)
        made, null = (
            solve(sums, f"{use}: stage {stage}"),
            solve(sums.shuffled(), f"{use}: stage {stage}, shuffled"),
        )
        rotation = Rotation(made.R, float((made.R * sums.M).sum()) / sums.energy)
        about = {
            "aligner": use, "stage": stage, "k": made.k, "gap_at_k": made.gap, "scale": rotation.scale,
            "singular_values": made.spectrum.tolist(), "singular_values_shuffled": null.spectrum.tolist(),
        } | orthogonality(rotation)  # fmt: skip
        for mean, (boundary, S, T, rows) in zip(
            sums.t, paired_streams(activations, pair, group, "validation", use), strict=True
        ):
            found[f"residual.{boundary}"] = rotation
            seen = {"after": made.R, "shuffled": null.R, "random": random}
            diagnostics[boundary] = LayerDiagnostics.from_dict(
                {"layer": boundary, **about, **diagnose(S[rows], T[rows], seen, mean)}
            )
            progress(boundary + 1, len(boundaries), f"stage {stage}")
    return maps.add(found, diagnostics)


def paired_streams(
    activations: ActivationStore, pair: Pair, boundaries: list[int], split: str, use: str
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (boundary, student rows, teacher rows, which of them to take): raw streams; sinks are not taken.

    Raises:
        RotdistillError: a stream is not finite.
        RecipeError: no row of this split is left.
    """
    from rotdistill_core.errors import RecipeError
    from rotdistill_core.forward.activations import massive_activation_mask
    from rotdistill_core.linalg.solvers import require_finite

    layout = activations.layouts["student"]
    for boundary in boundaries:
        depth = activations.depths[boundary]
        S, T = activations.rows("student", boundary), activations.teacher(layout, depth)
        for X, side, model, at in (
            (S, "student", pair.student, boundary),
            (T, "teacher", pair.teacher, activations.teacher_boundaries[depth]),
        ):
            require_finite(
                X, f"{use}: {side} {model.ref.model}, layer boundary {at}, site residual"
            )
        wanted = (
            layout.split(split)
            & ~massive_activation_mask(S)
            & ~massive_activation_mask(T)
            & activations.paired(layout)
        )
        wanted[0] = False
        if not wanted.any():
            raise RecipeError(
                f"{use}: boundary {boundary} has no {split} rows to work on; capture the student on more texts."
            )
        yield boundary, S, T, wanted.nonzero().flatten()


def fit_sums(
    activations: ActivationStore, pair: Pair, boundaries: list[int], use: str, squares: bool
) -> StreamSums:
    """Return the sums over the fit rows of some boundaries, each row divided by its RMS."""
    from rotdistill_core.forward.activations import rms_normalise

    def parts(S: Tensor, T: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        shuffled = rows.roll(len(rows) // 2)
        for k in range(0, len(rows), CHUNK):
            some, other = rows[k : k + CHUNK], shuffled[k : k + CHUNK]
            yield rms_normalise(S[some]), rms_normalise(T[some]), rms_normalise(T[other])

    streams = (
        parts(S, T, rows)
        for _, S, T, rows in paired_streams(activations, pair, boundaries, "fit", use)
    )
    return sum_streams(streams, activations.width("student"), pair.teacher.width, squares)


def spectral_gap(S: Tensor, k: int) -> float:
    """Return `(S_k - S_{k+1}) / S_1` of a falling spectrum, 0 behind its end."""
    after = float(S[k]) if k < len(S) else 0.0
    return (float(S[k - 1]) - after) / max(float(S[0]), 1e-300) if k else 0.0


def random_orthogonal(d_s: int, d_t: int) -> Tensor:
    """Return one random `R [d_s, d_t]` with `R Rᵀ = I`, always the same."""
    import torch

    noise = torch.randn(d_t, d_s, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q: Tensor = torch.linalg.qr(noise).Q
    return Q.T


def cosine(A: Tensor, B: Tensor) -> float:
    """Return the mean cosine of paired rows; a row of zeros has cosine 0."""
    return float((A * B).sum(-1).div((A.norm(dim=-1) * B.norm(dim=-1)).clamp_min(1e-30)).mean())


def diagnose(S: Tensor, T: Tensor, maps: Mapping[str, Tensor], mean: Tensor) -> dict[str, Any]:
    """Return the cosines of raw rows S, T, as they are and centred: before, behind each map, and with one constant for all rows.

    A rotation cannot change the RMS ratio, and a constant has no direction once it is centred.
    """
    from rotdistill_core.forward.activations import rms_normalise

    X, Y = rms_normalise(S), rms_normalise(T)
    card: dict[str, Any] = {"rows": len(S), "cosine_before": None, "centred_before": None}
    card |= {"cosine_mean": cosine(mean.expand_as(Y), Y), "centred_mean": 0.0}
    seen = {name: X @ R for name, R in maps.items()} | ({"before": X} if X.shape == Y.shape else {})
    for name, P in seen.items():
        card |= {
            f"cosine_{name}": cosine(P, Y),
            f"centred_{name}": cosine(P - P.mean(0), Y - Y.mean(0)),
        }
    return card | {"rms_ratio": float((S.double().pow(2).sum() / T.double().pow(2).sum()).sqrt())}


def orthogonality(rotation: Rotation) -> dict[str, Any]:
    """Return how far the rotation is from orthogonal."""
    import torch

    R = rotation.matrix
    P = R.T @ R
    if rotation.square:
        return {
            "max_rrt": rotation.error(),
            "max_rtr": float((P - torch.eye(len(P), dtype=P.dtype)).abs().max()),
        }
    return {"max_rrt": rotation.error(), "rank_rtr": float(P.trace())}
