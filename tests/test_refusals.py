"""A step that does not apply its edit says why and what to try: on the terminal and on disk."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from rotdistill_core.evaluation.acceptance import MORE_TEXTS, wider_guard
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.document import Lessons, SamplesRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import PicoWorkspace, command_line

STEPS = """
[[step]]
use = "residuals"
[[step]]
id = "head"
use = "lm-head-ridge"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["head"]
"""
NAMED = re.compile(r"\(([a-z_., ]+?)(?: = [^)]*)?(?:, or ([a-z.]+) = \d+)?\)")
"""The options that a remedy names, in brackets."""
TABLES = {"samples": SamplesRef, "lessons": Lessons}


def options_named(remedies: list[str]) -> set[str]:
    """Return the options that remedies name."""
    found = {
        name.strip()
        for remedy in remedies
        for match in NAMED.finditer(remedy)
        for group in match.groups()
        if group
        for name in group.split(",")
    }
    assert found, remedies
    return found


def is_an_option(name: str, step: object) -> bool:
    """Return whether a name is an option of a step or a key of a table of recipes."""
    table, _, key = name.partition(".")
    return key in TABLES[table].model_fields if key else name in options_of(step)


def test_a_refusal_stands_on_the_terminal_in_the_record_and_in_the_report(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_workspace.texts()
    model = pico_workspace.model()
    pico_workspace.recipe(STEPS, name="same", teacher=model, student=model, observers=["report"])
    monkeypatch.chdir(pico_workspace.folder)
    code, _, err = command_line("run", "same.toml")
    assert code == 0, err
    told = [line for line in err.splitlines() if "head keeps the student as it was" in line]
    assert len(told) == 1
    assert "lowers the validation KL; the weights are left as they were. Try: " in told[0]

    (folder,) = Path("runs").iterdir()
    lines = RunLayout(folder).ledger.read_text(encoding="utf-8").splitlines()
    (record,) = [r for line in lines if (r := json.loads(line)).get("report", {}).get("refused")]
    remedies = record["report"]["remedies"]
    assert all(remedy in told[0] for remedy in remedies)
    step = step_class("lm-head-ridge")[0]()
    assert all(is_an_option(name, step) for name in options_named(remedies))

    report = json.loads((folder / RunLayout.REPORT_JSON).read_text(encoding="utf-8"))
    (issue,) = [each for each in report["issues"] if each["kind"] == "refused"]
    assert issue["text"].endswith(f"Try: {'; '.join(remedies)}.")
    assert remedies[0] in command_line("show", "same")[1]
    shown = json.loads(command_line("show", "same", "--json")[1])
    assert [s["remedies"] for s in shown["steps"] if s["id"] == "head"] == [remedies]


def test_a_step_that_fails_is_named_before_the_error(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_workspace.texts()
    model = pico_workspace.model()
    steps = STEPS.replace('use = "lm-head-ridge"', 'use = "lm-head-ridge"\nguard = 1.1')
    pico_workspace.recipe(steps, name="failing", teacher=model, student=model)
    monkeypatch.chdir(pico_workspace.folder)
    code, _, err = command_line("run", "failing.toml")
    assert code == 2
    *_, failed, error = [line for line in err.splitlines() if line.strip()]
    assert failed.split() == ["full", "head", "failed"]
    message = "guard needs texts outside the domain. Name a file of them as samples.guard"
    assert message in error

    (line,) = [line for line in command_line("show", "failing")[1].splitlines() if message in line]
    assert re.match(r"full: head failed at \d{4}-\d\d-\d\d \d\d:\d\d: RecipeError: ", line)
    (failure,) = json.loads(command_line("show", "failing", "--json")[1])["failures"]
    assert (failure["id"], failure["variant"]) == ("head", "full")
    (listed,) = json.loads(command_line("runs", "--json")[1])
    assert (listed["state"], listed["failures"]) == ("unfinished, head failed", [failure])
    code, _, err = command_line("report", "failing")
    assert (code, line in err) == (2, True)


@pytest.mark.parametrize("use", ["writer-refit", "lm-head-ridge"])
def test_remedies_name_options_that_exist(use: str) -> None:
    cls, _ = step_class(use)
    method = import_module(f"{cls.__module__.partition('.')[0]}._method")
    step = cls()
    for name in options_named(method.remedies_of(step)):
        assert is_an_option(name, step), name


def test_general_remedies_name_options_that_exist() -> None:
    step = step_class("writer-refit")[0]()
    for name in options_named([MORE_TEXTS, *wider_guard(1.02)]):
        assert is_an_option(name, step), name


@pytest.mark.parametrize(("guard", "wider"), [(1.0, "1.1"), (1.02, "1.04"), (2.0, "3")])
def test_a_wider_guard_allows_more(guard: float, wider: str) -> None:
    assert wider_guard(guard)[0] == f"a wider guard (guard = {wider})"
