"""A variant whose weights do not fit the dtype of checkpoints fails; the others are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotdistill_core.execution.outcome import RunFailed
from rotdistill_core.testing import PicoWorkspace

LAYER = "model.layers.0."
STEPS = """
step = [
    { use = "residuals" },
    { id = "turn", use = "random-rotation" },
    { id = "fold", use = "basis-fold" },
    { id = "cut", use = "chop", layers = 1 },
]
[variants]
turned = ["turn", "fold"]
cut = ["cut"]
"""


@pytest.fixture
def workspace(tmp_path: Path) -> PicoWorkspace:
    """A float16 student with a gain that its readers cannot absorb in float16."""
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    folder = workspace.model("model", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}input_layernorm.weight"][3] = 3e4
    tensors[f"{LAYER}self_attn.q_proj.weight"][:, 3] *= 50
    save_file({name: X.half() for name, X in tensors.items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return workspace


def test_a_fold_that_does_not_fit_float16_is_refused(workspace: PicoWorkspace) -> None:
    recipe = workspace.recipe(STEPS)
    with pytest.raises(RunFailed) as caught:
        workspace.run(recipe)
    [fault] = caught.value.outcome.failed["turned"]
    assert "q_proj.weight" in fault
    assert "do not fit float16" in fault
    assert 'student.save_dtype = "bfloat16" or "float32"' in fault
    # Nothing that looks like a checkpoint is left, and the other variant is there.
    assert not list(workspace.runs.glob("*/checkpoints/turned/*.safetensors"))
    assert list(workspace.runs.glob("*/checkpoints/cut/*.safetensors"))
    code, _, words = workspace.command("run", str(recipe))
    assert code == 4
    assert "student.save_dtype" in words


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_remedy_holds(workspace: PicoWorkspace, dtype: str) -> None:
    recipe = workspace.recipe(STEPS)
    result = workspace.run(recipe, {"student.save_dtype": dtype})
    tensors = load_file(result.checkpoints["turned"] / "model.safetensors")
    assert all(bool(torch.isfinite(X).all()) for X in tensors.values())
    assert float(tensors[f"{LAYER}self_attn.q_proj.weight"].abs().max()) > 65504
