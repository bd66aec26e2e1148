"""Torn, foreign or unsafe checkpoint folders are refused from headers alone, by the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rotdistill_core.checkpoint.headers import (
    MOST_TENSORS,
    SHARD_INDEX,
    Header,
    folder_headers,
    read_config,
    read_header,
    shard_files,
)
from rotdistill_core.errors import SetupError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def item(shape: list[Any], start: object, stop: object, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def save(folder: Path, file: str, *names: str) -> Path:
    save_file({name: torch.ones(2, 3) for name in names}, folder / file, {"format": "pt"})
    return folder / file


def write_index(folder: Path, weight_map: object) -> None:
    (folder / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(path: Path, call: Callable[[Path], object]) -> str:
    with pytest.raises(SetupError) as caught:
        call(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_whole_file_is_read_without_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {
            "m": torch.zeros(2, 3, dtype=torch.bfloat16),
            "s": torch.tensor(1.0),
            "e": torch.zeros(0, 4),
        },
        path,
        {"a": "b"},
    )
    assert read_header(path) == {
        "m": Header(path, "bfloat16", (2, 3), 12),
        "s": Header(path, "float32", (), 4),
        "e": Header(path, "float32", (0, 4), 0),
    }


@pytest.mark.parametrize("missing", [1, 8, 24])
def test_a_torn_file_is_refused(tmp_path: Path, missing: int) -> None:
    path = save(tmp_path, "a.safetensors", "x")
    path.write_bytes(path.read_bytes()[:-missing])
    assert "torn" in refusal(path, read_header)


@pytest.mark.parametrize("kept", [0, 5, 8, 9, 30])
def test_a_file_torn_inside_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    path = save(tmp_path, "a.safetensors", "x")
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a valid safetensors file" in refusal(path, read_header)


def test_an_extended_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "a.safetensors", "x")
    path.write_bytes(path.read_bytes() + b"\0")
    assert "extended" in refusal(path, read_header)


@pytest.mark.parametrize("length", [0, 1, 1000, 2**40, 2**64 - 1])
def test_an_impossible_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "a.safetensors", {}, b"", length)
    assert "not a valid safetensors file" in refusal(path, read_header)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe",
        b"[" * 20_000,
        b"[]",
        b"17",
        b"null",
        b'"text"',
        b'{"x": 3}',
        b'{"x": []}',
        b'{"x": {}}',
    ],
    ids=[
        "broken",
        "bytes",
        "deep",
        "list",
        "number",
        "null",
        "string",
        "number inside",
        "list inside",
        "empty inside",
    ],
)
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path: Path, header: bytes) -> None:
    assert "not a valid safetensors file" in refusal(
        write_raw(tmp_path / "a.safetensors", header), read_header
    )


IMPOSSIBLE = {
    "too few bytes": item([2, 2], 0, 12),
    "a gap before it": item([2, 2], 4, 16),
    "an end before the start": item([2, 2], 16, 0),
    "a negative start": item([2, 2], -16, 0),
    "offsets as text": item([2, 2], "0", "16"),
    "a size as text": item(["2", 2], 0, 16),
    "negative sizes": item([-2, -2], 0, 16),
    "a fractional size": item([2.0, 2], 0, 16),
    "a nested shape": item([[2, 2]], 0, 16),
    "one offset": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
    "no shape": {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
}


@pytest.mark.parametrize("entry", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_impossible_shapes_and_offsets_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"x": entry}, bytes(16))
    assert "not a valid safetensors file" in refusal(path, read_header)


@pytest.mark.parametrize(
    "second", [item([2], 0, 8), item([2], 4, 12), item([1], 12, 16)], ids=["same", "part", "gap"]
)
def test_tensors_that_overlap_or_leave_a_gap_are_refused(
    tmp_path: Path, second: dict[str, Any]
) -> None:
    path = write_raw(
        tmp_path / "a.safetensors",
        {"x": item([2], 0, 8), "y": second},
        bytes(second["data_offsets"][1]),
    )
    refusal(path, read_header)


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E4M3", "F4", "nonsense"])
def test_a_quantised_dtype_is_refused(tmp_path: Path, dtype: str) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"x": item([4], 0, 4, dtype)}, bytes(4))
    assert "a.safetensors: " in refusal(path, read_header)


def test_a_file_of_very_many_tensors_is_refused_in_a_moment(tmp_path: Path) -> None:
    many = {f"x{k}": item([0], 0, 0) for k in range(MOST_TENSORS + 1)}
    path = write_raw(tmp_path / "a.safetensors", many)
    assert f"holds {MOST_TENSORS + 1} tensors" in refusal(path, read_header)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere.safetensors", read_header)


def test_a_sharded_folder_is_read_by_its_index(tmp_path: Path) -> None:
    one, two = save(tmp_path, "m-1.safetensors", "a"), save(tmp_path, "m-2.safetensors", "b", "c")
    save(tmp_path, "stray.safetensors", "z")
    write_index(tmp_path, {"c": "m-2.safetensors", "a": "m-1.safetensors", "b": "m-2.safetensors"})
    assert shard_files(tmp_path) == [one, two]
    assert set(folder_headers(tmp_path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "sub/in.safetensors", "..", "", "gone.safetensors"],
)
def test_a_shard_outside_the_folder_or_missing_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save(tmp_path, "out.safetensors", "a")
    save(folder / "sub", "in.safetensors", "a")
    write_index(folder, {"a": name})
    assert f'names the shard "{name}", which is not a file of this folder' in refusal(
        folder, shard_files
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": [], "b": "x"}}',
    ],
)
def test_a_broken_shard_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SHARD_INDEX).write_text(text)
    refusal(tmp_path / SHARD_INDEX, lambda path: shard_files(path.parent))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"b": "m-1.safetensors"}, "b is in m-1.safetensors according to the index, and in m-2."),
        ({"a": "m-2.safetensors"}, "a is in m-2.safetensors according to the index, and in none"),
        ({"c": None}, "c is in no shard according to the index, and in m-2.safetensors of its"),
        ({"d": "m-1.safetensors"}, "d is in m-1.safetensors according to the index, and in none"),
    ],
)
def test_an_index_that_differs_from_its_shards_is_refused(
    tmp_path: Path, changes: dict[str, str | None], says: str
) -> None:
    save(tmp_path, "m-1.safetensors", "a")
    save(tmp_path, "m-2.safetensors", "b", "c")
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors", **changes}
    write_index(tmp_path, {name: shard for name, shard in weight_map.items() if shard})
    refused = refusal(tmp_path / SHARD_INDEX, lambda path: folder_headers(path.parent))
    assert f"the tensor {says}" in refused


@pytest.mark.parametrize(
    "buffer",
    [
        "layers.0.rotary_emb.inv_freq",
        "layers.0.self_attn.rotary_emb.cos_cached",
        "layers.0.self_attn.rotary_emb.sin_cached",
        "layers.0.self_attn.masked_bias",
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_an_index_may_leave_out_buffers_of_old_checkpoints(
    tmp_path: Path, buffer: str, listed: bool
) -> None:
    save(tmp_path, "m-1.safetensors", "a", *([] if listed else [buffer]))
    names = ["a", *([buffer] if listed else [])]
    write_index(tmp_path, dict.fromkeys(names, "m-1.safetensors"))
    assert set(folder_headers(tmp_path)) == {"a"}


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "m-1.safetensors", "a", "b")
    save(tmp_path, "m-2.safetensors", "b", "c")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})
    assert "m-2.safetensors: tensor b is also in m-1.safetensors" in refusal(
        tmp_path, folder_headers
    )


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "has no .safetensors weights" in refusal(tmp_path, shard_files)


TWO_READINGS = {
    "an index of other shards": ("model.safetensors", "a.safetensors", SHARD_INDEX),
    "a pickle": ("other.safetensors", "pytorch_model.bin"),
    "a pickle in parts": ("other.safetensors", "pytorch_model.bin.index.json"),
    "two files": ("one.safetensors", "two.safetensors"),
    "parts without an index": (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
    "an adapter": ("model.safetensors", "adapter_config.json"),
    "a distributed checkpoint": (
        "model.safetensors",
        "shard-00000-model-00001-of-00001.safetensors",
    ),
}


@pytest.mark.parametrize("files", TWO_READINGS.values(), ids=list(TWO_READINGS))
def test_a_folder_that_can_be_read_in_two_ways_is_refused_by_file(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    put(tmp_path, *files)
    message = refusal(tmp_path, shard_files)
    assert files[-1] in message


ONE_READING = {
    "an index whose files are gone": ("model.safetensors", SHARD_INDEX),
    "a pickle beside": ("model.safetensors", "pytorch_model.bin", "training_args.bin"),
    "another layout": ("model.safetensors", "consolidated.safetensors"),
    "an adapter's weights": ("model.safetensors", "adapter_model.safetensors"),
    "a variant": ("model.safetensors", "model.fp16.safetensors"),
}


@pytest.mark.parametrize("files", ONE_READING.values(), ids=list(ONE_READING))
def test_files_that_transformers_ignores_are_ignored(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    put(tmp_path, *files)
    assert shard_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("name", ["x" * 300, "ä" * 200, "x" * 5000, "loop"])
def test_a_shard_that_no_file_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write_index(tmp_path, {"a": name})
    refusal(tmp_path / SHARD_INDEX, lambda path: shard_files(path.parent))
    whole = save(tmp_path, "model.safetensors", "a")
    assert shard_files(tmp_path) == [whole]


def test_the_index_of_the_whole_file_is_no_second_reading(tmp_path: Path) -> None:
    path = save(tmp_path, "model.safetensors", "x")
    for weight_map in ({"x": "model.safetensors"}, []):
        write_index(tmp_path, weight_map)
        assert shard_files(tmp_path) == [path]


def test_one_file_of_another_name_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, "other.safetensors", "x")
    (tmp_path / "optimizer.bin").write_bytes(b"pickle")
    assert shard_files(tmp_path) == [path]


def put(folder: Path, *files: str) -> None:
    """Write files of these names; an index names `a.safetensors`."""
    for name in files:
        if name == SHARD_INDEX:
            write_index(folder, {"x": "a.safetensors"})
        elif name.endswith(".safetensors"):
            save(folder, name, "x")
        else:
            (folder / name).write_text("{}")


def write_config(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_a_plain_config_is_returned(tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, '{"model_type": "llama"}')) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"quantization_config": {"quant_method": "gptq"}}', "the weights are quantised"),
        ("{", "not valid JSON"),
        ("[]", "config.json"),
        ("3", "config.json"),
        ("null", "config.json"),
        ("[" * 20_000, "config.json"),
    ],
    ids=["quantised", "torn", "list", "number", "null", "deep"],
)
def test_an_unsuitable_config_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in refusal(write_config(tmp_path, text), read_config)


KERNELS = {
    "a kernel": {"attn_implementation": "owner/kernel"},
    "a private key": {"_attn_implementation": "owner/kernel"},
    "an internal key": {"_attn_implementation_internal": "owner/kernel@v1"},
    "a function of it": {"attn_implementation": "kernel:forward"},
    "experts": {"experts_implementation": "owner/kernel"},
    "paged": {"attn_implementation": "paged|owner/kernel"},
    "for a part": {"attn_implementation": {"": "sdpa", "text_config": "owner/kernel"}},
    "inside a part": {"text_config": {"_experts_implementation": "owner/kernel"}},
    "inside a list": {"parts": [{"attn_implementation": ["sdpa", "owner/kernel"]}]},
}


@pytest.mark.parametrize("content", KERNELS.values(), ids=list(KERNELS))
def test_a_kernel_of_a_repository_is_refused_at_any_depth(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    message = refusal(write_config(tmp_path, json.dumps(content)), read_config)
    assert "asks to download a kernel and to run it" in message
    assert "config.json: `" in message


NO_PROPERTY = {
    "flash attention": {"attn_implementation": "flash_attention_2"},
    "private": {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True},
    "paged": {"attn_implementation": "paged|eager"},
    "null": {"_attn_implementation": None, "quantization_config": None},
    "experts": {"experts_implementation": "grouped_mm"},
    "remote code": {"auto_map": {"AutoModel": "evil--model.Model"}},
    "no remote code": {"auto_map": {}},
    "the usual file": {"transformers_weights": "model.safetensors"},
}


@pytest.mark.parametrize("content", NO_PROPERTY.values(), ids=list(NO_PROPERTY))
def test_what_is_no_property_of_a_checkpoint_is_left_out(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    folder = write_config(tmp_path, json.dumps({**content, "part": {"size": 3, **content}}))
    assert read_config(folder)["part"]["size"] == 3
    assert read_config(folder).keys() == {"part"}


@pytest.mark.parametrize("name", ["other.safetensors", "../model.safetensors", 3])
def test_a_config_that_names_other_weights_is_refused(tmp_path: Path, name: object) -> None:
    folder = write_config(tmp_path, json.dumps({"transformers_weights": name}))
    assert "lets transformers read other weights" in refusal(folder, read_config)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    assert "A model folder needs a config.json" in refusal(tmp_path, read_config)
