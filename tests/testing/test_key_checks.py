"""The kit names the config key, module or tensor of a table that is wrong, before steps use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention

from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import adapter_problems, pico_folder
from rotdistill_core.testing.adapter_checks import WrongTableError
from rotdistill_core.testing.key_checks import (
    KEY_CHECKS,
    a_cut_of_sizes_computes_what_transformers_computes,
    a_narrower_stream_has_the_same_embeddings,
    every_size_key_sets_its_size,
)

LLAMA = adapter_for("llama")


def does_not_make(field: str, key: str, number: int, what: str, right: str) -> str:
    return (
        f'{field} is "{key}": with {number} there, transformers does not make a model of {number} '
        f"{what}; {right} does"
    )


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (
            {"neurons_key": "hidden_size"},
            does_not_make("neurons_key", "hidden_size", 56, "neurons", "intermediate_size"),
        ),
        (
            {"groups_key": "num_attention_heads"},
            does_not_make(
                "groups_key", "num_attention_heads", 4, "key/value heads", "num_key_value_heads"
            ),
        ),
        (
            {"query_key": "num_key_value_heads"},
            does_not_make(
                "query_key", "num_key_value_heads", 8, "query heads", "num_attention_heads"
            ),
        ),
        (
            {"width_key": "intermediate_size"},
            does_not_make(
                "width_key", "intermediate_size", 64, "channels of the stream", "hidden_size"
            ),
        ),
        (
            {"depth_key": "num_key_value_heads"},
            does_not_make("depth_key", "num_key_value_heads", 3, "layers", "num_hidden_layers"),
        ),
        (
            {"query_key": "num_heads"},
            'query_key is "num_heads", and LlamaConfig has no such key. '
            'Did you mean "num_key_value_heads"?',
        ),
        ({"eps_key": "eps"}, 'eps_key is "eps", and LlamaConfig has no such key.'),
        ({"neurons_key": ""}, 'neurons_key is "", and LlamaConfig has no such key.'),
        (
            {"residual_multiplier_key": "residual_multiplier"},
            'residual_multiplier_key is "residual_multiplier", and LlamaConfig has no such key.',
        ),
        (
            {"norm": "model.nrm.weight"},
            'norm is "model.nrm.weight", and the model has no such tensor. '
            'Did you mean "model.norm.weight"?',
        ),
        (
            {"head": "model.norm.weight"},
            'head is "model.norm.weight", which is a norm gain in `params`',
        ),
        (
            {"layers": "model.layer"},
            'layers is "model.layer", and the model has no such module. '
            'Did you mean "model.layers"?',
        ),
    ],
    ids=str,
)
def test_a_wrong_name_is_one_problem(
    tmp_path: Path, wrong: Mapping[str, Any], problem: str
) -> None:
    found, rest = adapter_problems(replace(LLAMA, **wrong), tmp_path, checks=KEY_CHECKS)
    assert found == problem
    assert rest.startswith("not checked before these are right: ")


@pytest.mark.parametrize("model_type", ["qwen3", "phi3", "olmo2", "gemma3_text"])
def test_the_keys_of_shipped_tables_are_right(tmp_path: Path, model_type: str) -> None:
    sizes = {"num_key_value_heads": 4} if model_type == "phi3" else {}
    folder = pico_folder(tmp_path / "model", model_type, **sizes)
    every_size_key_sets_its_size(adapter_for(model_type), folder)


def test_embeddings_that_depend_on_the_width_are_refused(tmp_path: Path) -> None:
    """Gemma multiplies them by the root of its width, which a narrower stream would change."""
    table = replace(LLAMA, model_types=("gemma",), gain_offset=1.0)
    folder = pico_folder(tmp_path / "model", "gemma", head_dim=8)
    with pytest.raises(WrongTableError) as caught:
        a_narrower_stream_has_the_same_embeddings(table, folder)
    [problem] = caught.value.problems
    assert problem.startswith("the class multiplies embeddings by a function of hidden_size: with ")
    assert "24 channels of 32 they are 0.866 times as large" in problem


def test_sizes_that_do_not_follow_the_config_are_named(tmp_path: Path) -> None:
    sizes = LLAMA.dims
    table = replace(LLAMA, dims=lambda config: {**sizes(config), "neurons.{i}": 48})
    with pytest.raises(WrongTableError) as caught:
        every_size_key_sets_its_size(table, pico_folder(tmp_path / "model"))
    assert caught.value.problems == [
        '`dims` or `heads`: with intermediate_size = 56, "neurons.0" is 48 in the table and 56 in '
        "transformers' model"
    ]


def test_a_cut_that_computes_something_else_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that takes its scale from the stream and the number of heads, and not from the
    width of a head, has another scale in a cut."""
    whole = LlamaAttention.__init__

    def scaled(module: Any, config: Any, *args: Any, **options: Any) -> None:
        whole(module, config, *args, **options)
        module.scaling = (config.hidden_size / config.num_attention_heads) ** -0.5

    folder = pico_folder(tmp_path / "model")
    a_cut_of_sizes_computes_what_transformers_computes(LLAMA, folder)
    monkeypatch.setattr(LlamaAttention, "__init__", scaled)
    with pytest.raises(WrongTableError, match="a cut to the first half of all neurons and heads"):
        a_cut_of_sizes_computes_what_transformers_computes(LLAMA, folder)
