"""A run in several processes has the bits of a run in one, also after kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rotdistill_core.errors import SetupError
from tests.execution.several_processes import KILLS

ROOT = Path(__file__).parents[2]
CASES = (
    *("1", "2", "4"),
    *("1 moments", "2 moments", "4 moments"),
    *("1 cut moments", "2 cut moments"),
)
Outcomes = dict[str, Any]


def carry_out(folder: Path, *cases: str) -> Outcomes:
    """Carry out the driver's recipe for some cases."""
    words = ["-m", "tests.execution.several_processes", str(folder), *cases]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: Outcomes = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """Return how each case ended that nothing disturbs."""
    return carry_out(folder, *CASES)


def weights_of(files: dict[str, str]) -> dict[str, str]:
    """Return the hashes of weights and checkpoints, by their paths inside the run."""
    inside = {"/".join(Path(path).parts[2:]): sha256 for path, sha256 in files.items()}
    return {
        path: sha256
        for path, sha256 in inside.items()
        if path.startswith(("weights/", "checkpoints/")) and path.endswith(".safetensors")
    }


def test_one_two_and_four_processes_give_the_same_bits(outcomes: Outcomes) -> None:
    one, two, four = (outcomes[count] for count in ("1", "2", "4"))
    assert [each["codes"] for each in (one, two, four)] == [[[0]], [[0] * 2], [[0] * 4]]
    kinds = {Path(path).suffix for path in one["files"]}
    assert {".safetensors", ".json", ".jsonl"} <= kinds
    assert one["files"] == two["files"] == four["files"]
    assert one["committed"] == two["committed"] == four["committed"]


def test_sums_of_blocks_are_the_same_in_any_number_of_processes(
    outcomes: Outcomes, folder: Path
) -> None:
    one, two, four = (outcomes[f"{count} moments"] for count in (1, 2, 4))
    assert [each["codes"] for each in (one, two, four)] == [[[0]], [[0] * 2], [[0] * 4]]
    assert [path for path in one["files"] if "sums" in path]
    # The LoRA is trained, by gradients that processes have added up, also on its own answers.
    assert [path for path in one["files"] if "adapter" in path]
    # A head is fitted, on sums that they have added up.
    (edit,) = folder.glob("1 moments/runs/*/weights/head/changed.safetensors")
    assert "lm_head.weight" in load_file(edit)
    assert one["files"] == two["files"] == four["files"]


def test_a_refit_has_the_same_bits_from_rows_and_from_sums(outcomes: Outcomes) -> None:
    cases = ("1", "1 cut moments", "2 cut moments")
    rows, sums, dealt = (outcomes[case]["files"] for case in cases)
    made = weights_of(rows)
    assert "checkpoints/full/model.safetensors" in made
    assert "weights/refit/layer_00001_heads.safetensors" in made
    assert made == weights_of(sums)
    assert sums == dealt


@pytest.mark.slow
def test_killed_processes_are_replaced_by_another_number_of_them(
    outcomes: Outcomes, folder: Path
) -> None:
    undisturbed = outcomes["1"]
    for kill, outcome in carry_out(folder, *KILLS).items():
        number, _ = KILLS[kill]
        killed, again = outcome["codes"]
        assert killed[number] == -9, kill
        assert killed[1 - number] == SetupError.exit_code, kill
        assert again == [0, 0, 0], kill
        assert outcome["files"] == undisturbed["files"], kill
        # Something was committed before the kill, and nothing of it is made again.
        assert 0 < len(outcome["before"]) < len(undisturbed["committed"]), kill
        assert Counter(outcome["committed"]) == Counter(undisturbed["committed"]), kill
        # The teacher's states of boundary 1 were saved, and its capture goes on from them. The
        # refit takes the student up at boundary 0 in any run.
        goes_on = [1] if kill == "states" else []
        assert outcome["starts"] == [*goes_on, *undisturbed["starts"]], kill
