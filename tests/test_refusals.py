"""A step that does not apply its edit says why and what to try: on the terminal and on disk."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import pytest

from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import MORE_TEXTS, wider_guard
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.results import Remedy, StepReport
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
CUT = """
[[step]]
use = "chop"
layers = 3
[[step]]
use = "residuals"
[[step]]
id = "refit"
use = "writer-refit"
layers = "cut"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["refit"]
"""
GENERAL = [MORE_TEXTS, *wider_guard(1.02)]


def options_of_own(remedies: Iterable[Remedy]) -> dict[str, object]:
    """Return the options of the step itself that remedies set."""
    found = [pair.partition("=") for remedy in remedies for pair in remedy.sets]
    assert found
    return {key: toml_value(text) for key, _, text in found if "." not in key}


def toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def passes_check(command: str) -> bool:
    """Return whether `rotdistill check` takes the recipe and overrides of a run command."""
    program, run, *words = shlex.split(command)
    assert (program, run) == ("rotdistill", "run")
    code, _, err = command_line("check", *words)
    assert code == 0, err
    return True


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
    remedies = [Remedy(each["what"], tuple(each["sets"])) for each in record["report"]["remedies"]]
    texts = [remedy.text for remedy in remedies]
    assert "--set 'head.ridge=" in texts[0]
    assert all(text in told[0] for text in texts)

    report = json.loads((folder / RunLayout.REPORT_JSON).read_text(encoding="utf-8"))
    (issue,) = [each for each in report["issues"] if each["kind"] == "refused"]
    assert [each["what"] for each in issue["advice"]] == [remedy.what for remedy in remedies]
    commands = [each["command"] for each in issue["advice"] if each["command"]]
    assert len(commands) == len([remedy for remedy in remedies if remedy.sets])
    assert all(map(passes_check, commands))
    assert report["next_step"]["command"] == commands[0]
    assert texts[0] in command_line("show", "same")[1]
    shown = json.loads(command_line("show", "same", "--json")[1])
    assert [s["remedies"] for s in shown["steps"] if s["id"] == "head"] == [texts]


def test_what_cautions_advise_passes_check_on_the_recipe_with_its_overrides(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.evaluation.acceptance.OVERFIT_RATIO", 0.1)

    def half(_: object, ood_kl: Callable[[float], float], __: float) -> float:
        ood_kl(1.0)  # the caution states it
        return 0.5

    monkeypatch.setattr("rotdistill_core.evaluation.acceptance.largest_allowed_share", half)
    texts = pico_workspace.texts(questions=4)
    pico_workspace.recipe(
        CUT,
        name="cut",
        teacher=pico_workspace.model(num_hidden_layers=4),
        student=pico_workspace.folder / "model",
        observers=["report"],
        tables=f"samples.guard = {json.dumps(str(texts['guard.tsv']))}",
    )
    monkeypatch.chdir(pico_workspace.folder)
    code, out, err = command_line("run", "cut.toml", "--set", "refit.ridge=[0.5]")
    assert code == 0, err
    (folder,) = Path("runs").iterdir()
    report = json.loads((folder / RunLayout.REPORT_JSON).read_text(encoding="utf-8"))
    issues = {each["kind"]: each for each in report["issues"]}
    advice = [*issues["guarded"]["advice"], *issues["overfitted"]["advice"]]
    commands = [each["command"] for each in advice if each["command"]]
    assert "rotdistill run cut.toml --set 'refit.ridge=[0.5]' --set refit.guard=1.04" in commands
    assert any("lessons.count=500 --set lessons.from=teacher" in each for each in commands)
    assert all(map(passes_check, dict.fromkeys(commands)))
    assert report["next_step"]["command"] == issues["overfitted"]["advice"][0]["command"]
    assert "".join(report["next_step"]["command"].split()) in "".join((out + err).split())


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
def test_remedies_set_options_to_values_that_the_step_takes(use: str) -> None:
    cls, _ = step_class(use)
    step = cls()
    method = import_module(f"{cls.__module__.partition('.')[0]}._method")
    options = options_of_own([*method.remedies_of(step), *GENERAL])
    changed = validator_of(cls).validate_json(json.dumps({"use": use, **options}), strict=True)
    assert all(getattr(changed, name) != getattr(step, name) for name in options)


def test_words_of_earlier_records_are_remedies() -> None:
    stored = {"refused": "no gain", "remedies": ["a wider guard (guard = 1.04)"]}
    assert StepReport.from_dict(stored).refusal == "no gain. Try: a wider guard (guard = 1.04)."


@pytest.mark.parametrize(("guard", "wider"), [(1.0, "1.1"), (1.02, "1.04"), (2.0, "3")])
def test_a_wider_guard_allows_more(guard: float, wider: str) -> None:
    assert wider_guard(guard)[0].text == f"a wider guard (--set guard={wider})"


def test_an_option_without_its_step_names_the_steps_that_have_it(
    pico_workspace: PicoWorkspace,
) -> None:
    recipe = pico_workspace.recipe(CUT)
    with pytest.raises(RecipeError, match=r'called "guard"\. Did you mean "refit\.guard"\?'):
        load_recipe(recipe, ["guard=1.04"])
    with pytest.raises(RecipeError, match=r'called "sample"\. Did you mean "samples"\?'):
        load_recipe(recipe, ["sample.limit=3"])
