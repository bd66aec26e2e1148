"""Ridge regression of the head onto the teacher's logits, without any logits.

The teacher's logits are `h_t W_tᵀ`, so with states after the final norm `X_s [T, d_s]`, `X_t [T, d_t]`, `C_ss = X_sᵀX_s`, `C_st = X_sᵀX_t`:
`argmin_W Σ‖x_s Wᵀ - x_t W_tᵀ‖² + λ‖W - W_s‖² = (W_t C_stᵀ + λ W_s)(C_ss + λI)⁻¹ = W_t Aᵀ + W_s Bᵀ [V, d_s]`, with
`A = (C_ss + λI)⁻¹ C_st [d_s, d_t]` and `B = λ (C_ss + λI)⁻¹ [d_s, d_s]`: only A and B are solved for, whatever the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.api import Bank, Out, Pair, Progress, Samples, Weights

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
JUDGED_ROWS, BLOCK = 1024, 128
MARGIN = 1e-6
"""Nats by which a fitted head must be better: less is rounding."""


@step
class LmHeadRidge:
    """Fit the head to the teacher's logits, ridge towards the student's own head. Rows of padding tokens stay as they are.

    Ridge and blend are chosen on the KL of validation texts, and leaving the head alone is always a candidate.
    """

    use: Literal["lm-head-ridge"] = "lm-head-ridge"
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.01, 0.1, 1.0)
    """Candidates for λ, as multiples of the mean diagonal of `C_ss`."""
    blend: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 1.0)
    """Candidates for the share of the fitted head in the new one."""

    texts: PositiveInt | None = None
    """Fit on this many fit texts; default all. A head has few unknowns per row of the vocabulary and needs few."""

    exact: ClassVar[bool] = False

    @hookimpl
    def style(self, weights: Weights, bank: Bank, pair: Pair, samples: Samples, out: Out, progress: Progress) -> Weights:
        """See `Specs.style`."""
        import torch
        from rotdistill_predictions import shared_tokens

        from rotdistill_core.moments import Moments, ridge
        from rotdistill_core.walk import Walk, final_norm

        tokens = shared_tokens(pair)
        fit_texts = samples.layout.select("fit", most=self.texts)
        layout = replace(fit_texts, texts=fit_texts.texts + samples.layout.select("validation").texts)
        walk = Walk(weights, layout, pair.student.device, pair.student.dtype)
        for i in walk:
            walk.run()
            progress(i + 1, weights.depth + 1, f"{layout.rows} rows")
        X = final_norm(weights, walk.states)
        T = final_norm(pair.teacher.weights, bank.teacher(layout, pair.student.depth).to(X))
        fit = layout.split("fit")
        moments = Moments(X.shape[1], T.shape[1])
        moments.add(X[fit], T[fit])
        eye = torch.eye(X.shape[1], dtype=torch.float64) * float(moments.xx.diagonal().mean())
        solved = {
            r: (ridge(moments.xx, moments.xy, r, "lm-head-ridge"), ridge(moments.xx, r * eye, r, "lm-head-ridge")) for r in self.ridge
        }
        rows, _, _ = layout.predicting("validation")
        rows = rows[:: max(1, len(rows) // JUDGED_ROWS)]
        H_t, H_s = pair.teacher.weights.head()[:tokens], weights.head()[:tokens]
        scores = self._scores(X[rows], T[rows], H_t.to(X), H_s.to(X), solved)
        best = min(scores, key=scores.__getitem__)
        if scores[best] > scores[0.0, 0.0] - MARGIN:
            best = (0.0, 0.0)
        out.notes |= {
            "validation KL by (ridge, blend)": {f"{r:g}, {b:g}": kl for (r, b), kl in scores.items()},
            "chosen (ridge, blend)": list(best), "validation KL before": scores[(0.0, 0.0)], "validation KL after": scores[best],
        }  # fmt: skip
        progress(weights.depth + 1, weights.depth + 1, f"ridge {best[0]:g}, blend {best[1]:g}")
        if best == (0.0, 0.0):
            out.notes["refused"] = "no candidate lowers the validation KL; the head is left as it was"
            return weights
        (A, B), share = solved[best[0]], best[1]
        head = weights.head().to(X.dtype).clone()
        fitted = H_t.to(X) @ A.T.to(X) + H_s.to(X) @ B.T.to(X)
        head[:tokens] += share * (fitted - head[:tokens])
        return weights.untie().edit({weights.adapter.head: head})

    def _scores(
        self, X: Tensor, T: Tensor, H_t: Tensor, H_s: Tensor, solved: dict[float, tuple[Tensor, Tensor]]
    ) -> dict[tuple[float, float], float]:
        """Return the mean KL of every (ridge, blend), and of (0, 0): the head as it is."""
        total = {(0.0, 0.0): 0.0} | {(r, b): 0.0 for r in self.ridge for b in self.blend}
        for k in range(0, len(X), BLOCK):
            x, teacher = X[k : k + BLOCK], T[k : k + BLOCK] @ H_t.T
            p = teacher.log_softmax(-1)
            own = x @ H_s.T
            candidates = {(0.0, 0.0): own}
            for r, (A, B) in solved.items():
                fitted = (x @ A.to(x)) @ H_t.T + (x @ B.to(x)) @ H_s.T
                candidates |= {(r, b): own + b * (fitted - own) for b in self.blend}
            for key, logits in candidates.items():
                total[key] += float((p.exp() * (p - logits.log_softmax(-1))).sum())
        return {key: value / len(X) for key, value in total.items()}


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [LmHeadRidge]
