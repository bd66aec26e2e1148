"""Vocabularies of two folders, compared from their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rotdistill_core.data.vocabularies import one_vocabulary, require_one_vocabulary
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import pico_tokenizer


def pair(*folders: Path) -> Any:
    """Return what is asked of a pair: teacher and student."""
    teacher, student = (
        SimpleNamespace(folder=folder, ref=SimpleNamespace(model=folder.name)) for folder in folders
    )
    return SimpleNamespace(teacher=teacher, student=student)


def saved(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Save a tokenizer whose tokenizer.json is changed."""
    pico_tokenizer(64).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    if change:
        change(content)
    path.write_text(json.dumps(content))
    return folder


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]


def add(content: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 64, "content": "<new>", "special": True, **flags})


def test_equal_files_are_one_vocabulary(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one_vocabulary(one, one)
    assert one_vocabulary(one, two)
    require_one_vocabulary(pair(one, two))


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        (swap, 2),
        (lambda content: content["model"]["vocab"].pop("w5"), 0),
        (lambda content: content["model"]["vocab"].update(w5=99), 1),
    ],
)
def test_other_ids_are_another_vocabulary(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], differ: int
) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", change)
    assert not one_vocabulary(one, two)
    with pytest.raises(SetupError, match=f"one and two have different tokenizers: {differ} of 6"):
        require_one_vocabulary(pair(one, two))
    with pytest.raises(SetupError, match="two and one have different tokenizers"):
        require_one_vocabulary(pair(two, one))


def test_tokens_that_other_files_may_add_are_not_refused(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", add)
    assert not one_vocabulary(one, two)
    require_one_vocabulary(pair(one, two))
    require_one_vocabulary(pair(two, one))


def test_what_is_in_no_file_is_left_to_the_run(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", swap)
    (two / "tokenizer.json").unlink()
    require_one_vocabulary(pair(one, two))
