"""Models are described without the network: from folders, or from shipped configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rotdistill_core.errors import ModelNotAvailable, SetupError
from rotdistill_core.planning.models import model_info
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_model, save_folder


def test_a_folder_is_opened_and_states_its_dtype(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    save_folder(model.weights, model.folder, tmp_path / "half", torch.bfloat16)
    info = model_info(ModelRef(model=str(tmp_path / "half")), tmp_path, print)
    assert info.model is not None
    assert (info.folder, info.source) == (tmp_path / "half", tmp_path / "half")
    assert info.shape.stored == "bfloat16"


def test_a_shipped_config_describes_a_model_that_is_not_here(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    path = tmp_path / "texts" / "configs" / "nobody" / "nothing.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**model.config, "torch_dtype": "float16", "dtype": None}))
    info = model_info(ModelRef(model="nobody/nothing"), tmp_path / "texts", print)
    assert (info.folder, info.model, info.source) == (None, None, path)
    assert info.shape.stored == "float16"
    assert info.shape.depth == 2


def test_a_model_that_is_neither_here_nor_described_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable, match=r"^nobody/nothing: .*nobody/nothing\.json"):
        model_info(ModelRef(model="nobody/nothing"), tmp_path, print)


@pytest.mark.parametrize("name", ["owner/name@x", "owner/na me", "-owner/name", f"o/{'n' * 200}"])
def test_a_name_that_no_model_can_have_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError, match="is no folder here, and no id of Hugging Face"):
        model_info(ModelRef(model=name), tmp_path, print)
