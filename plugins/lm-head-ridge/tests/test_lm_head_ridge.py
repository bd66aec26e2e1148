"""The head ridge on pico pairs: a scrambled head is found again, and the small solve equals the dense one on logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rotdistill_lm_head_ridge.step import LmHeadRidge, _answers, _texts, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.head import final_norm
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    captured_activations,
    final_states,
    logits,
    pico_model,
    pico_output,
    pico_samples,
    pico_tokenizer,
    save_folder,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WORDS = 56


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
    """Take progress and say nothing."""


def fitted(
    step: LmHeadRidge, pair: Pair, samples: Samples, root: Path
) -> tuple[Weights, dict[str, Any]]:
    out, weights = pico_output(root), pair.student.weights
    activations = captured_activations(pair, weights, samples, pico_output(root, "capture"))
    return step.style(weights, activations, pair, samples, out, quiet), out.notes


def scrambled(teacher: Model, folder: Path) -> Pair:
    """Return the teacher and its twin with a random head, rows of padding tokens included."""
    head = 0.15 * torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    save_folder(teacher.weights.untie().edit({HEAD: head}), teacher.folder, folder)
    return Pair(teacher, open_model(ModelRef(model=str(folder))))


def test_it_is_an_inexact_style() -> None:
    assert steps() == [LmHeadRidge]
    assert (stage_of(LmHeadRidge), LmHeadRidge.exact) == ("style", False)


def test_a_scrambled_head_is_found_again(teacher: Model, samples: Samples, tmp_path: Path) -> None:
    pair = scrambled(teacher, tmp_path / "student")
    made, notes = fitted(LmHeadRidge(ridge=(1e-7, 0.1)), pair, samples, tmp_path / "runs")
    layout = samples.layout.select("heldout")
    expected, before, after = (
        logits(w, layout)[:, :WORDS] for w in (teacher.weights, pair.student.weights, made)
    )
    assert float((before - expected).abs().max()) > 1
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        made[HEAD][:WORDS], teacher.weights[EMBEDDING][:WORDS], rtol=0, atol=1e-3
    )
    assert notes["chosen (ridge, blend)"] == [1e-7, 1.0]
    assert notes["validation KL after"] == pytest.approx(0, abs=1e-6)
    assert notes["validation KL before"] > 0.1


@pytest.mark.parametrize("width", [32, 48])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_small_solve_equals_the_dense_ridge_on_logits(
    tmp_path: Path, samples: Samples, width: int, strength: float
) -> None:
    wide = padded(pico_model(tmp_path / "teacher", seed=9, hidden_size=width))
    own = padded(pico_model(tmp_path / "student", seed=1)).folder
    pair = Pair(wide, open_model(ModelRef(model=str(own), dtype="float64")))
    out, weights = pico_output(tmp_path / "runs"), pair.student.weights
    activations = captured_activations(
        pair, weights, samples, pico_output(tmp_path / "runs", "capture")
    )
    made = LmHeadRidge(ridge=(strength,), blend=(1.0,)).style(
        weights, activations, pair, samples, out, quiet
    )
    layout = samples.layout.select("fit", "validation")
    fit = layout.split("fit")
    X = final_norm(weights, final_states(weights, layout))[fit]
    T = final_norm(
        wide.weights,
        activations.rows("teacher", wide.depth)[layout.row_indices_in(samples.layout)].double(),
    )[fit]
    H_t, H_s = (w.head().double()[:WORDS] for w in (wide.weights, weights))
    weight = (strength * float((X.T @ X).diagonal().mean())) ** 0.5 * torch.eye(
        32, dtype=torch.float64
    )
    rows, targets = torch.cat([X, weight]), torch.cat([T @ H_t.T, weight @ H_s.T])
    dense = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    assert made is not weights
    torch.testing.assert_close(made[HEAD][:WORDS], dense, rtol=0, atol=1e-8)


def test_a_blend_lies_between_the_old_head_and_the_fitted_one(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair = scrambled(teacher, tmp_path / "student")
    whole, part = (
        fitted(
            LmHeadRidge(ridge=(0.1,), blend=(blend,)), pair, samples, tmp_path / f"runs {blend}"
        )[0][HEAD]
        for blend in (1.0, 0.25)
    )
    old = pair.student.weights[HEAD]
    torch.testing.assert_close(part, old + 0.25 * (whole - old), rtol=0, atol=1e-6)


def test_a_tied_head_is_untied_and_the_config_says_so(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, notes = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    assert student.weights.tied
    assert "refused" not in notes
    assert not made.tied
    assert made.config["tie_word_embeddings"] is False
    assert torch.equal(made[EMBEDDING], student.weights[EMBEDDING])
    assert {
        name
        for name in student.weights.entries
        if not torch.equal(made[name], student.weights[name])
    } == set()
    save_folder(made, student.folder, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    assert torch.equal(
        open_model(ModelRef(model=str(tmp_path / "saved"))).weights.head(), made[HEAD]
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_padding_tokens_stay_as_they_are(
    teacher: Model, samples: Samples, tmp_path: Path, tied: bool
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1, tie_word_embeddings=tied))
    made, _ = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    old = student.weights.head()
    assert len(student.tokenizer.get_vocab()) == WORDS < len(old)
    assert torch.equal(made[HEAD][WORDS:], old[WORDS:])
    assert not bool((made[HEAD][:WORDS] == old[:WORDS]).all(1).any())


@pytest.mark.parametrize("rows", [64, 72])
def test_a_teacher_with_another_number_of_padding_rows_is_no_obstacle(
    samples: Samples, tmp_path: Path, rows: int
) -> None:
    teacher = padded(pico_model(tmp_path / "teacher", seed=9, vocab_size=rows, hidden_size=48))
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, notes = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    assert made[HEAD].shape == (64, 32)
    assert notes["validation KL after"] < notes["validation KL before"]


def test_the_choice_is_the_candidate_of_least_validation_kl(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    made, notes = fitted(LmHeadRidge(), Pair(teacher, student), samples, tmp_path / "runs")
    scores = notes["validation KL by (ridge, blend)"]
    assert len(scores) == 10
    assert notes["validation KL before"] == scores["0, 0"]
    assert notes["validation KL after"] == min(scores.values())
    ridge, blend = notes["chosen (ridge, blend)"]
    assert scores[f"{ridge:g}, {blend:g}"] == notes["validation KL after"]
    layout = samples.layout.select("validation")
    rows, _, _ = layout.prediction_rows("validation")
    p, q = (logits(w, layout)[rows, :WORDS].log_softmax(-1) for w in (teacher.weights, made))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(
        notes["validation KL after"], rel=1e-3
    )


def test_a_student_that_is_its_teacher_keeps_its_head(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    made, notes = fitted(LmHeadRidge(), Pair(teacher, teacher), samples, tmp_path / "runs")
    assert made is teacher.weights
    assert "the head is left as it was" in notes["refused"]
    assert notes["validation KL after"] == notes["validation KL before"]


def test_candidates_that_are_all_worse_leave_the_head(
    teacher: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = scrambled(teacher, tmp_path / "student")
    monkeypatch.setattr(
        LmHeadRidge, "_scores", lambda *_: {(0.0, 0.0): 1.0, (0.01, 0.5): 1.0, (0.1, 1.0): 2.0}
    )
    made, notes = fitted(LmHeadRidge(), pair, samples, tmp_path / "runs")
    assert made is pair.student.weights
    assert "refused" in notes


def test_the_map_lowers_the_kl_further_and_the_head_is_the_mapped_one(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    _, first = fitted(LmHeadRidge(), pair, samples, tmp_path / "one")
    made, notes = fitted(LmHeadRidge(objective="kl"), pair, samples, tmp_path / "two")
    assert notes["validation KL before"] == first["validation KL before"]
    assert notes["map"]["validation KL before"] == pytest.approx(first["validation KL after"])
    assert notes["validation KL after"] < first["validation KL after"] - 1e-4
    layout = samples.layout.select("validation")
    rows, _, _ = layout.prediction_rows("validation")
    p, q = (logits(w, layout)[rows, :WORDS].log_softmax(-1) for w in (teacher.weights, made))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(
        notes["validation KL after"], rel=1e-3
    )
    assert torch.equal(made.head()[WORDS:], pair.student.weights.head()[WORDS:])
    assert {
        n for n in made.entries if n == HEAD or not torch.equal(made[n], pair.student.weights[n])
    } == {HEAD}


def test_a_map_that_does_not_help_leaves_the_head(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    made, notes = fitted(
        LmHeadRidge(objective="kl"), Pair(teacher, teacher), samples, tmp_path / "runs"
    )
    assert made is teacher.weights
    assert "the head is left as it was" in notes["refused"]


def test_rows_of_the_teacher_s_own_answers_come_first() -> None:
    layout = PackedTexts(
        tuple(Text(f"t{k}", "en", "fit", tuple(range(10)), 4) for k in range(4)), 2
    )
    rows, _, _ = layout.prediction_rows("fit")
    mine = rows[6:12]
    for most in (2, 6, 9, 100):
        chosen = _answers(layout, frozenset({"t1"}), most)
        assert len(chosen) <= most
        taken = set(chosen.tolist())
        assert taken <= set(rows.tolist())
        assert taken & set(mine.tolist()) == (
            set(mine.tolist()) if most >= 6 else {int(mine[0]), int(mine[3])}
        )
    assert len(_answers(layout, frozenset(), 100)) == len(rows)


def test_the_text_objective_asks_no_teacher(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    student = padded(pico_model(tmp_path / "student", seed=1))
    heads = []
    for name, model in (("one", teacher), ("two", padded(pico_model(tmp_path / "other", seed=5)))):
        heads.append(
            fitted(
                LmHeadRidge(objective="text", anchor=0.0),
                Pair(model, student),
                samples,
                tmp_path / name,
            )[0].head()
        )
    assert torch.equal(heads[0], heads[1])


def test_the_text_objective_likes_the_next_tokens() -> None:
    layout = PackedTexts(
        (Text("a", "en", "fit", (1, 2, 3, 4), 2), Text("b", "en", "fit", (1, 2, 5), 2)), 1
    )
    rows, targets, _ = layout.prediction_rows("fit")
    said = _texts(layout, 7)(rows)
    assert said.argmax(-1).tolist() == targets.tolist()
    assert said.exp().sum(-1).tolist() == [1.0] * len(rows)


@pytest.mark.parametrize("objective", ["ridge", "kl"])
def test_a_guard_bounds_what_the_head_may_cost_elsewhere(
    teacher: Model, tmp_path: Path, objective: Literal["ridge", "kl"]
) -> None:
    samples = pico_samples(texts=40, guard=8)
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    layout = samples.layout.select("guard-validation")
    rows, _, _ = layout.prediction_rows("guard-validation")

    def cost(weights: Weights) -> float:
        p, q = (logits(w, layout)[rows, :WORDS].log_softmax(-1) for w in (teacher.weights, weights))
        return float((p.exp() * (p - q)).sum(-1).mean())

    free, _ = fitted(LmHeadRidge(objective=objective), pair, samples, tmp_path / "free")
    ratio = cost(free) / cost(pair.student.weights)
    bounds = [1.0, 1.02, 5.0]
    for bound in bounds:
        made, notes = fitted(
            LmHeadRidge(objective=objective, guard=bound), pair, samples, tmp_path / str(bound)
        )
        assert cost(made) <= bound * cost(pair.student.weights) * (1 + 1e-4)
        assert notes["validation KL after"] <= notes["validation KL before"]
        if bound > ratio:
            assert torch.equal(made.head(), free.head())


def test_a_guard_that_nothing_can_meet_leaves_the_head(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(teacher, padded(pico_model(tmp_path / "student", seed=1)))
    monkeypatch.setattr(LmHeadRidge, "_limit", lambda _, __, ___, rows, ____: (rows, -1.0))
    made, notes = fitted(
        LmHeadRidge(objective="kl", guard=1.0),
        pair,
        pico_samples(texts=40, guard=4),
        tmp_path / "runs",
    )
    assert made is pair.student.weights
    assert notes["map"]["strength"] == 0.0


def test_a_guard_without_its_texts_is_refused(
    teacher: Model, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"name them as samples\.guard"):
        fitted(LmHeadRidge(guard=1.02), Pair(teacher, teacher), samples, tmp_path / "runs")
