"""Choosing layers by KL, and sharing a cut between depth and width: planted truth is found."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_chop._depth import PruningLoss, chosen, least_kl
from rotdistill_chop._keep import Size, Trial, splits
from rotdistill_chop.step import Chop

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.questions import Question
from rotdistill_core.errors import RecipeError
from rotdistill_core.testing import logits, pico_model, pico_output, pico_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pico_samples(texts=50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=6)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def silenced(weights: Weights, layers: tuple[int, ...], factor: float = 0.0) -> Weights:
    parts = ("mlp.down_proj", "self_attn.o_proj")
    names = [f"model.layers.{i}.{part}.weight" for i in layers for part in parts]
    return weights.edit({name: factor * weights[name] for name in names})


def chopped(
    weights: Weights, model: Model, samples: Samples, root: Path, **options: Any
) -> tuple[Weights, dict[str, Any]]:
    out = pico_output(root / "runs")
    return Chop(**options).fold(weights, Pair(model, model), samples, out, quiet), out.notes


@pytest.mark.parametrize("idle", [(1, 3), (1, 4), (2, 3), (2, 4)])
def test_layers_that_do_nothing_go_wherever_they_are(
    model: Model, samples: Samples, tmp_path: Path, idle: tuple[int, int]
) -> None:
    weights = silenced(model.weights, idle)
    made, notes = chopped(weights, model, samples, tmp_path, layers=4, choose="kl")
    assert notes["layers kept"] == [i for i in range(6) if i not in idle]
    assert notes["KL by number of layers cut"]["2"] == pytest.approx(0, abs=1e-6)
    assert made.lineage.depths == (*notes["layers kept"], 6)


def test_a_layer_that_undoes_its_neighbour_goes_with_it(
    model: Model, samples: Samples, tmp_path: Path
) -> None:
    weights = silenced(model.weights, (2, 4), 1e-3)
    copies = {
        n.replace(".2.", ".3."): weights[n]
        for n in weights.entries
        if n.startswith("model.layers.2.")
    }
    _, notes = chopped(weights.edit(copies), model, samples, tmp_path, layers=3, choose="kl")
    assert notes["layers kept"] == [0, 1, 5]


def test_the_kl_of_the_search_is_that_of_the_cut_student(model: Model, samples: Samples) -> None:
    judge = PruningLoss(model.weights, samples, 10**6, CPU, torch.float64)
    rows = judge.rows
    whole = logits(model.weights, judge.walk.layout)[rows].log_softmax(-1)

    def kl(gone: tuple[int, ...]) -> float:
        made = logits(model.weights.cut([i for i in range(6) if i not in gone]), judge.walk.layout)[
            rows
        ].log_softmax(-1)
        return float((whole.exp() * (whole - made)).sum(-1).mean())

    found = least_kl(judge, 3, quiet)
    assert list(found) == [0, 1, 2, 3]
    assert found[0] == ([], 0.0)
    for r, (gone, value) in found.items():
        every = {some: kl(some) for some in itertools.combinations(range(1, 5), r)}
        assert value == pytest.approx(every[tuple(gone)], abs=1e-9)
        assert value <= sorted(every.values())[len(every) // 2]
    assert found[1][1] == pytest.approx(min(kl((i,)) for i in range(1, 5)), abs=1e-9)


def test_own_answers_come_first_and_rows_are_at_most_those_asked_for(samples: Samples) -> None:
    own = tuple(
        Question(text.id, "en", text.split, "?", None) for text in samples.layout.texts[3::10]
    )
    marked = Samples(samples.layout, own, "")
    assert {text.id for text in chosen(marked, "validation", 100).texts} <= {
        question.id for question in own
    }
    assert chosen(marked, "validation", 100).rows <= 100
    assert len(chosen(marked, "validation", 1).texts) == 1
    assert len(chosen(marked, "validation", 10**6).texts) == 10


def test_a_share_takes_layers_where_layers_are_idle(
    model: Model, samples: Samples, tmp_path: Path
) -> None:
    weights = silenced(model.weights, (2, 3))
    made, notes = chopped(weights, model, samples, tmp_path, keep=0.67, choose="kl")
    assert notes["layers kept"] == [0, 1, 4, 5]
    assert (notes["neurons"], notes["groups"], notes["width"]) == (48, 2, 32)
    assert float(notes["splits"]["4 layers"].rpartition(" ")[2]) < 1e-4
    assert made.depth == 4


def test_a_share_takes_neurons_where_neurons_are_dead(
    model: Model, samples: Samples, tmp_path: Path
) -> None:
    down = [n for n in model.weights.entries if n.endswith("down_proj.weight")]
    weights = model.weights.edit(
        {n: model.weights[n].index_fill(1, torch.arange(12, 48), 0.0) for n in down}
    )
    made, notes = chopped(weights, model, samples, tmp_path, keep=0.6)
    assert (made.depth, notes["width"]) == (6, 32)
    assert notes["neurons"] >= 12
    assert float(notes["splits"]["6 layers"].rpartition(" ")[2]) < 1e-3


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.9])
def test_every_split_keeps_about_that_share(model: Model, keep: float) -> None:
    inner, outer = Size.of(model.weights).parameters(model.weights)
    assert inner + outer == model.weights.parameters
    found = splits(model.weights, keep) | splits(model.weights, keep, 6)
    assert len(found) >= 2
    for size in found.values():
        assert (
            -6 * 3 * 32
            <= sum(size.parameters(model.weights)) - outer - keep * inner
            <= 0.002 * inner
        )


def test_a_share_of_which_nothing_can_be_made_is_refused(
    model: Model, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"chop: keep = 0\.01 "):
        chopped(model.weights, model, samples, tmp_path, keep=0.01)


def test_the_small_refit_brings_a_cut_student_nearer(model: Model, samples: Samples) -> None:
    trial = Trial(model.weights, samples, 10**6, CPU, torch.float32)
    cut = model.weights.cut([0, 1, 4, 5])
    layout = trial.layout
    said, made = (logits(w, layout)[trial.rows].log_softmax(-1) for w in (model.weights, cut))
    assert trial.kl(model.weights) < 1e-6
    assert trial.kl(cut) < 0.9 * float((said.exp() * (said - made)).sum(-1).mean())
