"""Every verb explains itself and ends its help with two examples, which run."""

from __future__ import annotations

import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Column
from typer.main import get_command

from rotdistill_core.cli import app
from rotdistill_core.plugin.registry import COMMANDS, command_function, installed_plugins
from rotdistill_core.terminal import WideTable
from rotdistill_core.testing import PicoWorkspace, command_line

STEPS = """
variants = { base = [], full = ["basis", "fold"] }
step = [
    { use = "chop", layers = 23 },
    { use = "residuals" },
    { id = "basis", use = "ALIGNER" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""
CORE_VERBS = {
    info.name or info.callback.__name__: info.callback
    for info in app.registered_commands
    if info.callback
}
VERBS = {**CORE_VERBS, **{name: command_function(name) for name in installed_plugins(COMMANDS)}}
DESIGNED = {
    "run",
    "plan",
    "check",
    "runs",
    "show",
    "diff",
    "rm",
    "report",
    "chat",
    "plugins",
    "schema",
    "new",
}


class Keyboard(io.StringIO):
    """A terminal to type on."""

    def isatty(self) -> bool:
        return True


def examples(verb: str) -> list[str]:
    """Return the examples of a verb's help."""
    _, heading, text = (inspect.getdoc(VERBS[verb]) or "").partition("\nExamples:\n")
    assert heading, f"{verb} has no examples"
    return [line.strip() for line in text.splitlines() if line.strip()]


def carry_out(line: str, folder: Path) -> None:
    """Carry out a line as a shell would: pipes are left out, patterns expanded."""
    words = shlex.split(line.partition(" > ")[0].partition(" | ")[0])[1:]
    expanded = [str(p) for w in words for p in (sorted(folder.glob(w)) if "*" in w else [w])]
    code, out, err = command_line(*expanded)
    assert code == 0, (line, err)
    assert out or err


def test_the_verbs_are_those_of_the_design() -> None:
    assert set(VERBS) == DESIGNED
    assert list(get_command(app).list_commands(None)) == list(VERBS)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_two_or_three_examples(verb: str) -> None:
    code, out, err = command_line(verb, "--help")
    assert (code, err) == (0, "")
    lines = examples(verb)
    assert len(lines) in (2, 3)
    assert all(line.startswith(f"rotdistill {verb}") for line in lines)
    assert all(line.split(" --")[0].split(' "')[0] in out for line in lines)


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_table_loses_nothing_on_a_narrow_terminal(width: int) -> None:
    rows = [
        [
            "tour-guide",
            "0.5896",
            "106,200,000",
            "made before, from these texts",
            "-3.645 [-4.138, -3.184]",
        ]
        for _ in range(2)
    ]
    table = WideTable(
        "run",
        "held-out KL,\nnats/token",
        "parameters",
        Column("why", overflow="fold"),
        "change",
        title="a table",
    )
    for row in rows:
        table.add_row(*row)
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    for cell in ("tour-guide", "0.5896", "106,200,000", "-3.645 [-4.138, -3.184]"):
        assert sum(cell in line for line in lines) >= 2, cell
    assert {"made", "before,", "from", "these", "texts"} <= {
        word for line in lines for word in line.split()
    }


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Keyboard("y\n" * 4))
    PicoWorkspace(tmp_path).model(num_hidden_layers=25, hidden_size=16, intermediate_size=24)
    for size in ("big", "small"):  # those of `new recipe`
        PicoWorkspace(tmp_path / "models").model(size)
    (tmp_path / "texts").mkdir()
    rows = [json.dumps({"question": f"w{k} w4", "answer": f"w5 w{k}"}) for k in range(30)]
    (tmp_path / "texts" / "faq.jsonl").write_text("\n".join(rows))
    recipes = PicoWorkspace(tmp_path / "recipes")
    recipes.texts(blurbs=8, questions=2)
    for name, aligner in (("tour-guide", "procrustes"), ("swap-aligner", "random-rotation")):
        recipe = recipes.recipe(STEPS.replace("ALIGNER", aligner), name=name)
        recipe.rename(recipe.with_stem(name.replace("-", "_")))
    assert command_line("run", "recipes/swap_aligner.toml")[0] == 0
    ordered = ["run", *(verb for verb in VERBS if verb not in ("run", "rm")), "rm"]
    for line in [line for verb in ordered for line in examples(verb)]:
        # With another number of layers `tour-guide` would be the name of two runs: those come last.
        if "layers=24" not in line and "keep-checkpoints" not in line:
            carry_out(line, tmp_path)
    assert not list((tmp_path / "runs").glob("tour-guide-*/checkpoints"))
    carry_out("rotdistill plan recipes/tour_guide.toml --set chop.layers=24 --json", tmp_path)
    carry_out("rotdistill run recipes/tour_guide.toml --set chop.layers=24", tmp_path)
    carry_out("rotdistill rm tour-guide --keep-checkpoints", tmp_path)
    assert list((tmp_path / "runs").glob("tour-guide-*/checkpoints/full/model.safetensors"))


def test_the_version_names_what_an_issue_should() -> None:
    code, out, err = command_line("--version")
    assert (code, err) == (0, "")
    releases = {name: version(name) for name in ("rotdistill", "torch", "transformers")}
    assert all(f"{name} {release}" in out for name, release in releases.items())
    command = [sys.executable, "-X", "importtime", "-m", "rotdistill_core", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == out
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE), "torch was loaded"


def test_the_package_runs_as_a_module() -> None:
    """Launchers such as torchrun start a module."""
    command = [sys.executable, "-m", "rotdistill_core", "run", "gone.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error gone.toml: cannot be read")


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from rotdistill_core.cli import app; sys.argv[1:] = ['run', '--help']\n"
        "app(standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--no-plan" in done.stdout


def test_a_signal_inside_a_destructor_still_ends_the_program() -> None:
    program = """
import os, signal, sys, time
from rotdistill_core import cli

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # arrives here, where exceptions are ignored
        for _ in range(1000):
            pass

def app(*_, **__):
    Slow()
    time.sleep(20)

cli.app = app
sys.argv = ["rotdistill", "runs"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=15, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "Go on with" in done.stderr
    assert "Traceback" not in done.stderr
