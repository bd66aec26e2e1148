"""Scores of variants against the teacher, on pico models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_fidelity import _frames
from rotdistill_fidelity._frames import Frames
from rotdistill_fidelity._method import hidden_metrics, in_teacher_frame
from rotdistill_fidelity.step import Fidelity, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.linalg.solvers import polar
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import (
    captured_activations,
    logits,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    pico_tokenizer,
    random_rotation,
    rotated_twin,
)

Scores = dict[tuple[str, int | None, str | None], float]
"""(metric, layer, language) -> value."""


@parametrize_with_checks(Fidelity, {}, {"per_layer": False})
def test_fidelity_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


def test_fidelity_is_an_evaluator() -> None:
    assert steps() == [Fidelity]
    assert stage_of(Fidelity) == "evaluate"


def captured(pair: Pair, samples: Samples, folder: Path) -> ActivationStore:
    return captured_activations(pair, pair.student.weights, samples, pico_output(folder))


def metric_rows(
    weights: Weights, pair: Pair, activations: ActivationStore, samples: Samples
) -> list[MetricRow]:
    variant = Variant("x", weights, Maps(), 1.5, Path())
    out = pico_output(activations.root)
    return Fidelity().evaluate(variant, pair, activations, samples, out, quiet)


def scores(weights: Weights, pair: Pair, activations: ActivationStore, samples: Samples) -> Scores:
    """Return the figures over all texts."""
    return {
        (row.metric, row.layer, row.language): row.value
        for row in metric_rows(weights, pair, activations, samples)
        if row.text is None
    }


def test_the_teacher_scores_perfectly(tmp_path: Path, samples: Samples) -> None:
    model: Model = pico_model(tmp_path / "model")
    pair = Pair(model, model)
    found = scores(model.weights, pair, captured(pair, samples, tmp_path / "runs"), samples)
    # In float32 and in batches of other sizes, rounding differs by processor.
    assert found["kl", None, None] == pytest.approx(0, abs=1e-6)
    assert found["top1", None, None] == 1.0
    assert found["hidden_cosine", None, None] == pytest.approx(1.0)
    assert found["residual_rms_diff", None, None] == pytest.approx(0, abs=1e-5)
    assert found["channel_rms_gap", None, None] == pytest.approx(0, abs=1e-6)
    assert found["parameters", None, None] == model.weights.parameters
    assert found["seconds", None, None] == 1.5


def test_hidden_metrics_of_a_scaled_stream_are_known() -> None:
    T = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = hidden_metrics(3.0 * T, T)
    assert found["hidden_cosine"] == pytest.approx(1.0)
    assert found["residual_rms_diff"] == pytest.approx(2.0)
    assert found["channel_rms_gap"] == pytest.approx(torch.tensor(3.0).log().item())


def test_a_loud_channel_widens_the_channel_gap(tmp_path: Path, samples: Samples) -> None:
    pair = Pair(pico_model(tmp_path / "teacher"), pico_model(tmp_path / "student"))
    activations = captured(pair, samples, tmp_path / "runs")
    name = pair.student.weights.adapter.embedding
    factor = torch.ones(32).index_fill(0, torch.tensor([5]), 50.0)
    loud = pair.student.weights.edit({name: pair.student.weights[name] * factor})
    plain, changed = (
        scores(weights, pair, activations, samples) for weights in (pair.student.weights, loud)
    )
    assert plain["channel_rms_gap", 1, None] == pytest.approx(0, abs=1e-6)
    assert changed["channel_rms_gap", 1, None] > 2 / 32  # that channel alone: ln 50 = 3.9
    mean = sum(changed["channel_rms_gap", layer, None] for layer in (1, 2)) / 2
    assert changed["channel_rms_gap", None, None] == pytest.approx(mean)


def test_a_change_of_basis_does_not_change_scores(samples: Samples, tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    pair = Pair(teacher, pico_model(tmp_path / "student", "qwen2", seed=1))
    activations = captured(pair, samples, tmp_path / "runs")
    folded = pair.student.weights.fold({"residual": Rotation(random_rotation(32))})
    base, turned = (
        scores(w, pair, activations, samples) for w in (pair.student.weights.untie(), folded)
    )
    assert turned == pytest.approx(base, rel=1e-4, abs=1e-5)


def test_the_teacher_frame_undoes_a_planted_rotation(tmp_path: Path, samples: Samples) -> None:
    student = pico_model(tmp_path / "student")
    teacher, _ = rotated_twin(student, tmp_path / "teacher")
    pair = Pair(teacher, student)
    activations = captured(pair, samples, tmp_path / "runs")
    layout = activations.layouts["student"]
    X = activations.rows("student", 2).double()
    T = activations.teacher_states(layout, 2).double()
    frame = Frames.of(pair, activations, pico_output(tmp_path / "runs")).at(2)
    framed = in_teacher_frame(X, student.weights.lineage, frame)
    assert float((X - T).norm()) > 0.5 * float(T.norm())
    torch.testing.assert_close(framed, T, rtol=0, atol=1e-3 * float(T.abs().max()))


def test_out_of_domain_metrics_are_those_of_the_guard(tmp_path: Path) -> None:
    samples = pico_samples(texts=10, guard=4)
    pair = Pair(pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student"))
    activations = captured(pair, samples, tmp_path / "runs")
    found = scores(pair.student.weights, pair, activations, samples)
    rows, targets, _ = samples.layout.prediction_rows(Split.GUARD)
    p, q = (
        logits(model.weights, samples.layout, torch.float32)[rows].log_softmax(-1)
        for model in (pair.teacher, pair.student)
    )
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    perplexity = float((-q.gather(-1, targets[:, None]).mean()).exp())
    assert found["guard_kl", None, None] == pytest.approx(kl, rel=1e-4)
    assert found["guard_perplexity", None, None] == pytest.approx(perplexity, rel=1e-4)
    without = scores(pair.student.weights, pair, activations, pico_samples(texts=10))
    assert found["kl", None, None] == pytest.approx(without["kl", None, None], rel=1e-5)
    assert ("guard_kl", None, None) not in without


def test_metrics_by_text_add_up_to_those_over_all_tokens(tmp_path: Path) -> None:
    samples = pico_samples(texts=20, guard=6)
    pair = Pair(pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student"))
    activations = captured(pair, samples, tmp_path / "runs")
    rows = metric_rows(pair.student.weights, pair, activations, samples)
    for metric, split in (("kl", "heldout"), ("top1", "heldout"), ("guard_kl", "guard")):
        (overall,) = [row for row in rows if row.metric == metric and row.language is None]
        by_text = {row.text: row for row in rows if row.metric == metric and row.text}
        assert {name: row.n for name, row in by_text.items()} == {
            text.id: len(text.tokens) - text.answer
            for text in samples.layout.texts
            if text.split == split
        }
        assert {row.language for row in by_text.values()} == {"en"}
        total = sum(row.value * (row.n or 0) for row in by_text.values())
        tokens = sum(row.n or 0 for row in by_text.values())
        assert total / tokens == pytest.approx(overall.value)
        assert len({row.value for row in by_text.values()}) > 1


def test_two_tokenizers_leave_perplexity_and_no_kl(tmp_path: Path, samples: Samples) -> None:
    teacher, student = pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student")
    pico_tokenizer(56).save_pretrained(teacher.folder)
    pair = Pair(open_model(teacher.ref), student)
    activations = captured(pair, samples, tmp_path / "runs")
    found = scores(student.weights, pair, activations, samples)
    rows, targets, _ = samples.layout.prediction_rows(Split.HELDOUT)
    q = logits(student.weights, samples.layout)[rows].log_softmax(-1)
    perplexity = float((-q.gather(-1, targets[:, None]).mean()).exp())
    assert found["perplexity", None, None] == pytest.approx(perplexity, rel=1e-4)
    assert not {metric for metric, _, _ in found} & {"kl", "top1"}


def test_frames_are_solved_once_for_all_variants(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(pico_model(tmp_path / "teacher", seed=9), pico_model(tmp_path / "student"))
    activations = captured(pair, samples, tmp_path / "runs")
    solved: list[str] = []

    def noted(M: torch.Tensor, where: str, device: torch.device) -> tuple[torch.Tensor, ...]:
        solved.append(where)
        return polar(M, where, device)

    monkeypatch.setattr(_frames, "polar", noted)
    first, second = (scores(pair.student.weights, pair, activations, samples) for _ in range(2))
    assert first == second
    assert solved == [f"fidelity: boundary {b}" for b in (1, 2)]
