"""The notebook recomputes what a run's ledger says, and the observer executes it after every solve."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from rotdistill_report import rotation_sanity as plugin
from rotdistill_report.rotation_sanity import notebook, sanity
from safetensors.torch import load_file, save_file

from rotdistill_core.errors import RotdistillError
from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import pico_folder, pico_head, pico_texts

RECIPE = (
    pico_head("sane", "{work}/teacher", "{work}/student")
    + """
observers = ["report", "rotation-sanity"]
[[step]]
use = "residuals"
[[step]]
id = "layers"
use = "procrustes"
tie = 1
[[step]]
id = "one"
use = "procrustes"
[variants]
layers = ["layers"]
one = ["one"]
"""
)
Cells = Callable[..., dict[str, Any]]


class Heard:
    """Remembers what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def carry_out(work: Path) -> tuple[Path, list[str]]:
    heard = Heard()
    loaded = load_recipe(work / "sane.toml")
    return Executor(loaded, work / "runs", heard, lambda *_: None).go().folder, heard.lines


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sanity")
    pico_texts(work / "texts")
    pico_folder(work / "teacher", hidden_size=48)
    pico_folder(work / "student")
    (work / "sane.toml").write_text(RECIPE.format(work=work), encoding="utf-8")
    return work


@pytest.fixture(scope="module")
def carried(work: Path) -> tuple[Path, list[str]]:
    """Return the folder of a pico run with two aligners, a narrower student and the observer, and what was said."""
    return carry_out(work)


@pytest.fixture
def run(carried: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    folder, _ = carried
    small = shutil.ignore_patterns("shards", "checkpoints")
    return shutil.copytree(folder, tmp_path / "runs" / folder.name, ignore=small)


def cells_of(path: Path) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Cells:
    """Return a function that runs the notebook's code up to the verdict, here, and returns its variables."""

    def execute(run: str) -> dict[str, Any]:
        monkeypatch.setenv("ROTDISTILL_RUN", run)
        found: dict[str, Any] = {}
        code = [cell for cell in cells_of(notebook()) if cell.cell_type == "code"]
        last = next(i for i, cell in enumerate(code) if "verdict" in cell.metadata.get("tags", ()))
        for cell in code[: last + 1]:
            exec(cell.source, found)
        return found

    return execute


def rewritten(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the ledger again with other records, each with a mark that is right."""
    ledger = Ledger(run)
    ledger.path.unlink()
    records, ledger.records = ledger.records, []
    for record in records:
        change(record)
        ledger.append(
            record["kind"],
            **{key: value for key, value in record.items() if key not in ("kind", "schema")},
        )


def rehashed(run: Path) -> None:
    """Let the ledger say the hashes that its files have now."""

    def change(record: dict[str, Any]) -> None:
        for file in record.get("files", ()):
            if (run.parent / file["path"]).is_file():
                file["sha256"] = sha256_of(run.parent / file["path"])

    rewritten(run, change)


def test_the_notebook_is_executed_after_every_solve(carried: tuple[Path, list[str]]) -> None:
    folder, lines = carried
    told = [line for line in lines if line.startswith("rotation sanity: ")]
    assert [line.partition(": ")[2].partition(",")[0] for line in told] == [
        f"Everything holds for {folder.name}: {solved}"
        for solved in ("1 solved alignment", "2 solved alignments")
    ]
    made = cells_of(folder / "rotation_sanity.ipynb")
    outputs = [output for cell in made if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data"}
    assert sum("image/png" in output.data for output in outputs) == 2
    assert outputs[0].data["text/markdown"].startswith("**Everything holds**")


def test_a_reused_solve_is_not_looked_at_again(carried: tuple[Path, list[str]], work: Path) -> None:
    folder, _ = carried
    before = (folder / "rotation_sanity.ipynb").stat().st_mtime_ns
    again, lines = carry_out(work)
    assert again == folder
    assert lines == []
    assert (folder / "rotation_sanity.ipynb").stat().st_mtime_ns == before


def test_its_table_shows_the_figures_of_the_ledger(carried: tuple[Path, list[str]]) -> None:
    folder, _ = carried
    shown = [
        output.data["text/markdown"]
        for cell in cells_of(folder / "rotation_sanity.ipynb") if cell.cell_type == "code" and cell.id == "table"
        for output in cell.outputs
    ]  # fmt: skip
    steps = [r for r in Ledger(folder).records if r["kind"] == "step" and "spaces" in r["info"]]
    assert [step["id"] for step in steps] == ["layers", "one"]
    for step, text in zip(steps, shown, strict=True):
        rows = [
            line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")
        ][1:]
        assert len(rows) == len(step["info"]["cards"]) == 3
        for layer, stage, k, rrt, rrt_card, rank, rank_card, back in rows:
            card = json.loads((folder.parent / step["info"]["cards"][layer]).read_text())
            assert (int(stage), int(k)) == (card["stage"], card["k"])
            assert float(rrt_card) == pytest.approx(card["max_rrt"], rel=1e-5)
            assert float(rank_card) == pytest.approx(card["rank_rtr"])
            assert float(rrt) == pytest.approx(card["max_rrt"], abs=1e-14)
            assert float(rank) == pytest.approx(card["rank_rtr"], abs=1e-4)
            assert float(back) < 1e-12


def test_its_figures_are_those_of_torch(run: Path, cells: Cells) -> None:
    found = cells(str(run))
    assert found["problems"] == []
    for (diagnostics, _), step in zip(found["solves"].values(), found["steps"], strict=True):
        for layer, card in diagnostics.items():
            R = load_file(run.parent / step["info"]["spaces"][f"residual.{layer}"]["file"])["map"]
            assert R.shape == (32, 48)
            assert card["recomputed"]["max_rrt"] == pytest.approx(
                float((R @ R.T - torch.eye(32)).abs().max()), abs=1e-14
            )
            assert card["recomputed"]["rank_rtr"] == pytest.approx(32)
            assert card["recomputed"]["projector"] < 1e-12


def test_a_square_map_is_tested_from_both_sides(run: Path, cells: Cells) -> None:
    found = cells(str(run))
    values = found["figures"](torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q.numpy())
    assert set(values) == {"max_rrt", "max_rtr", "round_trip"}
    assert max(values.values()) < 1e-13


def test_a_changed_card_is_named(run: Path, cells: Cells) -> None:
    card = next(run.glob("rotations/*/layer_1.json"))
    card.write_text(json.dumps(json.loads(card.read_text()) | {"max_rrt": 1e-6}))
    assert "layer_1.json: does not match its sha256" in " ".join(cells(str(run))["problems"])
    rehashed(run)
    (problem,) = cells(str(run))["problems"]
    assert problem.startswith("layers (procrustes, ")
    assert problem.endswith("its card says 1e-06")


def test_a_bent_rotation_is_named(
    run: Path, cells: Cells, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(run.glob("rotations/*/layer_2.safetensors"))
    R = load_file(file)["map"]
    R[0] *= 1.001
    save_file({"map": R}, file)
    assert len(cells(str(run))["problems"]) == 1
    rehashed(run)
    found = cells(str(run))
    assert any(
        "residual.2: max|R Rᵀ − I| is 0.002, off by 2.0e-03, more than 1e-05" in text
        for text in found["problems"]
    )
    assert found["verdict"].startswith(
        f"**{len(found['problems'])} of the claims of {run.name} do not hold**"
    )


def test_a_permutation_must_be_a_bijection(run: Path, cells: Cells) -> None:
    files = [
        str(run.relative_to(run.parent) / name) for name in ("good.safetensors", "bad.safetensors")
    ]
    for path, index in zip(files, ([2, 0, 1], [2, 0, 2]), strict=True):
        save_file({"map": torch.tensor(index)}, run.parent / path)

    def change(record: dict[str, Any]) -> None:
        if record.get("id") == "one":
            record["info"]["spaces"] |= {
                f"neurons.{i}": {"file": path, "kind": "Permutation", "scale": None}
                for i, path in enumerate(files)
            }

    rewritten(run, change)
    (problem,) = cells(str(run))["problems"]
    assert problem.endswith("neurons.1: the permutation is no bijection")


def test_a_torn_ledger_line_counts_for_nothing(run: Path, cells: Cells) -> None:
    text = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(
        text.replace('"id": "one"', '"id": "two"') + '{"kind": "step", "inf'
    )
    assert [name.partition(" ")[0] for name in cells(str(run))["solves"]] == ["layers"]


def test_a_run_that_solved_nothing_says_so(run: Path, cells: Cells) -> None:
    (run / "ledger.jsonl").write_text("")
    assert cells(str(run))["verdict"].startswith("**Nothing to check:**")


def test_the_newest_run_is_taken_when_none_is_named(
    run: Path, cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    assert cells("")["run"] == run
    monkeypatch.chdir(run)
    with pytest.raises(FileNotFoundError, match="no run under runs/"):
        cells("")


def test_a_cell_that_raises_is_one_line_and_the_notebook_shows_where(run: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    (run / "recipe.resolved.json").unlink()
    with pytest.raises(RotdistillError) as caught:
        sanity(run)
    assert str(caught.value).startswith(
        f"a cell of {run / 'rotation_sanity.ipynb'} raised FileNotFoundError: "
    )
    assert "\n" not in str(caught.value)
    made = cells_of(run / "rotation_sanity.ipynb")
    assert "error" in {
        output.output_type for cell in made if cell.cell_type == "code" for output in cell.outputs
    }
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_execution_that_takes_too_long_is_given_up(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "SECONDS", 0.01)
    with pytest.raises(RotdistillError, match=r"not done after 0\.01 s"):
        sanity(run)


def test_the_notebook_is_committed_without_outputs_and_needs_no_rotdistill() -> None:
    code = [cell for cell in cells_of(notebook()) if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not any(
        "import rotdistill" in cell.source or "from rotdistill" in cell.source for cell in code
    )
    assert notebook().stat().st_size < 40_000


def test_the_wheel_carries_the_notebook(tmp_path: Path) -> None:
    here = Path(plugin.__file__).parent
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=here, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert wheel.read("rotdistill_rotation_sanity.ipynb") == notebook().read_bytes()
        wheel.extractall(tmp_path / "site")
    code = "import rotdistill_rotation_sanity as p; print(p.notebook())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "site",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert (
        Path(found.strip()).resolve()
        == (tmp_path / "site" / "rotdistill_rotation_sanity.ipynb").resolve()
    )
