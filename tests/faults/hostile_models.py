"""Hostile model folders: configs, headers, shard indices, two readings, code, numbers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.evil import PICKLE, write_pickle
from tests.faults.inputs import ANY, RUN, Input, edit_json, write_bytes

WEIGHTS = "model/model.safetensors"
INDEX = "model/model.safetensors.index.json"
BAD = frozenset({3})


def model_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    yield from _configs()
    yield from _headers()
    yield from _indices()
    yield from _readings()
    yield from _values()


# config.json

CONFIG_CHANGES: Mapping[str, tuple[Any, ...]] = {
    "num_hidden_layers": (0, -1, 2, 4, 10**9, "3", None, 2.5, [3], True),
    "hidden_size": (0, 31, 64, -32, "32", None, 10**12),
    "intermediate_size": (0, 47, "48", None),
    "num_attention_heads": (0, 3, 5, "4", None, -4),
    "num_key_value_heads": (0, 3, 8, "2", None),
    "head_dim": (0, 7, 16, "8", -8),
    "vocab_size": (0, 63, 65, 10**10, "64", None),
    "max_position_embeddings": (0, 1, -1, 8, "128", None),
    "rms_norm_eps": (0, -1, "x", None, 1e308),
    "hidden_act": ("evil", 1, None, "__import__('os')", ["silu"]),
    "tie_word_embeddings": ("yes", 1, None, False),
    "model_type": ("evil", 1, None, "../llama", "gpt2", "mixtral"),
    "architectures": (1, ["Evil"], "x", []),
    "rope_parameters": (
        1,
        [],
        {"rope_type": "evil"},
        {"rope_type": 1},
        {"rope_type": "yarn"},
        {"rope_type": "linear", "factor": "x"},
        {"rope_theta": "x"},
        {"rope_type": "longrope"},
    ),
    "eos_token_id": ("2", 64, 10**9, -1, [], [2, "x"], {"a": 1}),
    "pad_token_id": ("0", 10**9, -7),
    "dtype": ("evil", 1, "float8_e4m3fn", ["float32"]),
    "attention_bias": ("x", True),
    "mlp_bias": (True, "x"),
    "layer_types": (["evil"] * 3, ["full_attention"], 1, ["full_attention"] * 99),
    "quantization_config": ({"quant_method": "gptq"}, 1, {}),
    "attn_implementation": ("owner/kernel", "evil", "flash_attention_2", 1),
    "_attn_implementation": ("owner/kernel", "evil", 1),
    "_attn_implementation_internal": ("owner/kernel",),
    "experts_implementation": ("owner/kernel",),
    "text_config": ({"attn_implementation": "owner/kernel"}, {"_attn_implementation": "a/b"}),
    "auto_map": ({"AutoModelForCausalLM": "evil.Evil"}, {"AutoConfig": "a/b--evil.Evil"}, 1),
    "custom_pipelines": ({"x": {"impl": "evil.Evil"}},),
    "transformers_version": (1, "99.0.0", "x" * 10_000),
    "bos_token_id": ("x", 10**9),
    "initializer_range": ("x", -1),
    "attention_dropout": (0.5, "x"),
    "use_cache": ("x", False),
    "torch_dtype": ("evil", 7),
    "pretraining_tp": (0, 7, "x"),
    "sliding_window": (4, "x", -1),
}
"""Key -> values that a config may give it."""


def _configs() -> Iterator[Input]:
    kind = "configs of models"
    for key, values in CONFIG_CHANGES.items():
        for value in values:
            title = f"{key} = {json.dumps(value)[:50]}"
            # A plan does not build the model; end tokens are its own affair.
            early = key == "eos_token_id"
            yield Input(kind, title, partial(_config, key=key, value=value), ANY, early=early)
    whole: dict[str, bytes] = {
        "empty": b"",
        "a list": b"[]",
        "null": b"null",
        "torn": b'{"model_type": "lla',
        "not UTF-8": b"\xff\xfe{}",
        "NUL": b"\0" * 100,
        "{}": b"{}",
        "deep": b'{"a":' * 100_000,
        "a number of 5000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
        "a byte-order mark": b'\xef\xbb\xbf{"model_type": "llama"}',
        "a surrogate": b'{"model_type": "\\ud800"}',
        "ESC": b'{"model_type": "\\u001b[31mred"}',
        "NaN": b'{"model_type": "llama", "rms_norm_eps": NaN}',
        "20 MB": b" " * 20_000_000 + b"{}",
    }
    for title, data in whole.items():
        change = partial(write_bytes, file="model/config.json", data=data)
        yield Input(kind, title, change, {2, 3}, early=True)
    for title, replace in _NO_FILES.items():
        for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
            change = partial(_no_file, file=f"model/{file}", replace=replace)
            codes = ANY if file == "chat_template.jinja" else BAD
            yield Input(kind, f"{title}: {file}", change, codes, early=True)


def _config(work: Path, key: str, value: Any) -> None:
    edit_json(work / "model/config.json", **{key: value})


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


_NO_FILES: dict[str, Callable[[Path], None]] = {
    "gone": lambda _: None,
    "a fifo": _fifo,
    "an endless device": _zero,
    "a folder": Path.mkdir,
    "a link to itself": _loop,
}
"""What may stand where a file should be."""


def _no_file(work: Path, file: str, replace: Callable[[Path], None]) -> None:
    (work / file).unlink()
    replace(work / file)


# Headers of safetensors


def _headers() -> Iterator[Input]:
    kind = "safetensors headers"
    for title, damage in _HEADERS.items():
        change = partial(_header, damage=damage)
        yield Input(kind, title, change, BAD, early=True)
    raw: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "7 bytes": lambda data: data[:7],
        "8 bytes": lambda data: data[:8],
        "a header one byte short": lambda data: data[: 7 + _length(data)],
        "only a header": lambda data: data[: 8 + _length(data)],
        "cut in the middle": lambda data: data[: len(data) // 2],
        "one byte short": lambda data: data[:-1],
        "one byte long": lambda data: data + b"\0",
        "a length of 2**64 - 1": lambda data: b"\xff" * 8 + data[8:],
        "a length of 2**63": lambda data: struct.pack("<Q", 1 << 63) + data[8:],
        "a length of 100 MB": lambda data: struct.pack("<Q", 100_000_001) + data[8:],
        "a header of 101 MB": lambda data: _packed(b" " * 101_000_000, data),
        "a length of 0": lambda data: bytes(8) + data[8:],
        "a length one too small": lambda data: struct.pack("<Q", _length(data) - 1) + data[8:],
        "a header that is no text": lambda data: _packed(b"\xff\xfe" + b"{}", data),
        "a header that is a list": lambda data: _packed(b"[]", data),
        "a deep header": lambda data: _packed(b'{"a":' * 50_000, data),
        "zeros": lambda data: bytes(len(data)),
        "a zip": lambda data: b"PK\x03\x04" + data,
        "a pickle": lambda data: pickle.dumps({"a": 1}),
        "a tensor given twice": _twice,
    }
    for title, change in raw.items():
        codes = ANY if title == "a tensor given twice" else BAD
        yield Input(kind, title, partial(_raw, damage=change), codes, early=True)


Header = dict[str, Any]


def _length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data[8 + _length(data) :]


def _twice(data: bytes) -> bytes:
    header = data[8 : 8 + _length(data)].rstrip()
    name, about = next((n, a) for n, a in json.loads(header).items() if n != "__metadata__")
    again = header[:-1] + f", {json.dumps(name)}: {json.dumps(about)}}}".encode()
    return _packed(again, data)


def _raw(work: Path, damage: Callable[[bytes], bytes]) -> None:
    path = work / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))


def _header(work: Path, damage: Callable[[Header, list[str]], None]) -> None:
    path = work / WEIGHTS
    data = path.read_bytes()
    header: Header = json.loads(data[8 : 8 + _length(data)])
    names = [name for name in header if name != "__metadata__"]
    damage(header, names)
    path.write_bytes(_packed(json.dumps(header).encode(), data))


def _set(key: str, value: Any) -> Callable[[Header, list[str]], None]:
    def damage(header: Header, names: list[str]) -> None:
        header[names[0]][key] = value

    return damage


def _overlapping(header: Header, names: list[str]) -> None:
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _renamed(new: str) -> Callable[[Header, list[str]], None]:
    def damage(header: Header, names: list[str]) -> None:
        header[new] = header.pop(names[0])

    return damage


def _added(name: str) -> Callable[[Header, list[str]], None]:
    def damage(header: Header, names: list[str]) -> None:
        end = max(header[each]["data_offsets"][1] for each in names)
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    return damage


_HEADERS: dict[str, Callable[[Header, list[str]], None]] = {
    "offsets beyond the file": _set("data_offsets", [0, 1 << 40]),
    "negative offsets": _set("data_offsets", [-8, 8]),
    "offsets turned around": _set("data_offsets", [100, 0]),
    "offsets beyond 64 bits": _set("data_offsets", [0, 1 << 70]),
    "three offsets": _set("data_offsets", [0, 1, 2]),
    "offsets of text": _set("data_offsets", ["0", "8"]),
    "overlap": _overlapping,
    "a shape beyond the bytes": _set("shape", [1 << 30, 1 << 30]),
    "a shape that overflows": _set("shape", [1 << 62, 1 << 62, 1 << 62]),
    "a negative shape": _set("shape", [-1, 32]),
    "a shape of text": _set("shape", ["32"]),
    "another shape": _set("shape", [1]),
    "an unknown dtype": _set("dtype", "F128"),
    "an fp8 dtype": _set("dtype", "F8_E4M3"),
    "a dtype of another width": _set("dtype", "F64"),
    "a dtype that is a number": _set("dtype", 7),
    "another name": _renamed("evil.weight"),
    "a name with ESC": _renamed("\x1b[31mred\x1b]0;owned\x07"),
    "a name that is a path": _renamed("../../x"),
    "a name of 100 kB": _renamed("x" * 100_000),
    "an empty name": _renamed(""),
    "one tensor more": _added("model.layers.0.self_attn.q_proj.evil"),
    "a layer more": _added("model.layers.7.self_attn.q_proj.weight"),
    "metadata that is no text": lambda header, _: header.update(__metadata__={"a": 1}),
    "metadata that is a list": lambda header, _: header.update(__metadata__=[1]),
    "a lost tensor": lambda header, names: header.pop(names[0]),
}


# Shard indices


def _indices() -> Iterator[Input]:
    kind = "shard indices"
    for title, index in {
        "a name above": {"weight_map": {"a": "../x.safetensors"}},
        "an absolute name": {"weight_map": {"a": "/etc/passwd"}},
        "a NUL": {"weight_map": {"a": "x\0.safetensors"}},
        "ESC": {"weight_map": {"a": "\x1b[31mred"}},
        "a lost shard": {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
        "a number": {"weight_map": {"a": 1}},
        "a list": {"weight_map": ["model.safetensors"]},
        "no map": {},
        "an empty map": {"weight_map": {}},
        "a folder": {"weight_map": {"a": "."}},
        "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
        "a fifo": {"weight_map": {"a": "fifo"}},
        "a pickle": {"weight_map": {"a": "pytorch_model.bin"}},
        "a long name": {"weight_map": {"a": "x" * 300}},
    }.items():
        change = partial(_index, text=json.dumps(index))
        yield Input(kind, f"{title} in place of the weights", change, BAD, early=True)
        beside = partial(_index, text=json.dumps(index), keep=True)
        yield Input(kind, f"{title} beside the weights", beside, ANY, early=True)
    for title, text in {
        "torn": "{",
        "a list": "[]",
        "deep": '{"a":' * 100_000,
        "empty": "",
    }.items():
        yield Input(kind, title, partial(_index, text=text), BAD, early=True)


def _index(work: Path, text: str, keep: bool = False) -> None:
    (work / INDEX).write_text(text, encoding="utf-8")
    if not keep:
        (work / WEIGHTS).rename(work / "model/other.safetensors")
    if "fifo" in text:
        os.mkfifo(work / "model/fifo")
    if "pytorch_model" in text:
        write_pickle(work / "model" / PICKLE)


# Folders that can be read in two ways, and code


def _named_pickle(work: Path, name: str = PICKLE) -> None:
    write_pickle(work / "model" / name)


def _only_pickle(work: Path) -> None:
    (work / WEIGHTS).unlink()
    write_pickle(work / "model" / PICKLE)


def _plain_pickle(work: Path, name: str = "pytorch_model.bin") -> None:
    tensors = {k: torch.zeros_like(v) for k, v in load_file(work / WEIGHTS).items()}
    torch.save(tensors, work / "model" / name)


def _pickle_beside_other(work: Path) -> None:
    _plain_pickle(work)
    (work / WEIGHTS).rename(work / "model/other.safetensors")


def _code(work: Path) -> None:
    code = "import os\nopen(os.environ['CANARY'], 'w').close()\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_llama.py", "configuration_llama.py", "tokenization_llama.py"):
        (work / "model" / name).write_text(code, encoding="utf-8")


def _with_code(file: str, **keys: Any) -> Callable[[Path], None]:
    def change(work: Path) -> None:
        _code(work)
        edit_json(work / "model" / file, **keys)

    return change


def _adapter_config(base: str) -> Callable[[Path], None]:
    def change(work: Path) -> None:
        document = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 1}
        (work / "model/adapter_config.json").write_text(json.dumps(document), encoding="utf-8")

    return change


def _readings() -> Iterator[Input]:
    kind = "folders with two readings, and code"
    auto = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    tokenizer = {"AutoTokenizer": ["evil.Evil", None]}
    folders: dict[str, tuple[Callable[[Path], None], frozenset[int]]] = {
        "only a pickle": (_only_pickle, BAD),
        "a pickle beside the weights": (_named_pickle, ANY),
        "a plain pickle beside the weights": (_plain_pickle, ANY),
        "a plain pickle beside other weights": (_pickle_beside_other, ANY),
        "a .pt beside the weights": (partial(_named_pickle, name="model.pt"), ANY),
        "an .h5": (partial(_named_pickle, name="tf_model.h5"), ANY),
        "code beside the weights": (_code, ANY),
        "auto_map in the config": (_with_code("config.json", auto_map=auto), ANY),
        "auto_map and trust": (
            _with_code("config.json", auto_map=auto, trust_remote_code=True),
            ANY,
        ),
        "auto_map of a tokenizer": (_with_code("tokenizer_config.json", auto_map=tokenizer), ANY),
        "a tokenizer's class": (
            _with_code("tokenizer_config.json", tokenizer_class="EvilTokenizer"),
            ANY,
        ),
        "code for generation": (
            _with_code("generation_config.json", custom_generate="evil"),
            ANY,
        ),
        "a custom_generate folder": (_custom_generate, ANY),
        "an adapter config": (_adapter_config("model"), ANY),
        "an adapter config of a hub id": (_adapter_config("owner/name"), ANY),
        "an adapter config above": (_adapter_config("../../x"), ANY),
        "an adapter config with ESC": (_adapter_config("\x1b[31mred"), ANY),
        "two files of weights": (_two_files, ANY),
    }
    for title, (change, codes) in folders.items():
        yield Input(kind, title, change, codes, early=True)


def _custom_generate(work: Path) -> None:
    (work / "model/custom_generate").mkdir()
    code = "import os\nopen(os.environ['CANARY'], 'w').close()\ndef generate(*a, **k): pass\n"
    (work / "model/custom_generate/generate.py").write_text(code, encoding="utf-8")


def _two_files(work: Path) -> None:
    shutil.copy(work / WEIGHTS, work / "model/consolidated.safetensors")


# Numbers


def _values() -> Iterator[Input]:
    kind = "weights that are no numbers"
    for name in ("embed_tokens.weight", "layers.1.mlp.down_proj.weight", "model.norm.weight"):
        for title, value in (("NaN", float("nan")), ("Inf", float("inf")), ("1e38", 1e38)):
            for everywhere in (False, True):
                change = partial(_number, name=name, value=value, everywhere=everywhere)
                where = "all" if everywhere else "one"
                codes = ANY if title == "1e38" else frozenset({3, 4})
                yield Input(kind, f"{title} in {where} of {name}", change, codes, (RUN,))
    yield Input(kind, "all weights zero", _zeros, ANY)
    yield Input(kind, "denormal weights", _tiny, ANY)


def _number(work: Path, name: str, value: float, everywhere: bool) -> None:
    tensors = load_file(work / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    if everywhere:
        tensors[key].fill_(value)
    else:
        tensors[key].view(-1)[7] = value
    save_file(tensors, work / WEIGHTS, {"format": "pt"})


def _zeros(work: Path) -> None:
    tensors = {key: torch.zeros_like(tensor) for key, tensor in load_file(work / WEIGHTS).items()}
    save_file(tensors, work / WEIGHTS, {"format": "pt"})


def _tiny(work: Path) -> None:
    tensors = {key: tensor * 1e-42 for key, tensor in load_file(work / WEIGHTS).items()}
    save_file(tensors, work / WEIGHTS, {"format": "pt"})
