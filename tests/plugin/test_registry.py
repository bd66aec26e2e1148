"""Plugins: found by name, imported only when named, and named themselves when they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.errors import PluginError, RecipeError
from rotdistill_core.plugin import registry
from rotdistill_core.plugin.registry import (
    ADAPTERS,
    COMMANDS,
    OBSERVERS,
    STEPS,
    adapter_for,
    find_plugin,
    installed_plugins,
    iter_plugins,
    step_class,
)
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.schema import recipe_schema
from rotdistill_core.testing import command_line

GOOD = '''"""A step that does nothing."""
from typing import Literal
from rotdistill_core import hookimpl, step


@step
class Spin:
    use: Literal["spin"] = "spin"
    turns: int = 1
    """How often."""

    @hookimpl
    def align(self, maps):
        return maps


@hookimpl
def steps():
    return [Spin]
'''
TWO_STAGES = GOOD.replace(
    "    @hookimpl\n    def align",
    "    @hookimpl\n    def refine(self, maps):\n        return maps\n\n"
    "    @hookimpl\n    def align",
)
NO_STAGE = GOOD.replace("def align", "def prepare")
TABLE = '''"""Checkpoints of model type `tiny`.

More."""
from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder


@hookimpl
def adapters():
    return [rope_decoder(("tiny",))]
'''
WATCH = '''"""Watches.

Closely."""
from rotdistill_core import hookimpl


@hookimpl
def after_step(step_id, folder):
    raise SystemExit(f"{step_id} in {folder.name}\\nand more")
'''
VERB = '''"""Verbs."""
from rotdistill_core import hookimpl


def hop(times: int = 1) -> None:
    """Hop about."""
    print("hop " * times)


@hookimpl
def commands():
    return [hop]
'''
RECIPE = 'name = "t"\n[teacher]\nmodel = "a"\n[student]\nmodel = "b"\n[[step]]\nuse = "residuals"\n'

Install = Callable[..., str]


def write_recipe(tmp_path: Path, extra: str = "") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + extra, encoding="utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PluginError) as caught:
        call()
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_installed_step_is_found_with_its_origin(install: Install) -> None:
    module = install("acme-spin", "spin", GOOD)
    cls, origin = step_class("spin")
    assert cls.__name__ == "Spin"
    assert (origin.name, origin.distribution, origin.version, origin.target) == (
        "spin",
        "acme-spin",
        "1.0",
        module,
    )


def test_options_of_an_installed_step_are_keys_of_a_recipe(
    install: Install, tmp_path: Path
) -> None:
    install("acme-spin", "spin", GOOD)
    loaded = load_recipe(write_recipe(tmp_path, '[[step]]\nuse = "spin"\nturns = 3\n'))
    assert loaded.steps[1].step.turns == 3
    assert loaded.steps[1].stage == "align"
    with pytest.raises(RecipeError, match=r'turn: unknown key\. Did you mean "turns"'):
        load_recipe(write_recipe(tmp_path, '[[step]]\nuse = "spin"\nturn = 3\n'))


def test_one_name_in_two_distributions_names_both(install: Install, tmp_path: Path) -> None:
    install("acme-spin", "spin", GOOD)
    install("bolt-spin", "spin", GOOD)
    message = refusal(lambda: step_class("spin"))
    assert "acme-spin and bolt-spin" in message
    assert "uninstall" in message
    assert load_recipe(write_recipe(tmp_path))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
        ("import does_not_exist_anywhere", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_plugin_is_named_and_touches_no_other_recipe(
    install: Install, tmp_path: Path, source: str, reason: str
) -> None:
    install("acme-broken", "broken", source)
    message = refusal(lambda: step_class("broken"))
    assert 'plugin "broken" of acme-broken 1.0' in message
    assert reason in message
    assert load_recipe(write_recipe(tmp_path))
    assert "step.broken" not in recipe_schema()["$defs"]
    with pytest.raises(RecipeError, match="acme-broken"):
        load_recipe(write_recipe(tmp_path, '[[step]]\nuse = "broken"\n'))


@pytest.mark.parametrize(
    "body",
    ["raise SystemExit(3)", "raise RuntimeError", "return 3", "return [int]", "return [object()]"],
)
def test_a_plugin_that_fails_when_asked_for_its_steps_is_named(install: Install, body: str) -> None:
    install(
        "acme-late",
        "late",
        f"from rotdistill_core import hookimpl\n\n@hookimpl\ndef steps():\n    {body}\n",
    )
    assert "acme-late" in refusal(lambda: step_class("late"))


def test_options_that_cannot_be_validated_are_the_plugins_fault(
    install: Install, tmp_path: Path
) -> None:
    install("acme-spin", "spin", GOOD.replace("turns: int = 1", 'turns: "Nowhere" = 1'))
    with pytest.raises((RecipeError, PluginError), match="acme-spin"):
        load_recipe(write_recipe(tmp_path, '[[step]]\nuse = "spin"\n'))


def test_a_plugin_that_is_not_named_is_not_imported(install: Install, tmp_path: Path) -> None:
    module = install("acme-spin", "spin", GOOD)
    load_recipe(write_recipe(tmp_path))
    assert module not in sys.modules
    assert "spin" in installed_plugins(STEPS)
    assert module not in sys.modules
    load_recipe(write_recipe(tmp_path, '[[step]]\nuse = "spin"\n'))
    assert module in sys.modules


@pytest.mark.parametrize(("group", "name"), [(STEPS, "zzzzzz"), (ADAPTERS, "zzzzzz")])
def test_a_missing_plugin_says_what_to_install(group: str, name: str) -> None:
    assert "pip install 'rotdistill[all]'" in refusal(lambda: find_plugin(group, name))


def test_a_missing_default_observer_is_a_problem_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = registry.find_plugin

    def without_report(group: str, name: str) -> object:
        return find(group, "nowhere" if name == "report" else name)

    monkeypatch.setattr(registry, "find_plugin", without_report)
    with pytest.raises(RecipeError, match="observers: no observer"):
        load_recipe(write_recipe(tmp_path))


def test_an_observer_is_imported_when_a_recipe_names_it(install: Install, tmp_path: Path) -> None:
    module = install("acme-watch", "watch", WATCH, OBSERVERS)
    path = write_recipe(tmp_path)
    plain = load_recipe(path)
    assert module not in sys.modules
    path.write_text('observers = ["watch", "watch"]\n' + RECIPE, encoding="utf-8")
    watched = load_recipe(path)
    assert module in sys.modules
    assert watched.recipe.observers == ["watch", "watch"]
    assert watched.digest() == plain.digest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("after_step(", "after_stpe("), "unknown hook 'after_stpe'"),
        (("folder", "place"), "Argument(s) {'place'}"),
        (("import hookimpl", "import hookimp"), "ImportError"),
    ],
)
def test_a_broken_observer_is_a_problem_of_the_recipe(
    install: Install, tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    install("acme-watch", "watch", WATCH.replace(*change), OBSERVERS)
    path = write_recipe(tmp_path)
    path.write_text('observers = ["watch"]\n' + RECIPE, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert 'observers: plugin "watch" of acme-watch 1.0' in problem
    assert reason in problem


def test_an_unknown_step_gives_the_nearest_name() -> None:
    message = refusal(lambda: step_class("residual"))
    assert message == 'no step "residual" is installed. Did you mean "residuals"?'
    assert "Did you mean" not in refusal(lambda: step_class("zzzzzz"))


@pytest.mark.parametrize(
    ("source", "found"),
    [(TWO_STAGES, "['align', 'refine']"), (NO_STAGE, "none")],
    ids=["two", "none"],
)
def test_a_step_without_exactly_one_stage_hook_is_refused(
    install: Install, source: str, found: str
) -> None:
    install("acme-spin", "spin", source)
    message = refusal(lambda: step_class("spin"))
    assert "acme-spin" in message
    assert "exactly one of capture, align, refine, fold, style, evaluate" in message
    assert found in message


def test_a_step_without_use_is_refused(install: Install) -> None:
    install("acme-spin", "spin", GOOD.replace('use: Literal["spin"] = "spin"', "use: str"))
    assert "needs a field `use" in refusal(lambda: step_class("spin"))


def test_a_plugin_without_the_step_of_its_name_is_refused(install: Install) -> None:
    install("acme-spin", ["spin", "swirl"], GOOD)
    assert "offers no step of that name" in refusal(lambda: step_class("swirl"))


def test_a_table_is_found_by_model_type(install: Install) -> None:
    install("acme-tiny", "tiny", TABLE, ADAPTERS)
    table = adapter_for("tiny")
    assert isinstance(table, Adapter)
    assert table.model_types == ("tiny",)


def test_an_unknown_model_type_is_refused_not_guessed(install: Install) -> None:
    install("acme-tiny", ["tiny", "small"], TABLE, ADAPTERS)
    message = refusal(lambda: adapter_for("tinny"))
    assert message == 'no adapter for model type "tinny" is installed. Did you mean "tiny"?'
    assert 'no adapter for model type "small"' in refusal(lambda: adapter_for("small"))
    assert 'model type ""' in refusal(lambda: adapter_for(""))


def test_a_missing_adapter_says_how_to_get_one(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-tiny", "tiny", TABLE, ADAPTERS)
    assert refusal(lambda: adapter_for("stablelm")) == (
        'no adapter for model type "stablelm" is installed. `rotdistill new adapter stablelm` '
        "writes one, or says why no table can be written."
    )
    monkeypatch.setattr(registry, "_points", lambda _: [])
    assert refusal(lambda: adapter_for("smollm3")) == (
        f'no adapter for model type "smollm3" is installed. {registry.INSTALL_ALL}'
    )


def test_everything_lists_steps_adapters_and_broken_plugins(install: Install) -> None:
    install("acme-spin", "spin", GOOD)
    install("acme-tiny", "tiny", TABLE, ADAPTERS)
    install("acme-broken", "broken", "raise SystemExit(3)")
    install("acme-torn", "torn", "raise RuntimeError", ADAPTERS)
    install("acme-watch", "watch", WATCH, OBSERVERS)
    install("bolt-spin", "twice", GOOD)
    install("cord-spin", "twice", GOOD)
    listed = {(kind, origin.name): what for kind, origin, what in iter_plugins()}
    assert isinstance(listed["step", "spin"], type)
    assert listed["adapter", "tiny"] == "Checkpoints of model type `tiny`."
    assert "acme-broken" in str(listed["step", "broken"])
    assert "acme-torn" in str(listed["adapter", "torn"])
    assert "bolt-spin and cord-spin" in str(listed["step", "twice"])
    assert listed["observer", "watch"] == "Watches."
    assert ("step", "chop") in listed


def test_everything_lists_an_adapter_without_a_docstring(install: Install) -> None:
    install("acme-mute", "mute", TABLE[TABLE.index("from") :], ADAPTERS)
    assert ("adapter", "mute") in {(kind, origin.name) for kind, origin, _ in iter_plugins()}


def test_everything_lists_a_plugin_that_offers_no_steps(install: Install) -> None:
    install(
        "acme-odd",
        "odd",
        "from rotdistill_core import hookimpl\n\n@hookimpl\ndef steps():\n    return [int]\n",
    )
    assert ("step", "odd") in {(kind, origin.name) for kind, origin, _ in iter_plugins()}


def test_a_verb_is_found_listed_and_run(install: Install) -> None:
    install("acme-hop", "hop", VERB, COMMANDS)
    assert command_line("hop", "--times", "2") == (0, "hop hop \n", "")
    assert "Hop about." in command_line("--help")[1]
    assert ("verb", "hop") in {(kind, origin.name) for kind, origin, _ in iter_plugins()}
    code, _, err = command_line("hpo")
    assert (code, 'Did you mean "hop"?' in err) == (2, True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def (", "SyntaxError"),
        (VERB.replace("return [hop]", "return []"), 'offers no verb "hop"'),
        ("hop = 1", "no verb"),
    ],
)
def test_a_broken_verb_is_named_and_breaks_no_other(
    install: Install, source: str, reason: str
) -> None:
    install("acme-hop", "hop", source, COMMANDS)
    code, out, err = command_line("hop", "--anything", "else")
    assert (code, out) == (2, "")
    assert "acme-hop" in err
    assert reason in err
    assert command_line("check", "--help")[0] == 0
    code, out, _ = command_line("--help")
    assert (code, "Broken" in out) == (0, True)
    assert "acme-hop" in command_line("plugins")[1]


def test_one_verb_in_two_distributions_names_both(install: Install) -> None:
    install("acme-hop", "hop", VERB, COMMANDS)
    install("bolt-hop", "hop", VERB, COMMANDS)
    code, _, err = command_line("hop")
    assert (code, "acme-hop and bolt-hop" in err) == (2, True)


def test_a_verb_of_the_core_is_not_replaced(install: Install) -> None:
    install("acme-check", "check", VERB, COMMANDS)
    assert "hop" not in command_line("check", "--help")[1]


def test_what_is_installed_while_the_program_runs_is_found(
    install: Callable[..., str], tmp_path: Path
) -> None:
    install("acme-spin", "spin", "x = 1\n")
    assert "turn" not in installed_plugins(STEPS)
    info = tmp_path / "acme-spin" / "acme_turn-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-turn\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{STEPS}]\nturn = fake_acme_spin\n")
    assert "turn" in installed_plugins(STEPS)
