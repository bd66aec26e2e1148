"""LoRA distillation on the teacher's own continuations.

Minimises the mean `KL(softmax(h_t W_tᵀ) ‖ student)` over the tokens that the teacher wrote, in
the low-rank matrices of a LoRA `W + s B A`. The products are then added to the weights, which is
exact. Related: generalised knowledge distillation on generated text (Agarwal et al.,
arXiv:2306.13649), there on the student's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import LESSON, OWN_ANSWER
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import prompt_tokens, shared_prefix_length, with_prompt
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import accept_if_better
from rotdistill_core.evaluation.divergence import shared_vocabulary
from rotdistill_core.forward.answers import model_answers
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.exact import ExactSum
from rotdistill_core.store.casts import STUDENT_DTYPE, cast_that_fits
from rotdistill_prompt_kl._lora import lora_products, save_adapter, with_lora
from rotdistill_prompt_kl._targets import DistillationTargets, TrainingTexts

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.conversations import Conversation
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_prompt_kl.step import PromptKl

LARGEST_GRADIENT = 2.0**30
"""What entries of gradients add up to at most. Integers below it resolve `2^-71`."""
OF_PLACE = ".place"
"""Ends the id of a text that continues a place name."""
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
    texts = ranks.lead(partial(training_texts, step, pair, samples, out, progress))
    vocabulary = shared_vocabulary(pair)
    targets = DistillationTargets(
        pair, texts, vocabulary, out, progress, step.bfloat16, activations, ranks
    )
    out.notes["texts"] = len([text for text in texts.student.texts if not text.plain])
    # The guard's forward passes need memory: the model that trained is gone when this returns.
    trained = trained_weights(step, weights, pair, targets, out, progress)
    if trained is None:
        out.report.refused = (
            "training did not lower the validation KL; the weights are left as they were"
        )
        return weights
    score = partial(targets.scores, samples)
    return accept_if_better(weights, trained, score, step.guard, out)


# Texts.


def training_texts(
    step: PromptKl, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
) -> TrainingTexts:
    """Return the teacher's continuations and answers, and the guard's texts if there is a guard.

    Raises:
        RecipeError: the samples lack topics, answers or guard texts that the options need, or
            the student has fused projections.
    """
    if pair.student.adapter.fused:
        raise RecipeError(
            f"prompt-kl: a {pair.student.config['model_type']} model has fused projections, "
            "on which no LoRA is trained here."
        )
    answers: list[Text] = []
    if "questions" in step.prompts_from:
        answers = _teacher_answers(samples)
        if not answers:
            raise RecipeError(
                'prompt-kl: prompts_from = ["questions"] trains on the teacher\'s answers; '
                "let it write some: samples.own_answers = 64, or lessons.count."
            )
    outside: list[Text] = []
    if step.guard:
        outside = list(samples.layout.select(Split.GUARD_VALIDATION).texts)
        if not outside:
            raise RecipeError(
                "prompt-kl: guard needs texts outside the domain; name them as samples.guard."
            )
    continuations: list[Text] = []
    if step.continues_topics:
        continuations = topic_continuations(step, pair, samples, out, progress)
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
        yield with_prompt(text, prompts[text.id.removesuffix(OF_PLACE)])


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
            id=f"{question.id}{OF_PLACE}",
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
    """Return the texts with a topic, without held-out ones and those that the teacher wrote."""
    questions = [
        each
        for each in samples.conversations
        if each.topic
        and each.split in (Split.FIT, Split.VALIDATION)
        and not each.id.endswith((OWN_ANSWER, LESSON))
    ]
    return list({question.id: question for question in questions}.values())


# Training.


def trained_weights(
    step: PromptKl,
    weights: Weights,
    pair: Pair,
    targets: DistillationTargets,
    out: StepOutput,
    progress: Progress,
) -> Weights | None:
    """Train a LoRA and return the weights with the best one folded in; None without any gain.

    The LoRA is written in peft's format, the validation KL to the notes.
    """
    view = weights.untie() if step.train == "head" else weights
    with torch.random.fork_rng():
        torch.manual_seed(step.seed)
        student = with_lora(view, pair.student, step.train, step.rank)
        curve = [targets.kl(student, view, Split.VALIDATION)]
        evaluations = train(step, student, view, targets, progress)
        best_state = _early_stopping(student, evaluations, curve, step.patience)
    out.notes["validation KL by evaluation"] = curve
    if not best_state:
        return None
    student.load_state_dict(best_state, strict=False)
    targets.ranks.lead(partial(save_adapter, student, out))
    return view.edit(
        {
            name: cast_that_fits(
                view[name].double() + product, pair.student.dtype, name, STUDENT_DTYPE
            )
            for name, product in lora_products(student)
        }
    )


def _early_stopping(
    student: Any, evaluations: Iterator[float], curve: list[float], patience: int
) -> dict[str, Tensor]:
    """Return the LoRA with the least validation KL, by parameter; empty if none is a gain.

    Args:
        student: the peft model.
        evaluations: trains, and yields the validation KL.
        curve: starts with the KL before training; evaluations are appended.
        patience: evaluations in a row without gain after which training stops.
    """
    best, worse = curve[0], 0
    best_state: dict[str, Tensor] = {}
    for kl in evaluations:
        curve.append(kl)
        if kl < best:
            best, worse = kl, 0
            best_state = {
                name: parameter.detach().clone()
                for name, parameter in student.named_parameters()
                if parameter.requires_grad
            }
        else:
            worse += 1
        if worse == patience:
            break
    return best_state


def train(
    step: PromptKl, student: Any, view: Weights, targets: DistillationTargets, progress: Progress
) -> Iterator[float]:
    """Train the LoRA, and yield the validation KL twice an epoch.

    AdamW without weight decay, gradients clipped to norm 1. The learning rate rises over the
    first twentieth of the steps, and decays linearly to 0. Training ends where it diverges.
    """
    k, n = step.shard
    texts = [i for i, text in enumerate(targets.layout.texts) if text.split == Split.FIT]
    texts = texts[k - 1 :: n]
    total = step.max_epochs * -(-len(texts) // step.batch_size)
    halves = 2 * step.max_epochs
    evaluated = {round(total * half / halves) for half in range(1, halves + 1)}
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=step.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_up_and_decay, total))
    # All orders first: nothing that a process computes alone may draw between them.
    orders = [torch.randperm(len(texts)).tolist() for _ in range(step.max_epochs)]
    batches = [
        [texts[i] for i in order[start : start + step.batch_size]]
        for order in orders
        for start in range(0, len(order), step.batch_size)
    ]
    for done, batch in enumerate(batches, 1):
        loss = add_gradients(student, view, targets, batch, trainable)
        if not math.isfinite(loss):
            return
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(done, total, f"KL {loss:.3f}")
        if done in evaluated:
            yield targets.kl(student, view, Split.VALIDATION)


def add_gradients(
    student: Any,
    view: Weights,
    targets: DistillationTargets,
    batch: Sequence[int],
    trainable: Sequence[torch.nn.Parameter],
) -> float:
    """Give parameters the gradient of the mean KL over a batch; return that KL, nats a token.

    Processes share the texts of the batch. Each text goes through the student by itself, and
    gradients of texts are added as integers, so they have the same bits for any number of
    processes.

    Returns:
        The mean KL; NaN if training has diverged, and then there is no gradient.
    """
    ranks, tokens = targets.ranks, targets.tokens(batch)
    size = sum(parameter.numel() for parameter in trainable)
    total = ExactSum((size,), LARGEST_GRADIENT, "prompt-kl: gradient")
    losses = torch.zeros(len(batch), dtype=torch.float64)
    largest = torch.zeros(len(batch), dtype=torch.float64)
    for k in ranks.mine(range(len(batch))):
        loss = targets.losses(student, view, [batch[k]]).sum() / tokens
        torch.autograd.backward(loss)
        gradient = torch.cat([_gradient(parameter).flatten() for parameter in trainable])
        for parameter in trainable:
            parameter.grad = None
        losses[k] = float(loss.detach())
        largest[k] = float(gradient.abs().max())
        if largest[k] < LARGEST_GRADIENT / len(batch):
            total.add(gradient)
    ranks.add_up(losses)
    ranks.add_up(largest)
    if not bool((largest < LARGEST_GRADIENT / len(batch)).all()):
        return math.nan
    total.combine(ranks.add_up, trainable[0].device)
    parts = torch.split(total.value(), [parameter.numel() for parameter in trainable])
    for parameter, part in zip(trainable, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)
    return float(losses.sum())


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Return the gradient of a parameter; zero where the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _warm_up_and_decay(total: int, done: int) -> float:
    """Return the learning rate after `done` of `total` steps, relative to its peak."""
    warm_up = max(1, total // 20)
    return min(1.0, (done + 1) / warm_up) * (1 - done / (total + 1))
