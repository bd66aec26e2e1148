"""Hostile LoRA folders and .gguf files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.faults.evil import write_pickle
from tests.faults.gguf_file import gguf_file
from tests.faults.inputs import ANY, REFUSED, Input, replace_in

BAD = frozenset({3})


def adapter_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    yield from _adapters()
    yield from _ggufs()


LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "model",
}
LORA_CHANGES: Mapping[str, tuple[Any, ...]] = {
    "r": (0, -1, "2", None, 3, 1e308, [2]),
    "lora_alpha": ("4", None, float("nan"), 1e308, float("inf"), [4], -4, 0),
    "target_modules": (1, None, [1], "all-linear", ["norm"], ["evil"], [], "(q+q+)+$"),
    "peft_type": ("EVIL", 1, None, "IA3", "PREFIX_TUNING", "LOHA"),
    "use_dora": (True, "x"),
    "use_rslora": (True, "x", 1),
    "init_lora_weights": ("pissa", "olora", "eva", "evil", 1),
    "fan_in_fan_out": (True,),
    "bias": ("all", "lora_only", 1),
    "modules_to_save": (["lm_head"], "x"),
    "rank_pattern": ({"q_proj": 4}, 1, {"(": 1}, {"(q+q+)+$": 3}),
    "alpha_pattern": ({"q_proj": 8}, 1, {"q_proj": "x"}),
    "layers_to_transform": ([0], "x", 0),
    "layer_replication": ([[0, 2], [1, 3]],),
    "evil_key": (1,),
    "alora_invocation_tokens": ([1],),
    "auto_mapping": ({"base_model_class": "Evil", "parent_library": "evil"},),
    "base_model_name_or_path": ("../../x", "owner/name", 1, None, "\x1b[31mred"),
    "task_type": ("EVIL", None, 1),
    "lora_bias": (True,),
    "trainable_token_indices": ([1],),
    "corda_config": ({"x": 1},),
    "megatron_config": ({"x": 1},),
}


def _adapters() -> Iterator[Input]:
    kind = "LoRA folders"
    yield Input(kind, "a plain one", partial(_lora, keys={}), frozenset({0}))
    for key, values in LORA_CHANGES.items():
        for value in values:
            change = partial(_lora, keys={key: value})
            yield Input(kind, f"{key} = {json.dumps(value)[:40]}", change, ANY)
    for title, data in {
        "empty": b"",
        "a list": b"[]",
        "torn": b"{",
        "not UTF-8": b"\xff",
        "deep": b'{"a":' * 50_000,
    }.items():
        change = partial(_lora_file, file="adapter_config.json", data=data)
        yield Input(kind, f"a config that is {title}", change, REFUSED)
        change = partial(_lora_file, file="adapter_model.safetensors", data=data)
        yield Input(kind, f"weights that are {title}", change, REFUSED)
    for title, tensors in {
        "another shape": {"A": (2, 7)},
        "another rank": {"B": (32, 5)},
        "only A": {"B": None},
        "a vector": {"A": (64,)},
        "no rows": {"A": (0, 32), "B": (32, 0)},
    }.items():
        yield Input(kind, title, partial(_lora, keys={}, shapes=tensors), ANY)
    for title, value in (("NaN", float("nan")), ("Inf", float("inf"))):
        yield Input(kind, f"{title} in A", partial(_lora, keys={}, value=value), {3, 4})
    # Its product with B is a number, and so are the logits: a model of no use, but one.
    yield Input(kind, "1e38 in A", partial(_lora, keys={}, value=1e38), {0, 3, 4})
    yield Input(kind, "only a pickle", _lora_pickle, {3})
    for name in ("base_model.model.evil.lora_A.weight", "../x", "\x1b[31m.lora_A.weight", "lora_A"):
        yield Input(kind, f"a tensor {name!r}", partial(_lora, keys={}, extra=name), REFUSED)


def _lora(
    work: Path,
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
    value: float = 0.01,
    extra: str = "",
) -> None:
    folder = work / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **keys}), encoding="utf-8")
    wanted: dict[str, tuple[int, ...] | None] = {"A": (2, 32), "B": (32, 2), **(shapes or {})}
    tensors = {}
    for layer in range(3):
        for letter, shape in wanted.items():
            if shape is not None:
                name = (
                    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight"
                )
                tensors[name] = torch.full(shape, 0.01)
    next(iter(tensors.values())).fill_(value)
    if extra:
        tensors[extra] = torch.zeros(2, 32)
    save_file(tensors, folder / "adapter_model.safetensors")
    steps = (
        '{ use = "soups", ingredients = ["lora"], method = "lora", require_improvement = false }'
    )
    replace_in(work / "trial.toml", '{ use = "chop", layers = 2 }', steps)


def _lora_file(work: Path, file: str, data: bytes) -> None:
    _lora(work, {})
    (work / "lora" / file).write_bytes(data)


def _lora_pickle(work: Path) -> None:
    _lora(work, {})
    (work / "lora/adapter_model.safetensors").unlink()
    write_pickle(work / "lora/adapter_model.bin")


# .gguf files


def _ggufs() -> Iterator[Input]:
    kind = ".gguf files"
    changes: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "3 bytes": lambda data: data[:3],
        "only a header": lambda data: data[:24],
        "cut in the keys": lambda data: data[:200],
        "cut in the tensors": lambda data: data[: len(data) // 2],
        "one byte short": lambda data: data[:-1],
        "another magic": lambda data: b"EVIL" + data[4:],
        "version 0": lambda data: data[:4] + struct.pack("<I", 0) + data[8:],
        "version 99": lambda data: data[:4] + struct.pack("<I", 99) + data[8:],
        "2**63 tensors": lambda data: data[:8] + struct.pack("<Q", 1 << 63) + data[16:],
        "10**9 tensors": lambda data: data[:8] + struct.pack("<Q", 10**9) + data[16:],
        "no tensors": lambda data: data[:8] + struct.pack("<Q", 0) + data[16:],
        "2**63 keys": lambda data: data[:16] + struct.pack("<Q", 1 << 63) + data[24:],
        "10**9 keys": lambda data: data[:16] + struct.pack("<Q", 10**9) + data[24:],
        "a key of 2**63 characters": lambda data: (
            data[:24] + struct.pack("<Q", 1 << 63) + data[32:]
        ),
        "a key of 10**9 characters": lambda data: data[:24] + struct.pack("<Q", 10**9) + data[32:],
        "zeros": lambda data: bytes(len(data)),
        "zeros after the header": lambda data: data[:24] + bytes(len(data) - 24),
        "ones after the header": lambda data: data[:24] + b"\xff" * (len(data) - 24),
        "safetensors": lambda data: b"\x08\0\0\0\0\0\0\0{}      ",
    }
    for title, damage in changes.items():
        yield Input(kind, title, partial(_gguf, damage=damage), BAD)
    for seed in range(20):
        yield Input(
            kind,
            f"a flipped byte in its header ({seed})",
            partial(_gguf, damage=_flipped(seed)),
            ANY,
        )
    for title, keys in {
        "a lost tensor": {"lost": "blk.1.ffn_up"},
        "0 layers": {"layers": 0},
        "3 layers": {"layers": 3},
        "10**9 layers": {"layers": 10**9},
        "an unknown architecture": {"architecture": "evil"},
        "a name with ESC": {"architecture": "\x1b[31m"},
    }.items():
        yield Input(kind, title, partial(_gguf, damage=lambda data: data, **keys), BAD)
    yield Input(kind, "a fifo", _gguf_fifo, BAD)


def _flipped(seed: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[8 + seed * 37] ^= 0xFF
        return bytes(changed)

    return damage


def _gguf_fifo(work: Path) -> None:
    os.mkfifo(work / "pico.gguf")
    replace_in(work / "trial.toml", 'student.model = "model"', 'student.model = "pico.gguf"')


def _gguf(
    work: Path,
    damage: Callable[[bytes], bytes],
    lost: str = "",
    layers: int = 2,
    architecture: str = "llama",
) -> None:
    """Write a .gguf file, damaged, and make it the student."""
    path = gguf_file(work / "pico.gguf", lost, layers, architecture)
    path.write_bytes(damage(path.read_bytes()))
    replace_in(work / "trial.toml", 'student.model = "model"', 'student.model = "pico.gguf"')
