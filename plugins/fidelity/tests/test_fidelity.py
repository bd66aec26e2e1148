"""Scores of variants, on pico models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_fidelity.step import Fidelity, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import (
    captured_activations,
    logits,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
)


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def test_toggles_is_an_evaluator() -> None:
    assert steps() == [Fidelity]
    assert stage_of(Fidelity) == "evaluate"


def scores(
    weights: Weights, pair: Pair, activations: ActivationStore, samples: Samples
) -> dict[tuple[str, int | None, str | None], float]:
    return {
        (row.metric, row.layer, row.language): row.value
        for row in judged(weights, pair, activations, samples)
        if row.text is None
    }


def judged(
    weights: Weights, pair: Pair, activations: ActivationStore, samples: Samples
) -> list[MetricRow]:
    return Fidelity().evaluate(
        Variant("x", weights, Maps(), 1.5, Path()), pair, activations, samples, quiet
    )


def test_the_teacher_itself_scores_perfectly(tmp_path: Path, samples: Samples) -> None:
    model: Model = pico_model(tmp_path / "model")
    pair = Pair(model, model)
    seen = scores(
        model.weights,
        pair,
        captured_activations(pair, model.weights, samples, pico_output(tmp_path / "runs")),
        samples,
    )
    assert seen["kl", None, None] == pytest.approx(
        0, abs=1e-6
    )  # float32, in batches of other sizes: rounding differs by processor
    assert (seen["top1", None, None], seen["hidden_cosine", None, None]) == (
        1.0,
        pytest.approx(1.0),
    )
    assert seen["parameters", None, None] == model.weights.parameters
    assert seen["channel_rms_gap", None, None] == pytest.approx(0, abs=1e-6)


def test_a_channel_that_is_louder_than_the_teachers_is_told(
    tmp_path: Path, samples: Samples
) -> None:
    pair = Pair(pico_model(tmp_path / "teacher"), pico_model(tmp_path / "student"))
    activations = captured_activations(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs")
    )
    name = pair.student.weights.adapter.embedding
    factor = torch.ones(32).index_fill(0, torch.tensor([5]), 50.0)
    loud = pair.student.weights.edit({name: pair.student.weights[name] * factor})
    one, other = (
        scores(weights, pair, activations, samples) for weights in (pair.student.weights, loud)
    )
    assert one["channel_rms_gap", 1, None] == pytest.approx(0, abs=1e-6)
    assert other["channel_rms_gap", 1, None] > 2 / 32  # that one channel alone: ln 50 = 3.9
    assert other["channel_rms_gap", None, None] == pytest.approx(
        sum(other["channel_rms_gap", k, None] for k in (1, 2)) / 2
    )


def test_a_change_of_basis_scores_as_the_student_it_came_from(
    samples: Samples, tmp_path: Path
) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3),
        pico_model(tmp_path / "student", "qwen2", seed=1),
    )
    activations = captured_activations(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs")
    )
    folded = pair.student.weights.fold({"residual": Rotation(random_rotation(32))})
    base, turned = (
        scores(w, pair, activations, samples) for w in (pair.student.weights.untie(), folded)
    )
    assert turned == pytest.approx(base, rel=1e-4, abs=1e-5)


def test_what_a_variant_loses_outside_the_domain_is_told_from_the_reported_half_of_the_guard(
    tmp_path: Path,
) -> None:
    samples = pico_samples(texts=10, guard=4)
    pair = Pair(pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student"))
    activations = captured_activations(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs")
    )
    seen = scores(pair.student.weights, pair, activations, samples)
    rows, targets, _ = samples.layout.prediction_rows("guard")
    p, q = (
        logits(model.weights, samples.layout, torch.float32)[rows].log_softmax(-1)
        for model in (pair.teacher, pair.student)
    )
    assert seen["guard_kl", None, None] == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4
    )
    assert seen["guard_perplexity", None, None] == pytest.approx(
        float((-q.gather(-1, targets[:, None]).mean()).exp()), rel=1e-4
    )
    without = scores(pair.student.weights, pair, activations, pico_samples(texts=10))
    assert seen["kl", None, None] == pytest.approx(without["kl", None, None], rel=1e-5)
    assert ("guard_kl", None, None) not in without


def test_the_figures_of_the_texts_add_up_to_those_over_all_tokens(tmp_path: Path) -> None:
    samples = pico_samples(texts=20, guard=6)
    pair = Pair(pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student"))
    rows = judged(
        pair.student.weights,
        pair,
        captured_activations(pair, pair.student.weights, samples, pico_output(tmp_path / "runs")),
        samples,
    )
    for metric, split in (("kl", "heldout"), ("top1", "heldout"), ("guard_kl", "guard")):
        (whole,) = [row for row in rows if row.metric == metric and row.language is None]
        texts = {row.text: row for row in rows if row.metric == metric and row.text}
        assert {name: row.n for name, row in texts.items()} == {
            text.id: len(text.tokens) - text.answer
            for text in samples.layout.texts
            if text.split == split
        }
        assert {row.language for row in texts.values()} == {"en"}
        assert sum(row.value * (row.n or 0) for row in texts.values()) / sum(
            row.n or 0 for row in texts.values()
        ) == pytest.approx(whole.value)
        assert len({row.value for row in texts.values()}) > 1
