"""A cut carries what a config says for each layer over to those that stay, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from rotdistill_core.checkpoint.layer_lists import cut_config, layer_lists
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import max_difference, pico_folder, save_folder

FULL, SLIDING = "full_attention", "sliding_attention"
DEPTH = "num_hidden_layers"
IDS = torch.tensor([[3, 9, 17, 25, 33, 41, 50, 58, 7, 12, 20, 30]])
WINDOW = {"use_sliding_window": True, "sliding_window": 4}


def drop(folder: Path, *keys: str) -> None:
    """Leave keys out of config.json, as published configs do."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in config if key not in keys}))


@torch.no_grad()
def logits_of(folder: Path, without: set[int] = frozenset()) -> Tensor:  # type: ignore[assignment]
    """Return the logits of plain transformers, some layers passing the stream on as it is."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for i in without:
        model.model.layers[i].forward = MethodType(lambda _, states, *a, **k: states, object())
    return model(IDS).logits[0]


@pytest.mark.parametrize(
    ("model_type", "changes", "silent", "keep", "lists"),
    [
        (
            "qwen2",
            {DEPTH: 4, "max_window_layers": 2, **WINDOW},
            ("layer_types",),
            [0, 2, 3],
            {"layer_types": [FULL, SLIDING, SLIDING]},
        ),
        (
            "qwen3",
            {DEPTH: 5, "max_window_layers": 3, "head_dim": 8, **WINDOW},
            ("layer_types",),
            [0, 3],
            {"layer_types": [FULL, SLIDING]},
        ),
        (
            "smollm3",
            {DEPTH: 6, "no_rope_layers": [1, 1, 1, 0, 1, 1]},
            ("layer_types",),
            [0, 2, 3, 5],
            {"no_rope_layers": [1, 1, 0, 1], "layer_types": [FULL] * 4},
        ),
        (
            "smollm3",
            {DEPTH: 6, "no_rope_layer_interval": 2, **WINDOW},
            ("layer_types", "no_rope_layers"),
            [1, 2, 5],
            {"no_rope_layers": [0, 1, 0], "layer_types": [SLIDING, FULL, SLIDING]},
        ),
        (
            "smollm3",  # the class takes a longer list
            {DEPTH: 4, "no_rope_layers": [1, 0, 1, 1, 0, 1]},
            ("layer_types",),
            [1, 3],
            {"no_rope_layers": [0, 1]},
        ),
        (
            "gemma3_text",
            {DEPTH: 7, "head_dim": 8, "sliding_window": 4},
            ("layer_types", "_sliding_window_pattern"),
            [0, 5, 6],
            {"layer_types": [SLIDING, FULL, SLIDING]},
        ),
        ("llama", {DEPTH: 4, "eos_token_id": [2, 3, 5, 7]}, (), [0, 2, 3], {}),
        ("llama", {DEPTH: 3, "layer_types": [FULL] * 3}, (), [1, 2], {"layer_types": [FULL] * 2}),
        ("phi3", {DEPTH: 4, "sliding_window": 4}, (), [1, 3], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_cut_computes_what_transformers_computes_without_these_layers(
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
    silent: tuple[str, ...],
    keep: list[int],
    lists: dict[str, list[object]],
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, **changes)
    drop(folder, *silent)
    model = open_model(ModelRef(model=str(folder)))
    short = model.weights.cut(keep)
    save_folder(short, folder, tmp_path / "cut", torch.float64)
    saved = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert {key: saved[key] for key in lists} == lists
    assert saved.get("eos_token_id") == changes.get("eos_token_id", saved.get("eos_token_id"))
    others = set(range(changes[DEPTH])) - set(keep)
    assert max_difference(logits_of(tmp_path / "cut"), logits_of(folder, others)) < 1e-6


def test_a_cut_without_a_cut_writes_no_list_out() -> None:
    config = {"model_type": "qwen2", DEPTH: 3}
    assert cut_config(config, DEPTH, [0, 1, 2]) == config


def test_lists_inside_other_keys_belong_to_no_layer() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 64}
    config = {"model_type": "phi3", DEPTH: 4, "hidden_size": 32, "num_attention_heads": 4}
    cut = cut_config({**config, "rope_parameters": rope}, DEPTH, [0, 1, 3])
    assert cut["rope_parameters"] == rope
    by_type = {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "default"}}
    gemma = {"model_type": "gemma3_text", DEPTH: 2, "rope_parameters": by_type}
    assert cut_config(gemma, DEPTH, [1])["rope_parameters"] == by_type


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("mlp_layer_types", True),
        ("some_layers", True),
        ("eos_token_id", False),
        ("bad_words", False),
        ("architectures", False),
    ],
)
def test_keys_that_the_class_does_not_know_are_told_by_name(key: str, found: bool) -> None:
    values = ["sparse", "dense", "dense"] if key == "mlp_layer_types" else [1, 2, 3]
    if key == "architectures":
        values = ["A", "B", "C"]
    config = {"model_type": "llama", DEPTH: 3, key: values}
    assert layer_lists(config, DEPTH) == ({key: values} if found else {})


def declare(monkeypatch: pytest.MonkeyPatch, cls: type[PreTrainedConfig]) -> None:
    """Let a config class take the place of Qwen3's."""
    from transformers import CONFIG_MAPPING

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "qwen3", cls)


class Stubborn(Qwen3Config):
    """Computes a list from the layers' numbers, whatever is written."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.parity_of_layers = [i % 2 for i in range(self.num_hidden_layers)]


class Ambiguous(Qwen3Config):
    """Declares a list that it does not compute."""

    weights_of: list[float] | None = None
    wide_layers: list[int] | None = None


def test_a_list_that_the_class_makes_anew_is_refused_by_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declare(monkeypatch, Stubborn)
    config = {"model_type": "qwen3", DEPTH: 4}
    assert cut_config(config, DEPTH, [0, 1, 2])["parity_of_layers"] == [0, 1, 0]
    with pytest.raises(RecipeError, match=r"parity_of_layers would be \[0, 0\].* \[0, 1\]"):
        cut_config(config, DEPTH, [0, 2])


@pytest.mark.parametrize("given", [{"weights_of": [1.0, 2.0, 3.0]}, {"wide_layers": [0, 2]}])
def test_a_list_of_unknown_meaning_is_refused_by_key(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    declare(monkeypatch, Ambiguous)
    config = {"model_type": "qwen3", DEPTH: 3, **given}
    [key] = given
    with pytest.raises(RecipeError, match=f"cannot be cut: {key} in its config.json has"):
        cut_config(config, DEPTH, [0, 1])
    assert layer_lists({"model_type": "qwen3", DEPTH: 4, "weights_of": [1.0]}, DEPTH).keys() == {
        "layer_types"
    }


def test_a_config_that_its_class_refuses_is_named() -> None:
    config = {"model_type": "llama", DEPTH: 3, "layer_types": [FULL]}
    with pytest.raises(SetupError, match=r"does not take .* a llama model: .*layer_typ"):
        layer_lists(config, DEPTH)
