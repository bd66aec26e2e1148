"""Second moments of paired rows: additive sums, all that a least-squares fit needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from rotdistill_core.linalg.exact import ExactSum, FloatSum, Sum
from rotdistill_core.linalg.precision import SUM_DTYPE, sum_device, widened


class Moments:
    """Weighted sums over paired rows x [d_x] and y [d_y] with weights w.

    `xx = Σ w x xᵀ [d_x, d_x]`, `xy = Σ w x yᵀ [d_x, d_y]`, `yy = Σ w ‖y‖²`, `weight = Σ w`. They
    are additive, batch after batch, in any order. Products are taken in float32 at least, sums in
    float64. They are kept on the device of the rows. Reading them copies them to the host, once.

    Moments made by `exact` have the same bits in any order and any grouping of the batches.
    """

    def __init__(self, d_x: int, d_y: int) -> None:
        self._xx: Sum = FloatSum((d_x, d_x))
        self._xy: Sum = FloatSum((d_x, d_y))
        self._yy: Sum = FloatSum(())
        self._weight: Sum = FloatSum(())

    @classmethod
    def exact(cls, d_x: int, d_y: int, bound: float, where: str = "moments") -> Self:
        """Return moments whose bits do not depend on the order of the batches; see `ExactSum`.

        Args:
            d_x: width of x.
            d_y: width of y.
            bound: what `Σ w max(‖x‖², ‖y‖², 1)` is at most. No entry of a sum is larger.
            where: names the place in errors.

        Raises:
            ValueError: no sum can have this bound.
        """
        moments = cls(d_x, d_y)
        moments._xx = ExactSum((d_x, d_x), bound, f"{where}, xx")
        moments._xy = ExactSum((d_x, d_y), bound, f"{where}, xy")
        moments._yy = ExactSum((), bound, f"{where}, yy")
        moments._weight = ExactSum((), bound, f"{where}, weight")
        return moments

    def add(self, X: Tensor, Y: Tensor, weights: Tensor | None = None) -> None:
        """Add rows `X [n, d_x]`, `Y [n, d_y]` with weights `[n]` (default 1).

        Raises:
            RotdistillError: the moments are exact, and a sum is not finite.
            SumTooLarge: a sum is beyond the bound. The moments then hold a part of the batch and
                are of no further use.
        """
        X = widened(X)
        w = torch.ones_like(X[:, 0]) if weights is None else weights.to(X)
        # The root of the weight on both sides, so that each product carries the weight once.
        root = w.sqrt()[:, None]
        X, Y = X * root, Y.to(X) * root
        self._xx.add(X.T @ X)
        self._xy.add(X.T @ Y)
        self._yy.add(Y.to(sum_device(Y.device), SUM_DTYPE).pow(2).sum())
        self._weight.add(w.sum())

    def combine(self, add_up: Callable[[Tensor], None], device: torch.device) -> None:
        """Add the rows of the same moments in all other processes; see `ExactSum.combine`.

        Raises:
            SumTooLarge: a sum goes beyond the bound, in all processes.
            ValueError: the moments are not exact.
        """
        for each in (self._xx, self._xy, self._yy, self._weight):
            if not isinstance(each, ExactSum):
                raise ValueError("Only exact moments have a sum over processes that is exact.")
            each.combine(add_up, device)

    def settled(self) -> Moments:
        """Return moments of the same value whose sums are in float64, to be read often."""
        settled = Moments(0, 0)
        settled._xx = FloatSum.of(self.xx)
        settled._xy = FloatSum.of(self.xy)
        settled._yy = FloatSum.of(self._yy.value())
        settled._weight = FloatSum.of(self._weight.value())
        return settled

    @property
    def xx(self) -> Tensor:
        """`Σ w x xᵀ [d_x, d_x]`, float64, on the host."""
        return self._xx.value()

    @property
    def xy(self) -> Tensor:
        """`Σ w x yᵀ [d_x, d_y]`, float64, on the host."""
        return self._xy.value()

    @property
    def yy(self) -> float:
        """`Σ w ‖y‖²`."""
        return float(self._yy.value())

    @property
    def weight(self) -> float:
        """`Σ w`."""
        return float(self._weight.value())

    def error(self, B: Tensor) -> float:
        """Return `Σ w ‖y - x B‖²` for `B [d_x, d_y]`, from the sums alone."""
        return self.yy - 2.0 * float((B * self.xy).sum()) + float(((self.xx @ B) * B).sum())
