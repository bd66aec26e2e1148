"""Second moments of paired rows: additive sums, all that a least-squares fit needs."""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.linalg.precision import CPU, SUM_DTYPE, sum_device, widened


class Moments:
    """Weighted sums over paired rows x [d_x] and y [d_y] with weights w.

    `xx = Σ w x xᵀ [d_x, d_x]`, `xy = Σ w x yᵀ [d_x, d_y]`, `yy = Σ w ‖y‖²`, `weight = Σ w`. They
    are additive, batch after batch, in any order. Products are taken in float32 at least, sums in
    float64. They are kept on the device of the rows. Reading them copies them to the host, once.
    """

    def __init__(self, d_x: int, d_y: int) -> None:
        self._xx = torch.zeros(d_x, d_x, dtype=SUM_DTYPE)
        self._xy = torch.zeros(d_x, d_y, dtype=SUM_DTYPE)
        self._yy = torch.zeros((), dtype=SUM_DTYPE)
        self._weight = torch.zeros((), dtype=SUM_DTYPE)

    def add(self, X: Tensor, Y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows `X [n, d_x]`, `Y [n, d_y]` with weights `[n]` (default 1)."""
        X = widened(X)
        w = torch.ones_like(X[:, 0]) if weights is None else weights.to(X)
        # The root of the weight on both sides, so that each product carries the weight once.
        root = w.sqrt()[:, None]
        X, Y = X * root, Y.to(X) * root
        self._move(sum_device(X.device))
        self._xx += (X.T @ X).to(self._xx)
        self._xy += (X.T @ Y).to(self._xy)
        self._yy += Y.to(self._yy).pow(2).sum()
        self._weight += w.sum().to(self._weight)

    def _move(self, device: torch.device) -> None:
        """Keep the sums on a device from now on."""
        self._xx, self._xy = self._xx.to(device), self._xy.to(device)
        self._yy, self._weight = self._yy.to(device), self._weight.to(device)

    @property
    def xx(self) -> Tensor:
        """`Σ w x xᵀ [d_x, d_x]`, float64, on the host."""
        self._move(CPU)
        return self._xx

    @property
    def xy(self) -> Tensor:
        """`Σ w x yᵀ [d_x, d_y]`, float64, on the host."""
        self._move(CPU)
        return self._xy

    @property
    def yy(self) -> float:
        """`Σ w ‖y‖²`."""
        return float(self._yy)

    @property
    def weight(self) -> float:
        """`Σ w`."""
        return float(self._weight)

    def error(self, B: Tensor) -> float:
        """Return `Σ w ‖y - x B‖²` for `B [d_x, d_y]`, from the sums alone."""
        return self.yy - 2.0 * float((B * self.xy).sum()) + float(((self.xx @ B) * B).sum())
