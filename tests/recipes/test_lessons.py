"""`--set lessons.count=2000` is the one change that each shipped recipe needs to get lessons."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from rotdistill_core.data.lessons import LessonKind, candidates, checked_lesson_texts, domain_of
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_have_lessons(path: Path) -> None:
    loaded = load_recipe(path, ["lessons.count=2000"])
    recipe, base = loaded.recipe, path.parent
    conversations, _ = read_conversations(recipe.samples, base, lambda _: None)
    texts = checked_lesson_texts(recipe, base, conversations)
    domain = domain_of(conversations, recipe.lessons, texts)
    first = next(candidates(domain, recipe.lessons, recipe.seed))
    assert first.kind == LessonKind.DOMAIN
    assert first.topic in first.question


def test_the_tour_guide_has_enough_questions_for_its_curve() -> None:
    loaded = load_recipe(RECIPES / "tour_guide.toml", ["lessons.count=5000"])
    recipe, base = loaded.recipe, RECIPES
    conversations, _ = read_conversations(recipe.samples, base, lambda _: None)
    texts = checked_lesson_texts(recipe, base, conversations)
    domain = domain_of(conversations, recipe.lessons, texts)
    found = list(islice(candidates(domain, recipe.lessons, 7), 5000))
    # One lesson in a hundred is a plain text.
    assert len({each.question for each in found if each.question}) == 4950
    assert {language for language, _ in texts.forms} == set(domain.languages)
