"""Variants and adapters of earlier runs are found by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from rotdistill_soups.run_source import locate

from rotdistill_core.errors import SetupError
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import CheckpointRecord

ADAPTER = "weights/style/adapter"


def write_run(root: Path, name: str, *checkpoint_folders: str) -> Path:
    """Write a run whose ledger commits the variant `full` once for each folder."""
    run = root / "runs" / name
    for folder in checkpoint_folders:
        (run / folder / "full").mkdir(parents=True)
        path = f"{name}/{folder}/full"
        Ledger(run).append(CheckpointRecord(key=folder, variant="full", folder=path, files=()))
    return run


def locate_quietly(reference: str) -> Path:
    return locate(reference, lambda _: None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "tour-guide-0123abcd", "checkpoints")
    made = write_run(tmp_path, "tour-0123abcd", "checkpoints", "checkpoints-again")
    (made / ADAPTER).mkdir(parents=True)
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
    (older / ADAPTER).mkdir(parents=True)
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
