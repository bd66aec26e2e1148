"""Training of the matrices themselves, in place of a LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rotdistill_core.forward.layerwise import meta_model
from rotdistill_core.linalg.precision import wide_dtype
from rotdistill_core.store.casts import STUDENT_DTYPE, cast_that_fits

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights


def with_trained_matrices(weights: Weights, model: Model, train: Literal["lora", "head"]) -> Any:
    """Return a view of the student's weights as a model whose matrices train.

    Those are in float32 at least: a small step would be lost in bfloat16. The others stay in the
    model's dtype.

    Args:
        weights: the view; the head is untied if it trains.
        model: the student, for device and dtype.
        train: `"lora"` for all linear layers of attention and MLP, `"head"` for the head.
    """
    whole: Any = meta_model(weights, model.dtype)
    names = trained_matrices(weights, train)
    wide = wide_dtype(model.dtype)
    tensors = {
        # Memory of their own: training changes them in place.
        name: weights[name].to(model.device, wide, copy=True)
        if name in names
        else weights[name].to(model.device, model.dtype)
        for name in weights.entries
    }
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    whole.requires_grad_(requires_grad=False)
    for name in names:
        whole.get_parameter(name).requires_grad_()
    return whole


def trained_matrices(weights: Weights, train: Literal["lora", "head"]) -> set[str]:
    """Return the parameters that train."""
    adapter = weights.adapter
    if train == "head":
        return {adapter.head}
    return {
        name
        for name, param in adapter.expand(weights.config).items()
        if len(param.axes) == 2 and name.startswith(adapter.layers) and name.endswith(".weight")
    }


def with_matrices_of(view: Weights, student: Any, model: Model) -> Weights:
    """Return the view with the student's matrices as they are now.

    Raises:
        CheckFailed: a number is beyond the dtype of the model, or is NaN or Inf.
    """
    return view.edit(
        {
            name: cast_that_fits(parameter.detach(), model.dtype, name, STUDENT_DTYPE)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
    )
