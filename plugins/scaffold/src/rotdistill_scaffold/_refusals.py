"""Why no table can express an architecture, as its class in transformers has it.

Most reasons are read from names and shapes, so that they are found too where a class takes no small
sizes. The others need a small model that runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rotdistill_core.errors import SetupError
from rotdistill_scaffold._small_model import (
    IDS,
    calls,
    empty_model,
    layers_of,
    norms_of,
    part_of,
    small_model,
)

MODULES = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
"""Where `rope_decoder` looks for the parts of a model."""
INNER = ("self_attn.o_proj", "mlp.down_proj")
"""Where it looks for what writes into the stream."""
ATTENTION = ("att",)
MLP = ("mlp", "feed", "ffn")
"""Words in the names of the parts of a layer."""
SHOWN = 4
"""Names that a reason lists at most."""


def require_expressible(model_type: str) -> Any:
    """Return a small model of a type that a table may express.

    Raises:
        SetupError: none can, with all reasons; or transformers makes no small model of it.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SetupError(f"{model_type}: transformers makes no causal language model of it.")
    wholes = list(_whole_reasons(model_type))
    if wholes:
        raise inexpressible(model_type, wholes)
    empty = empty_model(model_type)
    reasons = [] if empty is None else list(_shape_reasons(empty))
    try:
        model = small_model(model_type)
    except SetupError:
        if not reasons:
            raise
    else:
        # A class may raise anything when it is run with hooks; its shapes then have to do.
        with suppress(Exception):
            reasons += _run_reasons(model)
    if reasons:
        raise inexpressible(model_type, reasons)
    missing = list(_missing(model))
    if missing:
        raise inexpressible(model_type, missing)
    return model


def inexpressible(model_type: str, reasons: list[str]) -> SetupError:
    """Return the error that says why no table can express a model type."""
    return SetupError(
        f"models of type {model_type} cannot be expressed as a table: {'; '.join(reasons)}. "
        "Nothing was written. docs/plugins/adapters.md has the limits of tables."
    )


def _whole_reasons(model_type: str) -> Iterator[str]:
    """Yield why a config is not of one decoder."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # a class may have no defaults that go together; a small model may say more
        return
    if config.is_encoder_decoder:
        yield "it is an encoder and a decoder, and a table is of a decoder alone"
        return
    text = config.get_text_config().model_type
    if text != model_type:
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        hint = f": rotdistill new adapter {text}" if text in names else ""
        yield f"it is a model of text and more; its text decoder is of type {text}{hint}"


# From names and shapes.


def _shape_reasons(model: Any) -> Iterator[str]:
    names = [name for name, _ in model.named_parameters()]
    experts = [name for name in names if "expert" in name or "router" in name]
    if experts:
        yield f"it is a mixture of experts ({experts[0]}), and a table has one set of neurons"
    means = [name for name, norm in norms_of(model) if _subtracts_mean(norm, model.config)]
    if means:
        yield (
            f"{means[0]} is a LayerNorm, which subtracts the mean; changes of basis do not commute "
            "with that"
        )
    latent = [name for name in names if re.search(r"\bkv_(a|lora|down)_?", name)]
    if latent:
        yield f"keys and values come from one latent space ({latent[0]}), which no table has"
    positions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search("pos|wpe", name)
    ]
    if positions:
        yield f"it has learned positions ({positions[0]}), which no rotation of keys leaves alone"
    layers = layers_of(model)
    if not layers:
        yield "it has no list of decoder layers"
    elif not part_of(layers[0], *ATTENTION) and not _other_layers(layers):
        parts = ", ".join(name for name, _ in layers[0].named_children())
        yield f"its layers have no attention (they have {parts})"
    elif not experts:  # of which the first layers often have none
        yield from _other_layers(layers)


def _other_layers(layers: list[nn.Module]) -> list[str]:
    """Return how the layers differ in their parameters, if they do."""
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers]
    for number, found in enumerate(shapes):
        different = sorted(name for name, _ in found.items() ^ shapes[0].items())
        if different:
            return [
                f"its layers differ: layers 0 and {number} in {_shown(different)}; a table has the "
                "same parameters in every layer"
            ]
    return []


@torch.no_grad()
def _subtracts_mean(module: nn.Module, config: Any) -> bool:
    """Return whether a norm makes nothing of a row of equal values."""
    norm: Any = copy.deepcopy(module).to_empty(device="cpu")
    for name, parameter in norm.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    shape = getattr(norm, "normalized_shape", (getattr(config, "hidden_size", 1),))
    weight = getattr(norm, "weight", None)
    row = torch.ones(1, 1, *(shape if weight is None else weight.shape))
    try:
        return bool(norm(row).abs().max() < 0.1)
    except Exception:  # a norm with more inputs (gates, keys) may raise anything without them
        return False


# From a run.


def _run_reasons(model: Any) -> Iterator[str]:
    if _sees_later_tokens(model):
        yield "its rows see later ones: it is an encoder, and the layer-wise forward is causal"
    layers = layers_of(model)
    if layers and _is_parallel(model, layers[0]):
        yield "attention and MLP are parallel blocks, so there is no stream between them"


@torch.no_grad()
def _sees_later_tokens(model: Any) -> bool:
    """Return whether the last token changes what is predicted after the first."""
    other = IDS.clone()
    other[0, -1] += 1
    first, second = (model(ids, use_cache=False).logits[0, 0] for ids in (IDS, other))
    return not torch.allclose(first, second, atol=1e-5)


def _is_parallel(model: Any, layer: nn.Module) -> bool:
    """Return whether the MLP reads the same whatever attention writes."""
    attention, mlp = part_of(layer, *ATTENTION), part_of(layer, *MLP)
    before = calls(model, layer)
    if attention not in before or mlp not in before:
        return False

    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 1.0, *output[1:])
        return output + 1.0

    handle = layer.get_submodule(attention).register_forward_hook(change)
    after = calls(model, layer)
    handle.remove()
    return torch.equal(before[mlp].read, after[mlp].read)


# What `rope_decoder` has no name for.


def _missing(model: Any) -> Iterator[str]:
    """Yield which modules of the tables of Llama-like models are not there."""
    modules = dict(model.named_modules())
    layer = layers_of(model)[0]
    inner = dict(layer.named_modules())
    missing = [
        *(name for name in MODULES if name not in modules),
        *(name for name in INNER if name not in inner),
    ]
    if missing:
        there = _shown([name for name, module in inner.items() if isinstance(module, nn.Linear)])
        yield (
            f"it has no {_shown(missing)}, which tables of Llama-like models are made of (the "
            f"matrices of a layer are {there})"
        )
        return
    if getattr(modules["model.norm"], "weight", None) is None:
        yield "model.norm has no gain, which the head absorbs"
    gates = [name for name in inner if re.search("gate", name)]
    if "mlp.up_proj" in inner and not gates:
        yield (
            "its MLP has no gate (mlp.up_proj and mlp.down_proj alone); neurons are matched by "
            "gate, up and down"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
