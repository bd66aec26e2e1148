"""Models by their Hugging Face id: from the local cache, or refused without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from rotdistill_core.checkpoint.open import locate_model
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef

COMMIT = "0123456789" * 4


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache with one small repository, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_cached_model_is_opened_without_a_network(snapshot: Path, revision: str | None) -> None:
    lines: list[str] = []
    folder = locate_model(ModelRef(model="somebody/small", revision=revision), lines.append)
    assert folder.resolve() == snapshot.resolve()
    assert lines == []


@pytest.mark.usefixtures("snapshot")
@pytest.mark.parametrize(("name", "revision"), [("somebody/other", None), ("somebody/small", "v2")])
def test_a_model_that_is_nowhere_is_refused_by_name(name: str, revision: str | None) -> None:
    lines: list[str] = []
    with pytest.raises(
        SetupError, match=f"{name}: there is no such folder here, and the hub did not give it"
    ):
        locate_model(ModelRef(model=name, revision=revision), lines.append)
    assert lines == [f"{name}: not in the local cache, downloading"]


def test_the_plugin_loads_without_the_hubs_client() -> None:
    program = "import sys, rotdistill_sources.hub; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
