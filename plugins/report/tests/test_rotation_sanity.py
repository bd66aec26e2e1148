"""The notebook recomputes what a ledger states; the observer executes it after every solve."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
import torch
from rotdistill_report import rotation_sanity
from rotdistill_report._notebook import notebook_file
from rotdistill_report.rotation_sanity import execute_in_subprocess
from safetensors.torch import load_file, save_file

from rotdistill_core.errors import RotdistillError
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import PicoWorkspace, SilentObserver

pytestmark = pytest.mark.slow

STEPS = """
variants = { layers = ["layers"], one = ["one"] }
step = [
    { use = "residuals" },
    { id = "layers", use = "procrustes", tie = 1 },
    { id = "one", use = "procrustes" },
]
"""
RESULT = "result"
"""Key of a step's result in its ledger record."""
NOTEBOOK = "rotation_sanity.ipynb"
NotebookRun = Callable[[str], dict[str, Any]]


class Finished(NamedTuple):
    """A run that has ended."""

    folder: Path
    log: list[str]


def run_in(workspace: PicoWorkspace) -> Finished:
    screen = SilentObserver()
    recipe = workspace.recipe(
        STEPS,
        teacher=workspace.folder / "teacher",
        student=workspace.folder / "student",
        observers=("rotation-sanity",),
    )
    return Finished(workspace.run(recipe, observer=screen).folder, screen.lines)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> PicoWorkspace:
    workspace = PicoWorkspace(tmp_path_factory.mktemp("sanity"))
    workspace.texts()
    workspace.model("teacher", hidden_size=48)
    workspace.model("student")
    return workspace


@pytest.fixture(scope="module")
def finished(workspace: PicoWorkspace) -> Finished:
    """Return a pico run with two aligners, a narrower student and the observer."""
    return run_in(workspace)


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    unused = shutil.ignore_patterns("shards", "checkpoints")
    return shutil.copytree(finished.folder, tmp_path / "runs" / finished.folder.name, ignore=unused)


def code_cells(text: str) -> list[Any]:
    cells = nbformat.reads(text, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def outputs_of(folder: Path) -> list[Any]:
    cells = code_cells((folder / NOTEBOOK).read_text(encoding="utf-8"))
    return [output for cell in cells for output in cell.outputs]


@pytest.fixture
def recompute(monkeypatch: pytest.MonkeyPatch) -> NotebookRun:
    """Return a function that runs the notebook's code up to the verdict and returns its names."""

    def execute(run: str) -> dict[str, Any]:
        monkeypatch.setenv("ROTDISTILL_RUN", run)
        names: dict[str, Any] = {}
        for cell in code_cells(notebook_file().read_text(encoding="utf-8")):
            exec(cell.source, names)
            if "verdict" in cell.metadata.get("tags", ()):
                break
        return names

    return execute


def read_ledger(run: Path) -> list[dict[str, Any]]:
    lines = RunLayout(run).ledger.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def solved_steps(run: Path) -> list[dict[str, Any]]:
    """Return the records of steps that found maps."""
    steps = [record for record in read_ledger(run) if record["kind"] == "step"]
    return [step for step in steps if "spaces" in step[RESULT]]


def rewrite_ledger(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the ledger again with changed records, each with a valid mark."""
    lines = []
    for record in read_ledger(run):
        del record["mark"]
        change(record)
        body = json.dumps(record, ensure_ascii=False)[:-1]
        mark = hashlib.sha256(body.encode()).hexdigest()[:16]
        lines.append(f'{body}, "mark": "{mark}"}}\n')
    RunLayout(run).ledger.write_text("".join(lines), encoding="utf-8")


def update_hashes(run: Path) -> None:
    """Let the ledger state the hashes that the files have now."""

    def change(record: dict[str, Any]) -> None:
        for file in record.get("files", ()):
            path = run.parent / file["path"]
            if path.is_file():
                file["sha256"] = sha256_of(path)

    rewrite_ledger(run, change)


def test_the_notebook_is_executed_after_every_solve(finished: Finished) -> None:
    name = finished.folder.name
    verdicts = [line for line in finished.log if line.startswith("rotation sanity: ")]
    assert [line.partition(",")[0] for line in verdicts] == [
        f"rotation sanity: Everything holds for {name}: 1 solved alignment",
        f"rotation sanity: Everything holds for {name}: 2 solved alignments",
    ]
    outputs = outputs_of(finished.folder)
    assert {output.output_type for output in outputs} == {"display_data"}
    assert sum("image/png" in output.data for output in outputs) == 2
    assert outputs[0].data["text/markdown"].startswith("**Everything holds**")


def test_a_reused_solve_executes_nothing(finished: Finished, workspace: PicoWorkspace) -> None:
    before = (finished.folder / NOTEBOOK).stat().st_mtime_ns
    again = run_in(workspace)
    assert again.folder == finished.folder
    assert again.log == []
    assert (finished.folder / NOTEBOOK).stat().st_mtime_ns == before


def test_the_table_shows_the_stored_diagnostics(finished: Finished) -> None:
    cells = code_cells((finished.folder / NOTEBOOK).read_text(encoding="utf-8"))
    (table,) = [cell for cell in cells if cell.id == "table"]
    steps = solved_steps(finished.folder)
    assert [step["id"] for step in steps] == ["layers", "one"]
    for step, output in zip(steps, table.outputs, strict=True):
        lines = output.data["text/markdown"].splitlines()
        _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        assert len(rows) == len(step[RESULT]["cards"]) == 3
        for layer, stage, k, rrt, rrt_stored, rank, rank_stored, round_trip in rows:
            path = finished.folder.parent / step[RESULT]["cards"][layer]
            stored = json.loads(path.read_text(encoding="utf-8"))
            assert (int(stage), int(k)) == (stored["stage"], stored["k"])
            assert float(rrt_stored) == pytest.approx(stored["max_rrt"], rel=1e-5)
            assert float(rank_stored) == pytest.approx(stored["rank_rtr"])
            assert float(rrt) == pytest.approx(stored["max_rrt"], abs=1e-14)
            assert float(rank) == pytest.approx(stored["rank_rtr"], abs=1e-4)
            assert float(round_trip) < 1e-12


def test_recomputed_figures_are_those_of_torch(run: Path, recompute: NotebookRun) -> None:
    names = recompute(str(run))
    assert names["problems"] == []
    for (layers, _), step in zip(names["solves"].values(), names["steps"], strict=True):
        for layer, stored in layers.items():
            path = step[RESULT]["spaces"][f"residual.{layer}"]["file"]
            R = load_file(run.parent / path)["map"]
            assert R.shape == (32, 48)
            error = float((R @ R.T - torch.eye(32)).abs().max())
            assert stored["recomputed"]["max_rrt"] == pytest.approx(error, abs=1e-14)
            assert stored["recomputed"]["rank_rtr"] == pytest.approx(32)
            assert stored["recomputed"]["projector"] < 1e-12


def test_a_square_map_is_tested_from_both_sides(run: Path, recompute: NotebookRun) -> None:
    names = recompute(str(run))
    Q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    figures = names["orthogonality"](Q.numpy())
    assert set(figures) == {"max_rrt", "max_rtr", "round_trip"}
    assert max(figures.values()) < 1e-13


def test_changed_diagnostics_are_named(run: Path, recompute: NotebookRun) -> None:
    path = next(run.glob("rotations/*/layer_1.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_rrt": 1e-6}))
    problems = recompute(str(run))["problems"]
    assert "layer_1.json: does not match its sha256" in " ".join(problems)
    update_hashes(run)
    (problem,) = recompute(str(run))["problems"]
    assert problem.startswith("layers (procrustes, ")
    assert problem.endswith("its diagnostics state 1e-06")


def test_a_bent_rotation_is_named(
    run: Path, recompute: NotebookRun, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(run.glob("rotations/*/layer_2.safetensors"))
    R = load_file(file)["map"]
    R[0] *= 1.001
    save_file({"map": R}, file)
    assert len(recompute(str(run))["problems"]) == 1
    update_hashes(run)
    names = recompute(str(run))
    fault = "residual.2: max|R Rᵀ − I| is 0.002, off by 2.0e-03, more than 1e-05"
    assert any(fault in problem for problem in names["problems"])
    count = len(names["problems"])
    assert names["verdict"].startswith(f"**{count} of the claims of {run.name} do not hold**")


def test_a_permutation_must_be_a_bijection(run: Path, recompute: NotebookRun) -> None:
    permutations = {"neurons.0": [2, 0, 1], "neurons.1": [2, 0, 2]}
    spaces = {}
    for space, index in permutations.items():
        file = run / f"{space}.safetensors"
        save_file({"map": torch.tensor(index)}, file)
        path = str(file.relative_to(run.parent))
        spaces[space] = {"file": path, "kind": "Permutation", "scale": None}

    def add_permutations(record: dict[str, Any]) -> None:
        if record.get("id") == "one":
            record[RESULT]["spaces"] |= spaces

    rewrite_ledger(run, add_permutations)
    (problem,) = recompute(str(run))["problems"]
    assert problem.endswith("neurons.1: the permutation is no bijection")


def test_a_torn_or_edited_ledger_line_counts_for_nothing(run: Path, recompute: NotebookRun) -> None:
    ledger = RunLayout(run).ledger
    edited = ledger.read_text().replace('"id": "one"', '"id": "two"')
    ledger.write_text(edited + '{"kind": "step", "inf')
    solves = recompute(str(run))["solves"]
    assert [name.partition(" ")[0] for name in solves] == ["layers"]


def test_a_run_that_solved_nothing_has_nothing_to_check(run: Path, recompute: NotebookRun) -> None:
    RunLayout(run).ledger.write_text("")
    assert recompute(str(run))["verdict"].startswith("**Nothing to check:**")


def test_without_a_name_the_newest_run_is_taken(
    run: Path, recompute: NotebookRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    assert recompute("")["run"] == run
    monkeypatch.chdir(run)
    with pytest.raises(FileNotFoundError, match="no run under runs/"):
        recompute("")


def test_a_cell_that_raises_is_one_line_and_the_notebook_shows_where(run: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    RunLayout(run).resolved_recipe.unlink()
    with pytest.raises(RotdistillError) as caught:
        execute_in_subprocess(run)
    message = str(caught.value)
    assert message.startswith(f"a cell of {run / NOTEBOOK} raised FileNotFoundError: ")
    assert "\n" not in message
    assert "error" in {output.output_type for output in outputs_of(run)}
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_execution_that_takes_too_long_is_given_up(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation_sanity, "SECONDS", 0.01)
    with pytest.raises(RotdistillError, match=r"not done after 0\.01 s"):
        execute_in_subprocess(run)


def test_the_notebook_has_no_outputs_and_does_not_import_rotdistill() -> None:
    text = notebook_file().read_text(encoding="utf-8")
    assert len(text) < 40_000
    for cell in code_cells(text):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert "import rotdistill" not in cell.source
        assert "from rotdistill" not in cell.source
