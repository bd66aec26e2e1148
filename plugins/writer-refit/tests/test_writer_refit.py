"""The writer refit on students cut from pico teachers: planted edits are undone, and what does not help is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit import _targets as goals
from rotdistill_writer_refit._targets import target_states
from rotdistill_writer_refit.step import WriterRefit, _LayerFit, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import TextScores
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    final_states,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    rotated_twin,
    save_folder,
)

KEPT = [0, 1, 4, 5]
SMALL = (1e-6, 1e-4)
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pico_samples(texts=80)


@pytest.fixture
def teacher(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "teacher", num_hidden_layers=6)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def refit(
    step: WriterRefit,
    weights: Weights,
    pair: Pair,
    samples: Samples,
    root: Path,
    maps: Maps | None = None,
) -> tuple[Weights, dict[str, Any]]:
    out = pico_output(root)
    activations = captured_activations(pair, weights, samples, pico_output(root, "capture"))
    return step.fold(weights, maps or Maps(), activations, pair, samples, out, quiet), out.notes


def changed(before: Weights, after: Weights) -> set[str]:
    assert set(before.entries) == set(after.entries)
    return {name for name in before.entries if not torch.equal(before[name], after[name])}


def kl(weights: Weights, pair: Pair, samples: Samples, split: str) -> float:
    layout = samples.layout.select(split)
    rows, targets, _ = layout.prediction_rows(split)
    T, S = (final_states(w, layout, torch.float32)[rows] for w in (pair.teacher.weights, weights))
    return float(
        compare_logits(
            pair.teacher.weights, T, weights, S, targets, shared_vocabulary(pair)
        ).kl.mean()
    )


def idle_teacher(folder: Path, **changes: Any) -> tuple[Model, Weights]:
    """Return a model whose layers 2 and 3 write nothing, and its view: cutting them changes no state."""
    model = pico_model(folder / "busy", num_hidden_layers=6, **changes)
    writers = [
        n
        for n in model.weights.entries
        if n.startswith(("model.layers.2.", "model.layers.3.")) and ("down" in n or "o_" in n)
    ]
    silent = model.weights.edit({name: torch.zeros_like(model.weights[name]) for name in writers})
    save_folder(silent, model.folder, folder / "idle")
    opened = open_model(ModelRef(model=str(folder / "idle")))
    return opened, opened.weights


def test_it_is_an_inexact_fold() -> None:
    assert steps() == [WriterRefit]
    assert (stage_of(WriterRefit), WriterRefit.exact) == ("fold", False)


@pytest.mark.parametrize("features", ["activations", "output"])
@pytest.mark.parametrize("rows", ["rms", "plain", "distinct"])
@pytest.mark.parametrize("layers", ["all", "cut"])
def test_a_cut_student_comes_nearer_to_its_teacher(
    teacher: Model, samples: Samples, tmp_path: Path, features: str, rows: str, layers: str
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    step = WriterRefit(features=features, rows=rows, layers=layers)  # type: ignore[arg-type]
    made, notes = refit(step, weights, pair, samples, tmp_path / "runs")
    assert "refused" not in notes
    assert notes["validation KL before"] == pytest.approx(
        kl(weights, pair, samples, "validation"), rel=1e-4
    )
    assert notes["validation KL after"] == pytest.approx(
        kl(made, pair, samples, "validation"), rel=1e-4
    )
    assert notes["validation KL after"] < 0.6 * notes["validation KL before"]
    assert kl(made, pair, samples, "heldout") < 0.6 * kl(weights, pair, samples, "heldout")
    assert changed(weights, made) == {
        DOWN.format(i) for i in ([1, 2, 3] if layers == "all" else [1])
    }
    assert all(
        0 <= card["step"] <= 1 and card["validation error"] <= 1
        for card in notes["layers"].values()
    )
    assert (made.config, made.lineage) == (weights.config, weights.lineage)


def test_plain_rows_count_the_shared_prompt_once_for_each_fit_text(samples: Samples) -> None:
    layout, goal = (
        samples.layout.select("fit", "validation"),
        torch.ones(samples.layout.select("fit", "validation").rows, 4),
    )
    texts = sum(text.split == "fit" for text in layout.texts)
    weight = {
        rows: WriterRefit(rows=rows)._counts(goal, layout, frozenset())
        for rows in ("plain", "distinct")
    }  # type: ignore[arg-type]
    assert (weight["distinct"] == 1).all()
    assert (weight["plain"][: layout.prefix] == texts).all()
    assert (weight["plain"][layout.prefix :] == 1).all()


def test_the_teachers_own_answers_are_counted_up(samples: Samples) -> None:
    layout = samples.layout.select("fit", "validation")
    text, start = layout.texts[3], layout.starts[3]
    weight = WriterRefit(answers=7.0)._counts(
        torch.ones(layout.rows, 4), layout, frozenset({text.id})
    )
    answers = torch.zeros(layout.rows, dtype=torch.bool)
    answers[start + text.answer - 1 - layout.prefix : layout.starts[4]] = True
    assert answers.sum() == len(text.tokens) - text.answer + 1
    assert (weight[answers] == 7).all()
    assert (weight[~answers][layout.prefix :] == 1).all()


@pytest.mark.parametrize("after", [1.0, 1.5, float("nan")])
def test_a_refit_that_does_not_lower_the_validation_kl_is_refused(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    figures: Iterator[float] = iter([1.0, after])
    monkeypatch.setattr(
        goals,
        "kl_on",
        lambda *_: TextScores(torch.full((9,), next(figures)).double(), torch.ones(9).double()),
    )
    weights = teacher.weights.cut(KEPT)
    made, notes = refit(WriterRefit(), weights, Pair(teacher, teacher), samples, tmp_path / "runs")
    assert made is weights
    assert "the weights are left as they were" in notes["refused"]


@pytest.mark.parametrize(("guard", "most"), [(1.0, 1.0), (1.02, 1.02), (50.0, 50.0)])
def test_a_guard_bounds_what_is_paid_elsewhere(
    teacher: Model, tmp_path: Path, guard: float, most: float
) -> None:
    texts, weights = pico_samples(texts=80, guard=12), teacher.weights.cut(KEPT)
    made, notes = refit(
        WriterRefit(guard=guard, prompt=0.0),
        weights,
        Pair(teacher, teacher),
        texts,
        tmp_path / "runs",
    )
    before, after = (
        kl(w, Pair(teacher, teacher), texts, "guard-validation") for w in (weights, made)
    )
    assert after <= most * before * (1 + 1e-5)
    assert notes["guard KL before"] == pytest.approx(before, rel=1e-4)


def test_a_guard_without_texts_is_refused(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"name them as samples\.guard"):
        refit(
            WriterRefit(guard=1.02),
            teacher.weights.cut(KEPT),
            Pair(teacher, teacher),
            samples,
            tmp_path / "runs",
        )


def test_an_uncut_student_of_the_same_model_stays_as_good(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair = Pair(teacher, teacher)
    made, notes = refit(WriterRefit(), teacher.weights, pair, samples, tmp_path / "runs")
    assert (made is teacher.weights) is ("refused" in notes)
    assert kl(made, pair, samples, "heldout") < 1e-6


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", ["rms", "plain"])
def test_a_planted_edit_of_one_writer_is_undone(
    tmp_path: Path, samples: Samples, layer: int, rows: str
) -> None:
    model, whole = idle_teacher(tmp_path)
    pair, cut = Pair(model, model), whole.cut(KEPT)
    assert kl(cut, pair, samples, "heldout") < 1e-9
    noise = 0.1 * torch.randn(32, 48, generator=torch.Generator().manual_seed(layer))
    student = cut.edit({DOWN.format(layer): cut[DOWN.format(layer)] + noise})
    made, _ = refit(WriterRefit(ridge=SMALL, rows=rows), student, pair, samples, tmp_path / "runs")  # type: ignore[arg-type]
    before, after = (kl(w, pair, samples, "heldout") for w in (student, made))
    assert before > 1e-3
    assert after < before / 10
    torch.testing.assert_close(made[DOWN.format(layer)], cut[DOWN.format(layer)], rtol=0, atol=0.02)


@pytest.mark.parametrize("writers", [("heads",), ("heads", "neurons")], ids=" ".join)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_planted_edit_of_the_attention_writer_is_undone(
    tmp_path: Path, samples: Samples, writers: tuple[str, ...], layer: int
) -> None:
    model, whole = idle_teacher(tmp_path)
    pair, cut, name = (
        Pair(model, model),
        whole.cut(KEPT),
        f"model.layers.{layer}.self_attn.o_proj.weight",
    )
    student = cut.edit(
        {
            name: cut[name]
            + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(layer))
        }
    )
    # Heads come in front of the MLP, so the regression sees the MLP's answer to the edit as noise: less is undone in one pass.
    made, _ = refit(
        WriterRefit(ridge=SMALL, writers=writers), student, pair, samples, tmp_path / "runs"
    )  # type: ignore[arg-type]
    before, after = (kl(w, pair, samples, "heldout") for w in (student, made))
    assert before > 1e-3
    assert after < 0.6 * before
    parts = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}
    assert {name.split(".", 3)[3] for name in changed(student, made)} == {
        f"{parts[w]}.weight" for w in writers
    }


@pytest.mark.parametrize("writers", [("heads",), ("heads", "neurons")], ids=" ".join)
def test_a_map_of_the_mlp_output_is_never_put_on_the_attention_writer(
    teacher: Model, samples: Samples, tmp_path: Path, writers: tuple[str, ...]
) -> None:
    weights, step = teacher.weights.cut(KEPT), WriterRefit(features="output", writers=writers)  # type: ignore[arg-type]
    try:
        made, _ = refit(step, weights, Pair(teacher, teacher), samples, tmp_path / "runs")
    except RecipeError as error:
        assert "output" in str(error)
    else:
        assert not any("o_proj" in name for name in changed(weights, made))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_planted_mix_of_the_mlp_output_is_undone(
    tmp_path: Path, samples: Samples, bias: bool
) -> None:
    model, whole = idle_teacher(tmp_path, mlp_bias=bias)
    pair, cut = Pair(model, model), whole.cut(KEPT)
    mix = torch.eye(32) + 0.15 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    writers = [DOWN.format(1), *([DOWN.format(1).replace("weight", "bias")] if bias else [])]
    student = cut.edit({name: mix @ cut[name] for name in writers})
    made, _ = refit(
        WriterRefit(features="output", ridge=SMALL, layers="cut"),
        student,
        pair,
        samples,
        tmp_path / "runs",
    )
    assert kl(made, pair, samples, "heldout") < kl(student, pair, samples, "heldout") / 10


@pytest.mark.parametrize("side", ["fit and validation", "all texts"])
def test_a_planted_edit_is_undone_through_an_aligner_and_a_change_of_basis(
    tmp_path: Path, samples: Samples, side: str
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=3)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs", "capture")
    if side == "all texts":
        activations = captured_activations(pair, twin.weights, samples, out)
    else:
        activations = Residuals().capture(pair, twin.weights, samples, out, quiet)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, quiet)
    noise = 0.1 * torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    name = DOWN.format(1)
    turned = twin.weights.edit({name: twin.weights[name] + noise}).fold(
        {"residual": Rotation(random_rotation(32, 8))}
    )
    made = WriterRefit(ridge=SMALL).fold(
        turned, maps, activations, pair, samples, pico_output(tmp_path / "runs"), quiet
    )
    before, after = (kl(w, pair, samples, "heldout") for w in (turned, made))
    assert before > 1e-3
    assert after < before / 10


def test_targets_of_a_student_cut_after_the_capture_have_the_depth_of_their_layer(
    tmp_path: Path, samples: Samples
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair = Pair(model, twin)
    activations = captured_activations(pair, twin.weights, samples, pico_output(tmp_path / "runs"))
    maps = Procrustes(tie=1).align(activations, Maps(), pair, quiet)
    cut = twin.weights.cut(KEPT)
    for boundary, depth in enumerate(cut.lineage.depths):
        goal = target_states(cut, maps, activations, pair, samples.layout, boundary)
        torch.testing.assert_close(goal, activations.rows("student", depth), rtol=1e-3, atol=1e-3)


def solved_bytes(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "run" / "weights").rglob("layer_*.safetensors")}


def test_the_same_refit_twice_gives_the_same_bytes(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    weights = teacher.weights.cut(KEPT)
    one, two = (
        refit(WriterRefit(), weights, Pair(teacher, teacher), samples, tmp_path / name)[0]
        for name in ("one", "two")
    )
    assert changed(one, two) == set()
    assert solved_bytes(tmp_path / "one") == solved_bytes(tmp_path / "two")
    assert sorted(int(name[6:11]) for name in solved_bytes(tmp_path / "one")) == [1, 2, 3]


def stop_after(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let `most` layers be solved, then fail; return the list of layers that were."""
    solved: list[int] = []
    real = WriterRefit._writer

    def solve(step: WriterRefit, here: _LayerFit, *rest: Any) -> Any:
        if len(solved) == most:
            raise KeyboardInterrupt
        solved.append(here.walk.boundary)
        return real(step, here, *rest)

    monkeypatch.setattr(WriterRefit, "_writer", solve)
    return solved


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_killed_refit_goes_on_behind_its_last_committed_layer(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    activations = captured_activations(
        pair, weights, samples, pico_output(tmp_path / "runs", "capture")
    )

    def fold(root: Path) -> tuple[Weights, StepOutput]:
        out = pico_output(root)
        return WriterRefit().fold(weights, Maps(), activations, pair, samples, out, quiet), out

    whole, expected = fold(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, done)
        if done == 3:
            fold(tmp_path / "runs")
        else:
            with pytest.raises(KeyboardInterrupt):
                fold(tmp_path / "runs")
    solved = stop_after(monkeypatch, 3)
    resumed, out = fold(tmp_path / "runs")
    assert solved == [1, 2, 3][done:]
    assert changed(resumed, whole) == set()
    assert solved_bytes(tmp_path / "runs") == solved_bytes(tmp_path / "whole")
    assert out.notes["validation KL after"] == expected.notes["validation KL after"]
    assert {name for name in out.used if "layer_" in name} == {
        name for name in expected.used if "layer_" in name
    }


def test_different_bases_without_an_aligner_are_refused(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = pico_model(tmp_path / "student", seed=1)
    with pytest.raises(
        RecipeError, match=r"different bases; put an aligner \(procrustes\) before this step"
    ):
        refit(WriterRefit(), student.weights, Pair(teacher, student), samples, tmp_path / "runs")


def test_a_model_with_norms_behind_its_writers_is_refused(samples: Samples, tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", "gemma3_text", head_dim=8)
    with pytest.raises(
        RecipeError, match="in a gemma3_text model a norm stands between writers and stream"
    ):
        refit(WriterRefit(), model.weights, Pair(model, model), samples, tmp_path / "runs")


def test_a_ridge_too_small_for_the_rows_is_no_candidate() -> None:
    made = torch.Generator().manual_seed(0)
    fit, validation = Moments(8, 2), Moments(8, 2)
    for moments, rows in ((fit, 3), (validation, 9)):
        A = torch.randn(rows, 8, generator=made)
        moments.add(A, A @ torch.ones(8, 2))
    delta, card = WriterRefit(ridge=(1e-30, 1.0))._solved(fit, validation, "here")
    assert card["ridge"] == 1.0
    assert delta.abs().sum() > 0
    delta, card = WriterRefit(ridge=(1e-30,))._solved(fit, validation, "here")
    assert (float(delta.abs().sum()), card["step"]) == (0.0, 0.0)
