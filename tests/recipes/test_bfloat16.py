"""Whole recipes in bfloat16, as a GPU runs them: they end, and agree with float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import pico_folder, pico_texts
from rotdistill_core.testing.runs import SilentObserver

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
Figures = dict[str, dict[str, float]]
"""Variant -> metric -> value."""

MERGING = """
name = "merging"

[teacher]
model = "teacher"

[student]
model = "student"

[[step]]
use = "residuals"

[[step]]
id = "merge"
use = "soups"
method = "fisher"
same_basis = "ignore"
ingredients = ["one", "two"]

[[step]]
use = "fidelity"

[[step]]
use = "interpolation-barrier"
between = ["one", "two"]
points = 3

[[step]]
use = "answers"
"""


def run(recipe: Path, work: Path, dtype: str, options: Mapping[str, object]) -> Figures:
    """Carry out a recipe on the pico models in `work`, computing in one dtype."""
    models = {"teacher.model": work / "teacher", "student.model": work / "student"}
    texts = {
        "samples.index": work / "texts/index.tsv",
        "samples.style": work / "texts/style.md",
        "samples.heldout": work / "texts/heldout.tsv",
        "samples.guard": work / "texts/guard.tsv",
    }
    given = {key: str(path) for key, path in {**models, **texts}.items()}
    lengths = {"samples.own_answers": 4, "samples.answer_tokens": 4}
    # Other tests report on runs in float32.
    observers = ["report"] if dtype == "bfloat16" else []
    dtypes = {"teacher.dtype": dtype, "student.dtype": dtype, "observers": observers}
    loaded = load_recipe(recipe, {**given, **lengths, **dtypes, **options})
    done = Executor(loaded, work / f"runs-{dtype}", SilentObserver(), lambda *_: None).go()
    assert not done.failed
    return overall_figures(done.rows)


def both(recipe: Path, work: Path, options: Mapping[str, object]) -> tuple[Figures, Figures]:
    """Return the figures in float32 and in bfloat16."""
    return (
        run(recipe, work, "float32", options),
        run(recipe, work, "bfloat16", options),
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with pico texts and a teacher; tests add the student."""
    pico_texts(tmp_path / "texts")
    wide = {"hidden_size": 48, "num_hidden_layers": 3, "tie_word_embeddings": False}
    pico_folder(tmp_path / "teacher", "llama", 0, **wide)
    return tmp_path


@pytest.mark.slow
def test_the_chain_of_two_models_agrees_with_float32(work: Path) -> None:
    pico_folder(work / "student", "qwen2", 1)
    single, half = both(RECIPES / "tour_guide_qwen.toml", work, {"style.max_epochs": 1})
    assert set(half) == set(single)
    for variant in single:
        assert half[variant]["kl"] == pytest.approx(single[variant]["kl"], abs=0.02), variant
        assert half[variant]["guard_kl"] == pytest.approx(single[variant]["guard_kl"], abs=0.02)


@pytest.mark.slow
def test_the_chain_of_a_cut_teacher_agrees_with_float32(work: Path) -> None:
    (work / "student").symlink_to(work / "teacher")
    # Without a guard: of small random models it would let a part of the refit through.
    options = {"chop.layers": 2, "refit.guard": "off", "head.guard": "off"}
    single, half = both(RECIPES / "tour_guide.toml", work, options)
    for variant in ("base", "rotated", "style-only"):
        assert half[variant]["kl"] == pytest.approx(single[variant]["kl"], abs=0.02), variant
    # The refitted writers themselves are bfloat16 here, and these models are small.
    for variant in ("refit", "full"):
        assert half[variant]["kl"] == pytest.approx(single[variant]["kl"], rel=0.12), variant
        assert half[variant]["kl"] < 0.75 * half["base"]["kl"]


@pytest.mark.slow
def test_merging_by_fisher_with_its_barrier_agrees_with_float32(work: Path) -> None:
    for seed, name in enumerate(("student", "one", "two"), 1):
        pico_folder(work / name, "llama", seed)
    recipe = work / "recipe.toml"
    recipe.write_text(MERGING, encoding="utf-8")
    ends = [str(work / "one"), str(work / "two")]
    options = {"merge.ingredients": ends, "interpolation-barrier.between": ends}
    single, half = both(recipe, work, options)
    for metric in ("kl", "barrier"):
        assert half["full"][metric] == pytest.approx(single["full"][metric], abs=0.02), metric
    assert torch.isfinite(torch.tensor(list(half["full"].values()))).all()
