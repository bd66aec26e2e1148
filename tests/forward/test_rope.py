"""Rotary tables: every type that transformers has, on texts of unequal lengths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward, meta_model
from rotdistill_core.forward.rope import tables_by_length, transformers_config
from rotdistill_core.testing import pico_model

CPU = torch.device("cpu")
LONGEST = 24
"""`max_position_embeddings` of the models; some texts are shorter, some longer."""
BORDER = 16
"""`original_max_position_embeddings`; 16, 17 and 15 tokens lie on its sides."""
LENGTHS = (12, 15, 16, 17, 19, 24, 25, 30, 31, 31, 40)
FACTORS = [1.0, 1.5, 2.0, 3.0]
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": BORDER},
    "longrope": {
        "long_factor": [4.0 * factor for factor in FACTORS],
        "short_factor": FACTORS,
        "original_max_position_embeddings": BORDER,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BORDER,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {"original_max_position_embeddings": BORDER},
    "olmo2": {},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
    },
}
LENGTH_DEPENDENT = ("dynamic", "longrope")
COMBINATIONS = [
    (model_type, rope)
    for model_type in MODELS
    for rope in ROPES
    if model_type != "phi3" or rope in ("default", "longrope")  # its config allows no other
]


def parameters(model_type: str, rope: str) -> dict[str, Any]:
    """Return `rope_parameters` of a config: for Gemma 3, the type for one of two kinds of layer."""
    values = {"rope_type": rope, "rope_theta": 500.0, **ROPES[rope]}
    if model_type != "gemma3_text":
        return values
    local = {"rope_type": "default", "rope_theta": 100.0}
    return {"full_attention": values, "sliding_attention": local}


def rope_model(folder: Path, model_type: str, rope: str, **changes: Any) -> Model:
    settings: Mapping[str, Any] = {
        "max_position_embeddings": LONGEST,
        "rope_parameters": parameters(model_type, rope),
        **MODELS[model_type],
        **changes,
    }
    return pico_model(folder, model_type, **settings)


def texts_of(lengths: tuple[int, ...], prefix: int = 7) -> tuple[Text, ...]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(6, 64, (len(lengths), max(lengths)), generator=generator).tolist()
    texts = []
    for k, length in enumerate(lengths):
        tokens = (*drawn[0][:prefix], *drawn[k][prefix:length])
        texts.append(Text(f"t{k}", "en", Split.FIT, tokens, prefix + 1))
    return tuple(texts)


def walked(model: Model, layout: PackedTexts, budget: int = 1536) -> LayerwiseForward:
    walk = LayerwiseForward(model.weights, layout, CPU, torch.float32, budget)
    for _ in walk:
        walk.run()
    return walk


def logits_of(walk: LayerwiseForward, k: int) -> Tensor:
    """Return the logits of a text's rows after the prefix."""
    rows = walk.states[walk.layout.starts[k] : walk.layout.starts[k + 1]]
    return head_logits(walk.weights, final_norm(walk.weights, rows), walk.weights.head())


@cache
def plain_model(folder: Path) -> Any:
    """Return the model as transformers loads it; it has seen no text."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_logits(model: Model, tokens: tuple[int, ...]) -> Tensor:
    """Return what a model gives that transformers has just loaded, and that saw no other text."""
    logits: Tensor = copy.deepcopy(plain_model(model.folder))(torch.tensor([tokens])).logits[0]
    return logits


def assert_as_transformers(model: Model, walk: LayerwiseForward) -> None:
    for k, text in enumerate(walk.layout.texts):
        expected = plain_logits(model, text.tokens)[walk.layout.prefix_length(text) :]
        worst = float((logits_of(walk, k) - expected).abs().max() / expected.abs().max())
        assert worst <= 1e-5, f"{len(text.tokens)} tokens: {worst:.1e}"


def test_every_type_of_transformers_is_tried() -> None:
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize(("model_type", "rope"), COMBINATIONS)
def test_walk_is_transformers_on_both_sides_of_the_original_length(
    tmp_path: Path, model_type: str, rope: str, prefix: int
) -> None:
    model = rope_model(tmp_path / "model", model_type, rope)
    layout = PackedTexts(texts_of(LENGTHS), prefix)
    assert_as_transformers(model, walked(model, layout))


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
@pytest.mark.parametrize("lengths", [(31, 12, 40), (12, 31), (31, 31, 12, 12), (40,), (16, 17)])
def test_whichever_text_comes_first_all_are_right(
    tmp_path: Path, rope: str, lengths: tuple[int, ...]
) -> None:
    model = rope_model(tmp_path / "model", "llama", rope)
    walk = walked(model, PackedTexts(texts_of(lengths), 7))
    assert_as_transformers(model, walk)
    # The rows of the prefix are those of the first text.
    norm = final_norm(model.weights, walk.states[:7])
    prefix = head_logits(model.weights, norm, model.weights.head())
    torch.testing.assert_close(
        prefix, plain_logits(model, walk.layout.texts[0].tokens)[:7], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
def test_tables_matter_to_these_models(tmp_path: Path, rope: str) -> None:
    model = rope_model(tmp_path / "model", "llama", rope)
    tokens = texts_of((40,))[0].tokens
    beginning = plain_logits(model, tokens[:12])
    assert float((plain_logits(model, tokens)[:12] - beginning).abs().max()) > 1e-2


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
def test_plain_texts_and_small_budgets_change_nothing(tmp_path: Path, rope: str) -> None:
    model = rope_model(tmp_path / "model", "llama", rope)
    texts = texts_of(LENGTHS)
    plain = tuple(
        Text(f"g{k}", "en", Split.GUARD, text.tokens[3:], 1, plain=True)
        for k, text in enumerate(texts)
    )
    assert_as_transformers(model, walked(model, PackedTexts((*texts, *plain), 7), budget=40))


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_pass_from_a_later_boundary_ends_where_the_whole_pass_ends(
    tmp_path: Path, rope: str, first: int
) -> None:
    model = rope_model(tmp_path / "model", "llama", rope, num_hidden_layers=3)
    layout = PackedTexts(texts_of(LENGTHS), 7)
    walk = LayerwiseForward(model.weights, layout, CPU, torch.float32)
    states = [walk.states.clone()]
    for _ in walk:
        walk.run()
        states.append(walk.states.clone())
    late = LayerwiseForward(model.weights, layout, CPU, torch.float32)
    late.start_at(first, states[first].__getitem__)
    for _ in late:
        late.run()
    assert torch.equal(late.states, states[-1])


def keep_rows(seen: list[int], rows: Tensor, _: Tensor) -> None:
    seen += rows.tolist()


@pytest.mark.parametrize("rope", LENGTH_DEPENDENT)
def test_observers_see_each_row_once(tmp_path: Path, rope: str) -> None:
    model = rope_model(tmp_path / "model", "llama", rope)
    layout = PackedTexts(texts_of(LENGTHS), 7)
    walk = LayerwiseForward(model.weights, layout, CPU, torch.float32)
    for _ in walk:
        outputs: list[int] = []
        neurons: list[int] = []
        walk.run({"output": partial(keep_rows, outputs), "neurons": partial(keep_rows, neurons)})
        assert sorted(outputs) == sorted(neurons) == list(range(layout.rows))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_long_text_leaves_no_table_behind(tmp_path: Path, model_type: str) -> None:
    model = rope_model(tmp_path / "model", model_type, "dynamic")
    built: Any = meta_model(model.weights, torch.float32)
    tensors = {name: model.weights[name] for name in model.weights.entries}
    built.load_state_dict(tensors, strict=False, assign=True)
    built.tie_weights()
    texts = texts_of((40, 31, 24, 12))
    for text in texts:
        with torch.no_grad():
            found = copy.deepcopy(built)(torch.tensor([text.tokens])).logits[0]
            found_after_others = built(torch.tensor([text.tokens])).logits[0]
        assert torch.equal(found, found_after_others)
        torch.testing.assert_close(found, plain_logits(model, text.tokens), rtol=1e-5, atol=1e-5)


def test_original_length_of_an_older_config_is_found() -> None:
    config = transformers_config(
        {
            "model_type": "phi3",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": 100,
            "original_max_position_embeddings": 50,
            "rope_scaling": {"type": "longrope", "long_factor": FACTORS, "short_factor": FACTORS},
        }
    )
    tables = tables_by_length(config)
    assert tables(1) == tables(50) != tables(51) == tables(200)


def test_config_stays_as_it_was() -> None:
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "rope_parameters": {"type": "dynamic", "factor": 2.0},
    }
    before = copy.deepcopy(config)
    transformers_config(config)
    assert config == before


def test_texts_share_tables_where_transformers_gives_them_the_same() -> None:
    def tables(**values: Any) -> Any:
        settings = type("Config", (), {"max_position_embeddings": 100, "rope_parameters": values})
        return tables_by_length(settings)

    longrope = tables(rope_type="longrope", original_max_position_embeddings=50)
    assert longrope(1) == longrope(50) != longrope(51) == longrope(1000)
    dynamic = tables(rope_type="dynamic")
    assert dynamic(1) == dynamic(100) != dynamic(101) != dynamic(102)
    for rope in ("default", "linear", "yarn", "llama3", "proportional"):
        assert tables(rope_type=rope)(1) == tables(rope_type=rope)(1000)
    both = tables(
        full_attention={"rope_type": "longrope", "original_max_position_embeddings": 50},
        sliding_attention={"rope_type": "longrope", "original_max_position_embeddings": 60},
    )
    assert len({both(50), both(51), both(61)}) == 3
    assert tables()(1) == tables()(1000)
