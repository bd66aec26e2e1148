"""A plan lists what a run then does: results, their sizes, and what does not fit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.planning import text_counts
from rotdistill_core.planning.cost import Cost
from rotdistill_core.planning.machine import Machine, load, this_machine
from rotdistill_core.planning.plan import (
    ESTIMATED_FROM_STAGE,
    Plan,
    PlanLine,
    build_plan,
    device_warnings,
    format_bytes,
)
from rotdistill_core.planning.rates import ASSUMED
from rotdistill_core.planning.times import time_in_words
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, run_recipe

CPU = Machine(ram=10**12, gpus=(), disk=10**12, cores=2, profile=ASSUMED)
GPU = replace(CPU, gpus=(10**12,))
THIRD_PARTY = '''
from typing import Literal

from rotdistill_core import Cost, CostContext, Weights, hookimpl, step


@step
class Priced:
    """A step that states its cost."""

    use: Literal["priced"] = "priced"

    def cost(self, context: CostContext) -> Cost:
        return Cost(
            host_bytes=1000 * context.student.depth,
            device_bytes=200,
            disk_bytes=30,
            operations=6e11,
            read_bytes=4,
            traffic_bytes=5,
        )

    def context_after(self, context: CostContext) -> CostContext:
        return context.with_student(num_hidden_layers=1)

    @hookimpl
    def fold(self, weights: Weights) -> Weights:
        return weights


@step
class Plain:
    """A step that states nothing."""

    use: Literal["plain"] = "plain"

    @hookimpl
    def fold(self, weights: Weights) -> Weights:
        return weights


@hookimpl
def steps() -> list[type]:
    return [Priced, Plain]
'''


@pytest.fixture
def exact_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pico template puts a word before a message and one after it, and asks with a third."""
    monkeypatch.setattr(text_counts, "TEMPLATE_TOKENS", 3)


@pytest.fixture
def third_party(before_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a distribution of one file with two steps, and a recipe that uses both."""
    site = before_run / "site"
    info = site / "third_party-0.1.0.dist-info"
    info.mkdir(parents=True)
    (site / "third_party.py").write_text(THIRD_PARTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[rotdistill]\npriced = third_party\nplain = third_party\n"
    )
    monkeypatch.syspath_prepend(str(site))
    steps = 'step = [{ use = "priced" }, { use = "plain" }]'
    return PicoWorkspace(before_run).recipe(steps)


def plan_of(machine: Machine | None = None, path: str = "trial.toml") -> Plan:
    machine = machine or this_machine(Path("runs"))
    return build_plan(load_recipe(Path(path)), Path("runs"), machine)


def capture_bytes(planned: Plan) -> dict[str, int]:
    """Return the disk that each capture takes, by its id."""
    return {line.id: line.disk_bytes for line in planned.lines if line.use == "residuals"}


def test_a_third_party_step_is_planned_with_the_cost_that_it_states(third_party: Path) -> None:
    [line] = [line for line in plan_of(CPU).lines if line.id == "priced"]
    assert line.note == ""
    assert line.plugin == "third-party 0.1.0"
    assert (line.ram_bytes, line.gpu_bytes, line.traffic_bytes) == (3200, 0, 0)
    assert (line.disk_bytes, line.read_bytes) == (30, 4)
    assert line.seconds == pytest.approx(6e11 / ASSUMED.host.float32, abs=0.1)


def test_a_gpu_takes_the_device_memory_and_the_traffic(third_party: Path) -> None:
    [line] = [line for line in plan_of(GPU).lines if line.id == "priced"]
    assert (line.ram_bytes, line.gpu_bytes, line.traffic_bytes) == (3000, 200, 5)


@pytest.mark.parametrize(
    ("devices", "places"),
    [
        (("cuda:0", "cuda:1"), {"cuda:0", "cuda:1"}),
        (("cuda:1", "cuda:1"), {"cuda:1"}),
        (("cpu", "cuda:1"), {"cuda:1"}),
        (("cuda", "cpu"), {"cuda:0"}),
        (("cpu", "cpu"), set()),
    ],
)
def test_memory_is_counted_on_the_device_that_the_recipe_names(
    third_party: Path, devices: tuple[str, str], places: set[str]
) -> None:
    machine = replace(CPU, gpus=(10**12, 10**12))
    names = {"teacher.device": devices[0], "student.device": devices[1]}
    planned = build_plan(load_recipe(Path("trial.toml"), names), Path("runs"), machine)
    assert planned.totals.by_gpu.keys() == places
    answers = next(line for line in planned.lines if "answers" in line.id)
    assert answers.by_gpu.keys() == {machine.device_of(devices[0])} - {"cpu"}
    assert planned.shortfalls == []
    lacking = replace(machine, gpus=(10**12,))
    small = build_plan(load_recipe(Path("trial.toml"), names), Path("runs"), lacking)
    missing = [line for line in small.shortfalls if "this machine has cuda:0" in line]
    assert len(missing) == ("cuda:1" in places)


def test_a_third_party_step_without_a_cost_is_estimated_from_its_stage(third_party: Path) -> None:
    planned = plan_of(CPU)
    [line] = [line for line in planned.lines if line.id == "plain"]
    assert line.note == ESTIMATED_FROM_STAGE
    whole = planned.models["student"].shape
    left = whole.changed(num_hidden_layers=1)  # after the step before it
    assert line.ram_bytes == line.disk_bytes == left.parameters() * 4
    assert line.read_bytes == left.bytes
    assert left.parameters() < whole.parameters()


@pytest.mark.slow
@pytest.mark.usefixtures("exact_template")
def test_states_that_two_captures_share_are_planned_once(before_run: Path) -> None:
    path = before_run / "trial.toml"
    control = '{ id = "shuffled", use = "residuals", control = "shuffled" },'
    basis = '{ id = "basis"'
    text = path.read_text().replace(basis, control + basis)
    text = text.replace("base = []", 'base = ["residuals"], shuffled = ["shuffled"]')
    path.write_text(text.replace('full = ["', 'full = ["residuals", "'))
    planned = capture_bytes(plan_of())
    shards = run_recipe(path).folder.glob("shards*/**/*.safetensors")
    sizes = {shard: shard.stat().st_size for shard in shards}
    teacher = sum(size for shard, size in sizes.items() if "teacher" in shard.parts)
    # The control writes rows of its own, as many as the teacher's.
    assert planned["residuals"] == pytest.approx(planned["shuffled"], abs=0.1 * teacher)
    assert sum(planned.values()) == pytest.approx(sum(sizes.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("exact_template")
def test_one_capture_after_two_chains_is_planned_twice(before_run: Path) -> None:
    path = before_run / "trial.toml"
    path.write_text(path.read_text().replace('full = ["', 'full = ["chop", "'))
    lines = [line for line in plan_of().lines if line.use == "residuals"]
    shards = run_recipe(path).folder.glob("shards*/**/*.safetensors")
    assert len(lines) == 2
    written = sum(shard.stat().st_size for shard in shards)
    assert sum(line.disk_bytes for line in lines) == pytest.approx(written, rel=0.1)


def test_a_variant_without_a_step_is_saved_too(before_run: Path) -> None:
    path = before_run / "trial.toml"
    every_step = 'full = ["chop", "residuals", "fidelity", "'
    path.write_text(path.read_text().replace('full = ["', every_step))
    saved = [line for line in plan_of().lines if line.id == "checkpoints"]
    assert {"base", "full"} <= {variant for line in saved for variant in line.variants}


@pytest.mark.slow
@pytest.mark.usefixtures("exact_template")
def test_a_plan_lists_what_the_run_then_makes(before_run: Path) -> None:
    first = plan_of()
    assert {line.why for line in first.todo} <= {
        "not made before",
        "not made before from these models and texts",
        "compared with transformers before anything is made",
        "these steps have no checkpoint yet",
    }
    outcome = run_recipe(before_run / "trial.toml")
    shards = [path for path in outcome.folder.rglob("*.safetensors") if "shards" in path.parts]
    written = sum(path.stat().st_size for path in shards)
    assert capture_bytes(first)["residuals"] == pytest.approx(written, rel=0.1)
    again = plan_of()
    assert again.todo == []
    assert {"teacher's answers", "chop", "fidelity"} <= {line.id for line in again.lines}


@pytest.mark.usefixtures("before_run")
def test_lessons_are_planned_with_what_they_cost_and_how_many_there_can_be() -> None:
    def planned(*sets: str) -> Plan:
        loaded = load_recipe(Path("trial.toml"), [f"lessons.{each}" for each in sets])
        return build_plan(loaded, Path("runs"), CPU)

    without, few = planned(), planned("count=10", "from=teacher")
    assert not any("lessons" in line.id for line in without.lines)
    [line] = [line for line in few.lines if line.id == "10 lessons"]
    assert line.seconds > 0 or line.ram_bytes > 0
    assert few.texts.texts["fit"] == without.texts.texts["fit"] + 10
    assert capture_bytes(few)["residuals"] > capture_bytes(without)["residuals"]
    Path("forms.tsv").write_text("en\tw1 {topic}\n", encoding="utf-8")
    [note] = [
        note
        for note in planned("count=5000", "forms=forms.tsv", "general=0.0").notes
        if note.startswith("lessons:")
    ]
    assert "of the 5000 that lessons.count asks for can be made at most" in note


def test_a_reused_result_costs_nothing(after_run: Path) -> None:
    planned = plan_of()
    assert planned.lines
    for line in planned.lines:
        sizes = (line.ram_bytes, line.gpu_bytes, line.disk_bytes, line.read_bytes, line.seconds)
        assert (line.reused, sizes) == (True, (0, 0, 0, 0, 0.0))
    assert (planned.totals.seconds, planned.loading) == (0.0, 0.0)
    assert planned.totals.ram_bytes == planned.baseline_memory
    assert planned.totals.disk_bytes == 0


def test_a_refused_cut_names_its_step(before_run: Path) -> None:
    loaded = load_recipe(Path("trial.toml"), ["chop.layers=9"])
    with pytest.raises(RecipeError, match=r'^step "chop": layers = 9, but the student has 3'):
        build_plan(loaded, Path("runs"), CPU)


def test_a_variant_without_a_capture_is_refused(before_run: Path) -> None:
    path = before_run / "trial.toml"
    path.write_text(path.read_text().replace('full = ["basis"', 'full = ["residuals", "basis"'))
    with pytest.raises(RecipeError, match=r'"fidelity": needs captured states, .* in "base"\.'):
        plan_of()


def small_plan(machine: Machine, *lines: PlanLine) -> Plan:
    return Plan(
        folder=Path("runs/trial"),
        lines=list(lines),
        models={},
        texts=text_counts.TextCounts(0, {}, {}, 0, 0),
        machine=machine,
        baseline_memory=100,
    )


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_without_a_tokenizer_is_named(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.chdir(pico_workspace.folder)
    bare = pico_workspace.model("bare", seed=1)
    (bare / "tokenizer.json").unlink()
    path = pico_workspace.recipe('[[step]]\nuse = "chop"\nlayers = 1\n', **{role: bare})
    with pytest.raises(SetupError, match="bare: has no tokenizer: none of"):
        build_plan(load_recipe(path), pico_workspace.runs, CPU)


def test_totals_are_peaks_of_memory_and_sums_of_the_rest() -> None:
    one = PlanLine(id="one", reused=False, why="", ram_bytes=5, disk_bytes=3, seconds=1.0)
    two = PlanLine(id="two", reused=False, why="", ram_bytes=2, disk_bytes=4, traffic_bytes=7)
    old = PlanLine(id="old", reused=True, why="run")
    totals = small_plan(CPU, one, two, old).totals
    assert (totals.ram_bytes, totals.gpu_bytes) == (105, 0)
    assert (totals.disk_bytes, totals.traffic_bytes, totals.seconds) == (
        7,
        7,
        1.0 + ASSUMED.loading,
    )


@pytest.mark.parametrize(
    ("machine", "resource"),
    [
        (replace(GPU, ram=10), "needs about 0 MB of memory; 0 MB are free"),
        (replace(GPU, gpus=(10,)), "needs about 0 MB of memory on cuda:0, which has 0 MB"),
        (replace(GPU, disk=10), "0 MB are free on the disk"),
    ],
)
def test_a_shortfall_names_the_largest_result(machine: Machine, resource: str) -> None:
    small = PlanLine(
        id="small",
        reused=False,
        why="",
        ram_bytes=1,
        gpu_bytes=1,
        by_gpu={"cuda:0": 1},
        disk_bytes=1,
    )
    large = PlanLine(
        id="large",
        reused=False,
        why="",
        ram_bytes=20,
        gpu_bytes=20,
        by_gpu={"cuda:0": 20},
        disk_bytes=20,
    )
    [shortfall] = small_plan(machine, small, large).shortfalls
    assert resource in shortfall
    assert '"large"' in shortfall


def test_a_plan_with_nothing_to_make_fits_everywhere() -> None:
    machine = Machine(ram=0, gpus=(), disk=0, cores=1)
    assert small_plan(machine, PlanLine(id="old", reused=True, why="run")).shortfalls == []


def test_a_machine_that_was_not_measured_has_no_times(before_run: Path) -> None:
    planned = plan_of(replace(CPU, profile=None))
    assert {line.seconds for line in planned.todo} == {None}
    assert planned.totals.seconds is None
    assert "how long it takes is not known" in planned.summary
    assert any("was not measured" in note for note in planned.time_notes)


def test_times_of_an_absent_gpu_are_said_to_be_assumed(before_run: Path) -> None:
    assert any("GPU was assumed" in note for note in plan_of(GPU).time_notes)
    measured = replace(GPU, profile=replace(ASSUMED, gpu_measured=True))
    assert not any("assumed" in note for note in plan_of(measured).time_notes)
    assert not any("assumed" in note for note in plan_of(CPU).time_notes)


def test_every_result_has_a_time_and_the_whole_is_their_sum(before_run: Path) -> None:
    planned = plan_of(CPU)
    times = [line.seconds for line in planned.todo]
    assert all(time is not None and time >= 0 for time in times)
    assert planned.totals.seconds == pytest.approx(sum(times) + ASSUMED.loading)
    assert planned.totals.reused_seconds == 0


def test_what_is_reused_has_the_time_that_it_took(after_run: Path) -> None:
    planned = plan_of(CPU)
    shown = run_recipe(Path("trial.toml")).steps
    for line in planned.lines:
        if line.stage:
            assert line.reused_seconds == round(shown[line.variants[0], line.id].seconds, 1)


def test_a_step_that_was_made_before_and_is_made_anew_takes_as_long(after_run: Path) -> None:
    took = {(line.id, *line.variants): line.reused_seconds for line in plan_of(CPU).lines}
    anew = build_plan(load_recipe(Path("trial.toml")), Path("runs"), CPU, fresh=True)
    for line in anew.lines:
        if line.stage:
            assert line.seconds == took[line.id, *line.variants]
    other = build_plan(load_recipe(Path("trial.toml"), ["seed=12"]), Path("runs"), CPU)
    assert all(line.seconds is not None for line in other.lines)


def test_bytes_are_written_for_people() -> None:
    assert format_bytes(2.34e9) == "2.3 GB"
    assert format_bytes(12e6) == "12 MB"


def test_a_free_machine_is_read_without_the_folder_of_runs(tmp_path: Path) -> None:
    machine = this_machine(tmp_path / "not" / "there")
    assert machine.ram > 0
    assert machine.disk > 0
    assert machine.cores > 0


def test_shared_files_count_in_the_first_line_that_has_them() -> None:
    assert Cost(shared_files={"a": 1}) + Cost(shared_files={"a": 1}) == Cost(shared_files={"a": 1})


def test_a_busy_machine_takes_longer_by_its_share_of_a_core(
    before_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.planning.plan.load", lambda: 3.0)
    planned = plan_of(CPU)
    assert planned.totals.seconds is not None
    idle, busy = planned.totals.seconds, 4 * planned.totals.seconds
    assert planned.time_notes == [
        f"times: are those of an idle machine, {time_in_words(idle)}. Other programs compute now, "
        f"3.0 for each core: beside them the run takes {time_in_words(busy)}."
    ]
    monkeypatch.setattr("rotdistill_core.planning.plan.load", lambda: 1.0)
    assert planned.time_notes == []


def test_a_load_that_has_ended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setattr("psutil.getloadavg", lambda: (3.0 * cores, 0.0, 0.0))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 100.0)
    assert load() == 3.0
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 2.0)
    assert load() == pytest.approx(0.06)


def test_rates_that_were_measured_beside_other_programs_say_so(
    before_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.planning.plan.load", lambda: 0.0)
    profile = replace(ASSUMED, in_use=0.5)
    (note,) = plan_of(replace(CPU, profile=profile)).time_notes
    assert "used 50% of the processors" in note
    assert "--recalibrate" in note
    assert plan_of(replace(CPU, profile=replace(profile, in_use=0.1))).time_notes == []


def test_a_gpu_that_is_not_here_is_a_shortfall_with_a_remedy(before_run: Path) -> None:
    loaded = load_recipe(Path("trial.toml"), {"teacher.device": "cuda"})
    (shortfall,) = build_plan(loaded, Path("runs"), CPU).shortfalls
    assert "of GPUs this machine has none; write device =" in shortfall
    (warning,) = device_warnings(loaded.recipe, CPU)
    assert warning.startswith('warning: teacher.device = "cuda": of GPUs this machine has none')
    assert device_warnings(loaded.recipe, GPU) == []
