"""The layer-outer walk against a plain transformers forward, its observers, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import RotdistillError
from rotdistill_core.forward.head import final_norm, head_logits, log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.testing import final_states, pico_model, pico_samples, plain_transformers

CPU = torch.device("cpu")
SITES = {"mid": 32, "neurons": 48, "mlp": 32, "heads": 32}
KINDS: dict[str, dict[str, object]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "final_logit_softcapping": 5.0,
    },
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "llama")


@pytest.fixture
def layout() -> PackedTexts:
    return pico_samples(texts=12).layout


def walk_of(
    weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float32, budget: int = 40
) -> LayerwiseForward:
    return LayerwiseForward(weights, layout, CPU, dtype, budget)


def plain(model: Model, layout: PackedTexts) -> tuple[list[Tensor], Tensor]:
    """Return the stream at every boundary and the logits of plain transformers in float32."""
    return plain_transformers(model.adapter, model.folder, layout, torch.float32)


def assert_near(made: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", [0, 6])
def test_the_walk_computes_what_plain_transformers_computes(
    tmp_path: Path, model_type: str, tied: bool, prefix: int
) -> None:
    model = pico_model(
        tmp_path / "model", model_type, tie_word_embeddings=tied, **KINDS[model_type]
    )
    layout = pico_samples(texts=12, prefix=prefix).layout
    states, logits = plain(model, layout)
    walk = walk_of(model.weights, layout)
    assert model.weights.tied is tied
    assert_near(walk.states, states[0])
    for i in walk:
        walk.run()
        assert_near(walk.states, states[i + 1])
    assert_near(
        head_logits(model.weights, final_norm(model.weights, walk.states), model.weights.head()),
        logits,
    )
    assert_near(log_probs(model.weights, walk.states), logits.log_softmax(-1))


def test_the_texts_of_these_tests_fall_into_batches_of_several_lengths(layout: PackedTexts) -> None:
    batches = layout.batches(40)
    lengths = [{len(layout.texts[k].tokens) for k in batch} for batch in batches]
    assert len(batches) > 2
    assert any(len(batch) > 1 for batch in batches)
    assert len(set.union(*lengths)) > 3


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_the_batch_budget_does_not_change_the_states(
    llama: Model, layout: PackedTexts, budget: int
) -> None:
    walk = walk_of(llama.weights, layout, torch.float64, budget)
    for _ in walk:
        walk.run()
    assert_near(walk.states, final_states(llama.weights, layout), 1e-12)


def test_the_shared_prefix_gives_what_every_text_alone_gives(
    llama: Model, layout: PackedTexts
) -> None:
    apart = PackedTexts(layout.texts, 0)
    alone, shared = final_states(llama.weights, apart), final_states(llama.weights, layout)
    for k in range(len(layout.texts)):
        first, last = apart.starts[k], apart.starts[k + 1]
        assert_near(alone[first : first + layout.prefix], shared[: layout.prefix], 1e-12)
        assert_near(
            alone[first + layout.prefix : last],
            shared[layout.starts[k] : layout.starts[k + 1]],
            1e-12,
        )


@pytest.mark.parametrize("model_type", KINDS)
def test_plain_texts_are_walked_beside_those_with_the_prefix(
    tmp_path: Path, model_type: str
) -> None:
    model = pico_model(tmp_path / "model", model_type, **KINDS[model_type])
    mixed = pico_samples(texts=5, guard=3).layout
    together, apart = final_states(model.weights, mixed), PackedTexts(mixed.texts, 0)
    alone = final_states(model.weights, apart)
    for k, text in enumerate(mixed.texts):
        last = apart.starts[k + 1]
        assert_near(
            together[mixed.starts[k] : mixed.starts[k + 1]],
            alone[apart.starts[k] + mixed.prefix_length(text) : last],
            1e-12,
        )
    assert_near(
        final_states(model.weights, mixed.select("guard")),
        together[mixed.select("guard").row_indices_in(mixed)],
        1e-12,
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_float64_agrees_with_plain_transformers_to_float32(tmp_path: Path, model_type: str) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    layout = pico_samples(texts=5).layout
    assert_near(final_states(model.weights, layout).float(), plain(model, layout)[0][-1])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_observers_see_every_row_once_and_in_its_place(
    tmp_path: Path, model_type: str, layout: PackedTexts
) -> None:
    model = pico_model(tmp_path / "model", model_type, **KINDS[model_type])
    walk = walk_of(model.weights, layout, torch.float64)
    for i in walk:
        seen = {
            site: torch.full((layout.rows, width), torch.nan, dtype=torch.float64)
            for site, width in SITES.items()
        }
        seen["output"] = torch.full((layout.rows, 32), torch.nan, dtype=torch.float64)
        visits = dict.fromkeys(seen, 0)

        def note(
            site: str, rows: Tensor, values: Tensor, seen: dict = seen, visits: dict = visits
        ) -> None:
            assert bool(seen[site][rows].isnan().all())
            seen[site][rows] = values
            visits[site] += len(rows)

        before = walk.states.clone()
        walk.run({site: lambda rows, values, site=site: note(site, rows, values) for site in seen})
        assert visits == dict.fromkeys(seen, layout.rows)
        down = model.weights[f"model.layers.{i}.mlp.down_proj.weight"].double()
        o = model.weights[f"model.layers.{i}.self_attn.o_proj.weight"].double()
        assert_near(seen["output"], walk.states, 0.0)
        assert_near(seen["neurons"] @ down.T, seen["output"] - seen["mid"], 1e-12)
        assert_near(seen["mlp"], seen["output"] - seen["mid"], 1e-12)
        assert_near(seen["heads"] @ o.T, seen["mid"] - before, 1e-12)


def test_a_run_that_does_not_keep_leaves_the_states_and_the_layer_open(
    llama: Model, layout: PackedTexts
) -> None:
    walk = walk_of(llama.weights, layout)
    outputs = torch.empty(layout.rows, 32)

    def note(rows: Tensor, X: Tensor) -> None:
        outputs[rows] = X

    for i in walk:
        before = walk.states.clone()
        walk.run({"output": note}, keep=False)
        assert torch.equal(walk.states, before)
        assert walk.boundary == i
        walk.run()
        assert torch.equal(walk.states, outputs)
        assert walk.boundary == i + 1


def test_observers_are_gone_after_their_run(llama: Model, layout: PackedTexts) -> None:
    walk = walk_of(llama.weights, layout)
    calls: list[int] = []
    for _ in walk:
        walk.run(
            {
                "neurons": lambda rows, _: calls.append(len(rows)),
                "output": lambda rows, _: calls.append(len(rows)),
            },
            keep=False,
        )
        first = len(calls)
        walk.run()
        assert len(calls) == first
        calls.clear()


def test_replacing_a_parameter_equals_walking_the_edited_weights(
    llama: Model, layout: PackedTexts
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    new = -2.0 * llama.weights[name]
    walk, edited = walk_of(llama.weights, layout), walk_of(llama.weights.edit({name: new}), layout)
    for i, _ in zip(walk, edited, strict=True):
        if i == 1:
            walk.replace(name, new.double())
        walk.run()
        edited.run()
    assert torch.equal(walk.states, edited.states)
    assert not torch.allclose(
        walk.states, final_states(llama.weights, layout, torch.float32), atol=1e-2
    )


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
def test_a_walk_from_a_later_boundary_ends_where_the_whole_walk_ends(
    tmp_path: Path, layout: PackedTexts, start: int
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    whole = walk_of(model.weights, layout)
    kept = [whole.states.clone()]
    for _ in whole:
        whole.run()
        kept.append(whole.states.clone())
    late = walk_of(model.weights, layout)
    late.states, late.boundary = kept[start].clone(), start
    opened = []
    for i in late:
        opened.append(i)
        late.run()
    assert opened == list(range(start, 4))
    assert torch.equal(late.states, kept[-1])


def test_a_layer_that_was_opened_and_not_moved_on_is_an_error(
    llama: Model, layout: PackedTexts
) -> None:
    walk = walk_of(llama.weights, layout)
    with pytest.raises(
        RotdistillError, match="layer 0 was opened and the states were not moved on"
    ):
        for _ in walk:
            walk.run(keep=False)


def test_a_walk_leaves_the_weights_view_as_it_was(llama: Model, layout: PackedTexts) -> None:
    before = {name: llama.weights[name].clone() for name in llama.weights.entries}
    final_states(llama.weights, layout)
    assert all(torch.equal(llama.weights[name], tensor) for name, tensor in before.items())
