from pathlib import Path

import pytest
from huggingface_hub import constants

from rotdistill_core.checkpoint.open import locate_model
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef

COMMIT = "0123456789" * 4


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_what_the_cache_holds_is_opened_without_network(cached: Path) -> None:
    said: list[str] = []
    for revision in (None, "v1", COMMIT):
        assert (
            locate_model(ModelRef(model="somebody/small", revision=revision), said.append).resolve()
            == cached.resolve()
        )
    assert not said


def test_what_is_nowhere_is_refused_by_name(cached: Path) -> None:
    for ref in (ModelRef(model="somebody/other"), ModelRef(model="somebody/small", revision="v2")):
        said: list[str] = []
        with pytest.raises(
            SetupError,
            match=f"{ref.model}: there is no such folder here, and the hub did not give it",
        ):
            locate_model(ref, said.append)
        assert said == [f"{ref.model}: not in the local cache, downloading"]
