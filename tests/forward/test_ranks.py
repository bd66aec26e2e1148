"""The processes of a run, as far as one process shows; `tests/execution` runs several."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rotdistill_core.errors import SetupError
from rotdistill_core.forward.ranks import ALONE, Numbering, launch_name, start_ranks

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "4"}])
def test_without_a_launcher_there_is_one_process(environment: dict[str, str]) -> None:
    assert start_ranks(environment) is ALONE


def test_one_process_does_everything_and_loads_no_torch() -> None:
    code = (
        "import sys; from rotdistill_core.forward.ranks import start_ranks; "
        "ranks = start_ranks({'RANK': '0', 'WORLD_SIZE': '1', 'TORCHELASTIC_RUN_ID': 'job'}); "
        "assert ranks.launch and ranks.leads; "
        "assert ranks.mine([1, 2, 3]) == [1, 2, 3] and ranks.lead(lambda: 4) == 4; "
        "assert ranks.lead_alone(lambda: 5, 0) == 5; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_of_torchrun_is_read() -> None:
    assert Numbering.of(TORCHRUN) == Numbering(1, 4, 1, "")


@pytest.mark.parametrize(
    "change", [{"RANK": "4"}, {"RANK": "-1"}, {"LOCAL_RANK": ""}, {"WORLD_SIZE": "many"}]
)
def test_an_environment_that_makes_no_sense_is_told_with_its_values(
    change: dict[str, str],
) -> None:
    (name, value), *_ = change.items()
    with pytest.raises(
        SetupError, match=f"{name}='{value}'.*Start several processes with torchrun"
    ):
        Numbering.of({**TORCHRUN, **change})


def test_a_launch_has_a_name_that_its_restarts_share() -> None:
    job = {"TORCHELASTIC_RUN_ID": "tour", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert launch_name(job) == launch_name({**job, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert launch_name(job) != launch_name({"TORCHELASTIC_RUN_ID": "other"})
    assert launch_name({}) == ""


def test_a_launch_without_a_name_is_that_of_its_launcher() -> None:
    # The parent of this process stands for torchrun.
    nameless = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"}
    assert launch_name(nameless) == launch_name(dict(nameless))
    assert launch_name(nameless) != launch_name({**nameless, "MASTER_PORT": "29501"})
