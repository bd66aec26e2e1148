"""TODO: rotdistill_core.execution.keys."""

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
    """Return what a run starts from, by name: hashes that need no tokenizer and hardly a byte of the weights."""
    texts = [
        [vars(replace(q, facts=(), falsehoods=())) for q in questions],
        style,
        recipe.samples.model_dump(include={"max_tokens", "answer_tokens", "own_answers"}),
    ]
    models = {
        role: model.fingerprint
        for role in ("teacher", "student", "anchor")
        if (model := getattr(pair, role))
    }
    refs = (recipe.teacher, recipe.student)
    return {
        **models,
        "texts": digest(texts),
        "seed": str(recipe.seed),
        "compute": " ".join(f"{ref.dtype} {ref.device}" for ref in refs),
    }
