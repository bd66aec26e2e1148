"""The llama table against pico checkpoints of plain transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rotdistill_llama_adapter import LLAMA, adapters

from rotdistill_core.headers import folder_headers
from rotdistill_core.maps import Rotation
from rotdistill_core.models import open_model
from rotdistill_core.plugins import adapter_for
from rotdistill_core.recipe import ModelRef
from rotdistill_core.testing import logits, pico_model, pico_samples, random_rotation, save_folder

CHANGES: list[dict[str, object]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False, "attention_bias": True},
    {"mlp_bias": True, "head_dim": 12, "num_key_value_heads": 1},
]
changes = pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))


def test_the_installed_adapter_is_this_one() -> None:
    assert adapters() == [LLAMA]
    assert adapter_for("llama") is LLAMA


@changes
def test_every_tensor_of_a_checkpoint_is_claimed_once(tmp_path: Path, changes: dict[str, object]) -> None:
    model = pico_model(tmp_path / "model", "llama", **changes)
    found = folder_headers(model.folder)
    table, sizes = LLAMA.expand(model.config), LLAMA.sizes(model.config)
    for name, header in found.items():
        templates = [t for t in LLAMA.params if re.fullmatch(re.escape(t).replace(r"\{i\}", r"\d+"), name)]
        assert len(templates) == 1, name
        assert header.shape == tuple(sizes[axis] for axis in table[name].axes)
    unused = {name for name in table if name not in found}
    assert all(table[name].optional or name == LLAMA.head for name in unused)
    assert (LLAMA.head in unused) is model.weights.tied


@changes
def test_a_random_rotation_leaves_the_logits_equal(tmp_path: Path, changes: dict[str, object]) -> None:
    weights = pico_model(tmp_path / "model", "llama", **changes).weights
    layout = pico_samples(texts=4).layout
    folded = weights.fold({"residual": Rotation(random_rotation(32, 1))})
    torch.testing.assert_close(logits(folded, layout), logits(weights, layout), rtol=0, atol=1e-9)


@changes
def test_a_folded_folder_reloads(tmp_path: Path, changes: dict[str, object]) -> None:
    from transformers import AutoModelForCausalLM

    model = pico_model(tmp_path / "model", "llama", **changes)
    save_folder(model.weights.fold({"residual": Rotation(random_rotation(32, 1))}), model.folder, tmp_path / "folded")
    assert open_model(ModelRef(model=str(tmp_path / "folded"))).depth == 2
    tokens = torch.tensor([pico_samples(texts=1).layout.texts[0].tokens])
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(p).eval()(tokens).logits for p in (model.folder, tmp_path / "folded"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
