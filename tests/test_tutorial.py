"""A step and an adapter from the guide alone are planned, run, reported and checked like ours."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from rotdistill_core.plugin.registry import ADAPTERS, STEPS
from rotdistill_core.testing import PicoWorkspace

GUIDE = Path(__file__).parents[1] / "docs" / "plugins"
MODULE = re.compile(
    r"`(rotdistill_\w+\.py)`(?:(?!```).)*?\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
STEP = "rotdistill_principal_axes"
ADAPTER = "rotdistill_mistral_adapter"
RECIPE = """
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "principal-axes"
centre = true
[[step]]
id = "fold"
use = "basis-fold"
[[step]]
use = "fidelity"
[variants]
base = []
rotated = ["basis", "fold"]
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the two plugins of the guide, each one module, as pip would."""
    modules: dict[str, str] = {}
    for page in GUIDE.glob("*.md"):
        modules |= dict(MODULE.findall(page.read_text(encoding="utf-8")))
    site = tmp_path / "site"
    for module, group, name in (
        (STEP, STEPS, "principal-axes"),
        (ADAPTER, ADAPTERS, "mistral"),
    ):
        info = site / f"{module}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(modules[f"{module}.py"], encoding="utf-8")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0.1.0\n"
            "Requires-Dist: rotdistill>=0.1,<1\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        (info / "RECORD").write_text(f"{module}.py,,\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.slow
@pytest.mark.usefixtures("strangers")
def test_plugins_of_the_guide_are_planned_run_reported_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model(model_type="mistral", sliding_window=None)
    recipe = str(workspace.recipe(RECIPE, observers=("report",)))

    code, out, err = workspace.command("plan", recipe, "--json")
    assert code == 0, err
    [line] = [step for step in json.loads(out)["steps"] if step["id"] == "basis"]
    assert line["plugin"] == "rotdistill-principal-axes 0.1.0"
    assert line["ram_bytes"] > 0
    assert not line["note"]  # it states its own cost

    code, out, err = workspace.command("run", recipe, "--json")
    assert code == 0, err
    kl = {
        row["variant"]: row["value"]
        for row in json.loads(out)["results"]
        if row["metric"] == "kl" and row["text"] is None and row["language"] is None
    }
    assert kl["rotated"] == pytest.approx(kl["base"], abs=1e-4)  # an exact step

    [report] = workspace.runs.glob("*/report.md")
    assert "basis" in report.read_text(encoding="utf-8")
    code, out, err = workspace.command("check", "trial", "--json")
    assert code == 0, err
    assert json.loads(out)["unfolded"]

    code, out, _ = workspace.command("run", recipe, "--json")  # again: everything is reused
    assert code == 0
    (tmp_path / "site" / f"{STEP}.py").write_text("# edited\n" + _source(tmp_path), "utf-8")
    code, out, _ = workspace.command("plan", recipe, "--json")
    reused = {step["id"]: step["reused"] for step in json.loads(out)["steps"]}
    assert reused["residuals"]
    assert not reused["basis"]


def _source(root: Path) -> str:
    return (root / "site" / f"{STEP}.py").read_text(encoding="utf-8")
