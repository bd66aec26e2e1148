"""The writer refit on students cut from pico teachers.

Planted edits are undone, and what does not help is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit import _method
from rotdistill_writer_refit._method import layer_problem
from rotdistill_writer_refit._scoring import Scorer
from rotdistill_writer_refit.step import WriterRefit, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.shards import in_shard
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import TextScores
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.step import check_models, stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    final_states,
    parametrize_with_checks,
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


@parametrize_with_checks(
    WriterRefit,
    {},
    {"writers": ["heads", "neurons"]},
    {"features": "output", "row_weighting": "plain"},
)
def test_writer_refit_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_writer_refit_is_an_inexact_fold() -> None:
    assert steps() == [WriterRefit]
    assert stage_of(WriterRefit) == "fold"
    assert not WriterRefit.exact


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pico_samples(texts=80)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("model") / "teacher", num_hidden_layers=6)


def silent(*_: object) -> None:
    """Report no progress."""


def refit(
    step: WriterRefit, weights: Weights, pair: Pair, samples: Samples, root: Path
) -> tuple[Weights, StepOutput]:
    """Capture and refit; return the weights and what the step wrote."""
    out = pico_output(root)
    activations = captured_activations(pair, weights, samples, pico_output(root, "capture"))
    return step.fold(weights, Maps(), activations, pair, samples, out, silent), out


def changed(before: Weights, after: Weights) -> set[str]:
    assert set(before.entries) == set(after.entries)
    return {name for name in before.entries if not torch.equal(before[name], after[name])}


def kl(weights: Weights, pair: Pair, samples: Samples, split: str) -> float:
    """Return the mean KL to the teacher on a split, from whole forward passes."""
    layout = samples.layout.select(split)
    rows, targets, _ = layout.prediction_rows(split)
    teacher = pair.teacher.weights
    T = final_states(teacher, layout, torch.float32)[rows]
    S = final_states(weights, layout, torch.float32)[rows]
    found = compare_logits(teacher, T, weights, S, targets, shared_vocabulary(pair))
    return float(found.kl.mean())


def idle_teacher(folder: Path, **changes: Any) -> tuple[Model, Weights]:
    """Return a model whose layers 2 and 3 write nothing: cutting them changes no state."""
    model = pico_model(folder / "busy", num_hidden_layers=6, **changes)
    writers = [
        name
        for name in model.weights.entries
        if name.startswith(("model.layers.2.", "model.layers.3."))
        and ("down" in name or "o_" in name)
    ]
    idle = model.weights.edit({name: torch.zeros_like(model.weights[name]) for name in writers})
    save_folder(idle, model.folder, folder / "idle")
    opened = open_model(ModelRef(model=str(folder / "idle")))
    return opened, opened.weights


def test_a_shard_is_fitted_as_if_there_were_no_other_texts(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    step = WriterRefit(shard=(-1, 3))
    only = samples.part(samples.layout.where(in_shard(samples, step.shard)))
    whole, _ = refit(WriterRefit(), weights, pair, samples, tmp_path / "whole")
    shard, _ = refit(step, weights, pair, samples, tmp_path / "shard")
    alone, _ = refit(WriterRefit(), weights, pair, only, tmp_path / "alone")
    assert changed(weights, shard)
    assert not changed(shard, alone)
    assert changed(shard, whole)


@pytest.mark.parametrize("features", ["activations", "output"])
@pytest.mark.parametrize("row_weighting", ["rms", "plain", "distinct"])
@pytest.mark.parametrize(("layers", "refitted"), [("all", [1, 2, 3]), ("cut", [1])])
def test_refit_brings_a_cut_student_nearer_to_its_teacher(
    teacher: Model,
    samples: Samples,
    tmp_path: Path,
    features: str,
    row_weighting: str,
    layers: str,
    refitted: list[int],
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    step = WriterRefit(features=features, row_weighting=row_weighting, layers=layers)  # type: ignore[arg-type]
    after, out = refit(step, weights, pair, samples, tmp_path / "runs")
    assert not out.report.refused
    for split in (Split.VALIDATION, Split.HELDOUT):
        assert kl(after, pair, samples, split) < 0.6 * kl(weights, pair, samples, split)
    fitted = kl(after, pair, samples, Split.FIT)
    assert out.notes["fit KL after"] == pytest.approx(fitted, rel=1e-3)
    assert changed(weights, after) == {DOWN.format(i) for i in refitted}
    assert (after.config, after.lineage) == (weights.config, weights.lineage)
    diagnostics = out.notes["layers"]
    assert list(diagnostics) == [f"{i} neurons" for i in refitted]
    assert all(0 <= fit["step"] <= 1 for fit in diagnostics.values())
    assert all(fit["validation error"] <= 1 for fit in diagnostics.values())


def test_plain_rows_count_the_shared_prompt_once_for_each_fit_text(
    teacher: Model, samples: Samples
) -> None:
    few = samples.layout.select(Split.FIT, Split.VALIDATION)
    texts = sum(text.split == Split.FIT for text in few.texts)
    # A plain text does not begin with the prompt.
    alone = Text("general.lesson", "en", Split.FIT, (1, 2, 3), 0, plain=True)
    layout = PackedTexts((*few.texts, alone), few.prefix)
    forward = LayerwiseForward(teacher.weights, layout, torch.device("cpu"), torch.float32)
    targets = torch.ones(layout.rows, 4)
    distinct = layer_problem(
        WriterRefit(row_weighting="distinct"), targets.__getitem__, forward, samples
    )
    plain = layer_problem(WriterRefit(row_weighting="plain"), targets.__getitem__, forward, samples)
    assert (distinct.row_weights == 1).all()
    assert (plain.row_weights[: layout.prefix] == texts).all()
    assert (plain.row_weights[layout.prefix :] == 1).all()
    assert torch.equal(plain.fit, layout.split(Split.FIT))


def test_shared_rows_count_for_each_text_to_fit_on(teacher: Model, samples: Samples) -> None:
    few = samples.layout.select(Split.FIT, Split.VALIDATION)
    again = tuple(replace(text, id=f"{text.id} again") for text in few.texts)
    many = PackedTexts((*few.texts, *again), few.prefix)
    step = WriterRefit(prompt_weight=0.5, sink_weight=3.0)
    for layout in (few, many):
        texts = sum(text.split == Split.FIT for text in layout.texts)
        targets = torch.ones(layout.rows, 4)
        forward = LayerwiseForward(teacher.weights, layout, torch.device("cpu"), torch.float32)
        weights = layer_problem(step, targets.__getitem__, forward, samples).row_weights
        assert weights[0] == 3.0 * texts
        assert (weights[1 : layout.prefix] == 0.5 * texts).all()
        assert (weights[layout.prefix :] == 1).all()


def test_a_sink_of_a_text_without_the_shared_prompt_counts_once(
    teacher: Model, samples: Samples
) -> None:
    plain = tuple(replace(text, plain=True) for text in samples.layout.texts)
    layout = PackedTexts(plain, 0)
    targets = torch.ones(layout.rows, 4)
    forward = LayerwiseForward(teacher.weights, layout, torch.device("cpu"), torch.float32)
    weights = layer_problem(
        WriterRefit(sink_weight=3.0), targets.__getitem__, forward, samples
    ).row_weights
    assert weights[0] == 3
    assert (weights[1:] == 1).all()


def test_rows_that_predict_teacher_answers_have_their_own_weight(
    teacher: Model, samples: Samples
) -> None:
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    forward = LayerwiseForward(teacher.weights, layout, torch.device("cpu"), torch.float32)
    text, start = layout.texts[3], layout.starts[3]
    question = Conversation(text.id, "en", text.split, "?", None)
    answered = Samples(samples.layout, (question,), "")
    step = WriterRefit(teacher_answer_weight=7.0)
    weights = layer_problem(
        step, torch.ones(layout.rows, 4).__getitem__, forward, answered
    ).row_weights
    answers = torch.zeros(layout.rows, dtype=torch.bool)
    answers[start + text.answer - 1 - layout.prefix : layout.starts[4]] = True
    assert answers.sum() == len(text.tokens) - text.answer + 1
    assert (weights[answers] == 7).all()
    assert (weights[~answers][layout.prefix :] == 1).all()


@pytest.mark.parametrize("after", [1.0, 1.5, float("nan")])
def test_refit_that_does_not_lower_validation_kl_is_refused(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    figures: Iterator[float] = iter([1.0, after])

    def score(_: object, split: str, *__: object) -> TextScores:
        rows = torch.ones(9, dtype=torch.float64)
        mean = 0.5 if split == Split.FIT else next(figures)
        return TextScores(total=mean * rows, rows=rows)

    monkeypatch.setattr(Scorer, "score", score)
    weights = teacher.weights.cut(KEPT)
    kept, out = refit(WriterRefit(), weights, Pair(teacher, teacher), samples, tmp_path / "runs")
    assert kept is weights
    assert out.report.refused


@pytest.mark.parametrize("guard", [1.0, 1.02, 50.0])
def test_guard_bounds_the_kl_outside_the_domain(
    teacher: Model, tmp_path: Path, guard: float
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    texts = pico_samples(texts=80, guard=12)
    step = WriterRefit(guard=guard, prompt_weight=0.0)
    after, _ = refit(step, weights, pair, texts, tmp_path / "runs")
    before = kl(weights, pair, texts, Split.GUARD_VALIDATION)
    assert kl(after, pair, texts, Split.GUARD_VALIDATION) <= guard * before * (1 + 1e-5)


def test_a_refit_that_learned_its_texts_by_heart_says_so(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.evaluation.acceptance.OVERFIT_RATIO", 0.1)
    weights = teacher.weights.cut(KEPT)
    step = WriterRefit(layers="cut")
    _, out = refit(step, weights, Pair(teacher, teacher), samples, tmp_path / "runs")
    (caution,) = out.report.cautions
    assert f"{out.notes['fit KL after']:.3f} on texts that it was fitted on" in caution.text
    assert f"{out.notes['validation KL after']:.3f} on validation texts" in caution.text
    assert "a larger ridge" in caution.text


def test_a_refit_that_the_guard_halves_is_judged_whole(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.evaluation.acceptance.OVERFIT_RATIO", 0.1)
    allowed = "rotdistill_core.evaluation.acceptance.largest_allowed_share"
    weights, samples = teacher.weights.cut(KEPT), pico_samples(texts=40, guard=6)
    step = WriterRefit(layers="cut", guard=1.02)

    def refitted(share: float) -> StepOutput:
        def chosen(_: object, ood_kl: Callable[[float], float], __: float) -> float:
            ood_kl(1.0)  # the caution states it
            return share

        monkeypatch.setattr(allowed, chosen)
        return refit(step, weights, Pair(teacher, teacher), samples, tmp_path / f"{share}")[1]

    whole, half = refitted(1.0), refitted(0.5)
    assert half.notes["validation KL after"] > whole.notes["validation KL after"] * 1.01
    guarded, by_heart = half.report.cautions
    assert guarded.text.startswith("half of it")
    assert by_heart == whole.report.cautions[0]


def test_guard_without_texts_is_refused(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    with pytest.raises(RecipeError, match=r"samples\.guard"):
        refit(WriterRefit(guard=1.02), weights, pair, samples, tmp_path / "runs")


def test_uncut_student_of_the_same_model_stays_as_good(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair = Pair(teacher, teacher)
    after, out = refit(WriterRefit(), teacher.weights, pair, samples, tmp_path / "runs")
    assert (after is teacher.weights) is bool(out.report.refused)
    assert kl(after, pair, samples, Split.HELDOUT) < 1e-6


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("row_weighting", ["rms", "plain"])
def test_planted_edit_of_an_mlp_writer_is_undone(
    tmp_path: Path, samples: Samples, layer: int, row_weighting: str
) -> None:
    model, whole = idle_teacher(tmp_path)
    pair, cut, name = Pair(model, model), whole.cut(KEPT), DOWN.format(layer)
    assert kl(cut, pair, samples, Split.HELDOUT) < 1e-9
    noise = 0.1 * torch.randn(32, 48, generator=torch.Generator().manual_seed(layer))
    student = cut.edit({name: cut[name] + noise})
    step = WriterRefit(ridge=SMALL, row_weighting=row_weighting)  # type: ignore[arg-type]
    after, _ = refit(step, student, pair, samples, tmp_path / "runs")
    before = kl(student, pair, samples, Split.HELDOUT)
    assert before > 1e-3
    assert kl(after, pair, samples, Split.HELDOUT) < before / 10
    torch.testing.assert_close(after[name], cut[name], rtol=0, atol=0.02)


@pytest.mark.parametrize("writers", [("heads",), ("heads", "neurons")], ids=" ".join)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_planted_edit_of_an_attention_writer_is_reduced(
    tmp_path: Path, samples: Samples, writers: tuple[str, ...], layer: int
) -> None:
    model, whole = idle_teacher(tmp_path)
    pair, cut = Pair(model, model), whole.cut(KEPT)
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    noise = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(layer))
    student = cut.edit({name: cut[name] + noise})
    # The MLP comes after the heads, so its answer to the edit is noise to their regression: one
    # pass undoes less.
    step = WriterRefit(ridge=SMALL, writers=writers)  # type: ignore[arg-type]
    after, _ = refit(step, student, pair, samples, tmp_path / "runs")
    before = kl(student, pair, samples, Split.HELDOUT)
    assert before > 1e-3
    assert kl(after, pair, samples, Split.HELDOUT) < 0.6 * before
    parts = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}
    edited = {name.split(".", 3)[3] for name in changed(student, after)}
    assert edited == {f"{parts[writer]}.weight" for writer in writers}


@pytest.mark.parametrize("writers", [("heads",), ("heads", "neurons")], ids=" ".join)
def test_output_features_are_refused_for_attention_writers(writers: Any) -> None:
    with pytest.raises(ValueError, match=r'writers must be \["neurons"\]'):
        WriterRefit(features="output", writers=writers)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_planted_mix_of_the_mlp_output_is_undone(
    tmp_path: Path, samples: Samples, bias: bool
) -> None:
    model, whole = idle_teacher(tmp_path, mlp_bias=bias)
    pair, cut = Pair(model, model), whole.cut(KEPT)
    mix = torch.eye(32) + 0.15 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    writers = [DOWN.format(1)]
    if bias:
        writers.append(DOWN.format(1).replace("weight", "bias"))
    student = cut.edit({name: mix @ cut[name] for name in writers})
    step = WriterRefit(features="output", ridge=SMALL, layers="cut")
    after, _ = refit(step, student, pair, samples, tmp_path / "runs")
    assert changed(student, after) == set(writers)
    before = kl(student, pair, samples, Split.HELDOUT)
    assert kl(after, pair, samples, Split.HELDOUT) < before / 10


@pytest.mark.parametrize("captured", ["fit and validation", "all texts"])
def test_planted_edit_is_undone_through_an_aligner_and_a_change_of_basis(
    tmp_path: Path, samples: Samples, captured: str
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=3)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs", "capture")
    if captured == "all texts":
        activations = captured_activations(pair, twin.weights, samples, out)
    else:
        activations = Residuals().capture(pair, twin.weights, samples, out, silent)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, silent)
    noise = 0.1 * torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    name = DOWN.format(1)
    edited = twin.weights.edit({name: twin.weights[name] + noise})
    turned = edited.fold({"residual": Rotation(random_rotation(32, 8))})
    out = pico_output(tmp_path / "runs")
    after = WriterRefit(ridge=SMALL).fold(turned, maps, activations, pair, samples, out, silent)
    before = kl(turned, pair, samples, Split.HELDOUT)
    assert before > 1e-3
    assert kl(after, pair, samples, Split.HELDOUT) < before / 10


def solved_bytes(root: Path) -> dict[str, bytes]:
    files = (root / "run" / "weights").rglob("layer_*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def test_same_refit_twice_gives_the_same_bytes(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    one, _ = refit(WriterRefit(), weights, pair, samples, tmp_path / "one")
    two, _ = refit(WriterRefit(), weights, pair, samples, tmp_path / "two")
    assert changed(one, two) == set()
    assert solved_bytes(tmp_path / "one") == solved_bytes(tmp_path / "two")
    assert sorted(int(name[6:11]) for name in solved_bytes(tmp_path / "one")) == [1, 2, 3]


def stop_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> list[int]:
    """Let some layers be solved, then interrupt; return the list of layers that were solved."""
    solved: list[int] = []
    real = _method.solve_writer

    def solve(step: Any, forward: Any, *rest: Any) -> Any:
        if len(solved) == layers:
            raise KeyboardInterrupt
        solved.append(forward.boundary)
        return real(step, forward, *rest)

    monkeypatch.setattr(_method, "solve_writer", solve)
    return solved


@pytest.mark.parametrize("done", [1, 2, 3])
def test_interrupted_refit_resumes_after_its_last_committed_layer(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    pair, weights = Pair(teacher, teacher), teacher.weights.cut(KEPT)
    capture = pico_output(tmp_path / "runs", "capture")
    activations = captured_activations(pair, weights, samples, capture)

    def fold(root: Path) -> tuple[Weights, StepOutput]:
        out = pico_output(root)
        return WriterRefit().fold(weights, Maps(), activations, pair, samples, out, silent), out

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
    assert out.notes == expected.notes
    layers = {name for name in out.used if "layer_" in name}
    assert layers == {name for name in expected.used if "layer_" in name}


def test_different_bases_without_an_aligner_are_refused(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = pico_model(tmp_path / "student", seed=1)
    pair = Pair(teacher, student)
    with pytest.raises(RecipeError, match=r"different bases; put an aligner \(procrustes\)"):
        refit(WriterRefit(), student.weights, pair, samples, tmp_path / "runs")


def test_model_with_norms_after_its_writers_is_refused(samples: Samples, tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", "gemma3_text", head_dim=8)
    pair = Pair(model, model)
    with pytest.raises(RecipeError, match="of type gemma3_text a norm stands between"):
        check_models(WriterRefit(), pair)
    with pytest.raises(RecipeError, match="of type gemma3_text a norm stands between"):
        refit(WriterRefit(), model.weights, pair, samples, tmp_path / "runs")
