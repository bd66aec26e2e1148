"""A new table says what the model class says, or why no table can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rotdistill_scaffold._architecture import source_of, table_arguments

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, command_line, pico_folder

BIASES = ("q", "k", "v", "o")
CASES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 12, "intermediate_size": 56},
    "smollm3": {"no_rope_layers": [0, 1]},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
}


@pytest.fixture(scope="module")
def found() -> Callable[[str], dict[str, Any]]:
    """Return the arguments for a model type, looked up once."""
    known: dict[str, dict[str, Any]] = {}

    def arguments(model_type: str) -> dict[str, Any]:
        if model_type not in known:
            known[model_type] = table_arguments(model_type)
        return known[model_type]

    return arguments


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "model_type",
    ["granite", *(pytest.param(t, marks=pytest.mark.slow) for t in ("mistral", "smollm3"))],
)
def test_a_new_table_passes_the_kit(
    tmp_path: Path,
    found: Callable[[str], dict[str, Any]],
    model_type: str,
    check: Callable[[Adapter, Path], None],
) -> None:
    table = rope_decoder((model_type,), **found(model_type))
    check(table, pico_folder(tmp_path / "model", model_type, **CASES[model_type]))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "granite", "smollm3"])
def test_a_new_table_is_the_one_that_is_shipped(
    found: Callable[[str], dict[str, Any]], model_type: str
) -> None:
    new, shipped = rope_decoder((model_type,), **found(model_type)), adapter_for(model_type)
    for field in ("params", "sites", "writers", "eps_key", "gain_offset", "softcap_key"):
        assert getattr(new, field) == getattr(shipped, field)
    for field in ("logits_scaling_key", "embedding_multiplier_key", "residual_multiplier_key"):
        assert getattr(new, field) == getattr(shipped, field)
    assert new.requires == {}


def test_norms_offsets_and_caps_are_seen_and_what_is_not_computed_is_required() -> None:
    assert table_arguments("gemma3_text") == {
        "optional_biases": BIASES,
        "mlp_norm": "pre_feedforward_layernorm",
        "head_norms": ("q_norm", "k_norm"),
        "output_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gain_offset": 1.0,
        "softcap_key": "final_logit_softcapping",
        "requires": {"use_bidirectional_attention": False},
    }


@pytest.mark.parametrize(
    ("model_type", "reasons"),
    [
        ("stablelm", ["input_layernorm is a LayerNorm, which subtracts the mean"]),
        ("cohere", ["is a LayerNorm", "attention and MLP are parallel blocks"]),
        ("gpt_neox", ["is a LayerNorm", "parallel blocks", "it has no model.embed_tokens"]),
        ("mixtral", ["a mixture of experts (model.layers.0.mlp.experts"]),
        ("olmo", ["is a LayerNorm"]),
        ("olmo2", ["self_attn.q_norm.weight is one norm over all heads"]),
        ("phi3", ["it has no self_attn.q_proj"]),
        ("arcee", ["it has no mlp.gate_proj"]),
        ("t5", ["makes no small causal language model"]),
    ],
)
def test_what_no_table_can_express_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, reasons: list[str]
) -> None:
    # Also where an adapter is installed that was written by hand.
    monkeypatch.setattr("rotdistill_scaffold._templates.installed_plugins", lambda _: ())
    code, out, err = command_line("new", "adapter", model_type, "--in", str(tmp_path))
    assert (code, out, list(tmp_path.iterdir())) == (3, "", [])
    flat = " ".join(err.split())
    assert "cannot be expressed as a table" in flat or model_type == "t5"
    for reason in reasons:
        assert reason in flat


@pytest.mark.parametrize("arguments", [{}, {"biases": ("q",), "requires": {"a": 1.0, "b": None}}])
def test_the_source_of_a_table_is_the_table(arguments: dict[str, Any]) -> None:
    source = source_of("trial", arguments)
    table = eval(source, {"rope_decoder": rope_decoder})
    assert table.params == rope_decoder(("trial",), **arguments).params
    assert table.requires == arguments.get("requires", {})
