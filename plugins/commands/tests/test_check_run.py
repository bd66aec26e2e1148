"""`check` recomputes hashes, maps and the way back from exact folds, also those of other runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_commands._check_run import check_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotdistill_core.checkpoint import file_hashes
from rotdistill_core.checkpoint.file_hashes import FileHashes, remembered_hashes
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import MODEL_HASHES, user_cache
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import (
    CheckpointRecord,
    FileRecord,
    LedgerRecord,
    StepRecord,
)
from rotdistill_core.testing import PicoWorkspace, command_line

STEPS = """
step = [
    { use = "residuals" },
    { id = "rotate", use = "procrustes" },
    { id = "permute", use = "hungarian-permute" },
    { use = "head-gauge" },
    { use = "basis-fold" },
    { use = "fidelity" },
]
"""

STEPS_OF_SMALL_RUN = """
variants = { cut = [] }
step = [{ use = "chop", layers = 1 }]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one recipe under two names: the second reuses the results of the first."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("check"))
    workspace.texts()
    teacher = workspace.model("teacher", seed=1)
    student = workspace.model("student")
    for name in ("first", "second"):
        workspace.run(workspace.recipe(STEPS, name=name, teacher=teacher, student=student))
    return workspace.folder


@pytest.fixture(params=["first", "second"])
def run(work: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy that a test may damage."""
    runs = shutil.copytree(work / "runs", tmp_path / "runs")
    return next(runs.glob(f"{request.param}-*"))


def damage(run: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file, and rewrite all ledgers as if they had always been so."""
    [path] = run.parent.glob(f"*/**/{name}")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    relative = path.relative_to(run.parent).as_posix()
    file = CommittedFile(relative, path.stat().st_size, sha256_of(path))
    for ledger in (Ledger(each.parent) for each in run.parent.glob("*/ledger.jsonl")):
        ledger.rewrite([with_file(record, file) for record in ledger.records])


def with_file(record: LedgerRecord, file: CommittedFile) -> LedgerRecord:
    """Return a record that states the length and the hash of `file`, if it is of that file."""
    if isinstance(record, FileRecord) and record.path == file.path:
        return replace(record, bytes=file.bytes, sha256=file.sha256)
    if isinstance(record, StepRecord | CheckpointRecord):
        files = tuple(file if old.path == file.path else old for old in record.files)
        return replace(record, files=files)
    return record


def test_a_whole_run_holds(run: Path) -> None:
    found = check_run(run)
    assert found.problems == []
    assert found.maps > 3 * 2  # boundaries, then heads, neurons and gauges of two layers on top
    assert found.unfolded.keys() == {"basis-fold"}
    assert 0 < found.unfolded["basis-fold"] < 1e-6
    assert found.files > 10
    assert found.models == 2


def test_a_map_that_is_no_rotation_is_named(run: Path) -> None:
    damage(run, "rotations/first-*/layer_0.safetensors", lambda t: t["map"].mul_(1.01))
    problems = check_run(run).problems
    assert (
        'step "rotate", residual.0: the rotation is off orthogonal by 2.01e-02, more than 1e-05.'
        in problems
    )
    assert any(
        p.startswith('step "rotate", residual.0: there and back again changes rows by')
        for p in problems
    )


def test_a_permutation_that_takes_a_neuron_twice_is_named(run: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["map"][0] = tensors["map"][1]

    damage(run, "rotations/first-*/neurons_0.safetensors", twice)
    assert any(
        ", neurons.0: the permutation is not a bijection" in p for p in check_run(run).problems
    )


def test_folded_weights_that_do_not_lead_back_are_named(run: Path) -> None:
    damage(
        run,
        "weights/basis-fold/changed.safetensors",
        lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(1.001),
    )
    [problem] = check_run(run).problems
    assert (
        problem == 'step "basis-fold": unfolded, its weights are off by 1.0e-03, more than 1e-05.'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "file", ["checkpoints/full/model.safetensors", "weights/basis-fold/changed.safetensors"]
)
def test_weights_that_are_not_finite_are_named(
    work: Path, tmp_path: Path, file: str, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    # Runs of before casts were looked at may hold such files, with true hashes.
    run = next((work / "runs").glob("first-*"))
    copy = shutil.copytree(run, tmp_path / "runs" / run.name)
    damage(copy, file, spoil)
    [path] = copy.glob(file)
    message = f"{path}: model.layers.1.mlp.down_proj.weight holds NaN or Inf."
    assert message in check_run(copy).problems


def test_a_flipped_byte_is_named_and_ends_the_check(run: Path) -> None:
    [path] = run.parent.glob("first-*/weights/basis-fold/undo.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    found = check_run(run)
    assert found.problems == [f"{path}: does not match its sha256 in the ledger."]
    assert (found.maps, found.unfolded) == (0, {})


@pytest.mark.parametrize("ending", ["", "-"])
def test_a_run_whose_name_has_a_dot_is_no_recipe(
    run: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(run.parents[1])
    shutil.copytree(run, run.with_name("small-1.5b-0a1b2c3d"))
    code, _, err = command_line("check", f"small-1.5b{ending}")
    assert code == 0, err
    assert command_line("check", "small-1.5b.toml")[0] == 2


def test_a_folder_without_a_ledger_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a run"):
        check_run(tmp_path)


def test_a_student_that_is_gone_is_named(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(ref: Any, *_: Any) -> None:
        raise SetupError(
            f"{ref.model}: is neither a folder here nor a Hugging Face id (owner/name)."
        )

    monkeypatch.setattr("rotdistill_commands._check_run.open_model", gone)
    with pytest.raises(SetupError, match="student: is neither a folder"):
        check_run(next((work / "runs").glob("first-*")))


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without an exact step; its teacher has a file large enough to be remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", -(10**12))  # files are new here
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    teacher = workspace.model("teacher", vocab_size=9000)
    student = workspace.model("student")
    recipe = workspace.recipe(STEPS_OF_SMALL_RUN, teacher=teacher, student=student)
    return workspace.run(recipe).folder


def test_models_are_compared_with_those_that_the_run_started_from(small_run: Path) -> None:
    found = check_run(small_run)
    assert (found.models, found.models_not_here, found.problems) == (2, [], [])
    student = small_run.parents[1] / "student"
    settings = student / "generation_config.json"
    settings.write_text(settings.read_text() + " ")
    [problem] = check_run(small_run).problems
    assert problem == (
        f"student {student}: its files in {student} are not those that the run started from."
    )


def test_a_byte_that_runs_do_not_see_is_seen_by_check(small_run: Path) -> None:
    teacher = small_run.parents[1] / "teacher"
    path = teacher / "model.safetensors"
    old, cached = open_model(ModelRef(model=str(teacher))), remembered_hashes()
    assert old.sha256 == replace(old, hashes=FileHashes()).sha256
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(size // 8)  # between two places of the sample
        byte = stream.read(1)[0]
        stream.seek(size // 8)
        stream.write(bytes([byte ^ 1]))
    pretend_unchanged(path)
    assert remembered_hashes().of([path]) == cached.of([path]) != [sha256_of(path)]
    [problem] = check_run(small_run).problems
    assert problem.endswith("are not those that the run started from.")
    assert f"teacher {teacher}" in problem


def pretend_unchanged(path: Path) -> None:
    """Let the cache of hashes believe that a file was hashed as it is now."""
    cache = user_cache() / MODEL_HASHES
    status = path.stat()
    name = f"{status.st_dev}:{status.st_ino}"
    known = json.loads(cache.read_text())
    _, _, size, sample = known[name][0].split()
    state = f"{status.st_ctime_ns} {status.st_mtime_ns} {size} {sample}"
    known[name] = [state, known[name][1], digest(name, state, known[name][1])]
    cache.write_text(json.dumps(known))


def test_a_model_that_is_not_here_is_named_and_is_no_problem(small_run: Path) -> None:
    teacher = small_run.parents[1] / "teacher"
    shutil.rmtree(teacher)
    found = check_run(small_run)
    assert (found.models, found.problems) == (1, [])
    assert found.models_not_here == [
        f"teacher {teacher}: is not on this machine, so it was not hashed."
    ]
    code, _, err = PicoWorkspace(small_run.parents[1]).command("check", str(small_run))
    assert code == 0
    assert "is not on this machine, so it was not hashed." in err.replace("\n", " ")


def test_a_torn_model_is_a_problem(small_run: Path) -> None:
    student = small_run.parents[1] / "student"
    path = student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    [problem] = check_run(small_run).problems
    assert problem.startswith(f"student {student}: cannot be opened any more: {path}: not a valid")


def test_a_reused_step_is_in_the_ledger_of_both_runs(work: Path) -> None:
    first, second = (
        Ledger(next((work / "runs").glob(f"{name}-*"))) for name in ("first", "second")
    )
    [fold] = [record for record in first.steps if record.id == "basis-fold"]
    assert fold in second.steps
    assert not list(second.folder.glob("weights/*"))


def test_the_random_state_of_torch_is_left_alone(work: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    check_run(next((work / "runs").glob("first-*")))
    assert torch.rand(1) == wanted
