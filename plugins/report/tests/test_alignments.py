"""What aligners measure is on the page and in Markdown: nulls, and figures of their own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from rotdistill_report import _write
from rotdistill_report._alignments import MAX_OWN, AlignmentTable, FigureRow, alignment_table

from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import PicoWorkspace

STEPS = """
[[step]]
use = "residuals"
[[step]]
use = "cca"
[[step]]
use = "procrustes"
[[step]]
use = "householder"
[variants]
base = []
rotated = ["cca", "procrustes", "householder"]
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    workspace = PicoWorkspace(tmp_path_factory.mktemp("aligned"))
    workspace.texts()
    teacher, student = workspace.model("teacher", seed=1), workspace.model("student", seed=2)
    recipe = workspace.recipe(STEPS, teacher=teacher, student=student, observers=["report"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_write, "plots", lambda *_: [])  # they take most of the time
        return workspace.run(recipe)


def read(outcome: RunResult, name: str) -> str:
    return (outcome.folder / name).read_text(encoding="utf-8")


def test_figures_nulls_and_own_figures_stand_in_both_forms(outcome: RunResult) -> None:
    report = json.loads(read(outcome, RunLayout.REPORT_JSON))
    layers: dict[str, dict[str, Any]] = report["diagnostics"]["procrustes"]
    means = [each["cosine_mean"] for each in layers.values()]
    line = f"null: the teacher's mean {min(means):.4g} ("
    for text in (page_text(outcome), markdown_text(outcome)):
        section = text.partition("Alignments")[2]
        of_procrustes, _, of_householder = section.partition("householder")
        for row in ("cosine after the map", "null: a map from shuffled rows", line):
            assert row in of_procrustes
        assert "householder.reflections 0 (0) 0 0 (0)" in of_householder
        assert f"stopped: the lowest eigenvalue is not negative ({len(layers)})" in of_householder


def page_text(outcome: RunResult) -> str:
    """Return the page from its plots on, without markup."""
    body = read(outcome, RunLayout.REPORT_HTML).partition('id="alignments"')[2]
    words = re.sub(r"<[^>]*>", " ", body).replace("&#39;", "'")
    return "Alignments " + " ".join(words.split())


def markdown_text(outcome: RunResult) -> str:
    section = read(outcome, RunLayout.REPORT_MARKDOWN).partition("## Alignments")[2]
    return "Alignments " + " ".join(section.replace("|", " ").split())


def test_a_figure_is_shown_by_its_ends_and_its_mean() -> None:
    layers = {
        0: LayerDiagnostics(cosine_after=0.25, extra={"turns": 3}),
        1: LayerDiagnostics(cosine_after=1.0, extra={"turns": 2}),
        2: LayerDiagnostics(extra={"turns": 7}),
    }
    assert alignment_table(layers).rows == [
        FigureRow("cosine after the map", "0.25 (0)", "0.625", "1 (1)"),
        FigureRow("turns", "2 (1)", "4", "7 (2)"),
    ]


def test_own_figures_of_any_kind_are_shown() -> None:
    extra = {
        "solver": {"name": "newton", "steps": 4},
        "converged": True,
        "path": [1, 2, 3],
        "loss": "nan",
    }
    table = alignment_table({3: LayerDiagnostics(extra=extra), 4: LayerDiagnostics(extra=extra)})
    assert table.rows == [FigureRow("solver.steps", "4 (3)", "4", "4 (3)")]
    assert table.remarks == [
        "solver.name: newton (2)",
        "converged: True (2)",
        "path: a list of 3 (2)",
        "loss: nan (2)",
    ]


def test_the_table_has_an_end() -> None:
    many = {f"figure {k}": k for k in range(MAX_OWN + 2)}
    long = {0: LayerDiagnostics(extra=many)}
    table = alignment_table(long)
    assert len(table.rows) == MAX_OWN
    assert table.remarks == ["2 more figures are in report.json"]
    texts = {k: LayerDiagnostics(extra={"name": f"{k}" * 1000}) for k in range(9)}
    (remark,) = alignment_table(texts).remarks
    assert remark.endswith("; 6 more in report.json")
    assert len(remark) < 500


def test_heads_and_neurons_have_their_null_beside_them() -> None:
    heads = AssignmentDiagnostics(
        identity=False, moved=2, of=4, score=0.9, identity_score=0.7, random_score=0.1
    )
    rows = {row.name: row.mean for row in alignment_table({0: LayerDiagnostics(heads=heads)}).rows}
    assert rows == {
        "heads left in place": "0.7",
        "heads matched": "0.9",
        "null: heads at random": "0.1",
    }


def test_a_later_aligner_is_compared_with_the_mean_too(outcome: RunResult) -> None:
    report = json.loads(read(outcome, RunLayout.REPORT_JSON))
    first, later = (report["diagnostics"][step] for step in ("cca", "procrustes"))
    for layer, figures in later.items():
        assert figures["cosine_mean"] == first[layer]["cosine_mean"]


def test_steps_that_measured_nothing_of_the_kind_have_no_table() -> None:
    assert alignment_table({0: LayerDiagnostics(rows=3)}) == AlignmentTable([], [])
