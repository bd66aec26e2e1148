"""Models by their Hugging Face id: from the local cache, or refused without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from rotdistill_sources._hub import FILES, NOT_FILES

from rotdistill_core.checkpoint.open import locate_model, without_downloads
from rotdistill_core.errors import ModelNotAvailable, SetupError
from rotdistill_core.recipe.document import ModelRef

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789" * 4


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache with one small repository, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text("{}")
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


@pytest.mark.usefixtures("snapshot")
def test_nothing_is_asked_of_the_hub_where_nothing_may_be_downloaded() -> None:
    lines: list[str] = []
    with without_downloads():
        assert locate_model(ModelRef(model="somebody/small"), lines.append).is_dir()
        for name in ("somebody/other", "hub:somebody/other@v3"):
            with pytest.raises(ModelNotAvailable, match=r"^somebody/other: is not, or not wholly"):
                locate_model(ModelRef(model=name), lines.append)
    assert lines == []
    with pytest.raises(SetupError, match="the hub did not give it"):
        locate_model(ModelRef(model="somebody/other"), lines.append)


PARTS = {
    "weights": (("config.json", "tokenizer.json"), "model.safetensors"),
    "a shard": (("config.json", "tokenizer.json", "a.safetensors", INDEX), "b.safetensors"),
    "config": (("tokenizer.json", "model.safetensors"), "config.json"),
    "an adapter's weights": (("adapter_config.json",), "adapter_model.safetensors"),
    "all but the tokenizer's config": (("tokenizer_config.json",), "config.json, tokenizer.json"),
}


@pytest.mark.parametrize(("files", "missing"), PARTS.values(), ids=list(PARTS))
def test_half_a_model_is_asked_for_and_refused_without_a_network(
    snapshot: Path, files: tuple[str, ...], missing: str
) -> None:
    fill(snapshot, *files)
    lines: list[str] = []
    with pytest.raises(SetupError, match="only partly in the local cache") as caught:
        locate_model(ModelRef(model="somebody/small"), lines.append)
    assert f"({missing}" in str(caught.value)
    [line] = lines
    assert line.endswith("missing), downloading")


@pytest.mark.parametrize("missing", [name for name, _ in PARTS.values()])
def test_half_a_model_is_completed(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    fill(snapshot, *missing)
    asked: list[object] = []

    def download(name: str, **options: object) -> str:
        asked.append(options["local_files_only"])
        if not options["local_files_only"]:
            fill(snapshot, "config.json", "model.safetensors", "tokenizer.json")
        return str(snapshot)

    monkeypatch.setattr("rotdistill_sources._hub.snapshot_download", download)
    assert locate_model(ModelRef(model="somebody/small")) == snapshot
    assert asked == [True, False]


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.safetensors"),  # without a tokenizer
        ("config.json", "tokenizer.model", "a.safetensors", "b.safetensors", INDEX),
        ("adapter_config.json", "adapter_model.safetensors"),
    ],
)
def test_a_whole_model_or_adapter_needs_no_network(snapshot: Path, files: tuple[str, ...]) -> None:
    fill(snapshot, *files)
    assert locate_model(ModelRef(model="somebody/small")).resolve() == snapshot.resolve()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("chat_template.jinja", True),
        ("tokenizer.model", True),
        ("spiece.model", True),
        ("generation_config.json", True),
        ("pytorch_model.bin", False),
        ("modeling_small.py", False),
        ("onnx/model.safetensors", False),
        ("original/tokenizer.model", False),
        ("checkpoint-10/tokenizer.json", False),
    ],
)
def test_what_is_fetched_is_what_is_read(name: str, wanted: bool) -> None:
    assert [*filter_repo_objects([name], allow_patterns=FILES, ignore_patterns=NOT_FILES)] == (
        [name] if wanted else []
    )


def fill(snapshot: Path, *files: str) -> None:
    """Let the snapshot hold these files alone."""
    for path in snapshot.iterdir():
        path.unlink()
    for name in files:
        shards = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (snapshot / name).write_text(json.dumps(shards if name == INDEX else {}))


def test_the_plugin_loads_without_the_hubs_client() -> None:
    program = "import sys, rotdistill_sources.hub; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
