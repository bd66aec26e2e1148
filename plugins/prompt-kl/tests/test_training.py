"""Training adds up parts of a batch, and a killed one ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_prompt_kl import _training
from rotdistill_prompt_kl._gradients import add_gradients
from rotdistill_prompt_kl._lora import with_lora
from rotdistill_prompt_kl._saved import SavedTraining
from rotdistill_prompt_kl._targets import DistillationTargets, TrainingTexts
from rotdistill_prompt_kl.step import PromptKl
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_model, pico_output, pico_samples

OPTIONS: dict[str, Any] = {
    "prompts_from": ("questions",),
    "rank": 2,
    "max_epochs": 2,
    "learning_rate": 1e-2,
    "batch_size": 8,
}
"""Six steps on 24 texts, with a check after steps 2, 3, 4 and 6."""
STEPS = 6


class Killed(Exception):
    """Stands in for kill -9: nothing after it is done."""


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("models")
    teacher = pico_model(root / "teacher", seed=1, num_hidden_layers=3)
    return Pair(teacher, pico_model(root / "student", seed=2))


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Texts whose answers the teacher wrote."""
    texts = pico_samples(texts=40)
    questions = tuple(Conversation(t.id, "en", t.split, "w1", None) for t in texts.layout.texts)
    return Samples(texts.layout, questions, "w7 w8 w9")


@pytest.fixture
def targets(pair: Pair, samples: Samples, tmp_path: Path) -> DistillationTargets:
    layout = samples.layout.select(Split.FIT)
    out = pico_output(tmp_path / "targets")
    return DistillationTargets(pair, TrainingTexts(layout, layout), 64, out, quiet)


def distilled(
    pair: Pair, samples: Samples, root: Path, **options: Any
) -> tuple[Weights, StepOutput]:
    out = pico_output(root)
    step = PromptKl(**{**OPTIONS, **options})
    return step.style(pair.student.weights, pair, samples, out, quiet), out


@pytest.fixture(scope="module")
def plain(
    pair: Pair, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Weights, StepOutput]:
    """A training that nobody disturbs."""
    return distilled(pair, samples, tmp_path_factory.mktemp("plain"))


def same(one: Weights, other: Weights) -> bool:
    """Whether two views have the same bits."""
    names = one.entries.keys() | other.entries.keys()
    return all(torch.equal(one[name], other[name]) for name in names)


def gradient(targets: DistillationTargets, batch: list[int], at_once: int) -> tuple[Tensor, float]:
    """Return the gradient of a batch, whose parts have so many texts, and its loss."""
    view, model = targets.pair.student.weights, targets.pair.student
    torch.manual_seed(0)
    student = with_lora(view, model, "lora", 2)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    loss = add_gradients(student, view, targets, batch, trainable, at_once=at_once)
    return torch.cat([p.grad.flatten() for p in trainable if p.grad is not None]), loss


def test_parts_of_a_batch_add_up_to_its_gradient(targets: DistillationTargets) -> None:
    batch = [5, 1, 3, 2, 8]
    whole, loss = gradient(targets, batch, len(batch))
    assert bool(whole.any())
    for at_once in (1, 2, 3):
        parts, other = gradient(targets, batch, at_once)
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_parts_add_up_to_the_same_bits_in_any_order(targets: DistillationTargets) -> None:
    one, _ = gradient(targets, [5, 1, 3, 2, 8, 7], 2)
    other, _ = gradient(targets, [8, 7, 5, 1, 3, 2], 2)
    assert torch.equal(one, other)
    # Other parts round otherwise, or the comparison would say nothing.
    assert not torch.equal(one, gradient(targets, [5, 3, 1, 2, 8, 7], 2)[0])


def test_larger_parts_change_the_result_by_rounding(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    one, four = (
        distilled(pair, samples, tmp_path / str(n), micro_batch_size=n)[1].report.training
        for n in (1, 4)
    )
    assert one is not None
    assert four is not None
    assert four.validation_kl == pytest.approx(one.validation_kl, rel=1e-4)
    assert min(four.validation_kl) < 0.95 * four.validation_kl[0]


def test_a_part_is_no_larger_than_the_batch() -> None:
    with pytest.raises(ValueError, match="micro_batch_size: a step of training has only"):
        PromptKl(batch_size=4, micro_batch_size=5)


@pytest.mark.parametrize("loss", ["reverse", "jensen-shannon"])
def test_other_losses_lower_the_forward_kl_too(
    pair: Pair,
    samples: Samples,
    tmp_path: Path,
    plain: tuple[Weights, StepOutput],
    loss: Any,
) -> None:
    forward = plain[1].report.training
    other = distilled(pair, samples, tmp_path, loss=loss)[1].report.training
    assert forward is not None
    assert other is not None
    assert other.loss == loss
    # They start from the same validation KL, minimise something else, and end elsewhere.
    assert other.validation_kl[0] == forward.validation_kl[0]
    assert other.losses[0] != pytest.approx(forward.losses[0], rel=1e-3)
    assert min(other.validation_kl) < 0.95 * other.validation_kl[0]


def test_the_curve_has_every_step_and_every_check(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    _, out = distilled(pair, samples, tmp_path)
    curve = out.report.training
    assert curve is not None
    assert len(curve.losses) == STEPS
    assert curve.checks == (0, 2, 3, 4, 6)
    assert list(curve.validation_kl) == out.notes["validation KL by evaluation"]
    assert curve.losses[-1] < curve.losses[0]


# Going on after a kill.


@contextmanager
def steps_of_training(kill_at: int | None = None) -> Iterator[list[list[int]]]:
    """Note the batches that are trained on, and die in the middle of one of them."""
    plain, seen = _training.add_gradients, []

    def noted(*given: Any, **named: Any) -> float:
        if len(seen) == kill_at:
            raise Killed
        seen.append(given[3])
        return plain(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "add_gradients", noted)
        yield seen


@pytest.mark.parametrize(
    ("options", "saved"),
    [({}, {1: 0, 5: 4}), ({"train": "head", "patience": 1}, {3: 3})],
    ids=str,
)
def test_a_killed_training_goes_on_after_the_last_check(
    pair: Pair, samples: Samples, tmp_path: Path, options: dict[str, Any], saved: dict[int, int]
) -> None:
    with steps_of_training() as batches:
        whole, undisturbed = distilled(pair, samples, tmp_path / "whole", **options)
    assert whole is not pair.student.weights
    for kill_at, goes_on_at in saved.items():
        root = tmp_path / str(kill_at)
        with steps_of_training(kill_at), pytest.raises(Killed):
            distilled(pair, samples, root, **options)
        with steps_of_training() as after:
            made, out = distilled(pair, samples, root, **options)
        assert after == batches[goes_on_at:]
        assert same(made, whole)
        assert out.report == undisturbed.report
        assert out.notes == undisturbed.notes


def test_a_training_that_is_killed_again_and_again_ends_the_same(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, undisturbed = distilled(pair, samples, tmp_path / "whole", max_epochs=1)
    monkeypatch.setattr(_training, "SAVED_STEPS", 1)
    for _ in range(STEPS // 2 - 1):
        with steps_of_training(kill_at=1) as seen, pytest.raises(Killed):
            distilled(pair, samples, tmp_path / "killed", max_epochs=1)
        assert len(seen) == 1
    made, out = distilled(pair, samples, tmp_path / "killed", max_epochs=1)
    assert same(made, whole)
    assert out.report == undisturbed.report


def test_a_torn_file_costs_what_was_learned_since_the_one_before(
    pair: Pair, samples: Samples, tmp_path: Path, plain: tuple[Weights, StepOutput]
) -> None:
    root = tmp_path / "killed"
    with steps_of_training(kill_at=5), pytest.raises(Killed):
        distilled(pair, samples, root)
    files = sorted(root.glob("run/training/step/*.safetensors"))
    assert len(files) == 2
    newest = files[3 % 2]  # three were saved
    newest.write_bytes(newest.read_bytes()[:-1])
    with steps_of_training() as after:
        made, _ = distilled(pair, samples, root)
    assert len(after) == STEPS - 3
    assert same(made, plain[0])


def test_what_was_saved_is_emptied_and_is_no_part_of_the_result(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    _, out = distilled(pair, samples, tmp_path, max_epochs=1)
    files = sorted(tmp_path.glob("run/training/step/*.safetensors"))
    assert [path.stat().st_size < 200 for path in files] == [True, True]
    assert SavedTraining(out, ALONE).load() == {}
    assert not any("training" in path for path in out.used)
    with steps_of_training() as again:
        distilled(pair, samples, tmp_path, max_epochs=1)
    assert len(again) == STEPS // 2


# What the student answers.

ON_POLICY: dict[str, Any] = {"on_policy": 0.5}


def test_the_teacher_judges_what_the_student_answers(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = _training.add_gradients, []

    def noted(*given: Any, **named: Any) -> float:
        seen.append(given[2])
        return plain(*given, **named)

    monkeypatch.setattr(_training, "add_gradients", noted)
    made, out = distilled(pair, samples, tmp_path, **ON_POLICY)
    original = samples.layout.select(Split.FIT, Split.VALIDATION)
    for epoch, targets in enumerate(seen[::3]):
        answered = [text for text in targets.layout.texts if ".student" in text.id]
        assert len(answered) == 12
        for text in answered:
            before = original.texts[original.numbers[text.id.removesuffix(f".student{epoch}")]]
            assert text.split == Split.FIT
            assert text.tokens[: text.answer] == before.tokens[: before.answer]
            assert len(text.tokens) <= len(before.tokens)
        assert any(text.tokens not in {t.tokens for t in original.texts} for text in answered)
        # The states are the teacher's own on these texts.
        fresh = pico_output(tmp_path / f"fresh{epoch}")
        again = DistillationTargets(
            pair, TrainingTexts(targets.layout, targets.layout), 64, fresh, quiet
        )
        torch.testing.assert_close(targets.states, again.states, rtol=1e-4, atol=1e-5)
    chosen = [[".student" in text.id for text in seen[k].layout.texts] for k in (0, 3)]
    assert chosen[0] != chosen[1]
    curve = out.report.training
    assert curve is not None
    assert made is not pair.student.weights
    assert min(curve.validation_kl) < 0.95 * curve.validation_kl[0]


def test_a_training_on_the_students_answers_is_killed_and_ends_the_same(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    whole, _ = distilled(pair, samples, tmp_path / "whole", **ON_POLICY)
    root = tmp_path / "killed"
    with steps_of_training(kill_at=4), pytest.raises(Killed):
        distilled(pair, samples, root, **ON_POLICY)
    made, _ = distilled(pair, samples, root, **ON_POLICY)
    assert same(made, whole)


# Matrices in place of a LoRA.


@pytest.mark.parametrize("train", ["lora", "head"])
def test_the_matrices_themselves_are_trained_and_applied(
    pair: Pair, samples: Samples, tmp_path: Path, train: Any
) -> None:
    before = {name: pair.student.weights[name].clone() for name in pair.student.weights.entries}
    made, out = distilled(pair, samples, tmp_path, rank="full", learning_rate=3e-3, train=train)
    notes = out.notes
    assert notes["validation KL after"] < 0.95 * notes["validation KL before"]
    # The view has the KL that was trained, so every matrix has come back.
    assert notes["validation KL after"] == pytest.approx(
        min(notes["validation KL by evaluation"]), rel=1e-4
    )
    changed = {
        name
        for name in before
        if name in made.entries and not torch.equal(made[name], before[name])
    }
    if train == "head":
        assert made.adapter.head in made.entries.keys() - before.keys() | changed
    else:
        assert len(changed) == 2 * 7
        delta = made["model.layers.0.mlp.up_proj.weight"].double()
        delta -= before["model.layers.0.mlp.up_proj.weight"].double()
        assert int(torch.linalg.matrix_rank(delta)) > OPTIONS["rank"]
    assert all(torch.equal(pair.student.weights[name], before[name]) for name in before)
    assert not list(tmp_path.glob("**/adapter_config.json"))


def test_a_narrow_student_trains_wide_matrices(
    samples: Samples, pair: Pair, tmp_path: Path
) -> None:
    folder = str(pair.student.folder)
    student = open_model(ModelRef(model=folder, dtype="bfloat16"))
    narrow = Pair(pair.teacher, student)
    assert student.dtype == torch.bfloat16
    made, out = distilled(narrow, samples, tmp_path, rank="full", learning_rate=3e-3, max_epochs=1)
    assert made is not student.weights
    assert made["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    curve = out.report.training
    assert curve is not None
    assert min(curve.validation_kl) < 0.98 * curve.validation_kl[0]


def test_each_kind_of_training_has_a_rate_of_its_own() -> None:
    assert PromptKl().peak_rate == 5e-4
    assert PromptKl(rank="full").peak_rate < PromptKl().peak_rate
    assert PromptKl(rank="full", learning_rate=0.5).peak_rate == 0.5
