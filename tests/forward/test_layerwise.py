"""The layerwise forward pass: what it computes, what observers see, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RotdistillError
from rotdistill_core.forward.layerwise import Deal, LayerwiseForward, Observer
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.testing import final_states, pico_model, pico_samples, plain_transformers

CPU = torch.device("cpu")
WIDTHS = {"mid": 32, "neurons": 48, "mlp": 32, "heads": 32, "output": 32}
"""What observers see, and how wide it is."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "final_logit_softcapping": 5.0,
    },
}
"""Model type -> changes of the pico config."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def layout() -> PackedTexts:
    return pico_samples(texts=12).layout


def start(
    weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float32, budget: int = 40
) -> LayerwiseForward:
    return LayerwiseForward(weights, layout, CPU, dtype, budget)


def boundaries(forward: LayerwiseForward) -> Iterator[Tensor]:
    """Yield the states at each boundary that is left."""
    yield forward.states.clone()
    for _ in forward:
        forward.run()
        yield forward.states.clone()


def plain_states(model: Model, layout: PackedTexts) -> list[Tensor]:
    """Return the stream at every boundary as plain transformers computes it in float32."""
    return plain_transformers(model.adapter, model.folder, layout, torch.float32)[0]


def assert_near(states: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", [0, 6])
def test_states_are_those_of_plain_transformers_at_every_boundary(
    tmp_path: Path, model_type: str, tied: bool, prefix: int
) -> None:
    changes = {"tie_word_embeddings": tied, **ARCHITECTURES[model_type]}
    model = pico_model(tmp_path / "model", model_type, **changes)
    layout = pico_samples(texts=12, prefix=prefix).layout
    states = boundaries(start(model.weights, layout))
    for found, expected in zip(states, plain_states(model, layout), strict=True):
        assert_near(found, expected)


def test_texts_of_these_tests_fall_into_batches_of_several_lengths(layout: PackedTexts) -> None:
    batches = layout.batches(40)
    lengths = [{len(layout.texts[k].tokens) for k in batch} for batch in batches]
    assert len(batches) > 2
    assert any(len(batch) > 1 for batch in batches)
    assert len(set.union(*lengths)) > 3


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_batch_budget_does_not_change_the_states(
    llama: Model, layout: PackedTexts, budget: int
) -> None:
    *_, states = boundaries(start(llama.weights, layout, torch.float64, budget))
    assert_near(states, final_states(llama.weights, layout), 1e-12)


def test_shared_prefix_gives_what_every_text_gives_alone(llama: Model, layout: PackedTexts) -> None:
    apart = PackedTexts(layout.texts, 0)
    alone, shared = final_states(llama.weights, apart), final_states(llama.weights, layout)
    for k in range(len(layout.texts)):
        first, last = apart.starts[k], apart.starts[k + 1]
        prefix = alone[first : first + layout.prefix]
        rest = alone[first + layout.prefix : last]
        assert_near(prefix, shared[: layout.prefix], 1e-12)
        assert_near(rest, shared[layout.starts[k] : layout.starts[k + 1]], 1e-12)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_plain_texts_run_together_with_texts_that_have_the_prefix(
    tmp_path: Path, model_type: str
) -> None:
    model = pico_model(tmp_path / "model", model_type, **ARCHITECTURES[model_type])
    mixed = pico_samples(texts=5, guard=3).layout
    apart = PackedTexts(mixed.texts, 0)
    together = final_states(model.weights, mixed)
    alone = final_states(model.weights, apart)
    for k, text in enumerate(mixed.texts):
        first, last = apart.starts[k] + mixed.prefix_length(text), apart.starts[k + 1]
        assert_near(together[mixed.starts[k] : mixed.starts[k + 1]], alone[first:last], 1e-12)
    guard = mixed.select(Split.GUARD)
    expected = together[guard.row_indices_in(mixed)]
    assert_near(final_states(model.weights, guard), expected, 1e-12)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_float64_agrees_with_plain_transformers_to_float32(tmp_path: Path, model_type: str) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    layout = pico_samples(texts=5).layout
    states = final_states(model.weights, layout)
    assert states.dtype == torch.float64
    assert_near(states.float(), plain_states(model, layout)[-1])


class Recording:
    """What observers saw of one pass: each row once, in its place."""

    def __init__(self, rows: int) -> None:
        self.values = {
            site: torch.full((rows, width), torch.nan, dtype=torch.float64)
            for site, width in WIDTHS.items()
        }
        self.visits = dict.fromkeys(WIDTHS, 0)

    def observers(self) -> dict[str, Observer]:
        return {site: partial(self._see, site) for site in WIDTHS}

    def _see(self, site: str, rows: Tensor, values: Tensor) -> None:
        assert bool(self.values[site][rows].isnan().all())
        self.values[site][rows] = values
        self.visits[site] += len(rows)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_observers_see_every_row_once_and_in_its_place(
    tmp_path: Path, model_type: str, layout: PackedTexts
) -> None:
    model = pico_model(tmp_path / "model", model_type, **ARCHITECTURES[model_type])
    forward = start(model.weights, layout, torch.float64)
    for i in forward:
        before = forward.states.clone()
        recording = Recording(layout.rows)
        forward.run(recording.observers())
        seen = recording.values
        assert recording.visits == dict.fromkeys(WIDTHS, layout.rows)
        W_down = model.weights[f"model.layers.{i}.mlp.down_proj.weight"].double()
        W_o = model.weights[f"model.layers.{i}.self_attn.o_proj.weight"].double()
        assert_near(seen["output"], forward.states, 0.0)
        assert_near(seen["neurons"] @ W_down.T, seen["output"] - seen["mid"], 1e-12)
        assert_near(seen["mlp"], seen["output"] - seen["mid"], 1e-12)
        assert_near(seen["heads"] @ W_o.T, seen["mid"] - before, 1e-12)


def test_run_without_advance_leaves_the_states_and_the_layer_open(
    llama: Model, layout: PackedTexts
) -> None:
    forward = start(llama.weights, layout)
    outputs = torch.empty(layout.rows, 32)

    def keep(rows: Tensor, X: Tensor) -> None:
        outputs[rows] = X

    for i in forward:
        before = forward.states.clone()
        forward.run({"output": keep}, advance=False)
        assert torch.equal(forward.states, before)
        assert forward.boundary == i
        forward.run()
        assert torch.equal(forward.states, outputs)
        assert forward.boundary == i + 1


def test_observers_are_gone_after_their_run(llama: Model, layout: PackedTexts) -> None:
    forward = start(llama.weights, layout)
    calls: list[int] = []

    def count(rows: Tensor, _: Tensor) -> None:
        calls.append(len(rows))

    for _ in forward:
        forward.run({"neurons": count, "output": count}, advance=False)
        observed = len(calls)
        assert observed > 0
        forward.run()
        assert len(calls) == observed
        calls.clear()


def test_observers_are_gone_after_one_of_them_failed(llama: Model, layout: PackedTexts) -> None:
    forward = start(llama.weights, layout)

    def fail(*_: Tensor) -> None:
        raise ValueError

    for _ in forward:
        with pytest.raises(ValueError):
            forward.run({"neurons": fail})
        forward.run()
    assert_near(forward.states, final_states(llama.weights, layout, torch.float32))


def test_replacing_a_parameter_equals_running_the_edited_weights(
    llama: Model, layout: PackedTexts
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    new = -2.0 * llama.weights[name]
    forward = start(llama.weights, layout)
    edited = start(llama.weights.edit({name: new}), layout)
    for i, _ in zip(forward, edited, strict=True):
        if i == 1:
            forward.replace(name, new.double())
        forward.run()
        edited.run()
    assert torch.equal(forward.states, edited.states)
    unedited = final_states(llama.weights, layout, torch.float32)
    assert not torch.allclose(forward.states, unedited, atol=1e-2)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_pass_from_a_later_boundary_ends_where_the_whole_pass_ends(
    tmp_path: Path, layout: PackedTexts, first: int
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    states = list(boundaries(start(model.weights, layout)))
    late = start(model.weights, layout)
    late.states = states[first].clone()
    late.boundary = first
    opened = []
    for i in late:
        opened.append(i)
        late.run()
    assert opened == list(range(first, 4))
    assert torch.equal(late.states, states[-1])


def test_layer_that_was_opened_and_not_moved_on_is_an_error(
    llama: Model, layout: PackedTexts
) -> None:
    forward = start(llama.weights, layout)
    with pytest.raises(RotdistillError, match="layer 0 was opened and the states were not moved"):
        for _ in forward:
            forward.run(advance=False)


def test_forward_pass_leaves_the_weights_as_they_were(llama: Model, layout: PackedTexts) -> None:
    before = {name: llama.weights[name].clone() for name in llama.weights.entries}
    final_states(llama.weights, layout)
    assert all(torch.equal(llama.weights[name], tensor) for name, tensor in before.items())


def test_processes_get_about_the_same_number_of_tokens() -> None:
    lengths = (203, *[43] * 10)
    texts = [Text(str(k), "en", Split.FIT, tuple(range(n)), 3) for k, n in enumerate(lengths)]
    layout = PackedTexts(tuple(texts), prefix=3)
    two = Ranks()
    two.count = 2
    deal = Deal.of(layout, 80, lambda _: None, two)
    assert deal.batches == Deal.of(layout, 80, lambda _: None, ALONE).batches
    loads = [0, 0]
    for batch, owner in zip(*deal, strict=True):
        loads[owner] += layout.padded_tokens(batch)
    # The long text, and five batches of two texts of 40 tokens.
    assert loads == [280, 320]
    assert deal.owners[0] == 0  # it continues the prefix, which the leading process shows
