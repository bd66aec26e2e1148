"""Nothing that comes from files or arguments steers the terminal: it is printed as escapes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.live import Live
from rich.text import Text
from safetensors.torch import save_file

from rotdistill_core.characters import visible
from rotdistill_core.terminal import (
    ProgressDisplay,
    VisibleConsole,
    WideTable,
    literal,
    print_json,
    print_line,
)
from rotdistill_core.testing import PicoWorkspace, command_line

OSC = "\x1b]0;pwned\x07"
"""Renames the window of a terminal."""
ATTACKS = {
    "window title": OSC,
    "clear": "\x1b[2J\x1b[H",
    "8-bit CSI": "\x9b2J",
    "carriage return": "fine\rerror",
    "backspace": "bad\b\b\bgood",
    "order": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "no character": "\udcff",
}
STEPS = '[[step]]\nuse = "chop"\nlayers = 1\n\n[[step]]\nuse = "fidelity"\n'


@pytest.fixture
def work(pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a recipe, its texts and its model."""
    pico_workspace.recipe(STEPS)
    monkeypatch.chdir(pico_workspace.folder)
    return pico_workspace.folder


def printed(*words: str) -> str:
    """Return all that a command line prints, which has to be visible; it ends with an error."""
    code, out, err = command_line(*words)
    assert code in (2, 3), err
    assert "should not happen" not in err
    assert visible(out + err) == out + err
    return out + err


WORDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "recipe": lambda text: ("plan", f"{text}.toml"),
    "run": lambda text: ("show", text),
    "verb": lambda text: (text,),
    "option": lambda text: ("plan", "trial.toml", f"--{text}"),
    "value of an option": lambda text: ("chat", "trial", "--tokens", text),
    "superfluous": lambda text: ("plan", "trial.toml", text),
    "set": lambda text: ("check", "trial.toml", "--set", text),
    "set step": lambda text: ("check", "trial.toml", "--set", f"{text}.layers=1"),
    "set value": lambda text: ("check", "trial.toml", "--set", f"chop.layers={text}"),
    "model": lambda text: ("plan", "trial.toml", "--set", f"teacher.model={text}"),
    "scheme": lambda text: ("plan", "trial.toml", "--set", f"teacher.model=x:{text}"),
    "texts": lambda text: ("plan", "trial.toml", "--set", f"samples.index={text}"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_arguments_are_shown_as_escapes(
    work: Path, words: Callable[[str], tuple[str, ...]], attack: str
) -> None:
    printed(*words(attack))


def recipe_with(old: str, new: str) -> Callable[[Path], None]:
    def edit(work: Path) -> None:
        path = work / "trial.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def text_table(content: str) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        path = work / "texts" / "index.tsv"
        path.write_text(path.read_text() + content, encoding="utf-8")

    return write


def tensor_name(work: Path) -> None:
    save_file({f"model.{OSC}": torch.zeros(2)}, work / "model" / "more.safetensors")


def index_of_shards(work: Path) -> None:
    index = {"weight_map": {"a": f"{OSC}.safetensors"}}
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def config(key: str, value: object) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        path = work / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return write


FILES: dict[str, Callable[[Path], None]] = {
    "step id": recipe_with('use = "chop"', 'use = "chop"\nid = "\\u001b]0;pwned\\u0007"'),
    "method": recipe_with('use = "chop"', 'use = "\\u001b]0;pwned\\u0007"'),
    "key": recipe_with("layers = 1", '"\\u001b]0;pwned\\u0007" = 1'),
    "value": recipe_with("layers = 1", 'layers = "\\u001b]0;pwned\\u0007"'),
    "extends": recipe_with("name =", 'extends = "\\u001b]0;pwned\\u0007.toml"\nname ='),
    "no TOML": recipe_with("name =", "\x1b]0;pwned\x07 ="),
    "text id": text_table(f"{OSC}\ten\tp\tc\tq\tb\n" * 2),
    "language": text_table(f"t-9\t{OSC}\tp\tc\tq\tb\n"),
    "columns": text_table(f"{OSC}\n"),
    "tensor name": tensor_name,
    "shard": index_of_shards,
    "model type": config("model_type", OSC),
    "config value": config("num_hidden_layers", OSC),
}


@pytest.mark.parametrize("spoil", FILES.values(), ids=list(FILES))
def test_contents_of_files_are_shown_as_escapes(work: Path, spoil: Callable[[Path], None]) -> None:
    spoil(work)
    printed("plan", "trial.toml")


def test_the_name_of_a_folder_is_shown_as_an_escape(work: Path) -> None:
    (work / "model").rename(work / f"model{OSC}")
    (work / f"model{OSC}" / "config.json").unlink()
    recipe_with('"model"', '"model\\u001b]0;pwned\\u0007"')(work)
    assert "model\\x1b]0;pwned\\x07" in printed("plan", "trial.toml")


def test_a_traceback_is_shown_as_escapes(work: Path) -> None:
    assert "Traceback" in printed("-v", "plan", f"{OSC}.toml")


def test_libraries_warn_and_log_in_escapes(work: Path) -> None:
    program = (
        "import logging, sys, warnings\n"
        "from rotdistill_core import cli\n"
        "def talk(*_, **__):\n"
        "    warnings.warn('a \\x1b]0;pwned\\x07')\n"
        "    logging.getLogger('transformers').warning('b %s', '\\x1b]0;pwned\\x07')\n"
        "cli.app = talk\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("\\x1b]0;pwned\\x07") >= 2
    assert visible(done.stderr) == done.stderr


def live_text(console: VisibleConsole) -> None:
    with Live(Text(OSC), console=console):
        pass


def progress(console: VisibleConsole) -> None:
    display = ProgressDisplay(console)
    display.before_step(OSC, OSC)
    display.progress(1, 2, OSC)
    display.log(OSC)
    display.after_step(OSC, OSC, 1.0, True)
    display.variant_saved(OSC, Path(OSC))
    display.stop()


def table(console: VisibleConsole) -> None:
    cells = WideTable(OSC, literal(OSC), title=OSC)
    cells.add_row(OSC, literal(OSC))
    console.print(cells)


@pytest.mark.parametrize("show", [live_text, progress, table])
def test_only_the_console_itself_steers_the_terminal(
    show: Callable[[VisibleConsole], None],
) -> None:
    output = io.StringIO()
    show(VisibleConsole(file=output, force_terminal=True, width=120, color_system=None))
    assert "pwned" in output.getvalue()
    assert "\x1b]" not in output.getvalue()
    assert "\x07" not in output.getvalue()


def test_a_table_is_as_wide_as_what_it_shows() -> None:
    output = io.StringIO()
    cells = WideTable("id", "n")
    cells.add_row(literal(OSC), "1")
    cells.add_row("plain", "2")
    VisibleConsole(file=output, width=80).print(cells)
    assert len({len(line) for line in output.getvalue().splitlines()}) == 1
    assert visible(OSC) in output.getvalue()


def test_results_for_other_programs_are_visible_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(f"[bold] {OSC}")
    print_json({"id": OSC, "blurb": "中"})
    line, document = capsys.readouterr().out.splitlines()
    assert line == "[bold] \\x1b]0;pwned\\x07"
    assert document == '{"id": "\\u001b]0;pwned\\u0007", "blurb": "中"}'


PRINTS = re.compile(
    r"(?<![\w.])print\(|(?<!Visible)\bConsole\(|rich\.markup|\becho\(|sys\.std(?:out|err)\.write"
    r"|rich\.print|traceback\.print"
)
MAY_PRINT = {
    "rotdistill_core/terminal.py",
    # They answer their parent process.
    "rotdistill_report/rotation_sanity.py",
    "data/_rendering.py",
    "planning/measure.py",
    # The example of a model card prints.
    "rotdistill_report/_card.py",
}


def test_nothing_is_printed_anywhere_else() -> None:
    root = Path(__file__).parents[1]
    modules = [*root.glob("rotdistill_core/**/*.py"), *root.glob("plugins/*/src/**/*.py")]
    assert len(modules) > 100
    found = {
        f"{path.parent.name}/{path.name}"
        for path in modules
        if PRINTS.search(path.read_text(encoding="utf-8"))
    }
    assert found == MAY_PRINT


def test_the_terminal_of_a_real_process_is_safe(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rotdistill_core", "plan", b"\xff\x1b]0;pwned\x07.toml"],
        capture_output=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 2
    assert b"\\udcff\\x1b]0;pwned\\x07.toml" in done.stderr
    assert b"\x1b" not in done.stderr
