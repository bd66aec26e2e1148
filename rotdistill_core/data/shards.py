"""Shards of the texts to fit on: a step can learn from texts that another has not fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from rotdistill_core.data.conversations import CONTINUED, OWN_ANSWER
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError

if TYPE_CHECKING:
    from rotdistill_core.data.packed import Samples, Text

Shard = tuple[int, PositiveInt]
"""`(k, n)`: the k-th of n shards of the texts to fit on. `(-k, n)`: all of them but the k-th."""
WHOLE: Shard = (1, 1)
"""All texts."""


def require_shard(shard: Shard) -> None:
    """Refuse a shard that does not exist or has no texts.

    Raises:
        ValueError: naming it.
    """
    k, n = shard
    if not 1 <= abs(k) <= n:
        raise ValueError(f"shard: there is no shard {k} of {n}")
    if -k == n == 1:
        raise ValueError("shard: [-1, 1] leaves no text, as the one shard of 1 has them all")


def share_of(shard: Shard) -> float:
    """Return about which share of the texts to fit on a shard has."""
    k, n = shard
    return (1 if k > 0 else n - 1) / n


def in_shard(samples: Samples, shard: Shard) -> Callable[[Text], bool]:
    """Return what tells whether a text is in a shard, or is none to fit on.

    Questions are dealt in turns, in the order of the texts. A text, the teacher's own answer to its
    question, and what the teacher writes on its topic are in one shard.

    Raises:
        RecipeError: no text to fit on is in it.
    """
    if shard == WHOLE:
        return lambda _: True
    k, n = shard
    fit = (text.id for text in samples.layout.texts if text.split == Split.FIT)
    questions = dict.fromkeys(map(_question_of, fit))
    kept = {name for place, name in enumerate(questions) if (place % n == abs(k) - 1) == (k > 0)}
    if not kept:
        raise RecipeError(
            f"shard = [{k}, {n}] has none of the {len(questions)} texts to fit on; "
            "take fewer shards, or give it more texts."
        )
    return lambda text: text.split != Split.FIT or _question_of(text.id) in kept


def _question_of(name: str) -> str:
    """Return the id of the conversation that a text's id is made of."""
    return name.removesuffix(OWN_ANSWER).removesuffix(CONTINUED)
