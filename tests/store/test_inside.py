"""A step writes inside the folder of its run and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rotdistill_core.errors import SetupError
from rotdistill_core.store.inside import LONGEST_PART, require_inside
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

OUTSIDE = [
    "../outside",
    "../../outside",
    "weights/../../outside",
    "weights/..",
    "..",
    ".",
    "",
    "/",
    "/tmp/outside",
    "//outside",
]
IMPOSSIBLE = ["a\0b", "a\x1bb", "a\nb\r", "a\u202eb", "x" * 300, "weights/" + "ä" * 150, "a\udcffb"]


def open_output(root: Path, key: str = "key") -> StepOutput:
    return StepOutput(ArtifactStore(root / "runs"), Ledger(root / "runs" / "run"), key)


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("name", OUTSIDE + IMPOSSIBLE)
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    before = everything(tmp_path)
    with pytest.raises(SetupError, match="no file called"):
        open_output(tmp_path).json(name, 1)
    assert everything(tmp_path) == before


def test_a_name_that_leads_out_is_refused_under_another_key_too(tmp_path: Path) -> None:
    open_output(tmp_path).json("weights/a.json", 1)
    with pytest.raises(SetupError, match="no file called"):
        open_output(tmp_path, key="other").json("weights/../../a.json", 1)


@pytest.mark.parametrize("link", ["weights", "weights/step", "weights-other"])
@pytest.mark.parametrize("target", ["../../elsewhere", "../other-run", "/"])
def test_a_folder_that_is_a_link_leading_out_is_refused(
    tmp_path: Path, link: str, target: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "other-run").mkdir(parents=True)
    if link == "weights-other":  # where a file of another key goes
        open_output(tmp_path).json("weights/step/a.json", 1)
    path = tmp_path / "runs" / "run" / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(Path(os.path.relpath(tmp_path / "runs" / target, path.parent)))
    with pytest.raises(SetupError, match="is a link that leads out of"):
        open_output(tmp_path, key="other").json("weights/step/a.json", 1)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list((tmp_path / "runs" / "other-run").iterdir())


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    target.write_text("mine")
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "a.json").symlink_to(target)
    path = open_output(tmp_path).json("a.json", 1)
    assert path.read_text() == "1\n"
    assert not path.is_symlink()
    assert target.read_text() == "mine"


@pytest.mark.parametrize("target", ["elsewhere.txt", "nowhere.txt", "runs/other/ledger.jsonl"])
def test_no_line_is_appended_through_a_link(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere.txt").write_text("mine\n")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "ledger.jsonl").symlink_to(tmp_path / target)
    before = everything(tmp_path)
    with pytest.raises(SetupError, match=r"ledger\.jsonl: is a link"):
        open_output(tmp_path).json("a.json", 1)
    assert everything(tmp_path) == before
    assert (tmp_path / "elsewhere.txt").read_text() == "mine\n"


def test_runs_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    assert open_output(tmp_path).json("weights/a/b.json", 1).is_file()
    assert (tmp_path / "disk" / "run" / "weights" / "a" / "b.json").is_file()


def test_the_ledger_is_no_file_of_a_step(tmp_path: Path) -> None:
    open_output(tmp_path).json("a.json", 1)
    for name in ("ledger.jsonl", "./ledger.jsonl"):
        with pytest.raises(SetupError, match="written by the program alone"):
            open_output(tmp_path).json(name, 1)
    assert open_output(tmp_path).find("a.json")


def test_names_of_all_scripts_are_written(tmp_path: Path) -> None:
    for name in ("weights/Ångström.json", "漢字/a b.json", "x" * LONGEST_PART, "a..b", "..a/b"):
        require_inside(tmp_path, name)
        assert open_output(tmp_path).json(name, 1).is_file()


def test_what_lies_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "run" / "a.json" / "mine").mkdir(parents=True)
    with pytest.raises(SetupError, match=r"a\.json: cannot be written: .* Move away"):
        open_output(tmp_path).json("a.json", 1)
    (tmp_path / "runs" / "run" / "weights").write_text("mine")
    with pytest.raises(SetupError, match=r"b\.json: cannot be written: .* Move away"):
        open_output(tmp_path).json("weights/b.json", 1)
    assert (tmp_path / "runs" / "run" / "weights").read_text() == "mine"
