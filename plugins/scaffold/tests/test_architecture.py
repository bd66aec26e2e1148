"""A new table says what the model class says, or why no table can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rotdistill_scaffold._lookup import QueryHeads
from rotdistill_scaffold._new_table import NewTable, nearest_table, new_table
from rotdistill_scaffold._source import cases_source, defaults_source, table_source

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.errors import SetupError
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import PICO, command_line

SAME = (
    "params",
    "sites",
    "writers",
    "fused",
    "eps_key",
    "gain_offset",
    "softcap_key",
    "logits_scaling_key",
    "embedding_multiplier_key",
    "residual_multiplier_key",
    "partial_rotary",
)
"""Fields of a table that the lookup must find as they were written by hand."""
REQUIRED: dict[str, dict[str, Any]] = {"gemma3_text": {"use_bidirectional_attention": False}}
GATE_UP = "model.layers.{i}.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    "model_type",
    [
        "phi3",
        "olmo2",
        *(
            pytest.param(model_type, marks=pytest.mark.slow)
            for model_type in ("llama", "qwen2", "qwen3", "granite", "smollm3", "gemma3_text")
        ),
    ],
)
def test_a_new_table_is_the_one_that_was_written_by_hand(model_type: str) -> None:
    new, shipped = nearest_table(model_type), adapter_for(model_type)
    for field in SAME:
        assert getattr(new.adapter, field) == getattr(shipped, field), field
    assert new.adapter.requires == REQUIRED.get(model_type, {})
    for heads in ({}, {"num_attention_heads": 8}):
        written = shipped.defaults({**PICO, **heads})
        found = new.adapter.defaults({**PICO, **heads})
        assert {key: found[key] for key in written if key in found} == {
            key: value for key, value in written.items() if key in found
        }
        assert {*written} - {*found} <= {
            "layer_types",
            "no_rope_layers",
            "vocab_size",
            "num_attention_heads",
        }


def test_a_table_of_an_architecture_without_an_adapter_passes_the_kit() -> None:
    table = new_table("glm")
    assert table.arguments == {
        "optional_biases": ("q", "k", "v"),
        "fused": {GATE_UP: tuple(GATE_UP.replace("gate_up", key) for key in ("gate", "up"))},
        "key_gauge": False,  # half of each head is turned
        "partial_rotary": True,
    }
    assert table.cases[0] == {"head_dim": 12, "intermediate_size": 56}


def test_norms_on_heads_and_on_branches_are_told_apart() -> None:
    assert nearest_table("exaone4").arguments == {
        "attention_norm": "",
        "mlp_norm": "",
        "head_norms": ("q_norm", "k_norm"),
        "output_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }


def test_only_keys_of_the_config_class_are_tried() -> None:
    first, second = nearest_table("granite").cases
    assert first == {"intermediate_size": 56}
    assert second == {"tie_word_embeddings": False, "num_key_value_heads": 4}


def test_a_table_that_fails_the_kit_is_refused_with_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = NewTable("llama", {"biases": ("q",), "gain_offset": 1.0}, {}, ({},))
    monkeypatch.setattr("rotdistill_scaffold._new_table.nearest_table", lambda _: wrong)
    with pytest.raises(SetupError) as raised:
        new_table("llama")
    assert "rope_decoder(biases=('q',), gain_offset=1.0), is wrong; " in str(raised.value)
    assert "model.layers.{i}.self_attn.q_proj.bias is declared" in str(raised.value)


ROWS = re.findall(
    r"^\| `(\w+)` \| (writes|refuses) \|.*\| (.+) \|$",
    (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
REFUSED = [(model_type, reasons) for model_type, what, reasons in ROWS if what == "refuses"]


@pytest.mark.parametrize(("model_type", "reasons"), REFUSED)
def test_the_readme_has_the_reasons_of_each_refusal(
    tmp_path: Path, model_type: str, reasons: str
) -> None:
    code, out, err = command_line("new", "adapter", model_type, "--in", str(tmp_path))
    assert (code, out, list(tmp_path.iterdir())) == (3, "", [])
    assert f"cannot be expressed as a table: {reasons}. Nothing was" in " ".join(err.split())


@pytest.mark.parametrize("model_type", ["exaone4", "glm", "olmo2"])
def test_the_readme_has_the_arguments_of_a_table(model_type: str) -> None:
    [found] = [found for name, what, found in ROWS if (name, what) == (model_type, "writes")]
    arguments = nearest_table(model_type).arguments
    assert found == ", ".join(f"`{name}`" for name in arguments)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "transformers makes no causal language model of it"),
        ("bailing_hybrid", "a mixture of experts"),  # whose norms raise errors of their own
    ],
)
def test_classes_that_cannot_be_run_small_are_refused_too(model_type: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        nearest_table(model_type)


@pytest.mark.parametrize(
    "table",
    [
        NewTable("trial", {}, {"num_key_value_heads": QueryHeads}, ({},)),
        NewTable(
            "trial",
            {
                "biases": ("q",),
                "requires": {"a": 1.0, "b": None},
                "fused": {"model.layers.{i}.self_attn.qkv_proj.weight": tuple("qkv") * 10},
            },
            {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
            ({"head_dim": 12}, {"tie_word_embeddings": False}),
        ),
    ],
)
def test_the_source_of_a_table_is_the_table(table: NewTable) -> None:
    values = f"def defaults(config):\n    return {{\n{defaults_source(table)}    }}\n"
    names: dict[str, Any] = {"rope_decoder": rope_decoder}
    exec(f"{values}\nTABLE = {table_source(table)}\nCASES = (\n{cases_source(table)})", names)
    made: Adapter = names["TABLE"]
    config = {"num_attention_heads": 4}
    assert made.params == table.adapter.params
    assert (made.requires, made.fused) == (table.adapter.requires, table.adapter.fused)
    assert made.defaults(config) == table.adapter.defaults(config)
    assert names["CASES"] == table.cases
