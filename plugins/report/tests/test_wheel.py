"""The wheel carries templates and notebook, and its modules find them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1]
SOURCES = PLUGIN / "src" / "rotdistill_report"
DATA_FILES = [*sorted(SOURCES.glob("templates/*.j2")), SOURCES / "rotation_sanity.ipynb"]
LOAD_EVERYTHING = """
from pathlib import Path
import rotdistill_report
from rotdistill_report._notebook import notebook_file
from rotdistill_report._templates import template
assert notebook_file().read_text(encoding="utf-8")
for name in ("report.html.j2", "report.md.j2", "card.md.j2"):
    template(name)
print(Path(rotdistill_report.__file__).parent)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=PLUGIN, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_carries_every_data_file(wheel: Path) -> None:
    assert len(DATA_FILES) == 4
    with zipfile.ZipFile(wheel) as archive:
        for file in DATA_FILES:
            name = file.relative_to(SOURCES.parent).as_posix()
            assert archive.read(name) == file.read_bytes()


def test_modules_of_an_installed_wheel_find_their_data_files(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    search_path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_EVERYTHING],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": search_path},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()).resolve() == (tmp_path / "rotdistill_report").resolve()
