"""Damage to a finished run is named by `check`, and healed by carrying out its recipe again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.place import this_place
from rotdistill_core.store.presence import at_work
from rotdistill_core.testing import command_line


def hashes(run: Path) -> dict[str, str]:
    """Return the hash of every file of a run but its ledger, which grows."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != RunLayout.LEDGER]
    return {str(path.relative_to(run)): sha256_of(path) for path in files}


def check(run: Path) -> tuple[int, str]:
    code, out, err = command_line("check", str(run))
    return code, out + err


def carry_out() -> str:
    code, out, err = command_line("run", "trial.toml", "--no-plan")
    assert code == 0, out + err
    return err


def heals(run: Path, before: Mapping[str, str]) -> None:
    """Require that the recipe, carried out again, makes the run as it was."""
    carry_out()
    after = hashes(run)
    results = {name for name in before if name in (RunLayout.RESULTS,)}
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= results  # times of steps that were made again
    assert check(run)[0] == 0


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_finished_run_holds(run: Path) -> None:
    assert check(run)[0] == 0
    assert "ledger" not in carry_out()
    assert check(run)[0] == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_of_the_ledger_is_named_and_healed(run: Path, seed: int) -> None:
    before, ledger = hashes(run), run / RunLayout.LEDGER
    picker = random.Random(seed)
    size = ledger.stat().st_size
    place = size - 1 if seed == 0 else picker.randrange(size)
    line = ledger.read_bytes()[:place].count(b"\n") + 1
    flip(ledger, place, picker.randrange(8))
    code, said = check(run)
    assert code == 4
    assert f"{ledger.name}: line {line} " in said
    heals(run, before)


def lines_of(run: Path) -> list[bytes]:
    return (run / RunLayout.LEDGER).read_bytes().splitlines(keepends=True)


def lose(run: Path, lost: Callable[[dict[str, object]], bool]) -> None:
    """Take out lines, and chain the others as if those had never been."""
    ledger = Ledger(run)
    kinds = [json.loads(line) for line in lines_of(run)]
    assert any(map(lost, kinds))
    left = [r for r, values in zip(ledger.records, kinds, strict=True) if not lost(values)]
    ledger.rewrite(left)


LOST: dict[str, tuple[Callable[[dict[str, object]], bool], str]] = {
    "start": (lambda line: line["kind"] == "start", "the record of the start is lost"),
    "cut": (lambda line: line.get("id") == "chop", 'the record of step "chop" is lost'),
    "capture": (lambda line: line.get("id") == "residuals", 'record of step "residuals" is lost'),
    "fold": (lambda line: line.get("id") == "fold", 'the record of step "fold" is lost'),
    "evaluator": (
        lambda line: (line.get("id"), line.get("variant")) == ("fidelity", "full"),
        'the record of step "fidelity" of variant "full" is lost',
    ),
    "checkpoint": (
        lambda line: (line["kind"], line.get("variant")) == ("checkpoint", "full"),
        'the record of the checkpoint "full" is lost',
    ),
    "resolved recipe": (
        lambda line: line.get("name") == RunLayout.RESOLVED_RECIPE,
        "recipe.resolved.json: no line of the ledger commits it",
    ),
    "results": (
        lambda line: line.get("name") == RunLayout.RESULTS,
        "results.jsonl: no line of the ledger commits it",
    ),
}


@pytest.mark.parametrize(("lost", "said"), LOST.values(), ids=LOST.keys())
def test_a_lost_record_is_named_even_without_a_gap(
    run: Path, lost: Callable[[dict[str, object]], bool], said: str
) -> None:
    before = hashes(run)
    lose(run, lost)
    assert Ledger(run).faults == []
    code, words = check(run)
    assert (code, said in " ".join(words.split())) == (4, True), words
    heals(run, before)


@pytest.mark.parametrize("kind", ["start", "file", "step", "checkpoint"])
def test_a_lost_line_is_named_and_told_once(run: Path, kind: str) -> None:
    before, lines = hashes(run), lines_of(run)
    number = next(n for n, line in enumerate(lines) if json.loads(line)["kind"] == kind)
    (run / RunLayout.LEDGER).write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
    code, said = check(run)
    assert code == 4
    assert f"line {number + 1} follows a line that is missing" in said
    assert "ledger.jsonl: line" in carry_out()
    assert "ledger.jsonl: line" not in carry_out()
    heals(run, before)


def test_the_last_line_is_missed_because_its_file_is_there(run: Path) -> None:
    before, lines = hashes(run), lines_of(run)
    (run / RunLayout.LEDGER).write_bytes(b"".join(lines[:-1]))
    code, said = check(run)
    assert (code, "results.jsonl: no line of the ledger commits it" in said) == (4, True)
    heals(run, before)


def test_a_torn_last_line_is_healed_without_a_word(run: Path) -> None:
    before, ledger = hashes(run), run / RunLayout.LEDGER
    ledger.write_bytes(ledger.read_bytes()[:-9])
    code, said = check(run)
    assert (code, "has no end" in said) == (4, True)
    assert "ledger.jsonl: line" not in carry_out()
    heals(run, before)


DOCUMENTS = (
    "recipe.toml",
    "recipe.resolved.json",
    "samples.tsv",
    "system.md",
    "results.jsonl",
    "checkpoints/full/COMPLETE",
    "checkpoints/full/config.json",
    "checkpoints/full/recipe.toml",
)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("damage", ["flipped", "gone", "pipe"])
def test_each_document_is_named_and_written_anew(run: Path, name: str, damage: str) -> None:
    before, path = hashes(run), run / name
    if damage == "flipped":
        flip(path, 5, 1)
    else:
        path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    code, said = check(run)
    assert (code, str(path) in said.replace("\n", "")) == (4, True), said
    heals(run, before)


@pytest.mark.parametrize("name", ["system.md", "results.jsonl", "checkpoints/full/config.json"])
def test_a_folder_in_the_place_of_a_file_is_named_and_refused(run: Path, name: str) -> None:
    before, path = hashes(run), run / name
    path.unlink()
    path.mkdir()
    code, said = check(run)
    assert (code, f"{path}: is a folder where a file belongs" in said) == (4, True), said
    code, _, err = command_line("run", "trial.toml", "--no-plan")
    assert code == 3
    assert "cannot be written: Is a directory. Move away what lies in its place" in err
    path.rmdir()
    heals(run, before)


def test_a_link_to_the_same_bytes_is_fine(run: Path) -> None:
    for name in ("system.md", "checkpoints/full/model.safetensors"):
        path = run / name
        elsewhere = run.parents[1] / f"elsewhere-{path.name}"
        shutil.move(path, elsewhere)
        path.symlink_to(elsewhere)
    assert check(run)[0] == 0


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        (("show", "trial"), "results.jsonl"),
        (("show", "trial"), "recipe.resolved.json"),
        (("diff", "trial", "trial"), "recipe.resolved.json"),
        (("diff", "trial", "trial"), "results.jsonl"),
        (("report", "trial"), "recipe.toml"),
        (("report", "trial"), "results.jsonl"),
    ],
)
def test_verbs_read_no_damaged_document(run: Path, verb: tuple[str, ...], name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes().replace(b"a", b"b", 1))
    code, out, err = command_line(*verb)
    assert (code, out) == (4, "")
    assert f"{name}: does not match its sha256 in the ledger" in err


@pytest.mark.parametrize("name", ["results.jsonl", "recipe.resolved.json", "ledger.jsonl"])
def test_a_damaged_run_hides_no_other(run: Path, name: str) -> None:
    other = run.with_name("another")
    shutil.copytree(run, other)
    (run / name).write_bytes(b"{" + (run / name).read_bytes()[:40])
    code, out, err = command_line("runs", "--json")
    listed = {each["run"]: each for each in json.loads(out)}
    assert (code, listed.keys()) == (0, {run.name, other.name})
    assert not listed[other.name]["damage"]
    assert name in listed[run.name]["damage"][0]
    code, out, err = command_line("runs")
    assert "damaged" in out
    assert str(run / name).removeprefix(f"{Path.cwd()}/") in err


def test_a_ledger_that_cannot_be_read_hides_no_other_run(run: Path) -> None:
    (run.with_name("folder") / "ledger.jsonl").mkdir(parents=True)
    code, out, err = command_line("runs")
    assert (code, run.name in out) == (0, True)
    assert "folder/ledger.jsonl" in err


@pytest.fixture
def elsewhere(run: Path) -> Iterator[Callable[[str], int]]:
    """Return a function that leaves the mark of a living process in the run's folder."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:

        def leave(work: str) -> int:
            with at_work(run, work) as own:
                about = json.loads(own.read_text())
            started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
            mark = this_place().temporary(run / work, process.pid)
            mark.write_text(json.dumps({**about, "started": started}))
            return process.pid

        yield leave
        process.kill()


def test_rm_refuses_a_run_in_progress(run: Path, elsewhere: Callable[[str], int]) -> None:
    before, pid = hashes(run), elsewhere("running")
    for words in (("rm", "trial", "--yes"), ("rm", "trial", "--keep-checkpoints", "--yes")):
        code, _, err = command_line(*words)
        assert code == 3
        assert f"is in progress: process {pid} carries out its recipe. Nothing was removed" in err
    assert before.items() <= hashes(run).items()
    assert json.loads(command_line("runs", "--json")[1])[0]["state"] == "running"


def test_run_refuses_a_run_that_is_being_removed(
    run: Path, elsewhere: Callable[[str], int]
) -> None:
    before, pid = hashes(run), elsewhere("removing")
    code, _, err = command_line("run", "trial.toml", "--no-plan")
    assert code == 3
    assert f"is being removed by process {pid}. Run the recipe again when that has ended" in err
    assert before.items() <= hashes(run).items()


def test_rm_leaves_nothing(run: Path) -> None:
    assert command_line("rm", "trial", "--yes")[0] == 0
    assert not run.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 300 + b"\n", b"noise\n" * 3])
def test_a_ledger_of_which_nothing_is_left_is_named_and_made_again(
    run: Path, content: bytes
) -> None:
    before = hashes(run)
    (run / RunLayout.LEDGER).write_bytes(content)
    code, said = check(run)
    assert (code, "ledger.jsonl: " in said) == (4, True)
    heals(run, before)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_run_whose_ledger_cannot_be_read_stops_no_other(
    run: Path, make: Callable[[Path], None]
) -> None:
    other = run.parent / "other-01234567"
    other.mkdir()
    make(other / RunLayout.LEDGER)
    for words in (("runs",), ("show", run.name), ("plan", "trial.toml"), ("check", str(run))):
        code, out, err = command_line(*words)
        assert code == 0, out + err
    said = carry_out()
    assert said.count(f"{other.name}/ledger.jsonl: cannot be read") == 1
    code, _, err = command_line("rm", run.name, "--yes")
    assert (code, "cannot be read" in err) == (3, True)  # which files that run needs is not known


@pytest.mark.parametrize(
    "name", ["rotations/*/layer_0.json", "checkpoints/full/config.json", "results.jsonl"]
)
def test_no_report_is_written_from_what_does_not_hold(run: Path, name: str) -> None:
    [path] = run.glob(name)
    flip(path, 12, 1)
    code, out, err = command_line("report", run.name)
    assert (code, str(path.relative_to(run)) in out + err) == (4, True), out + err


def test_a_plan_reuses_nothing_that_does_not_hold(run: Path) -> None:
    def to_do() -> set[str]:
        code, out, _ = command_line("plan", "trial.toml", "--json")
        assert code == 0
        return {line["id"] for line in json.loads(out)["steps"] if not line["reused"]}

    assert to_do() == set()
    flip(run / "weights/fold/changed.safetensors", -3, 2)
    flip(run / "checkpoints/base/model.safetensors", -3, 2)
    assert to_do() == {"fold", "checkpoints"}
