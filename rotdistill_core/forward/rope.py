"""Rotary tables that depend on the length of the whole sequence.

transformers makes them anew in each call, from the largest position of the call. So texts share a
call, or the keys of a shared prefix, only where each of them alone would get the same tables. Of
the types that transformers has, two depend on the length:

- `longrope`: one table up to `original_max_position_embeddings`, another beyond.
- `dynamic`: one table up to `max_position_embeddings`, and one for each length beyond.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig

NOT_OF_THE_MODEL = (
    "dtype",
    "torch_dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_return_dict",
    "torchscript",
)
"""Config keys that say how somebody called a model. The program says it itself."""

TableOf = Callable[[int], Hashable]
"""Number of tokens of a text -> what names its rotary tables: equal names, equal tables."""


def transformers_config(config: Mapping[str, Any]) -> Any:
    """Return a config.json as an object of its own transformers class."""
    settings = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    # transformers writes what it adds into the dictionaries that it is given.
    return AutoConfig.for_model(**copy.deepcopy(settings))


def tables_by_length(config: Any) -> TableOf:
    """Return the function that names the rotary tables of a text by its number of tokens.

    Args:
        config: a transformers config.
    """
    longest = getattr(config, "max_position_embeddings", 0)
    borders = _longrope_borders(config)
    has_dynamic = _has_dynamic(config)

    def table_of(length: int) -> Hashable:
        beyond = tuple(length > border for border in borders)
        return (*beyond, max(length, longest)) if has_dynamic else beyond

    return table_of


def shortest_border(config: Any) -> int | None:
    """Return the length beyond which the tables of a text depend on it; None if they never do.

    Args:
        config: a transformers config.
    """
    dynamic = [config.max_position_embeddings] if _has_dynamic(config) else []
    return min(map(int, [*_longrope_borders(config), *dynamic]), default=None)


def _longrope_borders(config: Any) -> list[int]:
    """Return the lengths beyond which a `longrope` table is another one, in order."""
    longest = getattr(config, "max_position_embeddings", 0)
    return sorted(
        {
            values.get("original_max_position_embeddings") or longest
            for values in _rope_parameters(config)
            if values.get("rope_type") == "longrope"
        }
    )


def _has_dynamic(config: Any) -> bool:
    return any("dynamic" in str(values.get("rope_type")) for values in _rope_parameters(config))


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of each kind of rotary table: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [values for values in parameters.values() if isinstance(values, Mapping)]
    return nested or [parameters]


def forget_lengths(model: nn.Module) -> None:
    """Let each call of a model make its rotary tables from its own length alone.

    A `dynamic` table that grew in one call stays grown in later, shorter ones: what a text gets
    would depend on the texts before it.
    """
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget_length)


def _forget_length(module: nn.Module, _: object) -> None:
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            inv_freq = f"{name.removesuffix('original_inv_freq')}inv_freq"
            module.register_buffer(inv_freq, buffer.clone(), persistent=False)
