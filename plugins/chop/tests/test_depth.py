"""Choosing layers by angle and by KL: planted truth is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from rotdistill_chop._depth import LayerSelector, PruningLoss, least_kl, run_angles
from rotdistill_chop.step import Chop

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import logits

CPU = torch.device("cpu")
ALL_ROWS = 10**6
Scale = Callable[[Weights, tuple[int, ...], float], Weights]


def silent(*_: object) -> None:
    """Report no progress."""


@pytest.mark.parametrize("idle", [(1, 2), (3, 4)])
def test_angle_is_least_over_the_run_that_does_least(
    deep: Model, samples: Samples, scale_layers: Scale, idle: tuple[int, int]
) -> None:
    weights = scale_layers(deep.weights, idle, 1e-3)
    forward = LayerwiseForward(weights, samples.layout, CPU, torch.float32)
    angles = run_angles(forward, 2, silent)
    assert sorted(angles) == [0, 1, 2, 3, 4]
    assert min(angles, key=angles.__getitem__) == idle[0]


def test_layer_that_undoes_its_neighbour_is_cut_with_it(
    deep: Model, samples: Samples, scale_layers: Scale, out: StepOutput
) -> None:
    weights = scale_layers(deep.weights, (2, 4), 1e-3)
    copies = {
        name.replace(".2.", ".3."): weights[name]
        for name in weights.entries
        if name.startswith("model.layers.2.")
    }
    selector = LayerSelector(
        Chop(layers=3, criterion="kl"),
        weights.edit(copies),
        Pair(deep, deep),
        samples,
        out,
        silent,
    )
    assert selector.keep(3) == [0, 1, 5]


def test_one_search_answers_for_all_smaller_cuts(
    deep: Model, samples: Samples, out: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Chop(layers=3, criterion="kl")
    selector = LayerSelector(step, deep.weights, Pair(deep, deep), samples, out, silent)
    shortest = selector.keep(3)
    monkeypatch.setattr("rotdistill_chop._depth.least_kl", None)  # a second search would fail
    assert len(selector.keep(4)) == 4
    assert selector.keep(3) == shortest


def test_kl_of_the_search_is_the_kl_of_the_cut_student(deep: Model, samples: Samples) -> None:
    loss = PruningLoss(deep.weights, samples, ALL_ROWS, CPU, torch.float64)
    layout, rows = loss.forward.layout, loss.rows
    p = logits(deep.weights, layout)[rows].log_softmax(-1)

    def kl(dropped: tuple[int, ...]) -> float:
        short = deep.weights.cut([i for i in range(6) if i not in dropped])
        q = logits(short, layout)[rows].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    found = least_kl(loss, 3, silent)
    assert list(found) == [0, 1, 2, 3]
    assert found[0] == ([], 0.0)
    for number, cut in found.items():
        every = {drop: kl(drop) for drop in itertools.combinations(range(1, 5), number)}
        assert cut.kl == pytest.approx(every[tuple(cut.dropped)], abs=1e-9)
        assert cut.kl <= sorted(every.values())[len(every) // 2]
    assert found[1].kl == pytest.approx(min(kl((i,)) for i in range(1, 5)), abs=1e-9)
