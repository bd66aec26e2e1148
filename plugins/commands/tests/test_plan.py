"""What `plan` says before anything is loaded, held against hand-derived sizes and against what runs then do."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rotdistill_core.planning import text_counts as rotdistill_plan_texts
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.models import model_info
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.recipe import load as recipe
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import command_line, pico_folder, pico_head, pico_texts, run_recipe

ROOT = Path(__file__).parents[3]
RECIPE = (
    pico_head()
    + """
student.save_dtype = "bfloat16"
[[step]]
use = "chop"
layers = 2
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "fold"
use = "basis-fold"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["basis", "fold"]
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the recipe has run once."""
    root = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pico_folder(root / "model", num_hidden_layers=3)
        pico_texts(root / "texts")
        (root / "recipe.toml").write_text(RECIPE)
        run_recipe(root / "recipe.toml")
    return root


@pytest.fixture
def ran(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy to work in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def work(ran: Path) -> Path:
    """Return the same before it has run."""
    shutil.rmtree(ran / "runs")
    return ran


def planned(*sets: str, fresh: bool = False) -> Plan:
    return build_plan(
        load_recipe(Path("recipe.toml"), sets), Path("runs"), this_machine(Path("runs")), fresh
    )


def why(made: Plan) -> dict[str, str]:
    """Return step and first variant -> why it has to be made, of what has to be made."""
    return {
        f"{line.id} {line.variants[0] if line.variants else ''}".strip(): line.why
        for line in made.todo
    }


def processor_time() -> float:
    """Return the seconds that finished child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_32b_recipe_is_planned_offline_without_torch() -> None:
    script = "import sys; from rotdistill_core.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    path = "recipes/tour_guide_qwen32b.toml"
    start = processor_time()
    subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
    imports = processor_time() - start
    made = subprocess.run(
        [sys.executable, "-c", script, "plan", path, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    took = processor_time() - start - imports
    assert made.returncode in (0, 3), made.stderr
    assert "does not fit here" in made.stderr or made.returncode == 0
    assert made.stderr.splitlines()[-1] == "False"
    assert took < imports  # 0.8 s alone; a run that loads a model has only begun by then
    found = json.loads(made.stdout)
    assert found["models"]["teacher"]["parameters"] == 32_763_876_352  # as published
    assert found["models"]["student"]["parameters"] == 3_085_938_688
    assert found["models"]["teacher"]["bytes"] == 2 * 32_763_876_352
    assert found["models"]["student"]["bytes"] == 2 * 3_085_938_688
    rows = sum(found["texts"]["rows"].values()) + found["texts"]["shared prompt"]
    fitted = (
        found["texts"]["rows"]["fit"]
        + found["texts"]["rows"]["validation"]
        + found["texts"]["shared prompt"]
    )
    steps = {step["id"]: step for step in found["steps"]}
    capture = 65 * rows * 5120 * 2 + 37 * fitted * 2048 * 2  # every boundary of both, in bfloat16
    assert steps["residuals"]["disk_bytes"] == pytest.approx(capture, rel=0.1)
    assert capture > 26e9
    layer = 5120 * (40 * 128 * 2 + 8 * 128 * 2) + 3 * 5120 * 27648  # q, o, k, v and the MLP
    wide = 2 if found["machine"]["gpu"] else 4
    batch = 1536 * 3 * 27648  # gate, up and their product
    memory = (
        2 * rows * 5120 + 2.5 * layer + batch
    ) * wide  # states and a copy that is written, two layers and one in bfloat16
    assert sum(steps["residuals"][key] for key in ("ram_bytes", "gpu_bytes")) == pytest.approx(
        memory, rel=0.1
    )
    answers = (
        32_763_876_352 * wide + 64 * 180 * 64 * 2 * 8 * 128 * wide
    )  # all weights; keys and values of 64 answers of about 180 tokens
    peak = max(found["ram_bytes"], found["gpu_bytes"])
    assert peak == pytest.approx(answers, rel=0.1)
    saved = (
        5 * (3_085_938_688 + 151936 * 2048) * 2 - 151936 * 2048 * 2
    )  # of six variants all but base untie the head, but style-only too
    assert sum(
        s["disk_bytes"] for s in found["steps"] if s["id"] == "checkpoints"
    ) == pytest.approx(saved + 3_085_938_688 * 2, rel=0.1)


@pytest.mark.parametrize(("name", "parameters"), [("0.5B", 494_032_768), ("1.5B", 1_543_714_304)])
def test_shipped_configs_lead_to_the_published_parameters(name: str, parameters: int) -> None:
    found = model_info(ModelRef(model=f"Qwen/Qwen2.5-{name}-Instruct"), ROOT / "samples", print)
    assert found.shape.parameters() == parameters
    assert found.model is None


def test_states_that_two_captures_share_are_planned_once(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotdistill_plan_texts, "TEMPLATE", 3)
    control = (
        '[[step]]\nid = "shuffled"\nuse = "residuals"\ncontrol = "shuffled"\n[[step]]\nid = "basis"'
    )
    named = RECIPE.replace("base = []", 'base = ["residuals"]\nshuffled = ["shuffled"]').replace(
        'full = ["', 'full = ["residuals", "'
    )
    (work / "recipe.toml").write_text(named.replace('[[step]]\nid = "basis"', control))
    foreseen = {line.id: line.disk_bytes for line in planned().lines if line.use == "residuals"}
    shards = run_recipe(work / "recipe.toml").folder.glob("shards*/**/*.safetensors")
    sizes = {path: path.stat().st_size for path in shards}
    theirs = sum(size for path, size in sizes.items() if "teacher" in path.parts)
    assert foreseen["residuals"] - foreseen["shuffled"] == pytest.approx(
        0, abs=0.1 * theirs
    )  # rows of its own instead of the teacher's
    assert sum(foreseen.values()) == pytest.approx(sum(sizes.values()), rel=0.1)


def test_one_capture_behind_two_chains_is_planned_twice(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotdistill_plan_texts, "TEMPLATE", 3)
    (work / "recipe.toml").write_text(RECIPE.replace('full = ["', 'full = ["chop", "'))
    foreseen = sum(line.disk_bytes for line in planned().lines if line.use == "residuals")
    shards = run_recipe(work / "recipe.toml").folder.glob("shards*/**/*.safetensors")
    assert foreseen == pytest.approx(sum(path.stat().st_size for path in shards), rel=0.1)


def test_a_variant_without_a_step_is_saved_too(work: Path) -> None:
    (work / "recipe.toml").write_text(
        RECIPE.replace('full = ["', 'full = ["chop", "residuals", "fidelity", "')
    )
    assert {"base", "full"} <= {
        variant for line in planned().lines if line.id == "checkpoints" for variant in line.variants
    }


def test_what_is_planned_is_what_happens(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rotdistill_plan_texts, "TEMPLATE", 3
    )  # the pico template is a word before and a word behind
    first = planned()
    assert set(why(first).values()) <= {
        "not made before", "not made before from these models and texts", "not saved before behind these steps",
    }  # fmt: skip
    made = run_recipe(work / "recipe.toml")
    again = planned()
    assert again.todo == []
    assert {line.id for line in again.lines} >= {
        "teacher's answers",
        "chop",
        "fidelity",
        "checkpoints",
    }
    assert any(
        line.variants == ["round-trip"] for line in again.lines
    )  # bfloat16 checkpoints get one more variant
    disk = sum(
        path.stat().st_size for path in made.folder.rglob("*.safetensors") if "shards" in path.parts
    )
    assert next(line for line in first.lines if line.id == "residuals").disk_bytes == pytest.approx(
        disk, rel=0.1
    )
    code, _, err = command_line("run", "recipe.toml")
    assert code == 0
    assert "plan: 11 of 11 results are there; nothing to make" in err


def test_it_says_what_changed_and_what_is_behind_it(ran: Path) -> None:
    found = planned("basis.tie=1")
    assert why(found)["basis full"] == "changed: tie all → 1"
    assert why(found)["fold full"] == "behind basis"
    kept = [
        line for line in found.lines if line.id in ("chop", "residuals", "fidelity") and line.reused
    ]
    assert {line.why.partition("-")[0] for line in kept} == {
        "trial"
    }  # it lies in the other run's folder
    assert why(planned("chop.layers=3"))["chop base"] == "changed: layers 2 → 3"
    assert why(planned("seed=5"))["chop base"] == "seed changed"
    assert why(planned("student.dtype=float64"))["chop base"] == "compute changed"
    assert why(planned(fresh=True))["chop base"] == "asked for with --fresh"
    index = ran / "texts" / "index.tsv"
    index.write_text(index.read_text().replace("place 3", "place three"))
    assert why(planned())["chop base"] == "texts changed"


def test_what_it_calls_reused_is_reused(ran: Path) -> None:
    path = ran / "other.toml"
    path.write_text(
        RECIPE.replace('name = "trial"', 'name = "other"').replace(
            'use = "procrustes"', 'use = "random-rotation"'
        )
    )
    said = build_plan(load_recipe(path), Path("runs"), this_machine(Path("runs")))
    made = run_recipe(path)
    happened = {key: done.reused for key, done in made.steps.items()}
    for line in said.lines:
        if line.use:
            assert happened[line.variants[0], line.id] is line.reused, line


def test_other_code_and_lost_files_are_told(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recipe.code_of
    monkeypatch.setattr(
        recipe, "code_of", lambda origin: "x" if origin.name == "procrustes" else real(origin)
    )
    assert why(planned())["basis full"] == "changed: the code of rotdistill-procrustes"
    monkeypatch.setattr(recipe, "code_of", real)
    next(ran.rglob("shards/student/residual/00001.safetensors")).unlink()
    assert why(planned())["residuals base"] == "its files are gone, or made from something else"
    model = ran / "model" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-2] ^= 1
    model.write_bytes(data)
    assert why(planned())["chop base"] == "teacher, student changed"


@pytest.mark.parametrize("cut", ["layers=9", "neurons=4096", "kv_heads=64", "width=512"])
def test_a_cut_that_leaves_too_much_is_told_before_the_teacher_answers(
    work: Path, cut: str
) -> None:
    code, _, err = command_line("run", "recipe.toml", "--set", f"chop.{cut}")
    assert code == 2
    assert f'step "chop": {cut.replace("=", " = ")}, but the student has ' in err
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_shortfall_ends_with_3_before_anything_loads(
    work: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    code, out, err = command_line(verb, "recipe.toml")
    assert code == 3
    assert "does not fit here" in err
    assert "of memory; 0 MB are free" in err
    assert not Path("runs").exists()
    assert ("runs/trial-" in out) is (verb == "plan")


def test_run_can_begin_without(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert command_line("run", "recipe.toml", "--no-plan")[0] == 0


def test_a_model_that_is_not_here_nor_described_is_an_error_of_plan_alone(work: Path) -> None:
    Path("recipe.toml").write_text(RECIPE.replace('model = "model"', 'model = "nobody/nothing"'))
    code, out, err = command_line("plan", "recipe.toml")
    assert (code, out) == (3, "")
    assert "nor texts/configs/nobody/nothing.json to say how large it is" in err
    assert command_line("plan", "recipe.toml", "--short")[0] == 0


def test_the_document_has_it_all(work: Path) -> None:
    code, out, err = command_line("plan", "recipe.toml", "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert {
        "run_dir",
        "steps",
        "models",
        "texts",
        "ram_bytes",
        "gpu_bytes",
        "disk_bytes",
        "time",
        "machine",
        "shortfalls",
    } <= found.keys()
    assert found["shortfalls"] == []
    assert found["models"]["student"]["source"] == "model"
    assert {step["id"]: step["needs"] for step in found["steps"]}["fold"] == [
        "captured states",
        "maps",
    ]


def test_a_step_without_its_capture_is_refused_before_anything_runs(work: Path) -> None:
    Path("recipe.toml").write_text(RECIPE.replace('[[step]]\nuse = "residuals"\n', ""))
    code, out, err = command_line("plan", "recipe.toml")
    assert (code, out) == (2, "")
    assert 'step "fidelity": needs captured states; put a capture step (use' in err


def test_a_variant_without_the_capture_that_another_has_is_named(work: Path) -> None:
    Path("recipe.toml").write_text(
        RECIPE.replace('full = ["basis"', 'full = ["residuals", "basis"')
    )
    code, out, err = command_line("plan", "recipe.toml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert (
        'step "fidelity": needs captured states; nothing before it in "base" captures any. There is "residuals": let it'
        in err
    )
