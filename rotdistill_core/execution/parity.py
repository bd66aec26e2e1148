"""When a run compares itself with transformers: models, cuts and checkpoints.

Each opened model is compared before anything is made with it. A model that a step cut is compared
before the next step sees it, and each saved variant as transformers opens its folder. What holds is
recorded, and not compared again.
"""

from __future__ import annotations

import errno
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.keys import texts_digest
from rotdistill_core.forward.parity import (
    branch_fault,
    compare_with_transformers,
    logits_of_folder,
    logits_of_view,
    parity_fault,
    parity_texts,
)
from rotdistill_core.forward.whole import empty_model, require_finite_ends
from rotdistill_core.plugin.source_code import core_digest
from rotdistill_core.recipe.resolved import RecipeStep
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.records import ParityRecord
from rotdistill_core.store.results import Parity


def compare_models(run: RunContext, fresh: bool = False) -> dict[str, Parity]:
    """Compare each model of a run with transformers, on the run's prompts and written answers.

    The teacher has not answered anything yet; a model that is wrong should not begin to.

    Args:
        run: the run.
        fresh: do not look for what an earlier run found.

    Returns:
        Role -> the comparison. Roles of one model share it.

    Raises:
        SetupError: the forward pass of a model is not its own, with the likely cause.
    """
    found: dict[str, Parity] = {}
    made: dict[str, Parity] = {}
    for role, model in run.pair.by_role.items():
        key = _key(model, texts_digest(run.recipe, run.conversations, run.style, run.lesson_texts))
        parity = made.get(key) or (None if fresh else run.store.find_parity(key))
        if parity is None:
            where = f"{role} {model.ref.model}"
            parity = _timed(run, role, partial(_compare_model, run, model, where))
        found[role] = made[key] = parity
        _record(run, ParityRecord(key=key, role=role, result=parity))
    return found


def _compare_model(run: RunContext, model: Model, where: str) -> Parity:
    empty_model(model.weights, torch.float32)  # a config that describes no model is told by key
    require_finite_ends(model.weights)
    texts = parity_texts(_known_texts(run, model), without_prefix=True)
    for text in texts.texts:
        model.require_known_tokens(text.tokens, f"the text {text.id!r}")
    logits = logits_of_folder(model.folder, model.device)
    parity = compare_with_transformers(model.weights, logits, texts, model.device)
    fault = parity_fault(parity, model.weights)
    branch = branch_fault(model.weights, texts, model.device)
    if branch:
        fault = f"{fault} Besides, {branch}" if fault else branch
    if fault:
        raise SetupError(f"{where}: {fault} Nothing was captured.")
    return parity


def _known_texts(run: RunContext, model: Model) -> PackedTexts:
    """Return all texts as a model reads them; a question that the teacher will answer ends there.

    Its prompt counts, with the token that ends a turn in the place of the answer.
    """
    pair = run.pair
    reader = pair.teacher if model is pair.teacher or pair.one_tokenizer else pair.student
    tokenizer = reader.tokenizer
    unanswered = [question.id for question in run.conversations if question.answer is None]
    answers = dict.fromkeys(unanswered, (tokenizer.eos_token_id or 0,))
    chat = run.chats.teacher if reader is pair.teacher else run.chats.student
    longest = run.recipe.samples.max_tokens
    samples = tokenize_texts(tokenizer, run.conversations, answers, run.style, longest, chat)
    return samples.layout


def has_other_shape(one: Weights, two: Weights) -> bool:
    """Return whether two views differ in depth, or in the size of anything."""
    sizes_of_one, sizes_of_two = one.adapter.sizes(one.config), two.adapter.sizes(two.config)
    return one.depth != two.depth or sizes_of_one != sizes_of_two


def compare_cut(
    run: RunContext, recipe_step: RecipeStep, weights: Weights, samples: Samples
) -> Parity:
    """Compare a model that a step has cut with transformers' model of the same config.

    Raises:
        CheckFailed: they differ, or transformers makes another model of the config.
    """
    where = f'step "{recipe_step.id}": the model after it'
    return _timed(run, recipe_step.id, partial(_compare_view, run, weights, samples, where))


def _compare_view(run: RunContext, weights: Weights, samples: Samples, where: str) -> Parity:
    device = run.pair.student.device
    texts = parity_texts(samples.layout, without_prefix=False)
    with _what_the_run_made(where):
        logits = logits_of_view(weights, device)
        parity = compare_with_transformers(weights, logits, texts, device)
    return _checked(parity, weights, where)


def compare_checkpoint(
    run: RunContext,
    variant: str,
    checkpoint_key: str,
    folder: Path,
    saved: Callable[[], Weights],
    samples: Samples,
) -> Parity:
    """Compare a saved variant with transformers' model of its folder.

    Args:
        run: the run.
        variant: the variant.
        checkpoint_key: key of the checkpoint.
        folder: its folder.
        saved: opens the tensors of the folder, with the config that the steps worked with.
        samples: the texts of the run.

    Raises:
        CheckFailed: they differ, or transformers cannot open the folder.
    """
    key = _key(run.pair.student, checkpoint_key)
    parity = run.store.find_parity(key)
    if parity is None:
        compare = partial(_compare_folder, run, folder, saved, samples)
        parity = _timed(run, variant, compare)
    _record(run, ParityRecord(key=key, variant=variant, result=parity))
    return parity


def _compare_folder(
    run: RunContext, folder: Path, saved: Callable[[], Weights], samples: Samples
) -> Parity:
    where = f"{folder}: the checkpoint"
    device = run.pair.student.device
    texts = parity_texts(samples.layout, without_prefix=False)
    with _what_the_run_made(where):
        weights = saved()
        parity = compare_with_transformers(weights, logits_of_folder(folder, device), texts, device)
    return _checked(parity, weights, where)


def _checked(parity: Parity, weights: Weights, where: str) -> Parity:
    fault = parity_fault(parity, weights)
    if fault:
        raise CheckFailed(f"{where} {fault}")
    return parity


@contextmanager
def _what_the_run_made(where: str) -> Iterator[None]:
    """Turn an error of opening a model that the run itself has made into a check that fails.

    Where the system let no file be read, the model was not looked at, and the error stands.
    """
    try:
        yield
    except SetupError as error:
        if _is_of_the_system(error):
            raise
        raise CheckFailed(f"{where} is no model that transformers opens: {error}") from error


def _key(model: Model, *parts: str) -> str:
    """Return the key of a comparison: the model, its table, both programs, and more parts."""
    code = core_digest("forward.parity", "data.tokenization")
    transformers = importlib.metadata.version("transformers")
    return digest("parity", model.sha256, model.table_code, code, transformers, *parts)


def _record(run: RunContext, record: ParityRecord) -> None:
    same = [
        each
        for each in run.ledger.parities
        if (each.role, each.variant) == (record.role, record.variant)
    ]
    if same[-1:] != [record]:  # readers take the last one
        run.ledger.append(record)


def _timed(run: RunContext, subject: str, compare: Callable[[], Parity]) -> Parity:
    """Compare, and log how long it took."""
    run.progress(0, 1, f"{subject}: compared with transformers")
    started = time.monotonic()
    parity = compare()
    seconds = time.monotonic() - started
    run.log(f"  {subject:<12} {'compared':<16} {seconds:6.1f} s  with transformers")
    return parity


def _is_of_the_system(error: BaseException | None) -> bool:
    """Return whether an error comes from a call of the system, and not from a file that is gone.

    Libraries raise OSErrors of their own, which have no number.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            return True
        error = error.__cause__ or error.__context__
    return False
