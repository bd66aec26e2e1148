"""A step's key covers the code that its result depends on, and nothing else."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.execution.keys import start_key
from rotdistill_core.plugin import source_code
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.plugin.registry import ADAPTERS, adapter_origin, step_class
from rotdistill_core.plugin.source_code import core_digest, source_digest
from rotdistill_core.testing import pico_model

Install = Callable[..., str]
STEP = '''"""A step that aligns with the core's solver."""
from typing import Literal
from rotdistill_core import Maps, hookimpl, step
from rotdistill_core.linalg.solvers import polar


@step
class Spin:
    use: Literal["spin"] = "spin"

    @hookimpl
    def align(self, maps):
        return maps


@hookimpl
def steps():
    return [Spin]
'''
TABLE = '''"""Checkpoints of model type `tiny`."""
from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder


@hookimpl
def adapters():
    return [rope_decoder(("tiny",))]
'''


def origin_of_spin() -> Origin:
    return step_class("spin")[1]


def edit(path: Path) -> None:
    """Change a file as a programmer does: other bytes, another time."""
    path.write_text(path.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the core that keys are computed from, so that a test may edit it."""
    copy = tmp_path / "copy" / "rotdistill_core"
    shutil.copytree(source_code.CORE_FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source_code, "CORE_FOLDER", copy)
    return copy


def test_every_file_of_a_distribution_counts(install: Install, tmp_path: Path) -> None:
    install("acme-spin", "spin", STEP)
    before = source_digest(origin_of_spin())
    root = tmp_path / "acme-spin"
    (root / "fake_helper.py").write_text("x = 1\n")
    record = root / "acme_spin-1.0.dist-info" / "RECORD"
    record.write_text("fake_acme_spin.py,,\nfake_helper.py,,\n")
    listed = source_digest(origin_of_spin())
    edit(root / "fake_helper.py")
    assert len({before, listed, source_digest(origin_of_spin())}) == 3


def test_a_distribution_installed_in_place_counts_with_its_folder_but_not_its_tests(
    install: Install, tmp_path: Path
) -> None:
    install("acme-spin", "spin", STEP)
    before = source_digest(origin_of_spin())
    source = tmp_path / "some where"
    (source / "tests").mkdir(parents=True)
    where = {"url": source.as_uri(), "dir_info": {"editable": True}}
    (tmp_path / "acme-spin/acme_spin-1.0.dist-info/direct_url.json").write_text(json.dumps(where))
    (source / "tests" / "test_it.py").write_text("x = 1\n")
    assert source_digest(origin_of_spin()) == before
    (source / "helper.py").write_text("x = 1\n")
    assert source_digest(origin_of_spin()) != before


@pytest.mark.usefixtures("core")
def test_a_working_copy_that_is_imported_counts_as_the_installed_package_and_without_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = step_class("transport")[1]
    package = origin.target.partition(".")[0]
    before = source_digest(origin)
    installed = Path(str(importlib.import_module(package).__file__)).parent
    copy = shutil.copytree(installed, tmp_path / package)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_it.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    assert source_digest(origin) == before
    edit(copy / "_spaces.py")
    assert source_digest(origin) != before


def test_a_required_distribution_that_builds_on_rotdistill_counts(
    install: Install, tmp_path: Path
) -> None:
    install("acme-spin", "spin", STEP, requires=["rotdistill", "acme-maths>=1", "numpy"])
    install("acme-maths", "maths", "x = 1\n", group="acme", requires=["rotdistill"])
    before = source_digest(origin_of_spin())
    edit(tmp_path / "acme-maths" / "fake_acme_maths.py")
    assert source_digest(origin_of_spin()) != before


def test_a_distribution_that_is_not_required_does_not_count(
    install: Install, tmp_path: Path
) -> None:
    install("acme-spin", "spin", STEP, requires=["rotdistill"])
    install("acme-maths", "maths", "x = 1\n", group="acme", requires=["rotdistill"])
    before = source_digest(origin_of_spin())
    edit(tmp_path / "acme-maths" / "fake_acme_maths.py")
    assert source_digest(origin_of_spin()) == before


@pytest.mark.parametrize(
    "module",
    [
        "linalg/solvers.py",  # imported by the step
        "linalg/maps.py",  # imported from the public names
        "store/hashing.py",  # imported by what the step imports
    ],
)
def test_a_module_of_the_core_that_the_step_reaches_counts(
    install: Install, core: Path, module: str
) -> None:
    install("acme-spin", "spin", STEP)
    before = source_digest(origin_of_spin())
    edit(core / module)
    assert source_digest(origin_of_spin()) != before


@pytest.mark.parametrize(
    "module",
    [
        "cli.py",
        "terminal.py",
        "errors.py",
        "planning/cost.py",
        "testing/pico.py",
        "forward/generate.py",  # not reached by this step
    ],
)
def test_a_module_that_cannot_change_the_result_does_not_count(
    install: Install, core: Path, module: str
) -> None:
    install("acme-spin", "spin", STEP)
    before = source_digest(origin_of_spin())
    edit(core / module)
    assert source_digest(origin_of_spin()) == before


def test_a_readme_does_not_count(install: Install, tmp_path: Path) -> None:
    install("acme-spin", "spin", STEP)
    before = source_digest(origin_of_spin())
    (tmp_path / "acme-spin" / "README.md").write_text("Spins.\n")
    assert source_digest(origin_of_spin()) == before


def test_the_table_of_an_adapter_counts_with_the_builder_it_uses(
    install: Install, tmp_path: Path, core: Path
) -> None:
    install("acme-tiny", "tiny", TABLE, group=ADAPTERS)
    digests = [source_digest(adapter_origin("tiny"))]
    edit(tmp_path / "acme-tiny" / "fake_acme_tiny.py")
    digests.append(source_digest(adapter_origin("tiny")))
    edit(core / "architecture" / "rope_decoder.py")
    digests.append(source_digest(adapter_origin("tiny")))
    assert len(set(digests)) == 3


def test_shipped_steps_reach_the_acceptance_test_that_they_share(core: Path) -> None:
    users = [step_class(name)[1] for name in ("writer-refit", "prompt-kl", "soups")]
    before = [source_digest(origin) for origin in users]
    edit(core / "evaluation" / "acceptance.py")
    after = [source_digest(origin) for origin in users]
    assert all(one != two for one, two in zip(before, after, strict=True))


def test_core_digest_follows_imports(core: Path) -> None:
    before = core_digest("forward.certificate")
    edit(core / "forward" / "layerwise.py")
    assert core_digest("forward.certificate") != before
    assert core_digest("store.hashing") == core_digest("store.hashing")


def test_the_start_of_a_run_depends_on_the_tables_and_on_the_cores_own_steps(
    core: Path, tmp_path: Path
) -> None:
    ref = pico_model(tmp_path / "model").ref

    def start() -> str:
        model = open_model(ref)
        return start_key(Pair(model, model), "texts", 0)

    before = start()
    assert start() == before
    edit(core / "architecture" / "rope_decoder.py")  # the table of the model is built with it
    table_edited = start()
    edit(core / "forward" / "certificate.py")  # certifies every exact step
    certificate_edited = start()
    edit(core / "terminal.py")
    assert len({before, table_edited, certificate_edited}) == 3
    assert start() == certificate_edited
