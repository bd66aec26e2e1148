"""What is built is what runs: wheels and sdists of all distributions, in an environment without
this repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rotdistill_core.testing import PicoWorkspace

ROOT = Path(__file__).parents[1]
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


def name_of(project: Path) -> str:
    document = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    name: str = document["project"]["name"]
    return name


def clean_environment() -> dict[str, str]:
    """Return the environment without anything that would lead back to the sources."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist of every distribution."""
    target = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    return target


def third_party() -> Iterator[Path]:
    """Yield what this environment has installed, but for the distributions of this repository."""
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "rotdistill" not in path.name and not path.name.startswith("__editable__"):
            yield path


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with third-party packages, and with the built wheels
    alone of ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    for path in third_party():
        (packages / path.name).symlink_to(path)
    wheels = sorted(map(str, built.glob("*.whl")))
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *wheels]
    python = folder / "bin" / "python"
    subprocess.run([python, *install], check=True, capture_output=True, env=clean_environment())
    return folder / "bin"


@pytest.mark.parametrize("project", PROJECTS, ids=name_of)
def test_wheel_and_sdist_carry_the_package(built: Path, project: Path) -> None:
    stem = name_of(project).replace("-", "_")
    [wheel] = built.glob(f"{stem}-[0-9]*.whl")
    [sdist] = built.glob(f"{stem}-[0-9]*.tar.gz")
    sources = project / "src" if project != ROOT else project / "rotdistill_core"
    base = sources if project != ROOT else project
    wanted = {
        path.relative_to(base).as_posix()
        for path in sources.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2].removeprefix("src/") for name in archive.getnames()}
        assert wanted <= inside


def test_every_plugin_is_in_the_extra_all() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = document["project"]["optional-dependencies"]["all"]
    assert [re.split("[>=]", line)[0] for line in extra] == [name_of(p) for p in PROJECTS[1:]]


def test_the_demo_is_planned_from_wheels_alone(environment: Path, tmp_path: Path) -> None:
    for name in ("recipes", "samples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [environment / "rotdistill", "plan", "recipes/tour_guide.toml", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert {step["id"] for step in plan["steps"]} >= {"chop", "residuals", "basis", "refit"}


def test_the_snippet_of_the_readme_runs_outside_the_repository(
    environment: Path, tmp_path: Path
) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model(num_hidden_layers=25)
    recipe = workspace.recipe(
        """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 3 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
""",
        observers=("report",),  # its templates must be in the wheel
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [snippet] = [code for code in PYTHON_BLOCK.findall(readme) if "import load_recipe" in code]
    code = snippet.replace("recipes/tour_guide.toml", str(recipe))
    assert code != snippet
    done = subprocess.run(
        [environment / "python", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^base \d", done.stdout, re.MULTILINE)
    assert (tmp_path / done.stdout.splitlines()[-1] / "config.json").is_file()
