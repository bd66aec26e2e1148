"""No transfer step makes a student worse on held-out texts, for any λ, texts and options.

All weights stay finite.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_lm_head_ridge.step import LmHeadRidge
from rotdistill_writer_refit import score_split
from rotdistill_writer_refit.step import WriterRefit

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.evaluation.acceptance import significantly_lower
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import captured_activations, pico_model, pico_output, pico_samples


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("model") / "teacher", num_hidden_layers=6)


def drawn(draw: random.Random) -> Samples:
    """Return 5 to 80 texts, some of them copies, and always the same ten held-out texts."""
    held = [t for t in pico_samples(texts=50).layout.texts if t.split == "heldout"]
    texts = [
        t
        for t in pico_samples(texts=draw.choice([5, 10, 40, 80])).layout.texts
        if t.split != "heldout"
    ]
    if draw.random() < 0.4:
        few = texts[: max(1, len(texts) // 5)]
        texts = [replace(few[k % len(few)], id=t.id, split=t.split) for k, t in enumerate(texts)]
    whole = pico_samples()
    return replace(whole, layout=replace(whole.layout, texts=(*texts, *held)))


def misled(activations: ActivationStore, out: StepOutput) -> ActivationStore:
    """Return activations with the teacher's rows of fit texts negated.

    A fit to them does harm, which only the acceptance test shows.
    """
    fit = activations.layouts["teacher"].split("fit")[:, None]
    shards = []
    for boundary in range(len(activations.shards["teacher"])):
        rows = activations.rows("teacher", boundary)
        shards.append(
            write_shard(out, "misled", boundary, torch.where(fit, -rows, rows), rows.dtype, {})
        )
    return replace(activations, shards={**activations.shards, "teacher": tuple(shards)})


def finite(weights: Weights) -> bool:
    return all(bool(torch.isfinite(entry.read()).all()) for entry in weights.entries.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_draw_leaves_the_student_worse(teacher: Model, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    samples, pair = drawn(draw), Pair(teacher, teacher)
    keep = sorted(draw.sample(range(6), draw.choice([3, 4, 4, 5, 5, 6])))
    start = teacher.weights.cut(keep)
    out = pico_output(tmp_path / "runs", "capture")
    true = activations = captured_activations(pair, start, samples, out)
    if draw.random() < 0.5:
        activations = misled(true, out)
    refit = WriterRefit(
        ridge=(10 ** draw.uniform(-6, 6),),
        writers=draw.choice([("neurons",), ("heads",), ("heads", "neurons")]),
        alpha=draw.choice([0.25, 1.0]),
        sink_weight=draw.choice([0.003, 3.125]),
    )
    head = LmHeadRidge(
        ridge=(10 ** draw.uniform(-6, 6),),
        blend=(draw.choice([0.5, 1.0]),),
        objective=draw.choice(["ridge", "kl"]),
        logit_penalty=10 ** draw.uniform(-3, 3),
    )
    refitted = refit.fold(
        start,
        Maps(),
        activations,
        pair,
        samples,
        pico_output(tmp_path / "runs", "refit"),
        lambda *_: None,
    )
    made = head.style(
        refitted,
        activations,
        pair,
        samples,
        pico_output(tmp_path / "runs", "head"),
        lambda *_: None,
    )
    before, between, after = (
        score_split("heldout", view, true, pair, samples) for view in (start, refitted, made)
    )
    assert finite(refitted)
    assert finite(made)
    assert not significantly_lower(between, before), (before.mean, between.mean, refit)
    assert not significantly_lower(after, between), (between.mean, after.mean, head)
