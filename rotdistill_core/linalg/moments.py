"""Second moments of paired rows: additive sums, all that a least-squares fit needs."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Weighted sums over paired rows x [d_x] and y [d_y] with weights w.

    `xx = Σ w x xᵀ [d_x, d_x]`, `xy = Σ w x yᵀ [d_x, d_y]`, `yy = Σ w ‖y‖²`, `weight = Σ w`. They
    are additive, batch after batch, in any order. Products are taken in the dtype of the rows, sums
    are kept in float64.
    """

    def __init__(self, d_x: int, d_y: int) -> None:
        self.xx = torch.zeros(d_x, d_x, dtype=torch.float64)
        self.xy = torch.zeros(d_x, d_y, dtype=torch.float64)
        self.yy = 0.0
        self.weight = 0.0

    def add(self, X: Tensor, Y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows `X [n, d_x]`, `Y [n, d_y]` with weights `[n]` (default 1)."""
        w = torch.ones(len(X)) if weights is None else weights
        # The root of the weight on both sides, so that each product carries the weight once.
        root = w.to(X).sqrt()[:, None]
        X, Y = X * root, Y.to(X) * root
        self.xx += (X.T @ X).to("cpu", torch.float64)
        self.xy += (X.T @ Y).to("cpu", torch.float64)
        self.yy += float(Y.double().pow(2).sum())
        self.weight += float(w.sum())

    def error(self, B: Tensor) -> float:
        """Return `Σ w ‖y - x B‖²` for `B [d_x, d_y]`, from the sums alone."""
        return self.yy - 2.0 * float((B * self.xy).sum()) + float(((self.xx @ B) * B).sum())
