"""Whatever peft saves is merged to peft's own logits, or refused by its key.

The kinds come from peft's own registry, so that a new one cannot slip by.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint import adapter_config
from rotdistill_core.checkpoint.adapter_config import (
    IDLE_KEYS,
    NEUTRAL,
    READ_KEYS,
    read_adapter_config,
)
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import pico_model, save_folder

pytestmark = pytest.mark.usefixtures("quiet_peft")
Merge = Callable[..., Any]
IDS = torch.tensor([[3, 9, 17, 25, 33, 41, 50, 58, 7, 12, 20, 30]])
MODEL_TYPES = [
    "llama",
    "phi3",
    # 36 short tests each; together they are long for the edit loop.
    pytest.param("qwen2", marks=pytest.mark.slow),
    pytest.param("gemma3_text", marks=pytest.mark.slow),
]
ATTENTION = {"phi3": "qkv_proj"}
"""Name of a projection of attention, `q_proj` elsewhere."""

MERGED: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rank-stabilised": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.o_proj": 6}},
    "alpha pattern": {"alpha_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 5}},
    "all patterns": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    },
    "one layer": {"layers_to_transform": [1]},
    "one layer by pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.mlp.down_proj"]},
    "pattern of targets": {"target_modules": r".*\.1\..*(o|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "fused or not": {"target_modules": ["gate_up_proj", "gate_proj", "k_proj", "qkv_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "dropout": {"lora_dropout": 0.5},
}
"""Kinds that merge."""
REFUSED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pissa": ("init_lora_weights", {"init_lora_weights": "pissa"}),
    "fast pissa": ("init_lora_weights", {"init_lora_weights": "pissa_niter_2"}),
    "olora": ("init_lora_weights", {"init_lora_weights": "olora"}),
    "mica": ("init_lora_weights", {"init_lora_weights": "mica"}),
    "dora": ("use_dora", {"use_dora": True}),
    "activated": ("alora_invocation_tokens", {"alora_invocation_tokens": [9, 17]}),
    "all biases": ("bias", {"bias": "all"}),
    "biases": ("bias", {"bias": "lora_only"}),
    "bias of B": ("lora_bias", {"lora_bias": True}),
    "saved head": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    "saved norm": ("modules_to_save", {"modules_to_save": ["norm"]}),
    "tokens": ("trainable_token_indices", {"trainable_token_indices": [3, 4]}),
    "velora": ("velora_config", {"velora_config": VeloraConfig(num_groups=4)}),
    "kasa": ("kasa_config", {"kasa_config": KasaConfig()}),
    "montecarlo": ("monteclora_config", {"monteclora_config": MontecloraConfig(num_samples=2)}),
    "block diagonal": (
        "use_bdlora",
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], match_strict=False)},
    ),
    "tied on purpose": (
        "ensure_weight_tying",
        {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
    ),
    "repeated layers": ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
}
"""Kind -> the key by which it is refused, and its options."""


@torch.no_grad()
def save_trained(model: Model, folder: Path, options: Mapping[str, Any]) -> torch.Tensor:
    """Save a trained adapter as peft does; return the logits that peft computes with it."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    attention = ATTENTION.get(str(model.config["model_type"]), "q_proj")
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": [attention, "o_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **{**defaults, **options})
    peft = get_peft_model(base, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(folder)
    logits: torch.Tensor = peft.eval()(IDS).logits
    return logits


@torch.no_grad()
def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = model.eval()(IDS).logits
    return logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", MERGED)
def test_a_plain_lora_merges_to_the_logits_of_peft(
    tmp_path: Path, merge: Merge, kind: str, model_type: str, tied: bool
) -> None:
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    wanted = save_trained(model, tmp_path / "adapter", MERGED[kind])
    assert float((wanted - plain_logits(model.folder)).abs().max()) > 0.01
    merged = merge(tmp_path / "adapter", into=model, method="lora").weights
    save_folder(merged, model.folder, tmp_path / "merged")
    error = float((plain_logits(tmp_path / "merged") - wanted).abs().max())
    assert error <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_lora_is_refused_by_its_key(tmp_path: Path, merge: Merge, kind: str) -> None:
    key, options = REFUSED[kind]
    model = pico_model(tmp_path / "model")
    save_trained(model, tmp_path / "adapter", options)
    with pytest.raises(SetupError, match=f"adapter_config.json has {key} = .*only a plain LoRA"):
        merge(tmp_path / "adapter", into=model, method="lora")


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.mark.parametrize("method", [str(each.value) for each in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_other_method_of_peft_is_refused(tmp_path: Path, method: str) -> None:
    folder = write_config(tmp_path, peft_type=method, r=4)
    if method == "LORA":
        assert read_adapter_config(folder).rank == 4
        return
    with pytest.raises(SetupError, match=f"peft_type = '{method}'; only a plain LoRA"):
        read_adapter_config(folder)


def test_what_peft_writes_by_default_is_understood(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.rank, config.scale_of("model.layers.0.self_attn.q_proj")) == (4, 1.5)


@pytest.mark.parametrize("key", [field.name for field in fields(LoraConfig)])
def test_every_key_of_peft_is_listed_or_refused(tmp_path: Path, key: str) -> None:
    if key in READ_KEYS | IDLE_KEYS:
        return
    assert read_adapter_config(write_config(tmp_path, **{key: None}))
    for value in (["something"], {"some": "thing"}, "something", True, 1):
        folder = write_config(tmp_path, **{key: value})
        with pytest.raises(SetupError, match=f"has {key} = .*only a plain LoRA"):
            read_adapter_config(folder)


def test_every_listed_key_is_one_of_peft() -> None:
    assert READ_KEYS | IDLE_KEYS | NEUTRAL.keys() <= {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("key", ["use_new_thing", "new_config", "new_alpha"])
def test_a_key_of_tomorrow_is_refused_where_it_says_something(tmp_path: Path, key: str) -> None:
    for nothing in (None, False, [], {}, ""):
        assert read_adapter_config(write_config(tmp_path, **{key: nothing}))
    for value in (True, 0, 1.5, "x", ["x"], {"x": 1}):
        folder = write_config(tmp_path, **{key: value})
        with pytest.raises(SetupError, match=f"has {key} = "):
            read_adapter_config(folder)


def named_inits() -> list[str]:
    """Return the names that peft documents for `init_lora_weights`."""
    [annotation] = [f.type for f in fields(LoraConfig) if f.name == "init_lora_weights"]
    hint = eval(str(annotation), {"Literal": typing.Literal, "bool": bool})
    return [name for part in typing.get_args(hint) for name in typing.get_args(part)]


@pytest.mark.parametrize("init", [*named_inits(), "lora_ga", "init_of_tomorrow"])
def test_every_init_is_understood_or_refused(tmp_path: Path, init: str) -> None:
    folder = write_config(tmp_path, init_lora_weights=init)
    if init in ("gaussian", "eva", "orthogonal"):
        assert read_adapter_config(folder)
        return
    with pytest.raises(SetupError, match=r"init_lora_weights = .*a base from which its first B A"):
        read_adapter_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", 4.0),
        ("r", "4"),
        ("r", True),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", 1e308),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", "8"),
        ("lora_alpha", [8]),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"q_proj": 1e30}),
        ("target_modules", 3),
        ("target_modules", [3]),
        ("target_modules", "("),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", ["1"]),
        ("layers_to_transform", True),
        ("layers_pattern", [3]),
        ("base_model_name_or_path", 3),
        ("revision", {"a": 1}),
    ],
)
def test_a_malformed_value_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_config(tmp_path, **{key: value})
    with pytest.raises(SetupError, match=f"adapter_config.json has {key} = .*Correct the file"):
        read_adapter_config(folder)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
@pytest.mark.parametrize("pattern", [r"(?:\w|\.|..|...)*[^a-z._0-9]", r"(?:.|..|(?:\w+))*[^\w.]"])
def test_a_pattern_that_does_not_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, pattern: str
) -> None:
    monkeypatch.setattr(adapter_config, "PATTERN_SECONDS", 0.1)
    module = "model.layers.0." + 20 * "deeper." + "q_proj"
    folder = write_config(tmp_path, **{key: pattern if key == "target_modules" else {pattern: 4}})
    config = read_adapter_config(folder)
    with pytest.raises(SetupError, match=r"its pattern .* takes more than 0\.1 seconds"):
        assert config.is_target(module) and config.scale_of(module)


def test_a_pattern_that_peft_could_not_use_is_refused(tmp_path: Path) -> None:
    # Valid by itself, but not inside the group that peft puts it into.
    config = read_adapter_config(write_config(tmp_path, rank_pattern={r"((.)\2)*": 4}))
    with pytest.raises(SetupError, match="is no pattern"):
        config.rank_of("model.norm")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff", "[" * 100_000, "{}" + " " * 2**21])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SetupError, match=r"adapter_config\.json: (is|must)"):
        read_adapter_config(tmp_path)
