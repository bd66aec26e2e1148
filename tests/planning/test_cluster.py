"""Several machines: what is dealt, what is added up, and what goes between machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.cluster import HERE, KINDS, Cluster, cluster_of
from rotdistill_core.planning.cost import Added, Cost, Gathered
from rotdistill_core.planning.machine import Machine
from rotdistill_core.planning.rates import ASSUMED

MACHINE = Machine(ram=64 << 30, gpus=(), disk=1 << 40, cores=4, profile=ASSUMED)
SPEED = KINDS["h100"].operations
NETWORK = KINDS["h100"].network


def cluster(nodes: int, gpus: int) -> Cluster:
    return cluster_of(nodes, gpus, "h100", MACHINE)


def test_what_is_dealt_is_divided_by_the_processes_and_the_rest_is_not() -> None:
    cost = Cost(operations=10 * SPEED, dealt_operations=8 * SPEED, device_bytes=1)
    assert cluster(1, 1).seconds(cost) == pytest.approx(10)
    assert cluster(1, 8).seconds(cost) == pytest.approx(2 + 1)
    assert cluster(4, 8).seconds(cost) == pytest.approx(2 + 8 / 32)


def test_what_needs_no_gpu_takes_the_time_of_the_processors() -> None:
    cost = Cost(operations=3e12)
    assert cluster(4, 8).seconds(cost) == pytest.approx(3)


def test_sums_go_round_in_a_ring_and_only_between_machines() -> None:
    cost = Cost(added_up=(Added(size=1e9, times=3),), device_bytes=1)
    assert cluster(1, 8).traffic_bytes(cost) == 0
    assert cluster(2, 1).traffic_bytes(cost) == pytest.approx(3e9)
    assert cluster(4, 8).traffic_bytes(cost) == pytest.approx(2 * 31 / 32 * 3e9)
    assert cluster(2, 1).seconds(cost) == pytest.approx(3e9 / NETWORK)


def test_sums_of_dealt_blocks_are_added_up_less_often_by_more_processes() -> None:
    cost = Cost(added_up=(Added(size=1e9, times=32, dealt=True),))
    assert cluster(2, 1).traffic_bytes(cost) == pytest.approx(16e9)
    assert cluster(2, 16).traffic_bytes(cost) == pytest.approx(2 * 31 / 32 * 1e9)
    assert cluster(2, 32).traffic_bytes(cost) == pytest.approx(2 * 63 / 64 * 1e9)


def test_gathered_rows_are_sent_once() -> None:
    many = Cost(gathered=(Gathered(8e9, 80_000),))
    # Three of four machines send their rows, so each of the four 1.5e9 in the mean.
    assert cluster(4, 2).traffic_bytes(many) == pytest.approx(1.5e9)
    assert cluster(1, 8).traffic_bytes(many) == 0


def test_few_batches_are_not_dealt_evenly() -> None:
    assert cluster(2, 1).traffic_bytes(Cost(gathered=(Gathered(3e9, 3),))) == pytest.approx(0.5e9)
    assert cluster(2, 4).traffic_bytes(Cost(gathered=(Gathered(4e9, 4),))) == 0
    assert cluster(2, 4).traffic_bytes(Cost(gathered=(Gathered(5e9, 5),))) == pytest.approx(0.5e9)
    assert cluster(2, 1).traffic_bytes(Cost(gathered=(Gathered(0, 0),))) == 0


def test_costs_keep_how_they_split() -> None:
    part = replace(
        Cost(operations=4.0).dealt(), added_up=(Added(10, 2),), gathered=(Gathered(3.0, 7),)
    )
    both = part.repeated(2) + Cost(operations=5.0)
    assert (both.operations, both.dealt_operations) == (13, 8)
    assert both.gathered == (Gathered(6, 7),)
    assert both.added_up == (Added(10, 4),)


def test_a_machine_of_the_table_has_its_memory_and_this_one_its_own() -> None:
    of_table = cluster(2, 8).machine(MACHINE)
    assert of_table.gpus == (80 << 30,) * 8
    assert of_table.ram == 8 * KINDS["h100"].ram
    here = cluster_of(2, None, None, MACHINE)
    assert (here.name, here.ranks) == (HERE, 2)
    assert here.machine(MACHINE) == replace(MACHINE, disk=None)
    assert cluster_of(1, None, None, MACHINE).machine(MACHINE) == MACHINE
    speed = MACHINE.profile.host.float32
    assert here.kind.operations == speed
    assert cluster_of(1, 2, "here", MACHINE).kind.operations == speed / 2
    assert of_table.profile.gpu.bfloat16 == pytest.approx(SPEED)
    assert replace(of_table.profile, gpu=ASSUMED.gpu) == MACHINE.profile


def test_each_constant_says_where_it_is_from() -> None:
    for name in (*KINDS, HERE):
        constants = cluster_of(1, 1, name, MACHINE).constants()
        assert all(line.endswith(("(assumed)", "(measured)", "(data sheet)")) for line in constants)
    unknown = replace(MACHINE, profile=None)
    speeds = [cluster_of(1, 1, HERE, here).constants()[0] for here in (MACHINE, unknown)]
    assert [speed.rpartition(" ")[2] for speed in speeds] == ["(measured)", "(assumed)"]


@pytest.mark.parametrize(
    ("nodes", "gpus", "name", "message"),
    [
        (0, 1, "h100", r"--nodes 0: must be a number from 1 to 4096: how many machines"),
        (1, -3, "h100", r"--gpus -3: must be a number from 1 to 4096: how many GPUs each"),
        (10**9, 1, None, r"--nodes 1000000000: must be"),
        (1, 1, "h10", r'--gpu h10: is no kind of GPU that is known\. Did you mean "h100"\? Write'),
    ],
)
def test_nonsense_is_refused(nodes: int, gpus: int, name: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cluster_of(nodes, gpus, name, MACHINE)


def test_a_kind_may_be_spelt_as_people_do() -> None:
    assert cluster_of(1, 1, "RTX 4090", MACHINE).name == "rtx4090"
