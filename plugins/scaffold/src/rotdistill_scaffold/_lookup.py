"""What a table has to say of an architecture, looked up from its class in transformers.

A small model of the class is run with hooks on a layer. From what norms, attention and MLP read and
write follow the arguments of `rope_decoder`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from rotdistill_core.architecture.rope_decoder import ATTENTION, MLP, rope_heads
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import PICO
from rotdistill_scaffold._refusals import inexpressible
from rotdistill_scaffold._small_model import (
    HEAD_WIDTH,
    HEAD_WIDTH_KEY,
    calls,
    known_settings,
    layers_of,
    small_model,
    small_sizes,
)

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Projection -> its module in a layer, where it is not fused."""
FUSED = {"self_attn": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Part of a layer -> the projections that may be one matrix."""
FACTOR_KEYS = {
    "final_logit_softcapping": "softcap_key",
    "logits_scaling": "logits_scaling_key",
    "embedding_multiplier": "embedding_multiplier_key",
    "residual_multiplier": "residual_multiplier_key",
}
"""Config key -> the field of a table that names it."""
EPS_KEYS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
EPS_FIELD = "eps_key"
QUERY_KEY, GROUPS_KEY = "num_attention_heads", "num_key_value_heads"
TIE_KEY = "tie_word_embeddings"


class QueryHeads:
    """The default of a config key whose class takes the number of query heads."""


def looked_up_arguments(model_type: str, model: Any) -> dict[str, Any]:
    """Return the arguments of `rope_decoder` that a run of a small model shows, by name.

    Raises:
        SetupError: a projection is nowhere.
    """
    modules = _modules(model_type, model)
    biases = _biases(model_type, modules)
    return {
        **biases,
        **_norms(model),
        **_factors(model_type),
        **_fused(modules, {key for keys in biases.values() for key in keys}),
    }


def _modules(model_type: str, model: Any) -> dict[str, str]:
    """Return the module in a layer of every projection; fused ones share a module."""
    heads = rope_heads(model.config.to_dict())
    rows = {
        "self_attn": (heads.query + 2 * heads.groups) * heads.width,
        "mlp": 2 * PICO["intermediate_size"],
    }
    inner = dict(layers_of(model)[0].named_modules())
    matrices = {name: module for name, module in inner.items() if isinstance(module, nn.Linear)}
    found = dict(PROJECTIONS)
    for part, keys in FUSED.items():
        apart = [PROJECTIONS[key] for key in keys]
        if set(apart) <= set(matrices):
            continue
        wide = [
            name
            for name, matrix in matrices.items()
            if name.startswith(part) and matrix.out_features == rows[part]
        ]
        if len(wide) != 1:
            raise inexpressible(
                model_type,
                [
                    f"{', '.join(keys)} are neither {', '.join(apart)} nor one below the other in "
                    f"one matrix; the matrices of a layer are {', '.join(matrices)}"
                ],
            )
        found |= dict.fromkeys(keys, wide[0])
    return found


def _biases(model_type: str, modules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return which projections always have a bias, and which have one if the config says so."""
    fields = dataclasses.fields(CONFIG_MAPPING[model_type])
    switches = [
        field.name for field in fields if "bias" in field.name and field.type in (bool, "bool")
    ]
    found = []
    for value in (False, True):
        layer = layers_of(small_model(model_type, **dict.fromkeys(switches, value)))[0]
        found.append(
            {
                key
                for key, module in modules.items()
                if getattr(layer.get_submodule(module), "bias", None) is not None
            }
        )
    always = tuple(key for key in PROJECTIONS if key in found[0])
    switched = tuple(key for key in PROJECTIONS if key in found[1] - found[0])
    arguments = {"biases": always, "optional_biases": switched}
    return {key: value for key, value in arguments.items() if value}


def _norms(model: Any) -> dict[str, Any]:
    """Return the norms of a layer: before attention and MLP, in heads, and on what both write."""
    layer: Any = layers_of(model)[0]
    called = calls(model, layer)

    def before(part: str) -> str:
        """Return the norm whose output a part reads; nothing if it reads the stream itself."""
        read = called[part].read
        return next((name for name, call in called.items() if call.written is read), "")

    attention_norm, mlp_norm = before("self_attn"), before("mlp")
    others = [name for name in called if "norm" in name and name not in (attention_norm, mlp_norm)]
    heads = rope_heads(model.config.to_dict())
    inside = {
        name.removesuffix(".weight"): len(parameter)
        for name, parameter in layer.self_attn.named_parameters()
        if "norm" in name and parameter.ndim == 1
    }
    of_heads = [name for name, width in inside.items() if width == heads.width]
    of_all = [
        name
        for count in (heads.query, heads.groups)
        for name, width in inside.items()
        if width == count * heads.width and name not in of_heads
    ]
    arguments: dict[str, Any] = {}
    if attention_norm != "input_layernorm":
        arguments["attention_norm"] = attention_norm
    if mlp_norm != "post_attention_layernorm":
        arguments["mlp_norm"] = mlp_norm
    if of_heads:
        arguments["head_norms"] = tuple(of_heads)
    if of_all:
        arguments["all_heads_norms"] = tuple(of_all)
    if others:
        arguments["output_norms"] = tuple(others)
    if _gain_offset(model.model.norm):
        arguments["gain_offset"] = 1.0
    return arguments


@torch.no_grad()
def _gain_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight."""
    empty: Any = copy.deepcopy(norm)
    nn.init.zeros_(empty.weight)
    return float(empty(torch.ones(1, 1, len(empty.weight))).mean().round())


def _factors(model_type: str) -> dict[str, str]:
    """Return the fields that name config keys, for keys that the class has."""
    known = known_settings(model_type)
    named = {field: key for key, field in FACTOR_KEYS.items() if key in known}
    eps = next((key for key in EPS_KEYS if key in known), EPS_KEYS[0])
    return named if eps == EPS_KEYS[0] else {**named, EPS_FIELD: eps}


def _fused(modules: Mapping[str, str], with_bias: set[str]) -> dict[str, Any]:
    """Return the fused tensors with the projections in them, if there are any."""
    fused: dict[str, tuple[str, ...]] = {}
    for part, prefix in (("self_attn", ATTENTION), ("mlp", MLP)):
        keys = FUSED[part]
        module = modules[keys[0]].removeprefix(f"{part}.")
        if modules[keys[0]] == PROJECTIONS[keys[0]]:
            continue
        for kind in ("weight", "bias") if with_bias & {*keys} else ("weight",):
            fused[f"{prefix}{module}.{kind}"] = tuple(f"{prefix}{key}_proj.{kind}" for key in keys)
    return {"fused": fused} if fused else {}


def looked_up_defaults(model_type: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config class takes for keys that a table reads and a config.json may leave
    out.

    The sizes that every published config names are not among them.
    """
    keys = (
        GROUPS_KEY,
        HEAD_WIDTH_KEY,
        arguments.get(EPS_FIELD, EPS_KEYS[0]),
        TIE_KEY,
        *(key for key, field in FACTOR_KEYS.items() if field in arguments),
    )
    return dict(_class_defaults(model_type, keys))


def _class_defaults(model_type: str, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for key in keys:
        sizes = {name: value for name, value in PICO.items() if name != key}
        few, many = (
            getattr(AutoConfig.for_model(model_type, **{**sizes, QUERY_KEY: count}), key, None)
            for count in (4, 8)
        )
        if (few, many) == (4, 8):
            yield key, QueryHeads
        elif few is not None and few == many:
            yield key, few


def trial_cases(model_type: str) -> tuple[dict[str, Any], ...]:
    """Return the changes of the pico config that the tests of a new table try.

    Sizes that nothing else has let a mistake be named. The class has all these keys.
    """
    known = known_settings(model_type)
    first = {HEAD_WIDTH_KEY: 12, "intermediate_size": 56, "sliding_window": 5}
    second = {TIE_KEY: False, GROUPS_KEY: 4, HEAD_WIDTH_KEY: HEAD_WIDTH}
    cases = tuple(
        {key: value for key, value in case.items() if key in known or key == TIE_KEY}
        for case in (first, second)
    )
    try:
        small_model(model_type, **cases[0])
    except SetupError:  # of some classes heads have to make up the width of the stream
        cases[0].update(small_sizes(model_type))
    return cases
