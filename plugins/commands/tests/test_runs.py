"""The verbs over runs, on two pico runs that share a capture."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_commands._diff import compare_maps
from rotdistill_commands._removal import files_to_delete, format_size

from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.execution.run_folder import RunFolder, all_runs, find_run, needed_by
from rotdistill_core.linalg.maps import Gauge, Permutation, Rotation
from rotdistill_core.testing import PicoWorkspace, command_line, run_recipe

STEPS = """
variants = { base = [], full = ["basis", "heads", "fold"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "ALIGNER" },
    { id = "heads", use = "hungarian-permute" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""


class Terminal(io.StringIO):
    """A keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def finished(make_workspace: Callable[..., PicoWorkspace]) -> Path:
    """Return a folder with two finished runs that share a capture and differ in the aligner."""
    workspace = make_workspace(num_hidden_layers=3)
    for name, aligner in (("one", "procrustes"), ("two", "random-rotation")):
        steps = STEPS.replace("ALIGNER", aligner)
        observers = ("report",) if name == "one" else ()
        workspace.run(workspace.recipe(steps, name=name, observers=observers))
    return workspace.folder


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy to work in."""
    copy = shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(copy)
    return copy


def document(*words: str) -> Any:
    code, out, err = command_line(*words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_runs_are_listed_the_newest_first(root: Path) -> None:
    found = document("runs")
    assert [run["run"].split("-")[0] for run in found] == ["two", "one"]
    assert {run["state"] for run in found} == {"done"}
    two, one = found
    assert two["shared_bytes"] == 0 < one["shared_bytes"] < one["bytes"]
    assert one["variants"] == ["base", "full"]
    code, out, err = command_line("runs")
    assert (code, err) == (0, "")
    assert one["run"] in out


def test_a_kl_that_is_no_number_is_not_the_lowest(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(_: RunFolder) -> list[MetricRow]:
        return [MetricRow("base", "kl", math.nan), MetricRow("full", "kl", 0.5)]

    monkeypatch.setattr(RunFolder, "rows", rows)
    assert {tuple(run["best"]) for run in document("runs")} == {("full", 0.5)}


def test_no_runs_is_a_message_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command_line("runs")
    assert (code, out) == (0, "")
    assert "rotdistill run RECIPE" in err
    assert document("runs") == []


def test_show_lists_steps_and_their_places(root: Path) -> None:
    one, two = document("show", "one"), document("show", "two")
    assert [step["id"] for step in two["steps"]] == [
        "chop",
        "residuals",
        "fidelity",
        "basis",
        "heads",
        "fold",
        "fidelity",
    ]
    both = ["base", "full"]
    variants = {step["id"]: step["variants"] for step in two["steps"] if step["use"] != "fidelity"}
    assert variants == {
        "chop": both,
        "residuals": both,
        "basis": ["full"],
        "heads": ["full"],
        "fold": ["full"],
    }
    where = {step["id"]: step["lies_in"] for step in two["steps"]}
    assert where["residuals"] == one["run"]
    assert where["basis"] == two["run"]
    assert one["needed_by"] == [two["run"]]
    assert two["needed_by"] == []
    assert two["figures"]["base"]["kl"] == pytest.approx(two["figures"]["full"]["kl"], abs=1e-3)
    code, out, _ = command_line("show", one["path"])
    assert code == 0
    assert f"part of {two['run']}" in out
    assert "held-out KL" in out


def test_the_beginning_of_its_name_names_a_run(root: Path) -> None:
    assert find_run("tw", Path("runs")).path.name.startswith("two-")
    shutil.copytree(find_run("two", Path("runs")).path, Path("runs/two-more"))
    named = RunFolder(Path("runs/two-more"))
    os.utime(named.ledger.path, (2e9, 2e9))
    with pytest.raises(
        RecipeError,
        match=rf"2 runs, the newest first: two-more \(of {named.changed}\), two-[0-9a-f]{{8}} \(",
    ):
        find_run("tw", Path("runs"))
    code, out, err = command_line("show", "thre")
    assert (code, out) == (2, "")
    assert 'there is no run "thre"' in err


def test_the_name_of_a_recipe_that_was_run_twice_means_the_newest_finished_run(root: Path) -> None:
    (root / "again.toml").write_text(
        (root / "one.toml").read_text().replace("layers = 2", "layers = 1")
    )
    run_recipe(root / "again.toml")
    newest, _, older = (run["run"] for run in document("runs"))
    assert newest[:4] == older[:4] == "one-"
    code, out, err = command_line("show", "one")
    assert (code, f"runs/{newest}: done" in out) == (0, True)
    assert err.startswith(f"{newest}, done, of ")
    (root / "runs" / newest / "results.jsonl").unlink()
    assert f"runs/{older}: done" in command_line("show", "one")[1]
    assert "is the beginning of 2 runs" in command_line("rm", "one")[2]
    assert "is the beginning of 3 runs" in command_line("show", "")[2]


def test_the_name_of_a_recipe_does_not_mean_another_that_begins_with_it(root: Path) -> None:
    one = find_run("one", Path("runs"))
    shutil.copytree(one.path, Path("runs/one-more-0a1b2c3d"))
    assert find_run("one", Path("runs")).path == one.path
    assert find_run("one-more", Path("runs")).path.name == "one-more-0a1b2c3d"
    with pytest.raises(RecipeError, match="is the beginning of 2 runs"):
        find_run("on", Path("runs"))


def test_diff_compares_recipes_maps_and_scores(root: Path) -> None:
    found = document("diff", "one", "two")
    changed = {each["key"]: (each["one"], each["two"]) for each in found["recipes"]}
    assert changed["step basis.use"] == ("procrustes", "random-rotation")
    assert "step chop.layers" not in changed
    angles = [each["angle"] for each in found["maps"] if each["space"].startswith("residual")]
    assert angles
    assert all(60 < angle < 120 for angle in angles)  # two random rotations are unrelated
    heads = [
        each for each in found["maps"] if each["step"] == "heads" and each["kind"] == "Permutation"
    ]
    assert heads
    assert all(0 <= each["changed"] <= each["size"] for each in heads)
    base = next(s for s in found["scores"] if (s["variant"], s["metric"]) == ("base", "kl"))
    assert base["one"] == base["two"]
    assert base["low"] == base["high"] == 0
    code, out, _ = command_line("diff", "one", "two")
    assert code == 0
    assert "assignments differ" in out
    same = sum(score["one"] == score["two"] for score in found["scores"])
    assert f"{same} of {len(found['scores'])} figures are the same." in out
    assert "base: kl" not in out  # the same in both runs
    assert "full: hidden_cosine" in out


def test_distances_between_maps_are_those_that_were_planted() -> None:
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    angle = compare_maps(
        "s", "residual.0", Rotation(torch.eye(2, dtype=torch.float64)), Rotation(turned)
    ).angle
    assert angle == pytest.approx(math.degrees(math.acos(0.6)))
    swapped = compare_maps(
        "s", "q.0", Permutation(torch.tensor([0, 1, 2])), Permutation(torch.tensor([0, 2, 1]))
    )
    assert (swapped.changed, swapped.size) == (2, 3)
    gauges = (Gauge(torch.eye(2, dtype=torch.float64)[None] * k) for k in (1, 3))
    assert compare_maps("s", "value.0", *gauges).distance == pytest.approx(2)
    other = compare_maps(
        "s", "residual.0", Rotation(torch.eye(2)), Permutation(torch.tensor([0, 1]))
    )
    assert (other.angle, other.changed) == (None, None)
    assert other.kind == "Rotation [2, 2], Permutation [2]"


def test_a_run_against_itself_differs_in_nothing(root: Path) -> None:
    found = document("diff", "one", "one")
    assert found["recipes"] == found["maps"] == []
    assert all(score["one"] == score["two"] for score in found["scores"])


def test_the_report_is_written_again_from_the_ledger(root: Path) -> None:
    path, page = (find_run("one", Path("runs")).path / f"report.{end}" for end in ("md", "html"))
    before = path.read_text()
    path.unlink()
    code, out, _ = command_line("report", "one")
    assert (code, out) == (0, f"{page}\n")
    assert path.read_text() == before


def test_an_unfinished_run_has_no_report(root: Path) -> None:
    run = find_run("one", Path("runs")).path
    (run / "results.jsonl").unlink()
    code, out, err = command_line("report", "one")
    assert (code, out) == (2, "")
    assert "is unfinished" in err
    assert document("show", "one")["state"] == "unfinished"


def test_removing_leaves_the_files_that_another_run_needs(root: Path) -> None:
    one, two = (find_run(name, Path("runs")) for name in ("one", "two"))
    needed = set(needed_by(one, all_runs(Path("runs"))))
    assert any(path.endswith("00000.safetensors") for path in needed)
    assert set(document("rm", "one", "--yes")[0]["kept"]) == needed
    left = {p.relative_to("runs").as_posix() for p in one.path.rglob("*") if p.is_file()}
    assert left == needed | {f"{one.path.name}/ledger.jsonl"}
    assert RunFolder(one.path).state == "kept files"
    code, _, err = command_line("check", str(two.path))
    assert code == 0, err
    again = run_recipe(root / "two.toml")
    assert all(
        again.steps[place].reused
        for place in (
            ("base", "chop"),
            ("base", "residuals"),
            ("base", "fidelity"),
            ("full", "fold"),
        )
    )
    assert document("rm", "two", "--yes")[0]["kept"] == []
    assert document("rm", "one", "--yes")[0]["kept"] == []
    assert list(Path("runs").iterdir()) == []


def test_a_removed_run_is_made_again_from_the_files_that_are_left(root: Path) -> None:
    command_line("rm", "one", "--yes")
    made = run_recipe(root / "one.toml")
    assert made.steps["base", "residuals"].reused  # known to the other run
    assert not made.steps["full", "basis"].reused
    assert document("show", "one")["state"] == "done"


def test_two_runs_removed_together_keep_nothing(root: Path) -> None:
    assert [each["kept"] for each in document("rm", "one", "two", "--yes")] == [[], []]
    assert list(Path("runs").iterdir()) == []


def test_rm_asks_first_on_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (find_run(name, Path("runs")) for name in ("one", "two"))
    for answer in ("\n", "", "no\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        before = two.bytes
        code, out, err = command_line("rm", "two", "--json")
        assert (code, json.loads(out), two.bytes) == (0, [], before)
        assert f"{two.path.name}: done, of {two.changed}, frees " in err
        assert "checkpoints" in err
        assert err.endswith("y/N nothing is removed.\n")
    expected = sum(
        path.lstat().st_size for path in files_to_delete(one, set(needed_by(one, [two])), False)
    )
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    code, out, err = command_line("rm", "one", "--json")
    assert (code, json.loads(out)[0]["freed_bytes"]) == (0, expected)
    assert f"frees {format_size(expected)} (" in err
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert command_line("rm", "one", "two", "--yes")[0] == 0
    assert list(Path("runs").iterdir()) == []


def test_rm_without_a_terminal_wants_the_word(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = find_run("one", Path("runs"))
    before = one.bytes
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, err = command_line("rm", "one", "two", "--json")
    assert (code, out, one.bytes) == (2, "", before)
    [line] = err.splitlines()
    assert "no terminal to ask on. Nothing is removed; --yes removes without asking" in line
    assert f"{one.path.name}: done, of {one.changed}, frees " in line


def test_a_copied_folder_is_called_a_copy_and_can_be_removed(root: Path) -> None:
    one = document("runs")[0]["run"]
    shutil.copytree(root / "runs" / one, root / "runs" / "copy")
    before = {path: path.stat().st_size for path in (root / "runs" / one).rglob("*")}
    states = {run["run"]: run["state"] for run in document("runs")}
    assert (states["copy"], states[one]) == (f"copy of {one}", "done")
    document("rm", "copy", "--yes")
    assert not (root / "runs" / "copy").exists()
    assert before == {path: path.stat().st_size for path in (root / "runs" / one).rglob("*")}


def test_checkpoints_and_scores_can_stay(root: Path) -> None:
    run = find_run("two", Path("runs"))
    before = run.bytes
    code, _, err = command_line("rm", "two", "--keep-checkpoints", "--yes")
    assert code == 0
    assert "freed" in err
    assert (run.path / "checkpoints" / "full" / "model.safetensors").is_file()
    assert not (run.path / "rotations").exists()
    assert 0 < RunFolder(run.path).bytes < before
    assert document("show", "two")["figures"]["full"]
    assert command_line("check", str(run.path))[0] == 0
    again = run_recipe(root / "two.toml")
    assert again.steps["base", "residuals"].reused
    assert not again.steps["full", "basis"].reused


@pytest.mark.parametrize("verb", ["runs", "show", "diff", "rm", "report"])
def test_help_ends_with_two_examples(verb: str) -> None:
    code, out, err = command_line(verb, "--help")
    assert (code, err) == (0, "")
    assert out.count(f"rotdistill {verb}") >= 2
