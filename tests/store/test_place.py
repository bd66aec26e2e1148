"""Temporary files are of one place: no other host or container takes them for dead ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rotdistill_core.store.ledger import ArtifactStore
from rotdistill_core.store.place import INITIAL_NAMESPACE, Place, pid_in_name, this_place
from rotdistill_core.store.presence import RUNNING, others_at_work

FILE = Path("run/rows.safetensors")
HERE = Place.of("node", "machine", "boot", INITIAL_NAMESPACE)
IN_NEW_NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]

WRITER = """
import sys
from pathlib import Path
from rotdistill_core.store.files import write_file
from rotdistill_core.store.presence import RUNNING, at_work

def blocks():
    yield b"first half"
    print("half", flush=True)
    sys.stdin.readline()
    yield b", second half"

folder = Path(sys.argv[1])
with at_work(folder, RUNNING):
    write_file(folder / "rows.safetensors", blocks())
"""


@pytest.fixture
def dead() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        child.wait()
    return child.pid


def test_a_name_is_read_back(dead: int) -> None:
    path = HERE.temporary(FILE, dead)
    assert path.parent == FILE.parent
    assert (HERE.pid_of(path), pid_in_name(path)) == (dead, dead)
    assert HERE.temporary(FILE, dead) != path


def test_only_a_dead_process_of_the_place_has_left_a_file(dead: int) -> None:
    assert HERE.has_left(HERE.temporary(FILE, dead))
    assert not HERE.has_left(HERE.temporary(FILE, os.getpid()))


@pytest.mark.parametrize(
    "other",
    [
        Place.of("another", "machine", "boot", INITIAL_NAMESPACE),
        Place.of("node", "another", "boot", INITIAL_NAMESPACE),
        Place.of("node", "machine", "boot", "pid:[4026532001]"),
    ],
)
def test_files_of_another_place_are_never_left(other: Place, dead: int) -> None:
    path = other.temporary(FILE, dead)
    assert not HERE.has_left(path)
    assert HERE.pid_of(path) is None
    assert pid_in_name(path) == dead


def test_what_a_machine_left_before_it_restarted_is_left(dead: int) -> None:
    again = Place.of("node", "machine", "later", INITIAL_NAMESPACE)
    path = HERE.temporary(FILE, os.getpid())  # the id of a process that is alive by chance
    assert again.has_left(path)
    assert again.pid_of(path) is None


@pytest.mark.parametrize(("machine", "namespace"), [("m", "pid:[4026532001]"), ("", "")])
def test_in_a_container_a_restart_proves_nothing(machine: str, namespace: str, dead: int) -> None:
    before, after = (Place.of("node", machine, boot, namespace) for boot in ("one", "two"))
    assert not after.has_left(before.temporary(FILE, dead))


@pytest.mark.parametrize("name", ["notes.tmp", "a.b.c.tmp", "a.json.17.0badcafe.tmp", "a.json"])
def test_other_names_are_of_no_place(name: str) -> None:
    assert not HERE.has_left(Path(name))
    assert pid_in_name(Path(name)) is None


def test_this_place_stays_the_same() -> None:
    assert this_place() == this_place()


def may_unshare() -> bool:
    """Return whether this process may make a pid namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*IN_NEW_NAMESPACE, "true"], capture_output=True).returncode == 0


def test_two_pid_namespaces_do_not_disturb_each_other(tmp_path: Path) -> None:
    if not may_unshare():
        pytest.skip("no pid namespace can be made here")
    command = [*IN_NEW_NAMESPACE, sys.executable, "-c", WRITER, str(tmp_path)]
    sweep = (
        "import sys; from pathlib import Path; from rotdistill_core.store.ledger import "
        "ArtifactStore; ArtifactStore(Path(sys.argv[1])).sweep(Path(sys.argv[1]))"
    )
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        during = sorted(path.name for path in tmp_path.iterdir())
        assert len(during) == 2
        # From outside, and from a third namespace, where the writer's id is another process's.
        ArtifactStore(tmp_path).sweep(tmp_path)
        third = [*IN_NEW_NAMESPACE, sys.executable, "-c", sweep, str(tmp_path)]
        subprocess.run(third, check=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == during
        [other] = others_at_work(tmp_path, RUNNING)
        assert "in another container (if that has ended, remove " in other
        writer.communicate("go on\n")
    assert writer.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.safetensors"]
    assert (tmp_path / "rows.safetensors").read_bytes() == b"first half, second half"
