"""Processes that work in a run's folder see each other; what a dead one left says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rotdistill_core.errors import SetupError
from rotdistill_core.store.ledger import ArtifactStore
from rotdistill_core.store.place import Place, this_place
from rotdistill_core.store.presence import REMOVING, RUNNING, at_work, others_at_work

WORKER = """
import sys
from pathlib import Path
from rotdistill_core.store.presence import at_work
with at_work(Path(sys.argv[1]), sys.argv[2]):
    print("there", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that works in the folder until it is told to end."""
    command = [sys.executable, "-c", WORKER, str(tmp_path), RUNNING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


def test_a_process_is_seen_while_it_works(tmp_path: Path, worker: subprocess.Popen[str]) -> None:
    assert others_at_work(tmp_path, RUNNING) == [f"process {worker.pid}"]
    assert others_at_work(tmp_path, REMOVING) == []
    worker.communicate("end\n")
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_not_seen_and_its_file_is_swept(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    worker.kill()
    worker.wait()
    assert list(tmp_path.iterdir())
    assert others_at_work(tmp_path, RUNNING) == []
    ArtifactStore(tmp_path.parent).sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_process_with_the_same_id_is_not_mistaken(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    [mark] = tmp_path.iterdir()
    about = json.loads(mark.read_text())
    mark.write_text(json.dumps({**about, "started": "another time"}))
    assert others_at_work(tmp_path, RUNNING) == []


def test_a_process_on_another_host_is_named_with_its_file(tmp_path: Path) -> None:
    mark = Place.of("elsewhere", "", "boot", "").temporary(tmp_path / RUNNING, 1234567)
    mark.write_text(json.dumps({"host": "elsewhere", "started": "1"}))
    [found] = others_at_work(tmp_path, RUNNING)
    assert found == f"process 1234567 on elsewhere (if that has ended, remove {mark})"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_torn_file_says_nothing(tmp_path: Path, content: str) -> None:
    this_place().temporary(tmp_path / RUNNING, 1234567).write_text(content)
    assert others_at_work(tmp_path, RUNNING) == []


def test_a_process_does_not_see_itself(tmp_path: Path) -> None:
    with at_work(tmp_path / "run", RUNNING) as mark:
        assert mark.is_file()
        assert others_at_work(tmp_path / "run", RUNNING) == []
    assert not mark.exists()


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with (
        pytest.raises(SetupError, match=r"run.*: cannot be written"),
        at_work(tmp_path / "run", RUNNING),
    ):
        pass
