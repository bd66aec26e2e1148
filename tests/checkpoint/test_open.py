"""A reference is a folder, or of a kind that an installed source opens; others are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.open import HUB_ID, locate_model, open_pair
from rotdistill_core.errors import PluginError, SetupError
from rotdistill_core.plugin.registry import SOURCES
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_folder

SOURCE = """
from pathlib import Path
from rotdistill_core import hookimpl

@hookimpl
def locate(reference, log):
    log(f"asked for {reference}")
    return Path("found") / reference.replace(":", "/")
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install one source for an ending, a scheme, and the ids of a hub; hide the others."""
    site = tmp_path / "site"
    info = site / "rotdistill_trial_source-0.1.0.dist-info"
    info.mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: rotdistill-trial-source\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(metadata)
    kinds = (".pack", "vault:", HUB_ID)
    points = "\n".join(f"{kind} = rotdistill_trial_source" for kind in kinds)
    (info / "entry_points.txt").write_text(f"[{SOURCES}]\n{points}\n")
    (site / "rotdistill_trial_source.py").write_text(SOURCE)
    others = [path for path in sys.path if not path.endswith("site-packages")]
    monkeypatch.setattr(sys, "path", [str(site), *others])
    monkeypatch.delitem(sys.modules, "rotdistill_trial_source", raising=False)


def located(model: str, revision: str | None = None) -> str:
    return locate_model(ModelRef(model=model, revision=revision)).as_posix()


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("model", "revision", "reference"),
    [
        ("folder/model.pack", None, "folder/model.pack"),
        ("vault:some/where", None, "vault/some/where"),
        ("owner/Model-1.5B", None, "owner/Model-1.5B"),
        ("owner/model", "v2", "owner/model@v2"),
    ],
)
def test_a_reference_goes_to_the_source_of_its_kind(
    model: str, revision: str | None, reference: str
) -> None:
    assert located(model, revision) == f"found/{reference}"


@pytest.mark.usefixtures("sources")
def test_a_folder_is_opened_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/model").mkdir(parents=True)
    assert located("owner/model") == "owner/model"
    assert located(str(tmp_path / "owner")) == (tmp_path / "owner").as_posix()


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("model", "wanted"),
    [("chest:some/where", 'begin with "chest:"'), ("model.crate", 'end with ".crate"')],
)
def test_a_kind_without_a_source_is_refused_with_what_to_do(model: str, wanted: str) -> None:
    with pytest.raises(PluginError, match=wanted) as caught:
        located(model)
    message = str(caught.value)
    assert message.startswith(f"{model}: ")
    assert f"group {SOURCES}" in message
    assert ".pack, owner/name, vault:" in message
    assert "\n" not in message


def test_without_any_source_a_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_core.plugin.registry._points", lambda _: [])
    with pytest.raises(PluginError, match=r"opens ids of a model hub .* None is installed"):
        located("owner/model")


@pytest.mark.parametrize("model", ["nowhere", "./nowhere/model-1.5", "/nowhere/at/all"])
def test_a_missing_folder_is_refused(model: str) -> None:
    with pytest.raises(SetupError, match="is neither a folder here nor a Hugging Face id"):
        located(model)


def test_an_anchor_has_the_shape_of_the_student(tmp_path: Path) -> None:
    model = ModelRef(model=str(pico_folder(tmp_path / "model")))
    wider = ModelRef(model=str(pico_folder(tmp_path / "wider", intermediate_size=56)))
    assert open_pair(model, model, model).anchor is not None
    with pytest.raises(SetupError, match=r"differs in neurons\.0: 56, and 48 in the student"):
        open_pair(model, model, wider)
