"""Whatever stands in the place of a file, a verb ends at once and names it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from rotdistill_core.testing import PicoWorkspace, command_line

STEPS = """
variants = { base = [], full = ["chop"] }
step = [{ use = "residuals" }, { use = "chop", layers = 1 }, { use = "fidelity" }]
"""
SECONDS = 30
"""After so long a verb waits for ever."""

Obstacle = Callable[[Path], object]
OBSTACLES: dict[str, Obstacle] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "looping link": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """End a test that waits for ever."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, texts, a recipe, and its finished run."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("files"))
    workspace.texts()
    workspace.model("model")
    workspace.recipe(STEPS, teacher="model", student="model")
    with contextlib.chdir(workspace.folder):
        code, _, err = command_line("run", "trial.toml", "--no-plan")
    assert code == 0, err
    return workspace.folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: a copy of the finished one without its run."""
    shutil.copytree(finished, tmp_path / "work", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def put(path: Path, obstacle: Obstacle) -> None:
    path.unlink(missing_ok=True)
    obstacle(path)


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("trial.toml", 2),
        ("texts/index.tsv", 2),
        ("texts/heldout.tsv", 2),
        ("texts/style.md", 2),
        ("model/config.json", 3),
        ("model/model.safetensors", 3),
        ("model/model.safetensors.index.json", 3),
        ("model/tokenizer.json", 3),
        ("model/tokenizer_config.json", 3),
        ("model/generation_config.json", 3),
        ("model/adapter_config.json", 3),
    ],
)
def test_what_is_no_file_is_named(work: Path, name: str, code: int, obstacle: Obstacle) -> None:
    put(work / name, obstacle)
    for verb in ("plan", "run"):
        found, _, err = command_line(verb, "trial.toml")
        assert found == code, err
        assert Path(name).name in err
        assert "should not happen" not in err
    assert not list(work.glob("runs/*/checkpoints"))


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
def test_a_recipe_that_is_extended_has_to_be_a_file(work: Path, obstacle: Obstacle) -> None:
    put(work / "parent.toml", obstacle)
    (work / "child.toml").write_text('extends = "parent.toml"\n')
    found, _, err = command_line("check", "child.toml")
    assert found == 2, err
    assert "parent.toml: cannot be read" in err


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
def test_a_gguf_file_has_to_be_a_file(work: Path, obstacle: Obstacle) -> None:
    put(work / "model.gguf", obstacle)
    found, _, err = command_line("plan", "trial.toml", "--set", "teacher.model=model.gguf")
    assert found == 3, err
    assert "model.gguf" in err


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
def test_another_system_prompt_has_to_be_a_file(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, obstacle: Obstacle
) -> None:
    monkeypatch.chdir(finished)
    put(tmp_path / "other.md", obstacle)
    found, _, err = command_line(
        "chat", "trial", "--prompt", "x", "--system", str(tmp_path / "other.md")
    )
    assert found == 2, err
    assert "other.md: the system prompt cannot be read" in err


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
@pytest.mark.parametrize(
    "name", ["ledger.jsonl", "results.jsonl", "recipe.resolved.json", "system.md", "recipe.toml"]
)
def test_a_run_with_something_else_in_it_stops_no_verb(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, obstacle: Obstacle
) -> None:
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    (run,) = (tmp_path / "work" / "runs").iterdir()
    put(run / name, obstacle)
    for words in (("runs",), ("show", run.name), ("check", str(run)), ("diff", run.name, run.name)):
        found, _, err = command_line(*words)
        assert found in (0, 2, 3, 4), (words, err)
        assert "should not happen" not in err
