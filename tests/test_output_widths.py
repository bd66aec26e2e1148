"""Output into a pipe, at any COLUMNS: no escape sequence, no line too wide, the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from rotdistill_core.plugin.registry import COMMANDS, installed_plugins
from rotdistill_core.testing import PicoWorkspace, command_line

WIDTHS = (40, 80, 140)
SCRIPTS = ("مرحبا-تجربة", "שלום", "模型蒸馏", "👩\u200d💻🧪")
STEPS = """
[[step]]
use = "chop"
layers = 1

[[step]]
use = "residuals"

[[step]]
id = "a-head-with-a-long-name"
use = "lm-head-ridge"

[[step]]
use = "fidelity"

[variants]
base = []
full = ["a-head-with-a-long-name"]
"""
VERBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "plan": (0, ("plan", "trial.toml")),
    "plan, cluster": (0, ("plan", "trial.toml", "--nodes", "2", "--gpus", "8", "--gpu", "h100")),
    "plan, short": (0, ("plan", "trial.toml", "--short")),
    "plan, no texts": (
        2,
        ("plan", "trial.toml", "--set", "samples.index=蒸.tsv"),
    ),
    "check a recipe": (0, ("check", "trial.toml")),
    "check, an unknown step": (2, ("check", "trial.toml", "--set", "头.layers=2")),
    "check a run": (0, ("check", "trial")),
    "run again": (0, ("run", "trial.toml")),
    "runs": (0, ("runs",)),
    "show": (0, ("show", "trial")),
    "show nothing": (2, ("show", "👩\u200d💻🧪")),
    "diff": (0, ("diff", "trial", "trial")),
    "report": (0, ("report", "trial")),
    "chat": (0, ("chat", "trial", "--prompt", "东京 在哪里?", "--tokens", "4")),
    "rm without --yes": (2, ("rm", "trial")),
    "plugins": (0, ("plugins",)),
    "new step": (0, ("new", "step", "name", "--in", "NEW")),
}
"""What is tried -> exit code and words. No verb changes what another one sees."""
WITH_TABLES = {"plan", "plan, cluster", "run again", "runs", "show"}
SLOW = ("check a run", "run again", "report", "chat")
CORE_VERBS = ("run",)
BORDERS = "│┃┏┡└"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the current folder: a run of a recipe whose texts are in many scripts."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("work"))
    texts = workspace.texts(blurbs=12, questions=3)["index.tsv"]
    header, *lines = texts.read_text(encoding="utf-8").splitlines()
    for number, script in enumerate(SCRIPTS):
        _, rest = lines[number].split("\t", 1)
        lines[number] = f"{script}\t{rest} {script}"
    content = "\n".join([header, *lines, ""])
    texts.with_stem(SCRIPTS[0]).write_text(content, encoding="utf-8")
    model = workspace.model(SCRIPTS[2], num_hidden_layers=2)
    path = workspace.recipe(STEPS, teacher=model, student=model, observers=["report"])
    recipe = path.read_text(encoding="utf-8")
    assert "texts/index.tsv" in recipe
    recipe = recipe.replace("texts/index.tsv", f"texts/{SCRIPTS[0]}.tsv")
    path.write_text(recipe, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.folder)
        code, _, err = command_line("run", "trial.toml")
        assert code == 0, err
        yield workspace.folder


def check_plain(out: str, err: str) -> None:
    """Check that nothing steers a terminal, and that no error is a traceback."""
    assert "\x1b" not in out + err
    assert "Traceback" not in out + err


def check_width(lines: Iterable[str], width: int) -> None:
    """Check that lines fit; a word alone may be wider, since it is not broken."""
    for line in lines:
        fits = cell_len(line) <= width or len(line.split()) == 1
        assert fits, f"{cell_len(line)} columns of {width}: {line}"


def table_lines(out: str) -> list[str]:
    """Return the lines of tables, and of lists that stand for them; sentences are not wrapped."""
    return [line for line in out.splitlines() if line[:1] in BORDERS or line[:1] == " "]


def check_verb(name: str, width: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Call a verb in this process, where stdout and stderr are pipes."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    expected, words = VERBS[name]
    code, out, err = command_line(*(str(folder) if word == "NEW" else word for word in words))
    assert code == expected, err
    check_plain(out, err)
    assert out or err
    check_width(table_lines(out), width)
    assert bool(table_lines(out)) is (name in WITH_TABLES)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [name for name in VERBS if name not in SLOW])
def test_what_a_verb_prints_fits(
    work: Path, name: str, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_verb(name, width, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_a_slow_verb_prints_fits(
    work: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_verb(name, 40, monkeypatch, tmp_path)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verb", ["", *CORE_VERBS, *sorted(installed_plugins(COMMANDS))])
def test_help_fits(verb: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = command_line(*filter(None, [verb, "--help"]))
    assert (code, err) == (0, "")
    check_plain(out, err)
    check_width(out.splitlines(), width)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_process_prints_the_same_into_a_pipe(work: Path, width: int) -> None:
    environment = {**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "rotdistill_core", "show", "trial"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=work, check=False
    )
    assert done.returncode == 0, done.stderr
    check_plain(done.stdout, done.stderr)
    assert table_lines(done.stdout)
    check_width(table_lines(done.stdout), width)
