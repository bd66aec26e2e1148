"""What a new table has to say of an architecture, looked up from its class in transformers.

A pico model of the class is run once with hooks on a layer. From what norms, attention and MLP read
and write follow the arguments of `rope_decoder`, or the reasons why no table can express the model.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.checkpoint.headers import read_config
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import PICO, pico_folder
from rotdistill_core.testing.config_checks import settings_computed_wrongly, tried_settings

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Projection -> its module in a layer."""
MODULES = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
"""Where `rope_decoder` looks for the parts of a model."""
FACTOR_KEYS = {
    "final_logit_softcapping": "softcap_key",
    "logits_scaling": "logits_scaling_key",
    "embedding_multiplier": "embedding_multiplier_key",
    "residual_multiplier": "residual_multiplier_key",
}
"""Config key -> the field of a table that names it."""
EPS_KEYS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
EPS_FIELD = "eps_key"
HEAD_WIDTH = 8
IDS = torch.tensor([[3, 9, 17, 25, 33]])


class Call(NamedTuple):
    """One call of a part of a layer."""

    name: str
    read: Tensor
    written: Tensor


def table_arguments(model_type: str) -> dict[str, Any]:
    """Return the arguments of `rope_decoder` for a model type, by name.

    Raises:
        SetupError: no table can express the model, or transformers makes no causal model of it.
    """
    model = _pico_model(model_type)
    reasons = list(_reasons(model, _layers(model)))
    if reasons:
        raise SetupError(
            f"models of type {model_type} cannot be expressed as a table: {'; '.join(reasons)}."
        )
    arguments = {
        **_biases(model_type),
        **_norms(model, _layers(model)),
        **_factors(model_type),
    }
    return {**arguments, **_required(model_type, arguments)}


def _pico_model(model_type: str, **changes: Any) -> Any:
    """Return a random model of a class, of hidden size 32 with 2 layers.

    Raises:
        SetupError: transformers makes none.
    """
    try:
        config = AutoConfig.for_model(model_type, **{**PICO, **_sizes(model_type), **changes})
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


def _sizes(model_type: str) -> dict[str, int]:
    """Return the width of a head if the class has a key for it, whose default is a large one."""
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    return {"head_dim": HEAD_WIDTH} if "head_dim" in known else {}


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the first list of modules that is as long as the model is deep."""
    depth = PICO["num_hidden_layers"]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == depth), [])


# Reasons.


def _reasons(model: Any, layers: list[nn.Module]) -> Iterator[str]:
    """Yield why `rope_decoder` cannot express a model."""
    modules = dict(model.named_modules())
    experts = [name for name, _ in model.named_parameters() if "expert" in name or "router" in name]
    if experts:
        yield f"it is a mixture of experts ({experts[0]}), and a table has one set of neurons"
    if not layers:
        yield f"it has no list of {PICO['num_hidden_layers']} decoder layers"
        return
    means = [name for name, module in modules.items() if _subtracts_mean(module, model.config)]
    if means:
        yield (
            f"{means[0]} is a LayerNorm, which subtracts the mean; changes of basis do not commute "
            "with that"
        )
    if _is_parallel(model, layers[0]):
        yield "attention and MLP are parallel blocks, so there is no stream between them"
    missing = [name for name in MODULES if name not in modules]
    inner = dict(layers[0].named_modules())
    missing += [name for name in PROJECTIONS.values() if name not in inner]
    if missing:
        yield f"it has no {', '.join(missing)}, which the tables of Llama-like models are made of"
        return
    width = inner[PROJECTIONS["q"]].weight.shape[0]
    wide = [
        name
        for name, parameter in layers[0].get_submodule("self_attn").named_parameters()
        if parameter.ndim == 1 and "norm" in name and parameter.shape[0] == width
    ]
    if wide and width != _head_width(model.config):
        yield f"self_attn.{wide[0]} is one norm over all heads; see olmo2-adapter for such a table"


def _subtracts_mean(module: nn.Module, config: Any) -> bool:
    """Return whether a norm makes nothing of a row of equal values."""
    if "norm" not in type(module).__name__.lower() or list(module.children()):
        return False
    norm = copy.deepcopy(module)
    for parameter in norm.parameters():
        nn.init.constant_(parameter, float(parameter.ndim > 0))
    bias = getattr(norm, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)
    weight = getattr(norm, "weight", None)
    shape = getattr(norm, "normalized_shape", (config.hidden_size,))
    row = torch.ones(1, 1, *(shape if weight is None else weight.shape))
    with torch.no_grad():
        return bool(norm(row).abs().max() < 0.1)


def _is_parallel(model: Any, layer: nn.Module) -> bool:
    """Return whether the MLP reads the same whatever attention writes."""
    attention, mlp = (_part(layer, *words) for words in (("att",), ("mlp", "feed", "ffn")))
    if not attention or not mlp:
        return False

    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 1.0, *output[1:])
        return output + 1.0

    before = _calls(model, layer)[mlp].read
    handle = layer.get_submodule(attention).register_forward_hook(change)
    after = _calls(model, layer)[mlp].read
    handle.remove()
    return torch.equal(before, after)


def _part(layer: nn.Module, *words: str) -> str:
    """Return the name of the child of a layer that is no norm and has one of some words in it."""
    for name, child in layer.named_children():
        if "norm" not in name and any(word in name for word in words) and list(child.parameters()):
            return name
    return ""


@torch.no_grad()
def _calls(model: Any, layer: nn.Module) -> dict[str, Call]:
    """Run a model and return the call of every child of a layer, in order."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            calls[name] = Call(name, read, output[0] if isinstance(output, tuple) else output)

        return see

    handles = [
        child.register_forward_hook(note(name), with_kwargs=True)
        for name, child in layer.named_children()
    ]
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


# Arguments.


def _biases(model_type: str) -> dict[str, Any]:
    """Return which projections always have a bias, and which have one if the config says so."""
    fields = dataclasses.fields(CONFIG_MAPPING[model_type])
    switches = [
        field.name for field in fields if "bias" in field.name and field.type in (bool, "bool")
    ]
    found = []
    for value in (False, True):
        layer = _layers(_pico_model(model_type, **dict.fromkeys(switches, value)))[0]
        found.append(
            {
                key
                for key, module in PROJECTIONS.items()
                if getattr(layer.get_submodule(module), "bias", None) is not None
            }
        )
    always = tuple(key for key in PROJECTIONS if key in found[0])
    switched = tuple(key for key in PROJECTIONS if key in found[1] - found[0])
    arguments = {"biases": always, "optional_biases": switched}
    return {key: value for key, value in arguments.items() if value}


def _norms(model: Any, layers: list[nn.Module]) -> dict[str, Any]:
    """Return the norms of a layer: before the MLP, in heads, and on what branches write."""
    layer: Any = layers[0]
    calls = _calls(model, layer)
    before_mlp = [name for name, call in calls.items() if call.written is calls["mlp"].read]
    before_attention = [
        name for name, call in calls.items() if call.written is calls["self_attn"].read
    ]
    others = [
        name for name in calls if "norm" in name and name not in (*before_mlp, *before_attention)
    ]
    width = _head_width(model.config)
    inside = [
        name.removesuffix(".weight")
        for name, parameter in layer.self_attn.named_parameters()
        if "norm" in name and parameter.ndim == 1 and parameter.shape[0] == width
    ]
    arguments: dict[str, Any] = {}
    if before_mlp and before_mlp[0] != "post_attention_layernorm":
        arguments["mlp_norm"] = before_mlp[0]
    if inside:
        arguments["head_norms"] = tuple(inside)
    if others:
        arguments["output_norms"] = tuple(others)
    if _gain_offset(model.model.norm):
        arguments["gain_offset"] = 1.0
    return arguments


def _gain_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight."""
    empty: Any = copy.deepcopy(norm)
    nn.init.zeros_(empty.weight)
    with torch.no_grad():
        return float(empty(torch.ones(1, 1, empty.weight.shape[0])).mean().round())


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _factors(model_type: str) -> dict[str, Any]:
    """Return the fields that name config keys, for keys that the class has."""
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    named = {field: key for key, field in FACTOR_KEYS.items() if key in known}
    eps = next((key for key in EPS_KEYS if key in known), EPS_KEYS[0])
    return named if eps == EPS_KEYS[0] else {**named, EPS_FIELD: eps}


def _required(model_type: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under which the table holds, of settings that it does not compute."""
    with tempfile.TemporaryDirectory() as root:
        folder = pico_folder(Path(root) / "model", model_type, **_sizes(model_type))
        table = rope_decoder((model_type,), **arguments)
        if not tried_settings(table, folder, read_config(folder), {}).computed:
            return {}  # the tests of the new adapter name what is wrong
        wrong = settings_computed_wrongly(table, folder)
    known = CONFIG_MAPPING[model_type]()
    values = {
        key: getattr(known, key) for key in wrong if not isinstance(getattr(known, key), dict)
    }
    return {"requires": values} if values else {}


def source_of(model_type: str, arguments: Mapping[str, Any]) -> str:
    """Return the call of `rope_decoder` as it stands in a module."""
    if not arguments:
        return f'rope_decoder(("{model_type}",))'
    lines = [
        f'("{model_type}",)',
        *(f"{key}={_literal(value)}" for key, value in arguments.items()),
    ]
    return "rope_decoder(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _literal(value: Any) -> str:
    """Return a value as Python, with double quotes."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        pairs = "".join(
            f"        {_literal(key)}: {_literal(item)},\n" for key, item in value.items()
        )
        return "{\n" + pairs + "    }"
    return repr(value)
