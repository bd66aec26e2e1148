"""What the harness returns becomes rows; without it a recipe is refused while it is read, with what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from rotdistill_lm_eval.step import HINT, LmEval, rows_of, steps

from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.load import load_recipe

FOUND = {
    "results": {
        "capitals": {
            "alias": "capitals",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 1.0,
        },
        "whole": {"perplexity,none": 7.0, "perplexity_stderr,none": "N/A"},
    },
    "samples": {
        "capitals": [
            {"doc_id": 0, "filter": "none", "acc": 1.0},
            {"doc_id": 1, "filter": "none", "acc": 0.0},
        ],
        "whole": [{"doc_id": 0, "filter": "none", "perplexity": (3.0, 2)}],
    },
}
RECIPE = '[teacher]\nmodel = "a"\n[student]\nmodel = "b"\n[[step]]\nuse = "lm-eval"\nfolder = "tasks"\ntasks = ["capitals"]\n'


def test_lm_eval_is_an_evaluator() -> None:
    assert steps() == [LmEval]
    assert stage_of(LmEval) == "evaluate"


def test_figures_become_rows_and_documents_beside_the_mean_that_is_theirs() -> None:
    assert list(rows_of("base", FOUND)) == [
        MetricRow("base", "capitals.acc", 0.5, "lm-eval", None, None, 2),
        MetricRow("base", "capitals.acc", 1.0, "lm-eval", None, None, 1, "capitals.0"),
        MetricRow("base", "capitals.acc", 0.0, "lm-eval", None, None, 1, "capitals.1"),
        MetricRow("base", "capitals.exact_match.strict", 1.0, "lm-eval", None, None, None),
        MetricRow("base", "whole.perplexity", 7.0, "lm-eval", None, None, None),
    ]


def test_without_the_harness_a_recipe_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "t"\n' + RECIPE, encoding="utf-8")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "lm_eval" else there(name, *more),
    )
    with pytest.raises(SetupError, match='pip install "lm-eval') as caught:
        load_recipe(path)
    assert (str(caught.value), caught.value.exit_code) == (HINT, 3)


def test_with_it_options_are_checked_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: there("json") if name == "lm_eval" else there(name, *more),
    )
    path.write_text('name = "t"\n' + RECIPE, encoding="utf-8")
    assert load_recipe(path).steps[0].step.tasks == ("capitals",)
    path.write_text('name = "t"\n' + RECIPE.replace('["capitals"]', "[]"), encoding="utf-8")
    with pytest.raises(RecipeError, match="tasks"):
        load_recipe(path)
