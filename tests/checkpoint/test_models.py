"""Two references are one model when their files and configs are; fingerprints are cheap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.models import Model, Pair, load_tokenizer
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_model


def copy_of(model: Model, folder: Path) -> Path:
    shutil.copytree(model.folder, folder)
    return folder


def test_a_copy_is_the_same_model(llama: Model, tmp_path: Path) -> None:
    copy = open_model(ModelRef(model=str(copy_of(llama, tmp_path / "copy"))))
    assert (copy.sha256, copy.fingerprint) == (llama.sha256, llama.fingerprint)
    assert Pair(llama, copy).same
    assert Pair(llama, copy).one_tokenizer


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_another_byte_is_another_model(llama: Model, tmp_path: Path, file: str) -> None:
    folder = copy_of(llama, tmp_path / "copy")
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)
    copy = open_model(ModelRef(model=str(folder)))
    assert copy.sha256 != llama.sha256
    assert copy.fingerprint != llama.fingerprint
    assert not Pair(llama, copy).same


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [2, "x"], {"a": 1}, True, 2.0])
def test_end_tokens_are_ids_in_both_files(
    llama: Model, tmp_path: Path, file: str, value: object
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    with pytest.raises(SetupError, match=f"{file}: `eos_token_id` = .* is no token id"):
        open_model(ModelRef(model=str(folder)))


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("text", ["null", "[]", '"x"', '{"a":' * 50_000, "", "\x00"])
def test_a_document_of_a_tokenizer_that_is_no_object_is_refused(
    llama: Model, tmp_path: Path, file: str, text: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    (folder / file).write_text(text)
    with pytest.raises(SetupError, match=file):
        open_model(ModelRef(model=str(folder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("model_max_length", value) for value in ("512", [512], {"n": 1}, True)),
        *(("padding_side", value) for value in ("evil", 1, None, ["left"])),
        ("truncation_side", "up"),
    ],
)
def test_a_setting_of_a_tokenizer_that_it_cannot_have_is_refused(
    llama: Model, tmp_path: Path, key: str, value: object
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(SetupError, match=f"tokenizer_config.json: `{key}` = "):
        open_model(ModelRef(model=str(folder)))


@pytest.mark.parametrize("number", ["\x1b]0;x\x07", "7", 1.5, -1, True, None, [3]])
def test_an_added_token_without_an_id_is_refused(
    llama: Model, tmp_path: Path, number: object
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": number}))
    with pytest.raises(SetupError, match=r"added_tokens.json: the token '<tool>' has the id"):
        open_model(ModelRef(model=str(folder)))


@pytest.mark.parametrize("value", [None, 512, 1e30])
def test_a_longest_text_may_have_no_end(llama: Model, tmp_path: Path, value: object) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama.folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    assert open_model(ModelRef(model=str(folder))).tokenizer.eos_token_id is not None


def test_teacher_depth_is_the_same_relative_depth(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", num_hidden_layers=6)
    pair = Pair(teacher, pico_model(tmp_path / "student", num_hidden_layers=2))
    assert [pair.teacher_depth(boundary) for boundary in range(3)] == [0, 3, 6]


def test_an_anchor_takes_the_teachers_place_in_alignment(llama: Model, tmp_path: Path) -> None:
    anchor = pico_model(tmp_path / "anchor", seed=2)
    teacher = pico_model(tmp_path / "teacher", seed=3)
    assert Pair(teacher, llama, anchor).for_alignment == Pair(anchor, llama)
    assert Pair(teacher, llama).for_alignment == Pair(teacher, llama)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"{tmp_path}: its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
