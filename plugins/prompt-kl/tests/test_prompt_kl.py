"""LoRA distillation lowers the KL or changes nothing, and folds exactly what was trained."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import ReferenceType, ref

import pytest
import torch
from rotdistill_prompt_kl import _method
from rotdistill_prompt_kl._gradients import add_gradients
from rotdistill_prompt_kl._lora import lora_products, with_lora
from rotdistill_prompt_kl._targets import DistillationTargets, TrainingTexts
from rotdistill_prompt_kl.step import PromptKl, steps
from torch import Tensor
from transformers import Qwen2Tokenizer

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import accept_if_better
from rotdistill_core.forward.ranks import Ranks
from rotdistill_core.plugin.step import check_models, stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    logits,
    options_survive_toml_and_json,
    parametrize_with_checks,
    pico_baked,
    pico_folder,
    pico_model,
    pico_output,
    pico_samples,
    pico_tokenizer,
    save_folder,
    the_hook_is_as_specified,
)

QUESTIONS = [
    Conversation(
        f"q{k}",
        "en",
        Split.FIT if k % 4 else Split.VALIDATION,
        f"w{k} w2",
        "w3",
        f"w{k} w{k + 1}",
    )
    for k in range(16)
]
SAMPLES = Samples(
    PackedTexts((), 0), (*QUESTIONS, Conversation("h", "en", Split.HELDOUT, "w5", None)), "w7 w8 w9"
)
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 4,
    "rank": 4,
    "max_epochs": 2,
    "learning_rate": 5e-3,
}
FACTORS: dict[str, dict[str, float]] = {
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}
"""What a model type does to embeddings, branches or logits."""
ON_ANSWERS: dict[str, Any] = {"prompts_from": ("questions",), "rank": 4, "max_epochs": 3}


# The kit's samples have neither places nor answers by the teacher, so the step refuses them. That
# training repeats itself is tested below.
@parametrize_with_checks(
    PromptKl,
    {},
    {"prompts_from": ["questions"], "shard": [2, 3], "guard": 1.02},
    checks=(the_hook_is_as_specified, options_survive_toml_and_json),
)
def test_prompt_kl_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


def pair_of(root: Path, model_type: str = "llama", **changes: object) -> Pair:
    folders = (
        pico_folder(root / "teacher", model_type, seed=1, num_hidden_layers=3, **changes),
        pico_folder(root / "student", model_type, seed=2, **changes),
    )
    if model_type == "qwen2":
        for folder in folders:
            byte_pairs().save_pretrained(folder)
    return Pair(*(open_model(ModelRef(model=str(folder))) for folder in folders))


def byte_pairs() -> Any:
    """Return a tokenizer of 64 tokens that spells the pico words: "w" and each digit.

    Beside a Qwen2 transformers reads every tokenizer as one of byte pairs, and the usual one of
    whole words would make all texts empty.
    """
    special = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
    pieces = ["w", "\u0120", "\u0120w", *"0123456789"]  # byte pairs write a space as U+0120
    unused = [f"unused{k}" for k in range(64 - len(special) - len(pieces))]
    tokenizer = Qwen2Tokenizer(
        vocab={token: k for k, token in enumerate([*special, *pieces, *unused])},
        merges=[("\u0120", "w")],
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens=special[3:],
    )
    tokenizer.chat_template = pico_tokenizer(64).chat_template
    return tokenizer


def answered_samples() -> Samples:
    """Return texts whose answers the teacher wrote, with a guard."""
    samples = pico_samples(texts=40, guard=8)
    questions = tuple(
        Conversation(text.id, "en", text.split, "w1", None)
        for text in samples.layout.texts
        if not text.plain
    )
    return Samples(samples.layout, questions, "w7 w8 w9")


def distilled(
    pair: Pair, root: Path, samples: Samples = SAMPLES, **options: Any
) -> tuple[Weights, StepOutput]:
    """Run the step; return the weights and the step's output."""
    out = pico_output(root / "runs")
    step = PromptKl(**options)
    return step.style(pair.student.weights, pair, samples, out, quiet), out


def test_prompt_kl_is_a_style() -> None:
    assert steps() == [PromptKl]
    assert stage_of(PromptKl) == "style"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("train", ["lora", "head"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "granite"])
def test_folded_weights_have_the_kl_that_was_trained(
    tmp_path: Path, model_type: str, train: Literal["lora", "head"], tied: bool
) -> None:
    pair = pair_of(tmp_path, model_type, tie_word_embeddings=tied, **FACTORS.get(model_type, {}))
    made, out = distilled(pair, tmp_path, **OPTIONS, train=train)
    assert out.notes["validation KL after"] < 0.98 * out.notes["validation KL before"]

    again = pico_output(tmp_path / "runs")
    step = PromptKl(**OPTIONS, train=train)
    texts = _method.training_texts(step, pair, SAMPLES, again, quiet)
    targets = DistillationTargets(pair, texts, 64, again, quiet)
    fresh = with_lora(made, pair.student, train, rank=4)  # its B is zero
    kl = targets.kl(fresh, made, Split.VALIDATION)
    assert kl == pytest.approx(out.notes["validation KL after"], rel=1e-4)

    before = pair.student.weights
    changed = {
        name
        for name in made.entries
        if name not in before.entries or not torch.equal(made[name], before[name])
    }
    if train == "head":
        assert changed == {"lm_head.weight"}
    else:
        assert len(changed) == 2 * 7
        assert made.tied is tied


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rotary_tables_of_a_text_do_not_follow_the_others_of_its_batch(
    tmp_path: Path, rope: str
) -> None:
    values: dict[str, dict[str, Any]] = {
        "longrope": {"long_factor": [9.0, 9.0, 20.0, 30.0], "short_factor": [1.0] * 4},
        "dynamic": {"factor": 6.0},
    }
    parameters = {"rope_type": rope, "rope_theta": 100.0, **values[rope]}
    pair = pair_of(tmp_path, max_position_embeddings=20, rope_parameters=parameters)
    samples = answered_samples()
    layout = samples.layout.select(Split.FIT)
    lengths = {len(text.tokens) for text in layout.texts}
    assert min(lengths) <= 20 < max(lengths)
    out = pico_output(tmp_path / "runs")
    targets = DistillationTargets(pair, TrainingTexts(layout, layout), 64, out, quiet)
    student = with_lora(pair.student.weights, pair.student, "lora", 4)
    texts = list(range(len(layout.texts)))
    with torch.no_grad():
        together = targets.losses(student, pair.student.weights, texts)
        alone = [targets.losses(student, pair.student.weights, [k]) for k in texts]
    torch.testing.assert_close(
        together.sort().values, torch.cat(alone).sort().values, rtol=1e-5, atol=1e-6
    )


class HalfOfTheWork(Ranks):
    """One of two processes, whose other one has nothing to add."""

    count = 2


def test_gradients_of_texts_add_up_to_that_of_the_batch(tmp_path: Path) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    layout = samples.layout.select(Split.FIT)
    out = pico_output(tmp_path / "runs")
    targets = DistillationTargets(pair, TrainingTexts(layout, layout), 64, out, quiet)
    view, batch = pair.student.weights, [5, 1, 3, 2]
    student = with_lora(view, pair.student, "lora", 4)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    expected = targets.losses(student, view, batch).mean()
    whole = torch.autograd.grad(expected, trainable)
    loss = add_gradients(student, view, targets, batch, trainable)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert any(bool(each.any()) for each in whole)
    for parameter, gradient in zip(trainable, whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)

    # A process carries out its share of the batch: here the first and the third text.
    targets.ranks = HalfOfTheWork()
    share = add_gradients(student, view, targets, batch, trainable)
    tokens = targets.tokens(batch)
    own = sum(float(targets.losses(student, view, [k]).detach().sum()) for k in (5, 3))
    assert share == pytest.approx(own / tokens, rel=1e-5)


def test_training_that_diverges_has_no_gradient(tmp_path: Path) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    layout = samples.layout.select(Split.FIT)
    out = pico_output(tmp_path / "runs")
    targets = DistillationTargets(pair, TrainingTexts(layout, layout), 64, out, quiet)
    view = pair.student.weights
    student = with_lora(view, pair.student, "lora", 4)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    trainable[0].data.fill_(torch.nan)
    assert math.isnan(add_gradients(student, view, targets, [0, 1], trainable))
    assert all(parameter.grad is None for parameter in trainable)


def test_a_student_that_is_its_teacher_is_left_alone(tmp_path: Path) -> None:
    model: Model = pico_model(tmp_path / "model")
    made, out = distilled(Pair(model, model), tmp_path, **OPTIONS)
    assert made is model.weights
    assert "did not lower" in out.report.refused


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_saved_adapter_loads_in_peft_with_the_folded_logits(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pair = pair_of(tmp_path)
    made, _ = distilled(pair, tmp_path, **OPTIONS)
    [config] = (tmp_path / "runs").glob("*/weights/step/adapter/adapter_config.json")
    layout = pico_samples(texts=4, prefix=0).layout
    ids = torch.tensor([text.tokens[:10] for text in layout.texts])
    base = AutoModelForCausalLM.from_pretrained(pair.student.folder, dtype=torch.float32)
    save_folder(made, pair.student.folder, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    with torch.no_grad():
        one, other = PeftModel.from_pretrained(base, config.parent)(ids).logits, folded(ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_training_repeats_itself_and_keeps_the_global_generator(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    layout, made = pico_samples(texts=5).layout, []
    for name in ("one", "two"):
        torch.manual_seed(5)
        made.append(logits(distilled(pair, tmp_path / name, **OPTIONS)[0], layout))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)
    other = logits(distilled(pair, tmp_path / "three", **OPTIONS, seed=1)[0], layout)
    assert float((other - made[0]).abs().max()) > 1e-4


def test_products_are_b_times_a_times_the_scale(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    student = with_lora(pair.student.weights, pair.student, "lora", rank=2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    products: dict[str, Tensor] = dict(lora_products(student))
    assert len(products) == 14
    A = student.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight.double()
    expected = 2 * torch.ones(32, 2, dtype=torch.float64) @ A
    torch.testing.assert_close(products["model.layers.0.mlp.down_proj.weight"], expected)


def test_training_without_gain_stops_early(tmp_path: Path) -> None:
    options = OPTIONS | {"max_epochs": 50, "learning_rate": 0.3}
    _, out = distilled(pair_of(tmp_path), tmp_path, **options, patience=1)
    curve = out.notes["validation KL by evaluation"]
    assert len(curve) < 50
    assert curve[-1] >= min(curve[:-1])


def test_answers_to_questions_are_learned_too(tmp_path: Path) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    made, out = distilled(pair, tmp_path, samples, **ON_ANSWERS, learning_rate=5e-3)
    assert made is not pair.student.weights
    assert out.notes["validation KL after"] < out.notes["validation KL before"]
    assert out.notes["texts"] == sum(
        text.split in (Split.FIT, Split.VALIDATION) for text in samples.layout.texts
    )


def test_general_lessons_are_learned_and_leave_the_others_their_prefix(tmp_path: Path) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    first = samples.layout.texts[0]
    text = replace(first, id="1.lesson", tokens=(9, 8, 7, 6), answer=1, plain=True)
    layout = PackedTexts((*samples.layout.texts, text), samples.layout.prefix)
    lesson = Conversation(text.id, "und", Split.FIT, "", None)
    with_lesson = replace(samples, layout=layout, conversations=(*samples.conversations, lesson))
    out = pico_output(tmp_path / "runs")
    step = PromptKl(**ON_ANSWERS)
    layout = _method.training_texts(step, pair, with_lesson, out, quiet).student
    assert text in layout.texts
    assert layout.prefix >= samples.layout.prefix
    made, _ = distilled(pair, tmp_path, with_lesson, **ON_ANSWERS, learning_rate=5e-3)
    assert made is not pair.student.weights


def test_lessons_are_no_topics(tmp_path: Path) -> None:
    lesson = Conversation("1.lesson", "en", Split.FIT, "w1 w2", None, "w1")
    samples = Samples(SAMPLES.layout, (*SAMPLES.conversations, lesson), SAMPLES.style)
    assert lesson not in _method._texts_with_topics(samples)


def test_a_topic_for_validation_is_not_trained_on() -> None:
    """Texts about one place may be in both splits, and the teacher continues them alike."""
    texts = [
        Conversation("v", "en", Split.VALIDATION, "w1", "w3", "Old Town"),
        Conversation("a", "en", Split.FIT, "w2", "w3", "old  town"),
        Conversation("b", "en", Split.FIT, "w4", "w3", "w6"),
        Conversation("c", "en", Split.FIT, "w5", "w3", "w6"),
    ]
    samples = Samples(SAMPLES.layout, tuple(texts), SAMPLES.style)
    assert [each.id for each in _method._texts_with_topics(samples)] == ["v", "b", "c"]
    # Where all texts are about a few places, most of these train.
    few = tuple(
        Conversation(
            f"{k}", "en", Split.FIT if k % 5 else Split.VALIDATION, "w1", "w3", f"w{k // 20}"
        )
        for k in range(100)
    )
    chosen = _method._texts_with_topics(Samples(SAMPLES.layout, few, SAMPLES.style))
    topics = {
        split: {each.topic for each in chosen if each.split == split}
        for split in (Split.FIT, Split.VALIDATION)
    }
    assert topics == {Split.FIT: {"w1", "w2", "w3", "w4"}, Split.VALIDATION: {"w0"}}


def test_a_remedy_brings_the_answers_that_it_trains_on(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", seed=1)
    _, out = distilled(Pair(model, model), tmp_path, **OPTIONS)
    assert out.report.refused
    [remedy] = [each for each in out.report.remedies if "answers" in each.what]
    assert remedy.sets == ('prompts_from=["questions"]', "samples.own_answers=64")


def test_a_baked_prompt_is_learned_from_the_teacher_that_reads_it(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", seed=1)
    pair, samples = Pair(model, model), answered_samples()
    baked = pico_baked(samples)
    options = ON_ANSWERS | {"max_epochs": 8, "learning_rate": 5e-3}
    made, out = distilled(pair, tmp_path, baked, **options)
    # Read alike, the model is its own teacher and has nothing to learn.
    _, alike = distilled(pair, tmp_path / "alike", samples, **options)
    assert alike.notes["validation KL by evaluation"][0] == pytest.approx(0, abs=1e-6)
    assert out.notes["validation KL after"] < 0.8 * out.notes["validation KL before"]
    score = baked_kl(pair, made, baked)
    assert score == pytest.approx(out.notes["validation KL after"], rel=1e-4)


def baked_kl(pair: Pair, view: Weights, samples: Samples) -> float:
    """Return the validation KL from the teacher's prompted logits to a view's bare ones."""
    total, rows = 0.0, 0
    both = zip(samples.layout.texts, samples.teacher.texts, strict=True)
    for own, theirs in ((a, b) for a, b in both if a.split == Split.VALIDATION):
        p, q = (
            logits(each, PackedTexts((text,), 0)).log_softmax(-1)[text.answer - 1 : -1]
            for each, text in ((pair.teacher.weights, theirs), (view, own))
        )
        total += float((p.exp() * (p - q)).sum())
        rows += len(p)
    return total / rows


def test_continuations_of_topics_are_read_without_a_baked_prompt(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", seed=1)
    baked = replace(SAMPLES, theirs=SAMPLES.layout, baked=True)
    texts = _method.training_texts(
        PromptKl(**OPTIONS), Pair(model, model), baked, pico_output(tmp_path / "runs"), quiet
    )
    style = model.tokenizer("<system> w7 w8 w9 <end>")["input_ids"]
    for own, theirs in zip(texts.student.texts, texts.teacher.texts, strict=True):
        assert theirs.tokens == (*style, *own.tokens)
        assert (own.id, own.split) == (theirs.id, theirs.split)
        assert theirs.answer == len(style) + own.answer


def test_shards_have_different_texts_and_together_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    seen: dict[int, set[str]] = {}
    read_by_teacher: dict[int, set[str]] = {}
    losses = DistillationTargets.losses
    for k in (1, 2, 3):

        def noted(
            self: DistillationTargets,
            student: object,
            weights: Weights,
            texts: list[int],
            *rest: Any,
            k: int = k,
        ) -> Tensor:
            chosen = (self.layout.texts[j] for j in texts)
            fit = {text.id for text in chosen if text.split == Split.FIT}
            seen.setdefault(k, set()).update(fit)
            of_teacher = (text for text in self.layout.texts if text.split == Split.FIT)
            read_by_teacher[k] = {text.id for text in of_teacher}
            return losses(self, student, weights, texts, *rest)

        monkeypatch.setattr(DistillationTargets, "losses", noted)
        options = ON_ANSWERS | {"max_epochs": 1, "learning_rate": 5e-3}
        distilled(pair, tmp_path / str(k), samples, **options, shard=(k, 3))
    fit = {text.id for text in samples.layout.texts if text.split == Split.FIT}
    assert [len(shard) for shard in seen.values()] == [8, 8, 8]
    assert read_by_teacher == seen
    assert set.union(*seen.values()) == fit
    assert len(fit) == 24


def test_a_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no shard 4 of 3"):
        PromptKl(shard=(4, 3))


@pytest.mark.parametrize("guard", [1.0, 1.05])
def test_a_guard_limits_the_kl_outside_the_domain(tmp_path: Path, guard: float) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    made, _ = distilled(pair, tmp_path, samples, **ON_ANSWERS, learning_rate=2e-2, guard=guard)
    texts = TrainingTexts(samples.layout, samples.layout)
    targets = DistillationTargets(pair, texts, 64, pico_output(tmp_path / "runs"), quiet)
    before, after = (
        targets.scores(samples, view, Split.GUARD_VALIDATION).mean
        for view in (pair.student.weights, made)
    )
    assert after <= guard * before * (1 + 1e-5)


def test_the_trained_model_is_freed_before_the_guard_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, samples = pair_of(tmp_path), answered_samples()
    models: list[ReferenceType[object]] = []
    accepted: list[bool] = []

    def noted(*given: Any) -> Any:
        model = with_lora(*given)
        models.append(ref(model))
        return model

    def accept(*given: Any) -> Weights:
        gc.collect()
        accepted.append(True)
        assert models
        assert not any(model() for model in models)
        return accept_if_better(*given)

    monkeypatch.setattr(_method, "with_lora", noted)
    monkeypatch.setattr(_method, "accept_if_better", accept)
    options = ON_ANSWERS | {"max_epochs": 1, "learning_rate": 2e-2}
    distilled(pair, tmp_path, samples, **options)
    assert accepted == [True]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"prompts_from": ("questions",)}, "samples.own_answers = 64"),
        ({"guard": 1.02}, "samples.guard"),
    ],
)
def test_missing_samples_are_named(tmp_path: Path, options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RecipeError, match=remedy):
        distilled(pair_of(tmp_path), tmp_path, **OPTIONS, **options)


@pytest.mark.parametrize("name", ["topics", "places"])
def test_texts_without_topics_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="no text has one"):
        options = {**OPTIONS, "prompts_from": (name,)}
        distilled(pair_of(tmp_path), tmp_path, answered_samples(), **options)


def test_a_student_with_fused_projections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="models of type phi3 have fused projections"):
        check_models(PromptKl(), pair_of(tmp_path, "phi3"))


def test_bfloat16_products_learn_about_as_much(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    wide, narrow = (
        distilled(pair, tmp_path / str(bfloat16), **OPTIONS, bfloat16=bfloat16)[1].notes
        for bfloat16 in (False, True)
    )
    after = narrow["validation KL after"]
    assert after == pytest.approx(wide["validation KL after"], rel=0.05)


def test_prompts_without_a_text_to_validate_on_are_refused(tmp_path: Path) -> None:
    fit_only = Samples(
        SAMPLES.layout, tuple(q for q in SAMPLES.conversations if q.split == "fit"), SAMPLES.style
    )
    with pytest.raises(RecipeError, match="none is a validation text to validate on"):
        distilled(pair_of(tmp_path), tmp_path, fit_only, **OPTIONS)
