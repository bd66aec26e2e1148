"""A LoRA on the student: `W + s B A` on chosen linear layers (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from rotdistill_core.checkpoint.models import is_unedited
from rotdistill_core.forward.layerwise import meta_model
from rotdistill_core.linalg.precision import widened
from rotdistill_core.store.casts import STUDENT_DTYPE, cast_that_fits
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_bytes
from rotdistill_prompt_kl._full_rank import with_matrices_of

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.store.output import StepOutput


def with_lora(weights: Weights, model: Model, train: Literal["lora", "head"], rank: int) -> Any:
    """Return a view of the student's weights as a peft model that trains only its LoRA.

    Args:
        weights: the view.
        model: the student, for device, dtype and name.
        train: `"lora"` for all linear layers of attention and MLP, `"head"` for the head.
        rank: rank of `B A`; its scale s is 2.
    """
    whole: Any = meta_model(weights, model.dtype)
    tensors = {name: weights[name].to(model.device, model.dtype) for name in weights.entries}
    whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    # peft writes the name into the adapter's config. An edited student has none.
    whole.name_or_path = model.ref.model if is_unedited(weights, model) else ""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_target_modules(weights, train))
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(whole, config)


def _target_modules(weights: Weights, train: Literal["lora", "head"]) -> list[str]:
    """Return the last names of the modules that get a LoRA, such as `q_proj`."""
    adapter = weights.adapter
    names = [adapter.head]
    if train == "lora":
        names = [
            name
            for name, param in adapter.params.items()
            if len(param.axes) == 2 and name.startswith(adapter.layers) and name.endswith(".weight")
        ]
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})


def wide_lora_product(module: Any, X: Tensor) -> Tensor:
    """Return what a linear layer makes of rows `X [n, in]`, `[n, out]`, in float32 at least.

    `X Wᵀ + s X Aᵀ Bᵀ` if the layer has a LoRA, else `X Wᵀ`. In bfloat16 a head would round
    its logits by more than the KL that they are compared by.
    """
    X = widened(X)
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    Y: Tensor = X @ base.weight.to(X).T
    if hasattr(module, "lora_A") and "default" in module.lora_A:
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        Y = Y + module.scaling["default"] * (X @ A.to(X).T @ B.to(X).T)
    return Y


def lora_products(student: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter of the plain model, `s B A [out, in]` in float64) of every LoRA layer."""
    for name, module in student.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            product = B.detach().cpu().double() @ A.detach().cpu().double()
            yield f"{name}.weight", module.scaling["default"] * product


def model_inside(student: Any) -> Any:
    """Return the model of transformers that trains, without what peft puts around it."""
    return student.get_base_model() if isinstance(student, PeftModel) else student


def folded(view: Weights, student: Any, model: Model) -> Weights:
    """Return the view with what the student has learned: its LoRA added, or its own matrices.

    Raises:
        CheckFailed: a number is beyond the dtype of the model, or is NaN or Inf.
    """
    if not isinstance(student, PeftModel):
        return with_matrices_of(view, student, model)
    return view.edit(
        {
            name: cast_that_fits(view[name].double() + product, model.dtype, name, STUDENT_DTYPE)
            for name, product in lora_products(student)
        }
    )


def save_adapter(student: Any, out: StepOutput) -> None:
    """Commit the LoRA in peft's format, under `weights/<step>/adapter/`."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder, save_embedding_layers=False)
        for path in sorted(Path(folder).glob("adapter_*")):
            content = read_bytes(path, path.stat().st_size)
            out.write(RunLayout.adapter(out.step, path.name), [content])
