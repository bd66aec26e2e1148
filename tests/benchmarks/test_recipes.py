"""The recipes of benchmarks/ are valid, and those that are compared read the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotdistill_core.recipe.load import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECIPES = sorted(BENCHMARKS.glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_benchmark_is_valid(path: Path) -> None:
    assert load_recipe(path).steps


@pytest.mark.parametrize("name", ["lessons_whole", "prompt_kl", "transfer"])
def test_refit_and_lora_read_all_texts_at_the_defaults(name: str) -> None:
    steps = {each.id: each.step for each in load_recipe(BENCHMARKS / f"{name}.toml").steps}
    refit, lora = vars(steps["refit"]), vars(steps["lora"])
    assert refit["shard"] == lora["shard"] == (1, 1)
    assert (lora["batch_size"], lora["learning_rate"]) == (4, 5e-4)
