"""Training on the teacher's continuations: it lowers the KL or changes nothing, and what is folded is what was trained."""

from __future__ import annotations

import gc
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
import torch
from rotdistill_prompt_kl._targets import DistillationTargets
from rotdistill_prompt_kl.step import PromptKl, deltas, steps
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.questions import Question
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation import acceptance as rotdistill_judge
from rotdistill_core.evaluation.acceptance import accept_if_better
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import logits, pico_model, pico_output, pico_samples, save_folder

QUESTIONS = [
    Question(
        f"q{k}", "en", "validation" if k % 4 == 0 else "fit", f"w{k} w2", "w3", f"w{k} w{k + 1}"
    )
    for k in range(16)
]
SAMPLES = Samples(
    PackedTexts((), 0), (*QUESTIONS, Question("h", "en", "heldout", "w5", None)), "w7 w8 w9"
)
OPTIONS = {"tokens": 4, "rank": 4, "epochs": 2, "rate": 5e-3}


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def pair_of(root: Path, model_type: str = "llama", **changes: object) -> Pair:
    teacher = pico_model(root / "teacher", model_type, seed=1, num_hidden_layers=3, **changes)
    return Pair(teacher, pico_model(root / "student", model_type, seed=2, **changes))


def taught(pair: Pair, root: Path, **options: object) -> tuple[Weights, dict[str, object]]:
    out = pico_output(root / "runs")
    return PromptKl(**{**OPTIONS, **options}).style(
        pair.student.weights, pair, SAMPLES, out, quiet
    ), out.notes  # type: ignore[arg-type]


def test_it_is_a_style_that_needs_no_capture() -> None:
    assert steps() == [PromptKl]
    assert stage_of(PromptKl) == "style"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("train", ["lora", "head"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_the_validation_kl_falls_and_the_folded_weights_are_the_trained_ones(
    tmp_path: Path, model_type: str, train: str, tied: bool
) -> None:
    cap = {"final_logit_softcapping": 5.0} if model_type == "gemma3_text" else {}
    pair = pair_of(tmp_path, model_type, tie_word_embeddings=tied, **cap)
    made, notes = taught(pair, tmp_path, train=train)
    assert notes["validation KL after"] < 0.98 * notes["validation KL before"]  # type: ignore[operator]
    step = PromptKl(**OPTIONS, train=train)  # type: ignore[arg-type]
    lesson = DistillationTargets(
        pair,
        step._texts(pair, SAMPLES, pico_output(tmp_path / "runs"), quiet),
        64,
        pico_output(tmp_path / "runs"),
        quiet,
    )
    plain = step._with_lora(made, pair)  # its B is zero
    assert lesson.kl(plain, made, "validation") == pytest.approx(
        notes["validation KL after"], rel=1e-4
    )
    changed = {
        n
        for n in made.entries
        if n not in pair.student.weights.entries
        or not torch.equal(made[n], pair.student.weights[n])
    }
    if train == "head":
        assert changed == {"lm_head.weight"}
    else:
        assert len(changed) == 2 * 7
        assert made.tied is tied


def test_a_student_that_says_the_same_already_is_left_alone(tmp_path: Path) -> None:
    model: Model = pico_model(tmp_path / "model")
    made, notes = taught(Pair(model, model), tmp_path)
    assert made is model.weights
    assert "did not lower" in str(notes["refused"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_saved_adapter_is_peft_s_own_and_gives_the_folded_logits(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pair = pair_of(tmp_path)
    made, _ = taught(pair, tmp_path)
    [config] = (tmp_path / "runs").glob("*/weights/step/adapter/adapter_config.json")
    layout = pico_samples(texts=4, prefix=0).layout
    ids = torch.tensor([text.tokens[:10] for text in layout.texts])
    base = AutoModelForCausalLM.from_pretrained(pair.student.folder, dtype=torch.float32)
    save_folder(made, pair.student.folder, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    with torch.no_grad():
        one, other = PeftModel.from_pretrained(base, config.parent)(ids).logits, folded(ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_two_trainings_are_the_same_and_leave_the_generator_alone(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    layout, made = pico_samples(texts=5).layout, []
    for name in ("one", "two"):
        torch.manual_seed(5)
        made.append(logits(taught(pair, tmp_path / name)[0], layout))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)
    other = logits(taught(pair, tmp_path / "three", seed=1)[0], layout)
    assert float((other - made[0]).abs().max()) > 1e-4


def test_the_order_of_the_products_is_b_times_a(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    student = PromptKl(rank=2)._with_lora(pair.student.weights, pair)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    found: dict[str, Tensor] = dict(deltas(student))
    assert len(found) == 14
    A = student.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight.double()
    torch.testing.assert_close(
        found["model.layers.0.mlp.down_proj.weight"], 2 * torch.ones(32, 2, dtype=torch.float64) @ A
    )


def test_training_that_stops_helping_stops(tmp_path: Path) -> None:
    _, notes = taught(pair_of(tmp_path), tmp_path, epochs=50, rate=0.3, patience=1)
    assert len(notes["validation KL by look"]) < 50  # type: ignore[arg-type]


def asked(folder: Path) -> tuple[Pair, Samples]:
    """Return a pair and texts of which the teacher wrote the answers, with a guard."""
    texts = pico_samples(texts=40, guard=8)
    own = tuple(
        Question(t.id, "en", t.split, "w1", None) for t in texts.layout.texts if not t.plain
    )
    return pair_of(folder), Samples(texts.layout, own, "w7 w8 w9")


def test_it_learns_from_answers_to_the_questions_too(tmp_path: Path) -> None:
    pair, samples = asked(tmp_path)
    out = pico_output(tmp_path / "runs")
    made = PromptKl(ask=("questions",), rank=4, epochs=3, rate=5e-3).style(
        pair.student.weights, pair, samples, out, quiet
    )
    assert made is not pair.student.weights
    assert out.notes["validation KL after"] < out.notes["validation KL before"]
    assert out.notes["texts"] == sum(t.split in ("fit", "validation") for t in samples.layout.texts)


def test_parts_of_the_texts_teach_different_things_and_make_up_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, samples = asked(tmp_path)
    seen: dict[int, set[int]] = {}
    whole = DistillationTargets.losses
    for k in (1, 2, 3):

        def losses(
            self: DistillationTargets,
            student: object,
            weights: Weights,
            texts: list[int],
            k: int = k,
        ) -> Tensor:
            seen.setdefault(k, set()).update(
                j for j in texts if self.layout.texts[j].split == "fit"
            )
            return whole(self, student, weights, texts)

        monkeypatch.setattr(DistillationTargets, "losses", losses)
        step = PromptKl(ask=("questions",), rank=4, epochs=1, rate=5e-3, part=(k, 3))
        step.style(
            pair.student.weights, pair, samples, pico_output(tmp_path / "runs", f"part {k}"), quiet
        )
    fit = {
        j
        for j, text in enumerate(samples.layout.select("fit", "validation").texts)
        if text.split == "fit"
    }
    assert sorted(map(len, seen.values())) == [8, 8, 8]
    assert len(set.union(*seen.values())) == len(fit) == 24


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no part 4 of 3"):
        PromptKl(part=(4, 3))


@pytest.mark.parametrize("guard", [1.0, 1.05])
def test_a_guard_bounds_the_lora(tmp_path: Path, guard: float) -> None:
    pair, samples = asked(tmp_path)
    step, out = (
        PromptKl(ask=("questions",), rank=4, epochs=3, rate=2e-2, guard=guard),
        pico_output(tmp_path / "runs"),
    )
    made = step.style(pair.student.weights, pair, samples, out, quiet)
    lesson = DistillationTargets(pair, samples.layout, 64, pico_output(tmp_path / "runs"), quiet)
    before, after = (
        lesson.scores(view, "guard-validation", samples).mean
        for view in (pair.student.weights, made)
    )
    assert after <= guard * before * (1 + 1e-5)


def test_the_model_that_trained_is_gone_before_the_guard_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, samples = asked(tmp_path)
    trained: list[ReferenceType[object]] = []
    begin, end = PromptKl._with_lora, accept_if_better

    def with_lora(step: PromptKl, *given: object) -> object:
        trained.append(ref(model := begin(step, *given)))  # type: ignore[arg-type]
        return model

    def settle(*given: object) -> object:
        gc.collect()
        assert trained
        assert not any(model() for model in trained)
        return end(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(PromptKl, "_with_lora", with_lora)
    monkeypatch.setattr(rotdistill_judge, "settle", settle)
    PromptKl(ask=("questions",), rank=4, epochs=1, rate=2e-2).style(
        pair.student.weights, pair, samples, pico_output(tmp_path / "runs"), quiet
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [({"ask": ("questions",)}, "samples.own_answers = 64"), ({"guard": 1.02}, "samples.guard")],
)
def test_what_the_samples_lack_is_named(
    tmp_path: Path, options: dict[str, object], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        taught(pair_of(tmp_path), tmp_path, **options)


def test_narrow_products_learn_about_the_same(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    after = [
        taught(pair, tmp_path / str(narrow), bfloat16=narrow)[1]["validation KL after"]
        for narrow in (False, True)
    ]
    assert after[1] == pytest.approx(after[0], rel=0.05)
