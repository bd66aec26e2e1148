"""Keys of what a run makes. Equal keys mean equal content, so a key decides what is reused.

The key of a step is `RecipeStep.key`. `plan` derives the same keys without opening a model, so
nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.lessons import NO_LESSON_TEXTS, LessonTexts
from rotdistill_core.planning.shape import DTYPE_BYTES
from rotdistill_core.plugin.source_code import core_digest
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.hashing import digest

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair


EVERY_RESULT = (
    "data._rendering",
    "execution.samples",
    "execution.artifacts",
    "execution.save",
    "execution.parity",
    "forward.certificate",
)
"""Modules of the core that every result passes through, whatever its step imports. The program
that renders chat templates is imported by none."""


class KeyedStep(NamedTuple):
    """One step of one variant, with the key of its result."""

    variant: str
    recipe_step: RecipeStep
    key: str
    """Key of its result."""
    before: str
    """Key that `key` is derived from: `before` in the step's ledger record."""
    earlier: tuple[RecipeStep, ...]
    """The variant's steps before it, evaluators apart: they made the weights, maps and captured
    states that it is given."""


def keyed_steps(recipe: ResolvedRecipe, start: str, dtype: str, facts: str) -> Iterator[KeyedStep]:
    """Yield every step of every variant with its key, in the order in which a run executes them.

    Steps that several variants share have the same key in each.

    Args:
        recipe: the recipe.
        start: key of the state before the first step.
        dtype: name of the dtype of checkpoints, such as `bfloat16`.
        facts: `facts_digest` of the questions, which only evaluators depend on.
    """
    narrow = DTYPE_BYTES[dtype] < DTYPE_BYTES["float32"]
    for variant, chain in recipe.chains(narrow).items():
        yield from keyed_chain(variant, chain, start, dtype, facts)


def keyed_chain(
    variant: str, chain: Sequence[RecipeStep], start: str, dtype: str, facts: str
) -> Iterator[KeyedStep]:
    """Yield the steps of one variant with their keys; see `keyed_steps` for the arguments.

    Evaluators come last, wherever the recipe lists them: they score the finished checkpoint.
    """
    before = start
    earlier: tuple[RecipeStep, ...] = ()
    for recipe_step in chain:
        if recipe_step.stage == "evaluate":
            continue
        key = recipe_step.key(before)
        yield KeyedStep(variant, recipe_step, key, before, earlier)
        before = key
        earlier = (*earlier, recipe_step)
    scored = evaluation_key(variant, before, dtype, facts)
    for recipe_step in chain:
        if recipe_step.stage == "evaluate":
            yield KeyedStep(variant, recipe_step, recipe_step.key(scored), scored, earlier)


def run_inputs(
    recipe: Recipe,
    pair: Pair,
    conversations: Sequence[Conversation],
    style: str,
    engine: str,
    date: str = "",
    lesson_texts: LessonTexts = NO_LESSON_TEXTS,
) -> dict[str, str]:
    """Return what a run starts from, by name.

    The hashes need no tokenizer and read a small part of the weights. A run records them with its
    `start_key`; where they are equal, that key and all keys after it are equal too. Of a device
    only its type counts, as in keys. `engine` is the key of what answers in the teacher's name. The
    date is that of the chat templates, if they write one.
    """
    refs = filter(None, (recipe.teacher, recipe.student, recipe.anchor))
    return {
        **{role: model.fingerprint for role, model in pair.by_role.items()},
        "code": shared_code(pair),
        "texts": texts_digest(recipe, conversations, style, lesson_texts),
        "engine": engine,
        "seed": str(recipe.seed),
        "compute": " ".join(f"{ref.dtype} {ref.device.partition(':')[0]}" for ref in refs),
        **({"date": date} if date else {}),
    }


def texts_digest(
    recipe: Recipe,
    conversations: Sequence[Conversation],
    style: str,
    lesson_texts: LessonTexts = NO_LESSON_TEXTS,
) -> str:
    """Return the hash of the texts of a run before any tokenizer or teacher has seen them."""
    texts: list[object] = [
        # Facts and falsehoods enter the key of evaluators alone.
        [{**vars(question), "facts": (), "falsehoods": ()} for question in conversations],
        style,
        recipe.samples.model_dump(
            include={"max_tokens", "answer_tokens", "own_answers", "thinking", "bake_prompt"}
        ),
    ]
    if recipe.lessons.count:
        # What the files say counts, and not where they are.
        texts += [recipe.lessons.model_dump(exclude={"forms", "topics"}), lesson_texts]
    return digest(texts)


def shared_code(pair: Pair) -> str:
    """Return the hash of code that all results depend on: the models' tables, the core's own steps.

    A table counts with everything that its adapter imports.
    """
    tables = sorted({model.table_code for model in pair.by_role.values()})
    return digest(core_digest(*EVERY_RESULT), *tables)


def start_key(pair: Pair, samples_digest: str, seed: int) -> str:
    """Return the key of the state before the first step."""
    models = [model.sha256 for model in pair.by_role.values()]
    compute = [f"{model.dtype} {model.device.type}" for model in pair.by_role.values()]
    return digest(*models, shared_code(pair), samples_digest, seed, *compute)


def checkpoint_key(variant: str, state_key: str, dtype: str) -> str:
    """Return the key of a saved variant; `dtype` is that of the checkpoint, such as `float32`."""
    return digest("checkpoint", variant, state_key, f"torch.{dtype}")


def evaluation_key(variant: str, state_key: str, dtype: str, facts: str) -> str:
    """Return the key of what an evaluator scores: a saved variant, and what answers should state.

    `facts` is `facts_digest` of the questions.
    """
    return digest(state_key, variant, f"torch.{dtype}", facts)
