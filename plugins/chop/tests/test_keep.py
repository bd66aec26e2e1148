"""Sharing a cut between depth and width: planted truth is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_chop._depth import LayerSelector
from rotdistill_chop._keep import ScoredSplit, Trial, best_split, depth_splits, width_splits
from rotdistill_chop._size import Size
from rotdistill_chop.step import Chop

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import logits, pico_model

CPU = torch.device("cpu")
ALL_ROWS = 10**6
Scale = Callable[[Weights, tuple[int, ...], float], Weights]
WHOLE = Size(layers=6, neurons=48, kv_heads=2, width=32)


def silent(*_: object) -> None:
    """Report no progress."""


def split(
    weights: Weights, model: Model, samples: Samples, out: StepOutput, step: Chop
) -> tuple[ScoredSplit, dict[str, float]]:
    """Return the best split and the KL of all splits."""
    assert step.keep_fraction is not None
    pair = Pair(model, model)
    trial = Trial(weights, samples, max_kl_rows=step.max_kl_rows, device=CPU, dtype=torch.float32)
    selector = LayerSelector(step, weights, pair, samples, out, silent)
    notes: dict[str, float] = {}
    best = best_split(weights, step.keep_fraction, trial, selector.keep, notes, silent)
    return best, notes


def test_share_takes_layers_where_layers_are_idle(
    deep: Model, samples: Samples, scale_layers: Scale, out: StepOutput
) -> None:
    weights = scale_layers(deep.weights, (2, 3), 0.0)
    step = Chop(keep_fraction=0.67, criterion="kl")
    best, scores = split(weights, deep, samples, out, step)
    assert best.layers == [0, 1, 4, 5]
    assert best.size == WHOLE._replace(layers=4)
    assert best.kl == scores[best.size.describe()] == min(scores.values())
    assert best.kl < 1e-4


def test_share_takes_neurons_where_neurons_are_dead(
    deep: Model, samples: Samples, out: StepOutput
) -> None:
    names = [name for name in deep.weights.entries if name.endswith("down_proj.weight")]
    dead = torch.arange(12, 48)
    weights = deep.weights.edit(
        {name: deep.weights[name].index_fill(1, dead, 0.0) for name in names}
    )
    best, _ = split(weights, deep, samples, out, Chop(keep_fraction=0.6))
    assert best.size == WHOLE._replace(neurons=best.size.neurons)
    assert 12 <= best.size.neurons < 48
    assert best.kl < 1e-3


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_every_split_keeps_about_its_share(deep: Model, share: float) -> None:
    inner, vocabulary = WHOLE.parameters(deep.weights)
    assert inner + vocabulary == deep.weights.parameters
    sizes = depth_splits(deep.weights, share) + width_splits(deep.weights, share, 6)
    assert len(sizes) >= 2
    neuron_in_each_layer = 6 * 3 * 32
    for size in sizes:
        excess = size.parameters(deep.weights).total - vocabulary - share * inner
        assert -neuron_in_each_layer <= excess <= 0.002 * inner


def test_splits_go_from_depth_alone_to_neurons_alone(deep: Model) -> None:
    sizes = depth_splits(deep.weights, 0.67)
    assert sizes[0] == WHOLE._replace(layers=4)
    assert sizes[-1].layers == 6
    assert sizes[-1].neurons < 48


def test_narrower_stream_is_no_split_where_the_stream_cannot_be_rotated(tmp_path: Path) -> None:
    gemma = pico_model(tmp_path / "gemma", "gemma3_text", head_dim=8, num_hidden_layers=6)
    assert all(size.width == 32 for size in width_splits(gemma.weights, 0.6, 6))


def test_share_below_every_split_is_refused(deep: Model, samples: Samples, out: StepOutput) -> None:
    with pytest.raises(RecipeError, match=r"chop: keep_fraction = 0\.01 "):
        split(deep.weights, deep, samples, out, Chop(keep_fraction=0.01))


def test_small_refit_brings_a_cut_student_nearer(deep: Model, samples: Samples) -> None:
    trial = Trial(deep.weights, samples, max_kl_rows=ALL_ROWS, device=CPU, dtype=torch.float32)
    cut = deep.weights.cut([0, 1, 4, 5])
    p = logits(deep.weights, trial.layout)[trial.rows].log_softmax(-1)
    q = logits(cut, trial.layout)[trial.rows].log_softmax(-1)
    assert trial.kl(deep.weights) < 1e-6
    assert trial.kl(cut) < 0.9 * float((p.exp() * (p - q)).sum(-1).mean())
