"""Pico models to cut, and how to cut them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rotdistill_chop.step import Chop

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import logits, pico_model, pico_output, pico_samples


@pytest.fixture(scope="session")
def samples() -> Samples:
    return pico_samples(texts=60)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of 3 layers."""
    return pico_model(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of 6 layers."""
    return pico_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6)


@pytest.fixture
def out(tmp_path: Path) -> StepOutput:
    """Where the fixture `chop` writes."""
    return pico_output(tmp_path / "runs")


@pytest.fixture
def chop(samples: Samples, out: StepOutput) -> Callable[..., Weights]:
    """`chop(model, weights, **options)` runs the step on a model, or on an edited view of it."""

    def run(model: Model, weights: Weights | None = None, **options: Any) -> Weights:
        pair = Pair(model, model)
        return Chop(**options).fold(weights or model.weights, pair, samples, out, lambda *_: None)

    return run


@pytest.fixture(scope="session")
def heldout_kl(samples: Samples) -> Callable[[Weights, Weights], float]:
    """`heldout_kl(weights, whole)` is the held-out KL of a cut model to the uncut one."""

    def score(weights: Weights, whole: Weights) -> float:
        layout = samples.layout.select(Split.HELDOUT)
        p = logits(whole, layout).log_softmax(-1)
        q = logits(weights, layout).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    return score


@pytest.fixture(scope="session")
def scale_layers() -> Callable[[Weights, tuple[int, ...], float], Weights]:
    """`scale_layers(weights, layers, factor)` scales what these layers write."""

    def scaled(weights: Weights, layers: tuple[int, ...], factor: float) -> Weights:
        parts = ("mlp.down_proj", "self_attn.o_proj")
        names = [f"model.layers.{i}.{part}.weight" for i in layers for part in parts]
        return weights.edit({name: factor * weights[name] for name in names})

    return scaled
