"""The verb `plan`: its document, its exit codes, and that it loads nothing heavy."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rotdistill_residuals import _cost

from rotdistill_core.data.splits import Split
from rotdistill_core.planning import text_counts
from rotdistill_core.planning.machine import Machine
from rotdistill_core.testing import PicoWorkspace, command_line

ROOT = Path(__file__).parents[3]
TEACHER, STUDENT = 32_763_876_352, 3_085_938_688
"""Published parameters of Qwen2.5 32B and 3B."""
Edit = Callable[[str, str], None]
STEPS = """
variants = { base = [], full = ["basis", "fold"] }
student.save_dtype = "bfloat16"
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""


@pytest.fixture
def recipe(pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe in the current folder that has not run."""
    monkeypatch.chdir(pico_workspace.folder)
    pico_workspace.model(num_hidden_layers=3)
    return pico_workspace.recipe(STEPS)


@pytest.fixture
def edit(recipe: Path) -> Edit:
    """Return a function that replaces a part of the recipe."""

    def replace(old: str, new: str) -> None:
        text = recipe.read_text()
        assert old in text
        recipe.write_text(text.replace(old, new))

    return replace


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))


def processor_time() -> float:
    """Return the processor seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def plan_of_32b() -> dict[str, Any]:
    """Return the plan of the 32B recipe, made by a process that must not load torch."""
    script = (
        "import sys; from rotdistill_core.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = ["plan", "recipes/tour_guide_qwen32b.toml", "--json"]
    start = processor_time()
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = processor_time() - start
    assert done.returncode == 0 or (done.returncode == 3 and "does not fit here" in done.stderr)
    assert done.stderr.splitlines()[-1] == "False", "torch was loaded"
    return {**json.loads(done.stdout), "processor seconds": seconds}


@pytest.mark.slow
def test_the_32b_recipe_is_planned_offline_in_less_than_two_seconds(
    plan_of_32b: dict[str, Any],
) -> None:
    start = processor_time()
    subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
    imports = processor_time() - start
    assert plan_of_32b["processor seconds"] < max(2, imports)  # on a busy machine both take longer
    models = plan_of_32b["models"]
    assert (models["teacher"]["parameters"], models["teacher"]["bytes"]) == (TEACHER, 2 * TEACHER)
    assert (models["student"]["parameters"], models["student"]["bytes"]) == (STUDENT, 2 * STUDENT)


def test_the_sizes_of_the_32b_recipe_are_those_derived_by_hand(plan_of_32b: dict[str, Any]) -> None:
    texts, steps = plan_of_32b["texts"], {step["id"]: step for step in plan_of_32b["steps"]}
    has_gpu = bool(plan_of_32b["machine"]["gpus"])
    number = 2 if has_gpu else 4  # bytes while models compute
    prompt = texts["shared prompt"]
    rows = sum(texts["rows"].values()) + prompt
    a_text = sum(texts["rows"][split] for split in ("fit", "validation")) / sum(
        texts["texts"][split] for split in ("fit", "validation")
    )

    # In bfloat16, the teacher's last boundary on all texts; every boundary on held-out ones and 48
    # others, with the prompt; and the student's on these 48.
    some = 48 * a_text + prompt
    inner = some + texts["rows"]["heldout"]
    states = (64 * inner + rows) * 5120 * 2 + 37 * some * 2048 * 2
    # All states at one boundary, as they are computed, until the capture is finished.
    states += rows * 5120 * number
    assert 4e9 < states < 65 * rows * 5120 * 2 / 3
    assert steps["residuals"]["disk_bytes"] == pytest.approx(states, rel=0.1)

    # The teacher's states and a copy that is written, 2.5 layers, and one batch of activations.
    layer = 5120 * (40 * 128 * 2 + 8 * 128 * 2) + 3 * 5120 * 27648  # q, o, k, v and the MLP
    batch = 1536 * 3 * 27648  # gate, up and their product
    capture = (2 * rows * 5120 + 2.5 * layer + batch) * number
    planned = steps["residuals"]["ram_bytes"] + steps["residuals"]["gpu_bytes"]
    assert planned == pytest.approx(capture, rel=0.1)

    # All weights, and keys and values of 64 answers of about 180 tokens.
    answers = TEACHER * number + 64 * 180 * 64 * 2 * 8 * 128 * number
    peak = max(plan_of_32b["ram_bytes"], plan_of_32b["gpu_bytes"])
    assert peak == pytest.approx(answers, rel=0.1)

    # Of five variants two keep the tied head: base, and the one that only fits the head anew.
    head = 151936 * 2048
    checkpoints = 4 * (STUDENT + head) * 2 - head * 2 + STUDENT * 2
    saved = [step["disk_bytes"] for step in plan_of_32b["steps"] if step["id"] == "checkpoints"]
    assert sum(saved) == pytest.approx(checkpoints, rel=0.1)


def test_reads_and_traffic_are_part_of_the_document(plan_of_32b: dict[str, Any]) -> None:
    steps = {step["id"]: step for step in plan_of_32b["steps"]}
    layers = (TEACHER - 2 * 152064 * 5120) * 2  # its head is not tied
    assert steps["residuals"]["read_bytes"] > layers
    reads = [step["read_bytes"] for step in plan_of_32b["steps"]]
    assert plan_of_32b["read_bytes"] == sum(reads)
    assert bool(plan_of_32b["traffic_bytes"]) is bool(plan_of_32b["machine"]["gpus"])


def test_the_document_keeps_its_keys(recipe: Path) -> None:
    code, out, err = command_line("plan", "trial.toml", "--json")
    assert (code, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    assert document.keys() == {
        "run_dir",
        "steps",
        "models",
        "texts",
        "ram_bytes",
        "gpu_bytes",
        "by_gpu",
        "disk_bytes",
        "read_bytes",
        "traffic_bytes",
        "seconds",
        "reused_seconds",
        "loading",
        "time",
        "machine",
        "shortfalls",
    }
    steps = {step["id"]: step for step in document["steps"]}
    assert steps["fold"].keys() == {
        "id",
        "use",
        "stage",
        "plugin",
        "needs",
        "variants",
        "reused",
        "why",
        "note",
        "ram_bytes",
        "gpu_bytes",
        "by_gpu",
        "disk_bytes",
        "less_disk",
        "read_bytes",
        "traffic_bytes",
        "seconds",
        "reused_seconds",
        "prompts",
        "answer_tokens",
        "missing",
    }
    assert steps["fold"]["needs"] == ["captured states", "maps"]
    assert document["shortfalls"] == []
    assert document["models"]["student"]["source"] == "model"
    assert document["machine"].keys() == {"ram", "gpus", "disk", "cores", "profile"}


def test_the_table_has_a_row_for_each_step(recipe: Path) -> None:
    code, out, err = command_line("plan", "trial.toml")
    assert (code, err) == (0, "")
    for step in ("teacher's answers", "chop", "basis (procrustes)", "checkpoints"):
        assert step in out
    assert "peak memory about" in out


def test_a_step_without_a_cost_says_that_it_is_estimated(
    edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "uncosted_step-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: uncosted-step\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[rotdistill]\nplain = uncosted_step\n")
    (site / "uncosted_step.py").write_text(
        "from typing import Literal\n"
        "from rotdistill_core import Weights, hookimpl, step\n"
        "@step\n"
        "class Plain:\n"
        '    use: Literal["plain"] = "plain"\n'
        "    @hookimpl\n"
        "    def fold(self, weights: Weights) -> Weights:\n"
        "        return weights\n"
        "@hookimpl\n"
        "def steps() -> list[type]:\n"
        "    return [Plain]\n"
    )
    monkeypatch.syspath_prepend(str(site))
    edit('use = "procrustes"', 'use = "plain"')
    out = command_line("plan", "trial.toml")[1]
    assert "estimated from its stage" in out


@pytest.mark.slow
def test_run_begins_with_the_plan_in_one_line(recipe: Path) -> None:
    assert command_line("run", "trial.toml")[0] == 0
    code, _, err = command_line("run", "trial.toml")
    assert code == 0
    assert "plan: 10 of 10 results are there; nothing to make" in err


def test_a_plan_prints_the_time_of_each_step_and_of_the_whole(recipe: Path) -> None:
    document = json.loads(command_line("plan", "trial.toml", "--json")[1])
    times = [step["seconds"] for step in document["steps"]]
    assert all(time is not None for time in times)
    assert document["seconds"] == pytest.approx(sum(times) + document["loading"])
    assert "; takes about 5 seconds" in command_line("plan", "trial.toml")[1]
    assert "takes about 5 seconds" in command_line("plan", "trial.toml", "--short")[2]


def test_a_run_begins_with_the_time_left_that_its_plan_states(recipe: Path) -> None:
    code, _, err = command_line("run", "trial.toml")
    assert code == 0
    assert "takes about 5 seconds" in err
    lines = [line for line in err.splitlines() if line.endswith(" left in all")]
    assert len(lines) >= 5
    assert "reused" not in "".join(lines)


def test_a_machine_that_cannot_be_measured_is_planned_and_run_without_times(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTDISTILL_CALIBRATION", "off")
    code, out, _ = command_line("plan", "trial.toml")
    assert (code, "how long it takes is not known" in out) == (0, True)
    code, _, err = command_line("run", "trial.toml")
    assert (code, " left" in err) == (0, False)


@pytest.mark.parametrize("cut", ["layers=9", "neurons=4096", "kv_heads=64", "width=512"])
def test_a_cut_that_leaves_too_much_is_refused_before_the_teacher_answers(
    recipe: Path, cut: str
) -> None:
    code, _, err = command_line("run", "trial.toml", "--set", f"chop.{cut}")
    assert code == 2
    assert f'step "chop": {cut.replace("=", " = ")}, but the student has ' in err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_shortfall_exits_with_3_before_anything_loads(recipe: Path, verb: str) -> None:
    code, out, err = command_line(verb, "trial.toml")
    assert code == 3
    assert "does not fit here" in err
    assert "of memory; 0 MB are free" in err
    assert not Path("runs").exists()
    assert ("runs/trial-" in out) is (verb == "plan")


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_full_disk_says_with_which_options_less_is_written(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    code, _, err = command_line(verb, "trial.toml")
    assert code == 3
    # Of the few texts of this recipe sums would be larger than rows.
    needs = 'the run writes about .*, most of it for "residuals"'
    assert re.search(f"{needs}; 0 MB are free on the disk", err)
    monkeypatch.setattr(_cost, "FEW_TEXTS", 2)
    monkeypatch.setattr(text_counts, "SAMPLE_TEXTS", {Split.FIT: 1, Split.VALIDATION: 1})
    err = command_line(verb, "trial.toml")[2]
    assert re.search(f"{needs}, which writes less with student_texts = 2 or store = ", err)
    assert not Path("runs").exists()


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nvidia-smi report a large GPU and one without memory."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf 'GPU-1, 81559\\nGPU-2, 0\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def planned_on(teacher: str, student: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the document of the plan with the models on these devices."""
    devices = ("--set", f"teacher.device={teacher}", "--set", f"student.device={student}")
    code, out, _ = command_line("plan", "trial.toml", "--json", *devices)
    return code, json.loads(out)


@pytest.mark.usefixtures("two_gpus")
def test_memory_is_that_of_the_gpus_that_the_recipe_names(recipe: Path) -> None:
    (code, apart), (_, together) = planned_on("auto", "cuda:0"), planned_on("cpu", "cuda:0")
    assert (code, apart["machine"]["gpus"]) == (0, [81559 << 20, 0])
    assert apart["by_gpu"].keys() == together["by_gpu"].keys() == {"cuda:0"}
    there, here = (
        next(step for step in plan["steps"] if step["id"] == "teacher's answers")
        for plan in (apart, together)
    )
    assert there["by_gpu"] == {"cuda:0": there["gpu_bytes"]}
    assert here["by_gpu"] == {}
    assert (here["ram_bytes"], here["traffic_bytes"]) == (there["gpu_bytes"], 0)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_too_small_or_not_there_is_named(recipe: Path) -> None:
    code, plan = planned_on("cuda:1", "cuda:0")
    [shortfall] = plan["shortfalls"]
    assert (code, plan["by_gpu"].keys()) == (3, {"cuda:0", "cuda:1"})
    assert "memory on cuda:1, which has 0 MB" in shortfall
    code, plan = planned_on("cpu", "cuda:3")
    [shortfall] = plan["shortfalls"]
    assert (code, plan["by_gpu"].keys()) == (3, {"cuda:3"})
    assert "computes on cuda:3, but of GPUs this machine has cuda:0, cuda:1" in shortfall


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cuda:x"])
def test_a_name_of_no_device_is_refused_in_one_sentence(
    recipe: Path, verb: str, device: str
) -> None:
    code, out, err = command_line(verb, "trial.toml", "--set", f"teacher.device={device}")
    assert (code, out) == (2, "")
    allowed = 'write "auto", "cpu", "cuda", "cuda:1" (the second GPU) or "mps"'
    assert err == f"error trial.toml: teacher.device: {allowed} (it is '{device}').\n"


@pytest.mark.parametrize("device", ["cuda:7", "mps"])
def test_a_device_that_torch_lacks_ends_a_run_before_models_are_opened(
    recipe: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    named = ("--set", f"anchor={{ model = 'nowhere', device = '{device}' }}")
    code, _, err = command_line("run", "trial.toml", "--no-plan", *named)
    assert code == 3
    assert f'device = "{device}": ' in err
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_run_can_begin_without_a_plan(recipe: Path) -> None:
    assert command_line("run", "trial.toml", "--no-plan")[0] == 0


def test_a_model_that_is_neither_here_nor_described_is_an_error_of_plan_alone(
    edit: Edit,
) -> None:
    edit('model = "model"', 'model = "nobody/nothing"')
    code, out, err = command_line("plan", "trial.toml")
    assert (code, out) == (3, "")
    assert "nor texts/configs/nobody/nothing.json to say how large it is" in err
    assert command_line("plan", "trial.toml", "--short")[0] == 0


def test_a_step_without_its_capture_is_refused_before_anything_runs(edit: Edit) -> None:
    edit('{ use = "residuals" },', "")
    code, out, err = command_line("plan", "trial.toml")
    assert (code, out) == (2, "")
    assert 'step "fidelity": needs captured states; put a capture step (use' in err


def test_a_variant_without_the_capture_of_another_is_refused_in_one_line(edit: Edit) -> None:
    edit('full = ["basis"', 'full = ["residuals", "basis"')
    code, out, err = command_line("plan", "trial.toml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert 'step "fidelity": needs captured states, but no capture step runs before it in "' in err


def test_several_machines_are_planned_from_the_same_costs(recipe: Path) -> None:
    alone = json.loads(command_line("plan", str(recipe), "--json")[1])
    sums = ("--set", "residuals.store=moments")
    options = ("--nodes", "2", "--gpus", "4", "--gpu", "h100", *sums, "--json")
    plan = json.loads(command_line("plan", str(recipe), *options)[1])
    found = plan["cluster"]
    assert "cluster" not in alone
    assert (found["nodes"], found["gpus"], found["gpu"], found["ranks"]) == (2, 4, "h100", 8)
    dealt = {step["id"]: step["dealt"] for step in found["steps"]}
    assert dealt["residuals"] == 1
    assert dealt["fidelity"] == 1
    assert dealt["basis"] == 0
    assert found["traffic_bytes"] == sum(step["traffic_bytes"] for step in found["steps"]) > 0
    assert len(found["steps"]) == len(alone["steps"])


def test_the_table_of_several_machines_says_what_is_assumed(recipe: Path) -> None:
    _, out, _ = command_line("plan", str(recipe), "--nodes", "4", "--gpu", "a100")
    assert "4 x 1 a100" in out
    assert "TFLOP/s (assumed)" in out
    assert "(assumed)" not in command_line("plan", str(recipe))[1]


@pytest.mark.parametrize("options", [("--nodes", "2"), ("--gpu", "h100")])
def test_the_disk_of_this_machine_is_not_that_of_others(
    recipe: Path, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Machine(ram=1 << 40, gpus=(), disk=1000, cores=2)
    monkeypatch.setattr("rotdistill_commands.plan.this_machine", lambda _: full)
    code, _, err = command_line("plan", str(recipe))
    assert (code, "are free on the disk" in err) == (3, True)
    code, out, err = command_line("plan", str(recipe), *options)
    assert (code, err) == (0, "")
    assert re.search(r"disk about [\d.]+ [MG]B; takes", out)


@pytest.mark.parametrize("options", [("--nodes", "0"), ("--gpus", "9999"), ("--gpu", "abacus")])
def test_machines_that_are_none_are_refused(recipe: Path, options: tuple[str, str]) -> None:
    code, _, err = command_line("plan", str(recipe), *options)
    assert code == 2
    assert " ".join(options) in err
