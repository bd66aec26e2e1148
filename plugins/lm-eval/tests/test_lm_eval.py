"""The harness's results become rows; without the harness a recipe is refused while it is read."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rotdistill_lm_eval._method import rows_of
from rotdistill_lm_eval.step import LmEval, steps

from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import STEP_CHECKS, parametrize_with_checks

RESULTS = {
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
RECIPE = """name = "t"
teacher.model = "a"
student.model = "b"
[[step]]
use = "lm-eval"
folder = "tasks"
tasks = ["capitals"]
"""


def pretend_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """Let `find_spec` find the harness, or not, whether it is installed or not."""
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        if name != "lm_eval":
            return real(name, *rest)
        return real("json") if installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


# The harness is optional and not installed with the tests, so the checks that run the step do not
# hold.
@parametrize_with_checks(
    LmEval, {"folder": "tasks", "tasks": ["capitals"], "batch_size": 2}, checks=STEP_CHECKS[:2]
)
def test_lm_eval_conforms(
    check: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, True)
    check(tmp_path)


def test_lm_eval_is_an_evaluator() -> None:
    assert steps() == [LmEval]
    assert stage_of(LmEval) == "evaluate"


def test_figures_become_rows_followed_by_the_documents_that_they_are_the_mean_of() -> None:
    assert list(rows_of("base", RESULTS)) == [
        MetricRow("base", "capitals.acc", 0.5, "lm-eval", n=2),
        MetricRow("base", "capitals.acc", 1.0, "lm-eval", n=1, text="capitals.0"),
        MetricRow("base", "capitals.acc", 0.0, "lm-eval", n=1, text="capitals.1"),
        MetricRow("base", "capitals.exact_match.strict", 1.0, "lm-eval"),
        MetricRow("base", "whole.perplexity", 7.0, "lm-eval"),
    ]


def test_documents_that_a_figure_is_not_the_mean_of_have_no_rows() -> None:
    """Of a perplexity the harness logs the logarithms of the documents."""
    documents = [
        {"doc_id": k, "filter": "none", "perplexity": -value} for k, value in enumerate((3.0, 3.8))
    ]
    results = {
        "results": {"lambada": {"perplexity,none": 29.96}},
        "samples": {"lambada": documents},
    }
    (row,) = rows_of("base", results)
    assert row == MetricRow("base", "lambada.perplexity", 29.96, "lm-eval", n=2)


class FakeHarness:
    """Stands for `lm_eval`: knows the task `capitals` and records its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        lm_eval, models, tasks = (ModuleType("lm_eval") for _ in range(3))
        lm_eval.simple_evaluate = self.simple_evaluate  # type: ignore[attr-defined]
        models.HFLM = lambda **options: options  # type: ignore[attr-defined]
        tasks.TaskManager = lambda **_: SimpleNamespace(all_tasks=["capitals"])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
        monkeypatch.delitem(sys.modules, "rotdistill_lm_eval._harness", raising=False)
        pretend_installed(monkeypatch, True)

    def simple_evaluate(self, model: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.calls.append({"offline": os.environ.get("HF_HUB_OFFLINE"), **model, **options})
        return RESULTS


def evaluate(step: LmEval) -> list[MetricRow]:
    variant: Any = SimpleNamespace(name="base", folder=Path("checkpoint"))
    student = SimpleNamespace(device="cpu", dtype="torch.float32")
    pair: Any = SimpleNamespace(student=student)
    return step.evaluate(variant, pair, lambda *_: None)


def test_the_harness_scores_the_saved_variant_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = FakeHarness(monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    rows = evaluate(LmEval(folder="tasks", tasks=("capitals",), shots=2, limit=5))
    assert rows == list(rows_of("base", RESULTS))
    (call,) = harness.calls
    assert (
        call.items()
        >= {
            "offline": "1",
            "pretrained": "checkpoint",
            "device": "cpu",
            "dtype": "float32",
            "batch_size": 8,
            "tasks": ["capitals"],
            "num_fewshot": 2,
            "limit": 5,
        }.items()
    )
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_task_that_the_folder_lacks_is_refused_with_those_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeHarness(monkeypatch)
    with pytest.raises(RecipeError, match="no task called rivers; it has: capitals"):
        evaluate(LmEval(folder="tasks", tasks=("rivers",)))


def test_without_the_harness_a_recipe_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    pretend_installed(monkeypatch, False)
    with pytest.raises(SetupError, match=r'pip install "lm-eval>=') as caught:
        load_recipe(path)
    assert caught.value.exit_code == 3


def test_with_the_harness_options_are_checked_like_any_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    pretend_installed(monkeypatch, True)
    path.write_text(RECIPE, encoding="utf-8")
    assert load_recipe(path).steps[0].step.tasks == ("capitals",)
    path.write_text(RECIPE.replace('["capitals"]', "[]"), encoding="utf-8")
    with pytest.raises(RecipeError, match="tasks"):
        load_recipe(path)
