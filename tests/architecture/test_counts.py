"""No count of a config makes anything before it is compared with the weights."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rotdistill_core.architecture.counts import MOST_LAYERS
from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import command_line, pico_folder

COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "sliding_window",
)
IMPOSSIBLE = {
    "huge": 10**9,
    "beyond 64 bits": 10**100,
    "negative": -3,
    "zero": 0,
    "fraction": 2.5,
    "whole float": 2.0,
    "boolean": True,
    "text": "2",
    "list": [2],
    "table": {"n": 2},
}

SECONDS = 8
"""Loose: another process may have the machine. The faults took minutes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("counts")

    def folder(model_type: str) -> Path:
        path = root / model_type
        return path if path.exists() else pico_folder(path, model_type)

    return folder


def changed(source: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


@pytest.mark.parametrize("value", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_impossible_count_is_named(
    tmp_path: Path, models: Callable[[str], Path], model_type: str, key: str, value: object
) -> None:
    folder = changed(models(model_type), tmp_path / "model", **{key: value})
    started = time.monotonic()
    with pytest.raises(SetupError, match=rf"config\.json does not fit: {key} is .{{1,60}}, and"):
        open_model(ModelRef(model=str(folder)))
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("layers", [1, 3, MOST_LAYERS])
def test_a_depth_that_the_weights_have_not_is_named(
    tmp_path: Path, models: Callable[[str], Path], layers: int
) -> None:
    folder = changed(models("llama"), tmp_path / "model", num_hidden_layers=layers)
    wanted = f"num_hidden_layers is {layers}, but its weights are of 2 layers"
    with pytest.raises(SetupError, match=re.escape(wanted)):
        open_model(ModelRef(model=str(folder)))


@pytest.mark.parametrize("value", [None, 4, 262_144])
def test_a_window_may_be_longer_than_any_text(
    tmp_path: Path, models: Callable[[str], Path], value: int | None
) -> None:
    folder = changed(models("llama"), tmp_path / "model", sliding_window=value)
    assert open_model(ModelRef(model=str(folder))).depth == 2


def test_null_stands_for_the_default(tmp_path: Path, models: Callable[[str], Path]) -> None:
    folder = changed(models("llama"), tmp_path / "model", head_dim=None)
    assert open_model(ModelRef(model=str(folder))).depth == 2


def test_a_shipped_config_is_looked_at_too(
    tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rotdistill_core.planning.models import model_info

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shipped = tmp_path / "configs" / "owner" / "name.json"
    shipped.parent.mkdir(parents=True)
    config = json.loads((models("llama") / "config.json").read_text())
    shipped.write_text(json.dumps({**config, "num_hidden_layers": 10**9, "dtype": "float32"}))
    with pytest.raises(SetupError, match="num_hidden_layers is 1000000000, and"):
        model_info(ModelRef(model="owner/name"), tmp_path, lambda _: None)


def test_many_unknown_tensors_are_refused_in_a_moment(models: Callable[[str], Path]) -> None:
    folder = models("llama")
    adapter = adapter_for("llama")
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: header.shape for name, header in folder_headers(folder).items()}
    shapes |= {f"model.layers.0.self_attn.q_proj{k}.weigth": (1,) for k in range(20_000)}
    started = time.monotonic()
    with pytest.raises(SetupError, match=r"Did you mean .*; and \d+ more"):
        adapter.check(config, shapes, "here")
    assert time.monotonic() - started < SECONDS


def test_the_command_line_ends_with_3(
    tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rotdistill_core.testing import PicoWorkspace

    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    changed(models("llama"), tmp_path / "model", num_hidden_layers=10**9)
    recipe = workspace.recipe('[[step]]\nuse = "fidelity"', teacher="model", student="model")
    monkeypatch.chdir(tmp_path)
    for verb in ("plan", "run"):
        code, _, err = command_line(verb, str(recipe))
        assert code == 3
        assert "num_hidden_layers is 1000000000" in err


def test_tensors_are_read_by_their_layers(tmp_path: Path, models: Callable[[str], Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    (folder / "model.safetensors").unlink()
    names = [f"model.layers.{10**k}.x" for k in range(30)]
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    with pytest.raises(SetupError, match="its weights are of 9 layers"):
        open_model(ModelRef(model=str(folder)))
