"""transformers' model of a view: built from our own config and weights, never from a folder.

So the model that answers is the one that is captured and saved: transformers does not look for
files by itself, and no file decides which kernel computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.checkpoint.headers import config_items
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import CheckFailed, RotdistillError, SetupError, listed
from rotdistill_core.forward.rope import forget_lengths, shortest_border, transformers_config
from rotdistill_core.store.casts import is_finite
from rotdistill_core.store.layout import RunLayout


def empty_model(weights: Weights, dtype: torch.dtype) -> Any:
    """Build the model with its parameters on the meta device; its buffers (rotary tables) are real.

    Raises:
        SetupError: transformers refuses the config, or it makes another model of it than the
            checkpoint holds.
    """
    path = f"{_place_of(weights)}/{RunLayout.CONFIG}"
    with reading(path, "the model that it describes"):
        try:
            config = transformers_config(weights.config)
            # Random numbers for parameters that have no memory would be most of the time.
            with init_empty_weights(include_buffers=False), no_init_weights():
                model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=False
                )
            model.tie_weights(recompute_mapping=False)
        except KeyError as error:
            [word] = error.args or [""]
            keys = [key for key, value in config_items(weights.config) if value == word]
            if not keys:
                raise
            raise SetupError(f"{path}: transformers knows no {keys[0]} = {word!r}.") from error
    types = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in types and getattr(config, "sliding_window", None) is None:
        raise SetupError(f"{path}: layers have a sliding window, and `sliding_window` is null.")
    _require_one_model(weights, model)
    forget_lengths(model)
    return model.eval()


def whole_model(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model with its weights on a device, one tensor after the other.

    Raises:
        SetupError, CheckFailed: see `empty_model` and `computable`.
        torch.OutOfMemoryError: the device has no memory for it.
    """
    model = empty_model(weights, dtype)
    for name, entry in weights.files.items():
        module, _, parameter = name.rpartition(".")
        [value] = computable({name: entry}, device, dtype).values()
        setattr(model.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))
    if weights.tied:
        model.tie_weights()
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    return model.to(device)  # the buffers


def _in_one_piece(_: nn.Module, rows: tuple[Tensor]) -> tuple[Tensor]:
    """Return a head's input without gaps between its rows.

    transformers gives the head a slice, the last token of each text (`logits_to_keep`). For such
    rows torch multiplies text by text, and in bfloat16 on a processor it copies the head for each:
    32 texts of a vocabulary of 152,000 and a width of 896 then take 7.8 GB, and 28 s for 0.1 s.
    """
    return (rows[0].contiguous(),)


def computable(
    entries: Mapping[str, LazyTensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read tensors of a model into the dtype in which it computes. The device is waited for once.

    Args:
        entries: the tensors by name.
        device: where to put them.
        dtype: the dtype to compute in.

    Raises:
        SetupError: a file holds NaN or Inf, or numbers beyond the dtype.
        CheckFailed: a step made such numbers.
    """
    values = {name: entry.read().to(device, dtype) for name, entry in entries.items()}
    extremes = [extreme for value in values.values() for extreme in torch.aminmax(value)]
    if not extremes or bool(torch.isfinite(torch.stack(extremes)).all()):  # NaN goes into both
        return values
    [first, *_] = [name for name, value in values.items() if not is_finite(value)]
    entry = entries[first]
    _require_finite(first, entry, entry.read())
    beyond = int((~torch.isfinite(values[first])).sum())
    kind = str(dtype).removeprefix("torch.")
    raise _unfit(
        first,
        entry,
        f"{beyond} of its {values[first].numel()} numbers do not fit {kind}. "
        'Set the model\'s dtype = "bfloat16".',
    )


def require_finite_ends(weights: Weights) -> None:
    """Refuse NaN and Inf in embedding, last norm and head. Those of layers are met in the walk.

    Raises:
        SetupError, CheckFailed: see `computable`.
    """
    adapter = weights.adapter
    for name in (adapter.embedding, adapter.norm, adapter.head):
        if name in weights.entries:
            _require_finite(name, weights.entries[name], weights[name])


def _require_finite(name: str, entry: LazyTensor, read: Tensor) -> None:
    if not is_finite(read):
        spoilt = int((~torch.isfinite(read)).sum())
        raise _unfit(
            name,
            entry,
            f"{spoilt} of its {read.numel()} numbers are NaN or Inf. The file is damaged, or its "
            "training diverged.",
        )


def _unfit(name: str, entry: LazyTensor, problem: str) -> RotdistillError:
    """Return the error for a tensor in which a model cannot compute."""
    if entry.stored is None:
        return CheckFailed(f"{name}: {problem} Or a step made them.")
    return SetupError(f"{entry.stored.file}: tensor {name}: {problem}")


def is_beyond_rope_limit(model: Any, prompt: int, more: int, where: str) -> bool:
    """Return whether a prompt is beyond the length at which the model's rotary tables change.

    Args:
        model: a causal model of transformers.
        prompt: tokens of the prompt.
        more: most tokens that follow it.
        where: names the text, for the error.

    Raises:
        SetupError: the tables would change while the answer grows, so that no one forward pass of
            the model gives it.
    """
    limit = shortest_border(model.config)
    if limit is None or prompt + more <= limit:
        return False
    if prompt > limit and "dynamic" not in str(model.config.rope_parameters):
        return True
    raise SetupError(
        f"{where}: has a prompt of {prompt} tokens. With an answer of up to {more} it passes "
        f"{limit}, from where the rotary tables of this model depend on the length of the text. "
        "Ask for shorter answers, or shorten the prompt."
    )


def _require_one_model(weights: Weights, model: Any) -> None:
    """Compare the parameters that transformers makes of a config with those of the checkpoint.

    Raises:
        SetupError: naming the differences.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if weights.tied:
        wanted.pop(weights.adapter.head, None)
    found = {name: tuple(entry.shape) for name, entry in weights.files.items()}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place in it" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])}, and {list(wanted[name])} by its config"
        for name in wanted
        if name in found and wanted[name] != found[name]
    ]
    if problems:
        raise SetupError(
            f"{_place_of(weights)}: transformers makes another model of config.json than the "
            f"checkpoint holds: {listed(problems)}. It would fill in or leave out such tensors; "
            "correct the config (switches of biases and sizes) instead."
        )


def _place_of(weights: Weights) -> str:
    """Return the folder that the weights come from, for errors."""
    stored = weights.entries[weights.adapter.embedding].stored
    return str(stored.file.parent) if stored else "the edited model"
