"""Distillation on the teacher's own continuations, and on the student's.

Minimises the mean divergence of the student from the teacher (`_loss`), by default
`KL(softmax(h_t W_tᵀ) ‖ student)`, over the tokens that the teacher wrote, in the low-rank matrices
of a LoRA `W + s B A`. The products are then added to the weights, which is exact. With `on_policy`
some texts are the student's own: generalised knowledge distillation (Agarwal et al.,
arXiv:2306.13649).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import CONTINUED, LESSON, OWN_ANSWER
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.shards import in_shard
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import comparable_name
from rotdistill_core.data.tokenization import prompt_tokens, shared_prefix_length, with_prompt
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import (
    MORE_TEXTS,
    accept_if_better,
    refuse,
)
from rotdistill_core.evaluation.divergence import shared_vocabulary
from rotdistill_core.evaluation.guard import guard_of
from rotdistill_core.forward.answers import model_answers
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.precision import wide_dtype
from rotdistill_core.store.results import Remedy
from rotdistill_prompt_kl._full_rank import with_trained_matrices
from rotdistill_prompt_kl._lora import folded, save_adapter, with_lora
from rotdistill_prompt_kl._saved import SavedTraining
from rotdistill_prompt_kl._targets import DistillationTargets, TrainingTexts
from rotdistill_prompt_kl._training import Batches, Training

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.conversations import Conversation
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_prompt_kl.step import PromptKl

CONTINUATIONS = "continuations"
"""Names the files of what the teacher wrote after topics."""


def distil(
    step: PromptKl,
    weights: Weights,
    activations: ActivationStore | None,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Weights:
    """Return the weights with the trained LoRA folded in, or as they are if that is no gain.

    The leading process lets the teacher write and writes files. Each process has a whole student;
    they share texts, and add up gradients.

    Raises:
        RecipeError: the samples lack what the options ask for, or the student is fused.
        SetupError: teacher and student have different tokenizers.
    """
    guard = guard_of(step.guard, samples, step.use)
    outside = samples.layout.select(Split.GUARD_VALIDATION).texts if guard else ()
    texts = ranks.lead(partial(training_texts, step, pair, samples, out, progress, outside))
    vocabulary = shared_vocabulary(pair)
    # Matrices that train are wide, and meet states in the narrow dtype of the student.
    narrow = wide_dtype(pair.student.dtype) != pair.student.dtype
    bfloat16 = step.bfloat16 or (step.rank == "full" and narrow)
    targets = DistillationTargets(
        pair, texts, vocabulary, out, progress, bfloat16, activations, ranks
    )
    out.notes["texts"] = len([text for text in texts.student.texts if not text.plain])
    # The guard's forward passes need memory: the model that trained is gone when this returns.
    saved = SavedTraining(out, ranks)
    trained = trained_weights(step, weights, targets, saved, out, progress)
    remedies = [Remedy("a lower learning rate", (f"learning_rate={step.peak_rate / 4:g}",))]
    if "questions" in step.prompts_from:
        remedies.append(MORE_TEXTS)
    if step.prompts_from != ("questions",):
        answers = "the teacher's answers instead of its continuations"
        asks = () if _teacher_answers(samples) else ("samples.own_answers=64",)
        remedies.append(Remedy(answers, ('prompts_from=["questions"]', *asks)))
    kept = weights
    if trained is None:
        refuse(out, "training did not lower the validation KL", remedies)
    else:
        score = partial(targets.scores, samples)
        kept = accept_if_better(weights, trained, score, guard, out, remedies)
    saved.clear()
    return kept


# Texts.

VALIDATED_TOPICS = 5
"""One of so many topics that are in both splits is for validation."""


def training_texts(
    step: PromptKl,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    outside: Sequence[Text] = (),
) -> TrainingTexts:
    """Return the teacher's continuations and answers, and `outside`, the guard's texts.

    Raises:
        RecipeError: the samples lack topics or answers that the options need.
    """
    answers: list[Text] = []
    if "questions" in step.prompts_from:
        answers = _teacher_answers(samples)
        if not answers:
            raise RecipeError(
                'prompt-kl: prompts_from = ["questions"] trains on the teacher\'s answers; '
                "let it write some: samples.own_answers = 64, or lessons.count."
            )
    continuations: list[Text] = []
    if step.continues_topics:
        continuations = topic_continuations(step, pair, samples, out, progress)
    keeps = in_shard(samples, step.shard)
    continuations, answers = ([*filter(keeps, each)] for each in (continuations, answers))
    own = (*continuations, *answers)
    for split, use in ((Split.FIT, "train"), (Split.VALIDATION, "validate")):
        if not any(text.split == split for text in own):
            raise RecipeError(
                f"prompt-kl: of {len(own)} prompts none is a {split.value} text to {use} on; "
                "give it more texts, or raise max_prompts."
            )
    read = _packed(own, outside)
    if not samples.baked:
        return TrainingTexts(read, read)
    ids = {answer.id for answer in answers}
    student = [
        *_without_system_prompt(continuations, pair, samples),
        *(text for text in samples.layout.texts if text.id in ids),
    ]
    return TrainingTexts(_packed(student, outside), read)


def _packed(own: Sequence[Text], outside: Sequence[Text]) -> PackedTexts:
    """Return conversations and plain texts, packed."""
    # General lessons begin otherwise, and would leave no prefix to the others.
    prompts = [text.tokens[: text.answer] for text in own if not text.plain]
    return PackedTexts((*own, *outside), shared_prefix_length(prompts))


def _teacher_answers(samples: Samples) -> list[Text]:
    """Return the teacher's own answers to questions that are not held out, as it reads them."""
    ids = samples.teacher_answered()
    texts = samples.teacher.texts
    return [text for text in texts if text.id in ids and text.split != Split.HELDOUT]


def _without_system_prompt(
    continuations: Sequence[Text], pair: Pair, samples: Samples
) -> Iterator[Text]:
    """Yield continuations of topics as a student reads them that has no system prompt."""
    tokenizer = pair.student.tokenizer
    chat = samples.chat or ChatFormat.of(tokenizer)
    named = [_naming(q).without_system_prompt() for q in _texts_with_topics(samples)]
    prompts = prompt_tokens(tokenizer, samples.style, named, chat)
    for text in continuations:
        yield with_prompt(text, prompts[text.id.removesuffix(CONTINUED)])


def topic_continuations(
    step: PromptKl, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
) -> list[Text]:
    """Return the teacher's greedy continuations of the system prompt and topics.

    The teacher writes them once; every run under the same folder finds them again.

    Raises:
        RecipeError: no text has a topic.
        SetupError: the teacher's device has no memory for a single continuation.
    """
    teacher = pair.teacher
    chosen = _texts_with_topics(samples)[: step.max_prompts]
    if not chosen:
        raise RecipeError(
            'prompt-kl: prompts_from = ["topics"] continues topics, and no text has one; '
            'train on answers instead: prompts_from = ["questions"].'
        )
    tokenizer = pair.student.tokenizer
    chat = samples.chat or ChatFormat.of(tokenizer)
    prompts = prompt_tokens(tokenizer, samples.style, map(_naming, chosen), chat)
    continuations = model_answers(
        teacher, prompts, step.max_new_tokens, out, CONTINUATIONS, progress
    ).tokens
    return [
        Text(
            id=f"{question.id}{CONTINUED}",
            language=question.language,
            split=question.split,
            tokens=(*prompts[question.id], *continuations[question.id]),
            answer=len(prompts[question.id]),
        )
        for question in chosen
        if continuations[question.id]
    ]


def _naming(conversation: Conversation) -> Conversation:
    """Return a conversation that names a topic, and asks nothing."""
    return replace(conversation, question=conversation.topic, earlier=())


def _texts_with_topics(samples: Samples) -> list[Conversation]:
    """Return the texts with a topic, without held-out ones and those that the teacher wrote.

    The continuation of one `place` is the same in all texts about it, and these may be in both
    splits. Of the places that are in both, every fifth is for validation, and the others train.
    """
    questions = {
        each.id: each
        for each in samples.conversations
        if each.topic
        and each.split in (Split.FIT, Split.VALIDATION)
        and not each.id.endswith((OWN_ANSWER, LESSON))
    }
    splits: dict[str, set[Split]] = {}
    for each in questions.values():
        splits.setdefault(comparable_name(each.topic), set()).add(each.split)
    shared = [topic for topic, found in splits.items() if len(found) > 1]
    dealt = {
        topic: Split.FIT if number % VALIDATED_TOPICS else Split.VALIDATION
        for number, topic in enumerate(shared)
    }
    return [
        each
        for each in questions.values()
        if dealt.get(comparable_name(each.topic), each.split) == each.split
    ]


# Training.


def trained_weights(
    step: PromptKl,
    weights: Weights,
    targets: DistillationTargets,
    saved: SavedTraining,
    out: StepOutput,
    progress: Progress,
) -> Weights | None:
    """Train, and return the weights with the best that was learned; None without any gain.

    A LoRA is written in peft's format, the loss and the validation KL to the report.
    """
    model = targets.pair.student
    view = weights.untie() if step.train == "head" else weights
    with torch.random.fork_rng():
        torch.manual_seed(step.seed)
        if step.rank == "full":
            student = with_trained_matrices(view, model, step.train)
        else:
            student = with_lora(view, model, step.train, step.rank)
        batches = Batches.drawn(step, targets.layout)
        learned = Training(step, student, view, targets, batches, saved).run(progress)
    out.report.training = learned.curve(step.loss)
    out.notes["validation KL by evaluation"] = learned.kl
    if not learned.best:
        return None
    student.load_state_dict(learned.best, strict=False)
    if step.rank != "full":
        targets.ranks.lead(partial(save_adapter, student, out))
    return folded(view, student, model)
