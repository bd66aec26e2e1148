"""The head ridge on pico pairs: a random head is recovered, and A, B give the dense solution."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from rotdistill_lm_head_ridge import _method
from rotdistill_lm_head_ridge._method import (
    Candidate,
    OutOfDomain,
    allowed_share,
    map_rows,
    next_token_log_probs,
)
from rotdistill_lm_head_ridge.step import SCORED_ROWS, LmHeadRidge, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import MAX_SCORED_ROWS
from rotdistill_core.forward.head import final_norm
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import CautionKind
from rotdistill_core.testing import (
    captured_activations,
    final_states,
    logits,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    pico_tokenizer,
    save_folder,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WORDS = 56


@parametrize_with_checks(
    LmHeadRidge, {}, {"objective": "kl", "guard": 1.5}, {"objective": "next-token"}
)
def test_lm_head_ridge_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pico_samples(WORDS)


@pytest.fixture
def teacher(tmp_path: Path) -> Model:
    return padded(pico_model(tmp_path / "teacher", seed=9))


def padded(model: Model) -> Model:
    """Give a model of 64 rows a tokenizer of fewer tokens."""
    pico_tokenizer(WORDS).save_pretrained(model.folder)
    return open_model(model.ref)


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


def fitted(
    step: LmHeadRidge, pair: Pair, samples: Samples, root: Path
) -> tuple[Weights, StepOutput]:
    """Run the step on a captured student; return the weights and the step's output."""
    out, weights = pico_output(root), pair.student.weights
    activations = captured_activations(pair, weights, samples, pico_output(root, "capture"))
    return step.style(weights, activations, pair, samples, out, quiet), out


def with_random_head(teacher: Model, folder: Path) -> Pair:
    """Return the teacher and its twin with a random head, rows of padding tokens included."""
    head = 0.15 * torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    save_folder(teacher.weights.untie().edit({HEAD: head}), teacher.folder, folder)
    return Pair(teacher, open_model(ModelRef(model=str(folder))))


def mean_kl(teacher: Weights, student: Weights, samples: Samples, split: Split) -> float:
    """Return the mean KL over the answers of a split, from whole logits in float64."""
    layout = samples.layout.select(split)
    rows, _, _ = layout.prediction_rows(split)
    p, q = (logits(w, layout)[rows, :WORDS].log_softmax(-1) for w in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def changed_tensors(before: Weights, after: Weights) -> set[str]:
    return {
        name
        for name in after.entries
        if name not in before.entries or not torch.equal(after[name], before[name])
    }


def test_lm_head_ridge_is_an_inexact_style() -> None:
    assert steps() == [LmHeadRidge]
    assert (stage_of(LmHeadRidge), LmHeadRidge.exact) == ("style", False)


def test_the_cost_counts_as_many_rows_as_are_scored() -> None:
    assert SCORED_ROWS == MAX_SCORED_ROWS


def test_a_random_head_is_recovered(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    pair = with_random_head(teacher, tmp_path / "student")
    made, out = fitted(LmHeadRidge(ridge=(1e-7, 0.1)), pair, samples, tmp_path / "runs")
    layout = samples.layout.select(Split.HELDOUT)
    expected, before, after = (
        logits(w, layout)[:, :WORDS] for w in (teacher.weights, pair.student.weights, made)
    )
    assert float((before - expected).abs().max()) > 1
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)
    wanted = teacher.weights[EMBEDDING][:WORDS]
    torch.testing.assert_close(made[HEAD][:WORDS], wanted, rtol=0, atol=1e-3)
    assert out.notes["chosen (ridge, blend)"] == [1e-7, 1.0]
    assert out.notes["validation KL after"] == pytest.approx(0, abs=1e-6)
    assert out.notes["validation KL before"] > 0.1


@pytest.mark.parametrize(
    ("model_type", "of_teacher", "of_student"),
    [
        ("granite", {"logits_scaling": 0.5}, {"logits_scaling": 0.5}),
        ("granite", {"logits_scaling": 4.0}, {"logits_scaling": 0.25}),
        ("granite", {"logits_scaling": 0.5}, {}),
        ("gemma3_text", {"final_logit_softcapping": 6.0}, {"final_logit_softcapping": 6.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", ["ridge", "kl"])
def test_heads_are_fitted_and_judged_by_the_logits_that_models_make(
    samples: Samples,
    tmp_path: Path,
    model_type: str,
    of_teacher: dict[str, float],
    of_student: dict[str, float],
    objective: Literal["ridge", "kl"],
) -> None:
    sizes = {"head_dim": 8, "tie_word_embeddings": False} if model_type == "gemma3_text" else {}
    teacher = padded(pico_model(tmp_path / "teacher", model_type, seed=9, **sizes, **of_teacher))
    head = 0.15 * torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    view = teacher.weights.untie().edit({HEAD: head})
    for key in of_teacher:
        view = view.edit({}, **{key: of_student.get(key, 1.0)})
    save_folder(view, teacher.folder, tmp_path / "student")
    pair = Pair(teacher, open_model(ModelRef(model=str(tmp_path / "student"))))
    step = LmHeadRidge(ridge=(1e-7, 0.1), objective=objective)
    made, out = fitted(step, pair, samples, tmp_path / "runs")
    for weights, name in ((pair.student.weights, "before"), (made, "after")):
        kl = mean_kl(teacher.weights, weights, samples, Split.VALIDATION)
        assert out.notes[f"validation KL {name}"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    ratio = of_student.get("logits_scaling", 1.0) / of_teacher.get("logits_scaling", 1.0)
    wanted = ratio * teacher.weights.head()[:WORDS]
    if objective == "ridge":
        assert out.notes["validation KL after"] == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(made[HEAD][:WORDS], wanted, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("width", [32, 48])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_small_solve_equals_the_dense_ridge_on_logits(
    tmp_path: Path, samples: Samples, width: int, strength: float
) -> None:
    wide = padded(pico_model(tmp_path / "teacher", seed=9, hidden_size=width))
    folder = padded(pico_model(tmp_path / "student", seed=1)).folder
    pair = Pair(wide, open_model(ModelRef(model=str(folder), dtype="float64")))
    weights = pair.student.weights
    activations = captured_activations(
        pair, weights, samples, pico_output(tmp_path / "runs", "capture")
    )
    step = LmHeadRidge(ridge=(strength,), blend=(1.0,))
    out = pico_output(tmp_path / "runs")
    made = step.style(weights, activations, pair, samples, out, quiet)

    # Least squares on the logits themselves, with a row of weight sqrt(λ) for each channel.
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    fit = layout.split(Split.FIT)
    captured = activations.rows("teacher", wide.depth)[layout.row_indices_in(samples.layout)]
    X = final_norm(weights, final_states(weights, layout))[fit]
    T = final_norm(wide.weights, captured.double())[fit]
    H_t, H_s = (w.head().double()[:WORDS] for w in (wide.weights, weights))
    eye = torch.eye(32, dtype=torch.float64)
    penalty = (strength * float((X.T @ X).diagonal().mean())) ** 0.5 * eye
    rows, targets = torch.cat([X, penalty]), torch.cat([T @ H_t.T, penalty @ H_s.T])
    dense = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    assert made is not weights
    torch.testing.assert_close(made[HEAD][:WORDS], dense, rtol=0, atol=1e-8)


def test_a_blend_lies_between_the_old_head_and_the_fitted_one(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair = with_random_head(teacher, tmp_path / "student")
    whole, part = (
        fitted(
            LmHeadRidge(ridge=(0.1,), blend=(blend,)), pair, samples, tmp_path / f"runs {blend}"
        )[0][HEAD]
        for blend in (1.0, 0.25)
    )
    old = pair.student.weights[HEAD]
    torch.testing.assert_close(part, old + 0.25 * (whole - old), rtol=0, atol=1e-6)


def test_a_tied_head_is_untied_in_weights_and_config(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, out = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    assert student.weights.tied
    assert not out.report.refused
    assert not made.tied
    assert made.config["tie_word_embeddings"] is False
    assert changed_tensors(student.weights, made) == {HEAD}
    save_folder(made, student.folder, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    saved = open_model(ModelRef(model=str(tmp_path / "saved")))
    assert torch.equal(saved.weights.head(), made[HEAD])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_padding_tokens_do_not_change(
    teacher: Model, samples: Samples, tmp_path: Path, tied: bool
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1, tie_word_embeddings=tied))
    made, _ = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    old = student.weights.head()
    assert len(student.tokenizer.get_vocab()) == WORDS < len(old)
    assert torch.equal(made[HEAD][WORDS:], old[WORDS:])
    assert not bool((made[HEAD][:WORDS] == old[:WORDS]).all(1).any())


@pytest.mark.parametrize("rows", [64, 72])
def test_a_teacher_may_have_other_padding_rows(samples: Samples, tmp_path: Path, rows: int) -> None:
    teacher = padded(pico_model(tmp_path / "teacher", seed=9, vocab_size=rows, hidden_size=48))
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, out = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    assert made[HEAD].shape == (64, 32)
    assert out.notes["validation KL after"] < out.notes["validation KL before"]


def test_the_candidate_of_least_validation_kl_is_chosen(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, out = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    scores = out.notes["validation KL by (ridge, blend)"]
    assert len(scores) == 10
    assert out.notes["validation KL before"] == scores["0, 0"]
    assert out.notes["validation KL after"] == min(scores.values())
    ridge, blend = out.notes["chosen (ridge, blend)"]
    assert scores[f"{ridge:g}, {blend:g}"] == out.notes["validation KL after"]
    kl = mean_kl(teacher.weights, made, samples, Split.VALIDATION)
    assert kl == pytest.approx(out.notes["validation KL after"], rel=1e-3)


def test_a_student_that_is_its_teacher_keeps_its_head(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    made, out = fitted(LmHeadRidge(), Pair(teacher, teacher), samples, tmp_path / "runs")
    assert made is teacher.weights
    assert "the weights are left as they were" in out.report.refused
    assert out.notes["validation KL after"] == out.notes["validation KL before"]


def test_candidates_without_gain_leave_the_head(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = with_random_head(teacher, tmp_path / "student")
    scores = {Candidate(0.01, 0.5): 1e3, Candidate(0.1, 1.0): 2e3}
    monkeypatch.setattr(_method, "candidate_kl", lambda *_: scores)
    made, out = fitted(LmHeadRidge(), pair, samples, tmp_path / "runs")
    assert made is pair.student.weights
    assert out.report.refused
    assert out.notes["chosen (ridge, blend)"] == [0.0, 0.0]


def test_the_map_lowers_the_kl_further(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    _, ridge = fitted(LmHeadRidge(), pair, samples, tmp_path / "one")
    made, out = fitted(LmHeadRidge(objective="kl"), pair, samples, tmp_path / "two")
    assert out.notes["validation KL before"] == ridge.notes["validation KL before"]
    start = out.notes["map"]["validation KL before"]
    assert start == pytest.approx(ridge.notes["validation KL after"])
    assert out.notes["validation KL after"] < ridge.notes["validation KL after"] - 1e-4
    kl = mean_kl(teacher.weights, made, samples, Split.VALIDATION)
    assert kl == pytest.approx(out.notes["validation KL after"], rel=1e-3)
    assert torch.equal(made.head()[WORDS:], pair.student.weights.head()[WORDS:])
    assert changed_tensors(pair.student.weights, made) == {HEAD}


def test_a_map_without_gain_leaves_the_head(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    step = LmHeadRidge(objective="kl")
    made, out = fitted(step, Pair(teacher, teacher), samples, tmp_path / "runs")
    assert made is teacher.weights
    assert "the weights are left as they were" in out.report.refused


@pytest.mark.parametrize("limit", [2, 6, 9, 100])
def test_rows_of_answers_by_the_teacher_come_first(limit: int) -> None:
    texts = tuple(Text(f"t{k}", "en", "fit", tuple(range(10)), 4) for k in range(4))
    layout = PackedTexts(texts, 2)
    rows, _, _ = layout.prediction_rows(Split.FIT)
    preferred = rows[6:12]
    chosen = map_rows(layout, frozenset({"t1"}), limit)
    assert len(chosen) <= limit
    assert set(chosen.tolist()) <= set(rows.tolist())
    expected = preferred if limit >= 6 else preferred[::3]
    assert set(chosen.tolist()) & set(preferred.tolist()) == set(expected.tolist())


def test_all_rows_are_taken_if_there_is_room() -> None:
    texts = tuple(Text(f"t{k}", "en", "fit", tuple(range(10)), 4) for k in range(4))
    layout = PackedTexts(texts, 2)
    assert len(map_rows(layout, frozenset(), 100)) == len(layout.prediction_rows(Split.FIT)[0])


def test_the_next_token_objective_asks_no_teacher(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    other = padded(pico_model(tmp_path / "other", seed=5))
    step = LmHeadRidge(objective="next-token", logit_penalty=0.0)
    one, two = (
        fitted(step, Pair(model, student), samples, tmp_path / name)[0].head()
        for name, model in (("one", teacher), ("two", other))
    )
    assert torch.equal(one, two)


def test_next_token_targets_put_all_probability_on_the_next_token() -> None:
    layout = PackedTexts(
        (Text("a", "en", "fit", (1, 2, 3, 4), 2), Text("b", "en", "fit", (1, 2, 5), 2)), 1
    )
    rows, targets, _ = layout.prediction_rows(Split.FIT)
    log_probs = next_token_log_probs(layout, 7, torch.device("cpu"), rows)
    assert log_probs.argmax(-1).tolist() == targets.tolist()
    assert log_probs.exp().sum(-1).tolist() == [1.0] * len(rows)


@pytest.mark.parametrize("objective", ["ridge", "kl"])
def test_a_guard_limits_the_kl_outside_the_domain(
    teacher: Model, tmp_path: Path, objective: Literal["ridge", "kl"]
) -> None:
    samples = pico_samples(texts=40, guard=8)
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))

    def ood_kl(weights: Weights) -> float:
        return mean_kl(teacher.weights, weights, samples, Split.GUARD_VALIDATION)

    before = ood_kl(pair.student.weights)
    free, _ = fitted(LmHeadRidge(objective=objective), pair, samples, tmp_path / "free")
    ratio = ood_kl(free) / before
    for guard in (1.0, 1.02, 5.0):
        step = LmHeadRidge(objective=objective, guard=guard)
        made, out = fitted(step, pair, samples, tmp_path / str(guard))
        assert ood_kl(made) <= guard * before * (1 + 1e-4)
        assert out.notes["validation KL after"] <= out.notes["validation KL before"]
        if guard > ratio:
            assert torch.equal(made.head(), free.head())
            assert not out.report.cautions


def impossible_limit(problem: _method.HeadProblem, _: float | None) -> OutOfDomain:
    """Return a limit that no head can meet."""
    return OutOfDomain(problem.layout.prediction_rows(Split.GUARD_VALIDATION)[0], 1.0, 0.5, -1.0)


def test_a_guard_that_nothing_meets_leaves_the_head(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    monkeypatch.setattr(_method, "ood_limit", impossible_limit)
    step = LmHeadRidge(objective="kl", guard=1.0)
    made, out = fitted(step, pair, pico_samples(texts=40, guard=4), tmp_path / "runs")
    assert made is pair.student.weights
    assert out.notes["map"]["strength"] == 0.0
    assert out.report.refused.startswith(
        "with every head that lowers the validation KL the KL on the guard's texts would exceed 1 "
        "times its value before the edit"
    )
    assert out.report.remedies[0].what == "a wider guard"
    assert not out.report.cautions


def test_a_guard_that_allows_a_weaker_head_only_says_so(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = with_random_head(teacher, tmp_path / "student")
    of_rows = _method.candidate_kl

    def worse_by_blend(
        problem: _method.HeadProblem, teacher_head: Any, rows: torch.Tensor, *options: Any
    ) -> dict[_method.Candidate, float]:
        found = of_rows(problem, teacher_head, rows, *options)
        return found if rows is problem.validation else {each: each.blend for each in found}

    monkeypatch.setattr(_method, "candidate_kl", worse_by_blend)
    monkeypatch.setattr(_method, "largest_allowed_kl", lambda *_: 0.5)
    samples = pico_samples(texts=40, guard=4)
    step = LmHeadRidge(ridge=(0.01,), guard=1.02)
    made, out = fitted(step, pair, samples, tmp_path / "runs")
    assert made is not pair.student.weights
    (caution,) = out.report.cautions
    assert caution.kind is CautionKind.GUARDED
    assert caution.text.startswith("the head of ridge 0.01 and blend 0.5, the guard allows no more")
    assert "that of ridge 0.01 and blend 1, the best, would bring" in caution.text
    assert "to 1.000, and 0.500 is allowed" in caution.text
    assert "Try: a wider guard (--set guard=1.04)" in caution.text


@pytest.mark.parametrize(("share", "part"), [(0.25, "a quarter of the map"), (1.0, "")])
def test_a_guard_that_allows_a_part_of_the_map_says_so(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, part: str
) -> None:
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    monkeypatch.setattr(_method, "largest_allowed_kl", lambda *_: 100.0)
    monkeypatch.setattr(_method, "allowed_share", lambda *_: share)
    step = LmHeadRidge(objective="kl", guard=1.02)
    _, out = fitted(step, pair, pico_samples(texts=40, guard=4), tmp_path / "runs")
    assert not out.report.refused
    texts = [caution.text for caution in out.report.cautions]
    assert len(texts) == bool(part)
    assert all(text.startswith(f"{part}, the guard allows no more (all of it") for text in texts)


class PlainRows(NamedTuple):
    """Rows of a model that neither divides nor caps its logits."""

    X: torch.Tensor

    def logits(self, rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return self.X[rows] @ head.T


@pytest.mark.parametrize(
    ("within", "share"), [(1.0, 1.0), (0.6, 0.5), (0.3, 0.25), (0.1, 0.0), (None, 1.0)]
)
def test_the_map_is_scaled_down_to_the_limit(within: float | None, share: float) -> None:
    maker = torch.Generator().manual_seed(0)
    X, H, change = (torch.randn(n, 4, generator=maker) for n in (20, 9, 9))
    problem = _method.HeadProblem(
        layout=PackedTexts((), 0),
        X=PlainRows(X),  # type: ignore[arg-type]
        head=H,
        target_log_probs=lambda rows: (X[rows] @ H.T).log_softmax(-1),
        validation=torch.arange(20),
        validation_text=torch.zeros(20),
    )
    limit = None
    if within is not None:
        rows = torch.arange(20)
        limit = OutOfDomain(rows, 1.0, 0.0, problem.validation_kl(H + within * change))
    assert allowed_share(problem, H, change, limit) == share


def test_a_guard_without_texts_is_refused(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"as samples\.guard"):
        fitted(LmHeadRidge(guard=1.02), Pair(teacher, teacher), samples, tmp_path / "runs")
