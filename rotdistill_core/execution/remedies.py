"""Remedies of steps as overrides that this very recipe takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.lessons import available, domain_of, read_lesson_texts
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import MORE_LESSONS
from rotdistill_core.recipe.document import Lessons, Recipe
from rotdistill_core.store.results import Remedy, StepReport

FIRST_LESSONS = 500
"""Lessons that are proposed where a run has fewer than half of it."""


def more_lessons(
    recipe: Recipe, base: Path, conversations: Sequence[Conversation]
) -> tuple[str, ...]:
    """Return the overrides that give a run more lessons: twice those it has, or the first.

    Where forms and topics of the texts make too few questions, the teacher proposes them.

    Args:
        recipe: the recipe of the run.
        base: its folder.
        conversations: all texts of the run.
    """
    lessons = recipe.lessons
    count = max(FIRST_LESSONS, 2 * lessons.count)
    wanted = lessons.model_copy(update={"count": count})
    sets = (f"lessons.count={count}",)
    if _are_enough(wanted, base, conversations):
        return sets
    return (*sets, "lessons.from=teacher")


def _are_enough(lessons: Lessons, base: Path, conversations: Sequence[Conversation]) -> bool:
    """Return whether as many lessons can be made as are asked for."""
    try:
        texts = read_lesson_texts(lessons, base)
        return available(domain_of(conversations, lessons, texts), lessons) == lessons.count
    except RecipeError:  # there is no question at all, or a file that lessons would need is wrong
        return False


def complete(report: StepReport, step: str, lessons: Sequence[str]) -> StepReport:
    """Return a step's report whose remedies are overrides of its recipe.

    Args:
        report: as the step left it.
        step: the step's id.
        lessons: what `more_lessons` returns.
    """

    def completed(remedy: Remedy) -> Remedy:
        sets: list[str] = []
        for each in remedy.sets:
            sets += lessons if each == MORE_LESSONS else [each]
        return Remedy(remedy.what, tuple(sets)).of_step(step)

    return report.with_remedies(completed)
