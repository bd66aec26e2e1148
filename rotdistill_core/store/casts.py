"""Casts on the way to a file. A number that the narrower dtype does not hold is refused.

A gain of 3e4 fits float16. Absorbed into a reader it may pass 65,504, and the cast would write Inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.errors import CheckFailed

WIDER_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""What a refusal offers, the narrowest first."""
STORED_IN = "Store it in {dtypes}."
"""Remedy where no option of a recipe is known to decide."""
STUDENT_DTYPE = "Set student.dtype = {dtypes}."
"""Remedy for weights that steps make: they are stored in the dtype in which the student computes.
"""
SAVE_DTYPE = "Set student.save_dtype = {dtypes}."
"""Remedy for checkpoints."""


def cast_that_fits(
    tensor: Tensor, dtype: torch.dtype, name: str, remedy: str = STORED_IN
) -> Tensor:
    """Return a tensor on the CPU in another dtype, after a look at every number of it.

    Args:
        tensor: any shape.
        dtype: the dtype to store.
        name: what the tensor is, for the message.
        remedy: what to do; `{dtypes}` stands for those that would hold the numbers.

    Raises:
        CheckFailed: a number is beyond the dtype, or is NaN or Inf already.
    """
    cast = tensor.to("cpu", dtype)
    if is_finite(cast):
        return cast
    finite = torch.isfinite(tensor)
    spoilt = int((~finite).sum())
    if spoilt:
        raise CheckFailed(
            f"{name}: {spoilt} of its {tensor.numel()} numbers are NaN or Inf before they are "
            "written. The step before, or the model, is broken; nothing of it was written."
        )
    size = tensor.abs()
    largest, limit = float(size.max()), torch.finfo(dtype).max
    beyond = int((~torch.isfinite(cast)).sum())
    fitting = [_name(wide) for wide in WIDER_DTYPES if largest <= torch.finfo(wide).max]
    dtypes = " or ".join(f'"{each}"' for each in fitting[:2])
    raise CheckFailed(
        f"{name}: {beyond} of its {tensor.numel()} numbers do not fit {_name(dtype)}: the largest "
        f"is {largest:,.6g}, and {_name(dtype)} ends at {limit:,.6g}, so they would be written as "
        f"Inf. {remedy.format(dtypes=dtypes)}"
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number of a tensor is finite, in one pass and without a copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NaN goes into both extremes.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
