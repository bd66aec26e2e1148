"""The check of captured states: none is NaN or Inf."""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.errors import RotdistillError


def require_finite_states(model: str, boundary: int, states: Tensor) -> None:
    """Raise unless all states `[rows, d]` of a model at a boundary are finite.

    Raises:
        RotdistillError: a state is NaN or Inf.
    """
    # A finite sum proves that all states are finite. Only without it are rows searched.
    if torch.isfinite(states.sum()):
        return
    bad_rows = (~torch.isfinite(states)).any(-1).nonzero().flatten().tolist()
    if bad_rows:
        where = f"layer {boundary - 1}" if boundary else "the embeddings"
        raise RotdistillError(
            f"{model}: {where}: {len(bad_rows)} rows are NaN or Inf, "
            f"the first is row {bad_rows[0]}. The model overflows there: set its dtype to "
            '"float32".'
        )
