"""Orthogonal Procrustes between the residual streams of student and teacher.

Problem: `max_R tr(Rᵀ M)` over `R [d_s, d_t]` with `R Rᵀ = I`, `M = Σ x_sᵀ x_t`. Closed form: `M = U S Vᵀ` (thin SVD), `R = U Vᵀ`,
scale `s = tr S / ‖X_s‖²`. (Schönemann, Psychometrika 31, 1966; rectangular with d_s <= d_t it is still the optimum.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.api import Bank, Maps, Pair, Progress


@step
class Procrustes:
    """Find the rotation that carries the student's residual stream onto the teacher's.

    Rows are divided by their RMS; position 0 and massive-activation rows are left out. Solved on fit texts, the cosines in the
    diagnostics are on validation texts, beside the same fit with the teacher's rows shuffled.
    """

    use: Literal["procrustes"] = "procrustes"
    tie: PositiveInt | Literal["all"] = "all"
    """One rotation per stage of this many layer boundaries (1: every boundary its own), or one for the whole stream."""

    @hookimpl
    def align(self, bank: Bank, maps: Maps, pair: Pair, progress: Progress) -> Maps:
        """See `Specs.align`."""
        import torch

        from rotdistill_core.maps import Rotation
        from rotdistill_core.moments import polar

        if pair.student.width > pair.teacher.width:
            from rotdistill_core.errors import RecipeError

            raise RecipeError(f"procrustes: the student is wider ({pair.student.width}) than the teacher ({pair.teacher.width}).")
        boundaries = list(range(len(bank.depths)))
        size = len(boundaries) if self.tie == "all" else self.tie
        found, cards = {}, {}
        for stage, start in enumerate(range(0, len(boundaries), size)):
            group = boundaries[start : start + size]
            M = torch.zeros(pair.student.width, pair.teacher.width, dtype=torch.float64)
            null, energy = torch.zeros_like(M), 0.0
            for _, S, T in _rows(bank, pair, group, "fit"):
                M += S.T @ T
                null += S.T @ T.roll(len(T) // 2, 0)
                energy += float(S.pow(2).sum())
            R, spectrum = polar(M, f"procrustes: stage {stage}")
            shuffled, _ = polar(null, f"procrustes: stage {stage}, shuffled")
            rotation = Rotation(R, float(spectrum.sum()) / energy)
            for boundary, S, T in _rows(bank, pair, group, "validation"):
                found[f"residual.{boundary}"] = rotation
                about = {"layer": boundary, "stage": stage, "k": len(R), "singular_values": spectrum.tolist(), "scale": rotation.scale}
                cards[boundary] = about | _diagnose(S, T, R, shuffled) | _orthogonality(rotation)
                progress(boundary + 1, len(boundaries), f"stage {stage}")
        return maps.add(found, cards)


def _rows(bank: Bank, pair: Pair, boundaries: list[int], split: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (boundary, student rows [n, d_s], teacher rows [n, d_t]) in float64, without sinks, each row divided by its RMS."""
    from rotdistill_core.bank import massive, normalised

    layout = bank.layouts["student"]
    where = layout.rows_in(bank.layouts["teacher"])
    for boundary in boundaries:
        S = bank.rows("student", boundary)
        T = bank.rows("teacher", pair.teacher_depth(bank.depths[boundary]))[where]
        use = layout.split(split) & ~massive(S) & ~massive(T)
        use[0] = False
        yield boundary, normalised(S[use]), normalised(T[use])


def _cosine(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum(-1).div(A.norm(dim=-1) * B.norm(dim=-1)).mean())


def _diagnose(S: Tensor, T: Tensor, R: Tensor, shuffled: Tensor) -> dict[str, Any]:
    """Return validation cosines: raw and centred, before and after, and with the rotation fitted on shuffled rows."""
    Sc, Tc = S - S.mean(0), T - T.mean(0)
    same = S.shape[1] == T.shape[1]
    return {
        "rows": len(S),
        "cosine_before": _cosine(S, T) if same else None,
        "cosine_after": _cosine(S @ R, T),
        "cosine_shuffled": _cosine(S @ shuffled, T),
        "centred_before": _cosine(Sc, Tc) if same else None,
        "centred_after": _cosine(Sc @ R, Tc),
        "centred_shuffled": _cosine(Sc @ shuffled, Tc),
        "rms_ratio": float((S @ R).pow(2).mean().sqrt() / T.pow(2).mean().sqrt()),
    }


def _orthogonality(rotation: Any) -> dict[str, Any]:
    import torch

    R = rotation.matrix
    P = R.T @ R
    if rotation.square:
        return {"max_rrt": rotation.error(), "max_rtr": float((P - torch.eye(len(P), dtype=P.dtype)).abs().max())}
    return {"max_rrt": rotation.error(), "rank_rtr": float(P.trace())}


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Procrustes]
