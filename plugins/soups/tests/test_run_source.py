"""Variants and adapters of earlier runs are found by name."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rotdistill_soups.run_source import locate

from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.records import CheckpointRecord

ADAPTER = "weights/style/adapter"


def write_run(root: Path, name: str, *checkpoint_folders: str) -> Path:
    """Write a run whose ledger commits the variant `full` once for each folder."""
    run = root / "runs" / name
    for folder in checkpoint_folders:
        out = StepOutput(ArtifactStore(root / "runs"), Ledger(run), folder)
        weights = out.json(f"{folder}/full/config.json", {"depth": len(folder)})
        hashes = {weights.name: sha256_of(weights)}
        out.json(f"{folder}/full/COMPLETE", hashes)
        files = tuple(out.used.values())
        record = CheckpointRecord(
            key=folder, variant="full", folder=f"{name}/{folder}/full", files=files
        )
        out.ledger.append(record)
    return run


def write_adapter(run: Path) -> Path:
    """Write an adapter into a run, as a step leaves it; return its folder."""
    out = StepOutput(ArtifactStore(run.parent), Ledger(run), "style")
    return out.json(f"{ADAPTER}/adapter_config.json", {"r": 2}).parent


def locate_quietly(reference: str) -> Path:
    return locate(reference, lambda _: None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "tour-guide-0123abcd", "checkpoints")
    made = write_run(tmp_path, "tour-0123abcd", "checkpoints", "checkpoints-again")
    write_adapter(made)
    return made


@pytest.mark.parametrize("name", ["tour", "tour-0123abcd"])
def test_a_variant_is_its_newest_checkpoint(run: Path, name: str) -> None:
    newest = Path("runs/tour-0123abcd/checkpoints-again/full")
    assert locate_quietly(f"run:{name}/full") == newest


def test_an_adapter_is_found_by_its_path_inside_the_run(run: Path) -> None:
    assert locate_quietly(f"run:tour/{ADAPTER}") == Path(f"runs/tour-0123abcd/{ADAPTER}")


def test_a_run_that_does_not_exist_is_refused(run: Path) -> None:
    with pytest.raises(SetupError, match="holds no run of that name"):
        locate_quietly("run:nothing/full")


@pytest.mark.parametrize("reference", ["run:tour/base", "run:tour", "run:tour/weights/other"])
def test_a_variant_that_does_not_exist_is_refused(run: Path, reference: str) -> None:
    with pytest.raises(SetupError, match="its variants: full"):
        locate_quietly(reference)


def test_several_runs_of_one_name_are_listed_newest_first(run: Path, tmp_path: Path) -> None:
    older = write_run(tmp_path, "tour-4567abcd")
    write_adapter(older)
    os.utime(run / ADAPTER, (2e9, 2e9))
    os.utime(older / ADAPTER, (1e9, 1e9))
    with pytest.raises(SetupError) as caught:
        locate_quietly(f"run:tour/{ADAPTER}")
    assert re.fullmatch(
        r"run:tour/weights/style/adapter: 2 runs have it, the newest first: "
        r"run:tour-0123abcd/weights/style/adapter \(of 2033-05-1\d \d\d:\d\d\), "
        r"run:tour-4567abcd/weights/style/adapter \(of 2001-09-0\d \d\d:\d\d\)\. "
        r"Write one of these in its place; "
        r"`rotdistill diff tour-4567abcd tour-0123abcd` shows how they differ\.",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("run:tour/full", "checkpoints-again/full/config.json"),
        ("run:tour/full", "checkpoints-again/full/COMPLETE"),
        (f"run:tour/{ADAPTER}", f"{ADAPTER}/adapter_config.json"),
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "gone", "folder"])
def test_a_file_that_is_not_as_committed_is_named(
    run: Path, reference: str, name: str, damage: str
) -> None:
    path = run / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        content[3] ^= 8
        path.write_bytes(content)
    if damage == "folder":
        path.mkdir()
    with pytest.raises(CheckFailed, match=re.escape(str(path))):
        locate_quietly(reference)


def test_a_manifest_that_names_other_hashes_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "tour-0123abcd", "checkpoints")
    ledger = Ledger(run)
    [record] = ledger.checkpoints
    others = tuple(
        replace(file, sha256="0" * 64) if file.path.endswith("config.json") else file
        for file in record.files
    )
    problem = ArtifactStore(run.parent).manifest_problem(replace(record, files=others))
    assert "does not name the files of the checkpoint" in problem
    without = ArtifactStore(run.parent).manifest_problem(replace(record, files=()))
    assert "names no COMPLETE" in without


def test_a_folder_in_which_nothing_is_committed_is_refused(run: Path) -> None:
    (run / "weights" / "half").mkdir()
    with pytest.raises(SetupError, match="committed no file there"):
        locate_quietly("run:tour/weights/half")


@pytest.mark.parametrize("inside", ["weights/../../tour-guide-0123abcd/checkpoints", "../.."])
def test_a_path_that_leads_out_of_the_run_is_refused(run: Path, inside: str) -> None:
    with pytest.raises(SetupError, match="committed no file there"):
        locate_quietly(f"run:tour/{inside}")
