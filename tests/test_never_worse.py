"""Whatever λ, texts and options are drawn, no transfer step leaves a student worse on held-out texts, or a weight that is not finite."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_judge import better
from rotdistill_lm_head_ridge import LmHeadRidge
from rotdistill_refit_goals import kl_on
from rotdistill_writer_refit import WriterRefit

from rotdistill_core.bank import Bank, write_shard
from rotdistill_core.ledger import Out
from rotdistill_core.maps import Maps
from rotdistill_core.models import Model, Pair
from rotdistill_core.samples import Samples
from rotdistill_core.testing import captured, pico_model, pico_out, pico_samples
from rotdistill_core.weights import Weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("model") / "teacher", num_hidden_layers=6)


def drawn(draw: random.Random) -> Samples:
    """Return 5 to 80 texts, as they are or copies of a few; the held-out ones are always the same ten."""
    held = [t for t in pico_samples(texts=50).layout.texts if t.split == "heldout"]
    texts = [t for t in pico_samples(texts=draw.choice([5, 10, 40, 80])).layout.texts if t.split != "heldout"]
    if draw.random() < 0.4:
        few = texts[: max(1, len(texts) // 5)]
        texts = [replace(few[k % len(few)], id=t.id, split=t.split) for k, t in enumerate(texts)]
    whole = pico_samples()
    return replace(whole, layout=replace(whole.layout, texts=(*texts, *held)))


def misled(bank: Bank, out: Out) -> Bank:
    """Return the bank with the teacher's rows of fit texts turned round: what is fitted to them is harmful, and only judging tells."""
    fit = bank.layouts["teacher"].split("fit")[:, None]
    shards = []
    for boundary in range(len(bank.shards["teacher"])):
        rows = bank.rows("teacher", boundary)
        shards.append(write_shard(out, "misled", boundary, torch.where(fit, -rows, rows), rows.dtype, {}))
    return replace(bank, shards={**bank.shards, "teacher": tuple(shards)})


def finite(weights: Weights) -> bool:
    return all(bool(torch.isfinite(entry.read()).all()) for entry in weights.entries.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_draw_leaves_the_student_worse(teacher: Model, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    samples, pair = drawn(draw), Pair(teacher, teacher)
    keep = sorted(draw.sample(range(6), draw.choice([3, 4, 4, 5, 5, 6])))
    start = teacher.weights.cut(keep)
    out = pico_out(tmp_path / "runs", "capture")
    true = bank = captured(pair, start, samples, out)
    if draw.random() < 0.5:
        bank = misled(true, out)
    refit = WriterRefit(
        ridge=(10 ** draw.uniform(-6, 6),),
        writers=draw.choice([("neurons",), ("heads",), ("heads", "neurons")]),
        strength=draw.choice([0.25, 1.0]),
        sinks=draw.choice([1.0, 1000.0]),
    )
    head = LmHeadRidge(ridge=(10 ** draw.uniform(-6, 6),), blend=(draw.choice([0.5, 1.0]),), objective=draw.choice(["ridge", "kl"]),
                       anchor=10 ** draw.uniform(-3, 3))  # fmt: skip
    refitted = refit.fold(start, Maps(), bank, pair, samples, pico_out(tmp_path / "runs", "refit"), lambda *_: None)
    made = head.style(refitted, bank, pair, samples, pico_out(tmp_path / "runs", "head"), lambda *_: None)
    before, between, after = (kl_on("heldout", view, None, true, pair, samples) for view in (start, refitted, made))
    assert finite(refitted)
    assert finite(made)
    assert not better(between, before), (before.mean, between.mean, refit)
    assert not better(after, between), (between.mean, after.mean, head)
