"""What is no plain file in a model folder is refused before anybody opens it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.headers import SHARD_INDEX, require_plain_files
from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_folder

FILES = (
    "config.json",
    "model.safetensors",
    SHARD_INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "adapter_config.json",
)
OBSTACLES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "looping link": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_folder(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=list(OBSTACLES))
def test_a_model_with_something_else_than_a_file_is_refused(
    tmp_path: Path, model: Path, name: str, obstacle: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    obstacle(folder / name)
    with pytest.raises(SetupError, match=re.escape(f"{folder / name}: cannot be read: ")):
        open_model(ModelRef(model=str(folder)))


def test_a_tokenizer_is_not_loaded_from_a_pipe(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "tool.jinja")
    with pytest.raises(SetupError, match=r"tool\.jinja: cannot be read: it is a named pipe"):
        load_tokenizer(folder)


def test_an_endless_tokenizer_is_refused_by_its_length(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    os.truncate(folder / "tokenizer.json", 2 << 30)  # a hole, which takes no room
    with pytest.raises(SetupError, match=r"tokenizer\.json: cannot be read: it is longer than"):
        require_plain_files(folder)


def test_links_to_files_and_what_nobody_opens_are_fine(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "original").mkdir()
    (folder / "LICENSE").symlink_to("nowhere")
    assert open_model(ModelRef(model=str(folder))).depth == 2
