"""Keys of what a run makes. Equal keys mean equal content, so a key decides what is reused.

The key of a step is `RecipeStep.key`. `plan` derives the same keys without opening a model, so
nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rotdistill_core.data.questions import Question
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.store.hashing import digest

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair


def run_inputs(
    recipe: Recipe, pair: Pair, questions: Sequence[Question], style: str
) -> dict[str, str]:
    """Return what a run starts from, by name.

    The hashes need no tokenizer and read a small part of the weights. A run records them with its
    `start_key`; where they are equal, that key and all keys after it are equal too.
    """
    models = {"teacher": pair.teacher, "student": pair.student, "anchor": pair.anchor}
    texts = [
        # Facts and falsehoods enter the key of evaluators alone.
        [vars(replace(question, facts=(), falsehoods=())) for question in questions],
        style,
        recipe.samples.model_dump(include={"max_tokens", "answer_tokens", "own_answers"}),
    ]
    refs = (recipe.teacher, recipe.student)
    return {
        **{role: model.fingerprint for role, model in models.items() if model},
        "texts": digest(texts),
        "seed": str(recipe.seed),
        "compute": " ".join(f"{ref.dtype} {ref.device}" for ref in refs),
    }


def start_key(pair: Pair, samples_digest: str, seed: int) -> str:
    """Return the key of the state before the first step."""
    models = [model.sha256 for model in (pair.teacher, pair.student, pair.anchor) if model]
    return digest(*models, samples_digest, seed, str(pair.student.dtype), pair.student.device.type)


def teacher_answers_key(pair: Pair, prompts: dict[str, list[int]], max_tokens: int) -> str:
    """Return the key of the teacher's greedy answers to tokenised prompts."""
    teacher = pair.teacher
    return digest(
        "answers", teacher.sha256, prompts, max_tokens, str(teacher.dtype), teacher.device.type
    )


def checkpoint_key(variant: str, state_key: str, dtype: str) -> str:
    """Return the key of a saved variant; `dtype` is that of the checkpoint, such as `float32`."""
    return digest("checkpoint", variant, state_key, f"torch.{dtype}")


def evaluation_key(variant: str, state_key: str, dtype: str, facts: str) -> str:
    """Return the key of what an evaluator scores: a saved variant, and what answers should state.

    `facts` is `facts_digest` of the questions.
    """
    return digest(state_key, variant, f"torch.{dtype}", facts)
