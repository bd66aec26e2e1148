"""A small model of a class of transformers, and what the parts of its layers read and write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from rotdistill_core.errors import SetupError
from rotdistill_core.testing import PICO

DEPTH_KEY = "num_hidden_layers"
DEEP = 8
"""Layers of a model whose layers are compared: kinds of layers come in periods of up to eight."""
HEAD_WIDTH_KEY = "head_dim"
HEAD_WIDTH = 8
IDS = torch.tensor([[3, 9, 17, 25, 33]])


class Call(NamedTuple):
    """One call of a part of a layer."""

    name: str
    read: Tensor
    written: Tensor


def known_settings(model_type: str) -> set[str]:
    """Return the keys that the config class of a model type has."""
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}


def small_sizes(model_type: str) -> dict[str, int]:
    """Return the width of a head if the class has a key for it, whose default is a large one."""
    return {HEAD_WIDTH_KEY: HEAD_WIDTH} if HEAD_WIDTH_KEY in known_settings(model_type) else {}


def small_model(model_type: str, **changes: Any) -> Any:
    """Return a random model of a class, of hidden size 32 with 2 layers, that has been run once.

    Raises:
        SetupError: transformers makes none.
    """
    try:
        settings = {**PICO, **small_sizes(model_type), **changes}
        config = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model(IDS, use_cache=False)
        return model
    except Exception as error:
        # A class may raise anything at sizes that it does not know.
        reason = str(error).strip().partition("\n")[0]
        raise SetupError(
            f"{model_type}: transformers makes no small causal language model of it ({reason}). A "
            "table of it has to be written by hand; see docs/plugins/adapters.md."
        ) from error


def empty_model(model_type: str) -> Any:
    """Return a model of a class without values, to read names and shapes from; None if there is
    none.

    It is a deep one of small sizes; a class that does not take these sizes has its own.
    """
    small = {**PICO, **small_sizes(model_type)}
    for settings in ({**small, DEPTH_KEY: DEEP}, small, {}):
        # A class may raise anything at sizes that it does not know.
        with suppress(Exception), torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return None


def layers_of(model: Any) -> list[nn.Module]:
    """Return the decoder layers: the first list of modules that is as long as the model is deep."""
    depth = getattr(model.config, DEPTH_KEY, None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == depth), [])


def part_of(layer: nn.Module, *words: str) -> str:
    """Return the name of the child of a layer that is no norm and has one of some words in it."""
    for name, child in layer.named_children():
        if "norm" not in name and any(word in name for word in words) and list(child.parameters()):
            return name
    return ""


def norms_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below a module that are norms, by name."""
    for name, inner in module.named_modules():
        if "norm" in type(inner).__name__.lower() and not list(inner.children()):
            yield name, inner


@torch.no_grad()
def calls(model: Any, layer: nn.Module) -> dict[str, Call]:
    """Run a model and return the call of every child of a layer, in order."""
    seen: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            read = args[0] if args else kwargs.get("hidden_states")
            written = output[0] if isinstance(output, tuple) else output
            if isinstance(read, Tensor) and isinstance(written, Tensor):
                seen[name] = Call(name, read, written)

        return see

    handles = [
        child.register_forward_hook(note(name), with_kwargs=True)
        for name, child in layer.named_children()
    ]
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
