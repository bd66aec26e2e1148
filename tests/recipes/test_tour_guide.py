"""The main job end to end on the real small model, on a fifth of README's texts and with short
answers, so that it can be checked often. All tests share one folder of runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FEW_TEXTS = (
    "--set",
    "samples.limit=28",
    "--set",
    "samples.own_answers=8",
    "--set",
    "samples.answer_tokens=16",
    "--set",
    "refit.ridge=[0.3]",
)
OFFLINE = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}
ELSEWHERE = """
import sys, json
sys.modules["rotdistill_core"] = None  # any import of it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=5, do_sample=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    print(json.dumps({
        "tokens": made.shape[1] - ids["input_ids"].shape[1],
        "tied": embedding.weight.data_ptr() == head.weight.data_ptr(),
        "layers": model.config.num_hidden_layers,
    }))
"""


class Called(NamedTuple):
    """A call of the command line that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Processor time."""


class Job(NamedTuple):
    """The finished run of the recipe."""

    where: Path
    """The folder that it was started in: `runs/` lies there."""
    folder: Path
    table: dict[str, dict[str, float]]
    """Variant -> metric -> figure."""
    seconds: float
    """Processor time."""


def rotdistill(where: Path, *words: str) -> Called:
    command = [str(Path(sys.executable).with_name("rotdistill")), *words]
    before = processor_seconds()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=where, env=OFFLINE
    )
    return Called(done.returncode, done.stdout, done.stderr, processor_seconds() - before)


def processor_seconds() -> float:
    """Return the processor time of all processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def run(where: Path, recipe: str, *words: str) -> Called:
    few = (
        *FEW_TEXTS,
        "--set",
        f"samples.guard={where / 'guard.tsv'}",
        "--set",
        f"samples.heldout={where / 'heldout.tsv'}",
    )
    done = rotdistill(where, "run", str(ROOT / "recipes" / recipe), *few, *words)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    where = tmp_path_factory.mktemp("job")
    for name, file, step in (("guard", "general/index.tsv", 8), ("heldout", "heldout.tsv", 4)):
        head, *rows = (ROOT / "samples" / file).read_text(encoding="utf-8").splitlines()
        (where / f"{name}.tsv").write_text("\n".join([head, *rows[::step], ""]), encoding="utf-8")
    done = run(where, "tour_guide.toml", "--json")
    document = json.loads(done.out)
    return Job(where, Path(document["run_dir"]), figures(document["results"]), done.seconds)


def results_in(ledger: Path) -> list[str]:
    """Return the lines of a ledger that commit steps and checkpoints."""
    lines = ledger.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["kind"] != "file"]


def figures(results: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for row in results:
        assert list(row) == [
            "variant",
            "metric",
            "value",
            "split",
            "layer",
            "language",
            "n",
            "text",
        ]
        if row["layer"] is None and row["language"] is None:
            table.setdefault(str(row["variant"]), {})[str(row["metric"])] = float(str(row["value"]))
    return table


def test_transfer_brings_the_student_near_the_teacher(job: Job) -> None:
    table = job.table
    assert table["full"]["kl"] <= 0.2 * table["base"]["kl"]
    assert table["refit"]["kl"] <= 0.2 * table["base"]["kl"]
    assert (
        table["full"]["kl"] < 1.02 * table["refit"]["kl"]
    )  # the head was chosen on validation texts; it adds nothing here
    assert table["style-only"]["kl"] < table["base"]["kl"]


def test_exact_steps_change_nothing(job: Job) -> None:
    table = job.table
    for metric in ("kl", "top1", "hidden_cosine", "residual_rms_diff"):
        assert table["rotated"][metric] == pytest.approx(table["base"][metric], rel=1e-5, abs=1e-5)
    nats = [math.log(table[variant]["perplexity"]) for variant in ("rotated", "base")]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_the_certificate_is_in_the_ledger(job: Job) -> None:
    lines = [json.loads(line) for line in (job.folder / "ledger.jsonl").read_text().splitlines()]
    (certificate,) = [line["report"]["certificate"] for line in lines if line.get("id") == "fold"]
    assert certificate["logits_float64"] <= 1e-9
    assert certificate["logits_float32"] <= 1e-3
    assert certificate["kl_float32"] <= 1e-6
    assert certificate["unfold"] <= 1e-12


def test_a_second_run_recomputes_nothing(job: Job) -> None:
    results = results_in(job.folder / "ledger.jsonl")
    before = {p: p.stat().st_mtime_ns for p in (job.folder / "checkpoints").rglob("*")}
    done = run(job.where, "tour_guide.toml")
    assert "plan: 21 of 21 results are there; nothing to make" in done.err
    assert results_in(job.folder / "ledger.jsonl") == results
    assert before == {p: p.stat().st_mtime_ns for p in (job.folder / "checkpoints").rglob("*")}
    assert "full answers" in done.out
    assert done.seconds < job.seconds / 4


def test_every_checkpoint_loads_without_rotdistill(job: Job, tmp_path: Path) -> None:
    folders = [tmp_path / variant for variant in job.table]
    for folder in folders:
        shutil.copytree(job.folder / "checkpoints" / folder.name, folder, copy_function=os.link)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        env=OFFLINE,
    )
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        seen = json.loads(line)
        tied = folder.name == "base"
        assert seen["layers"] == 22
        assert seen["tokens"] >= 1
        assert seen["tied"] == tied
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
        assert (folder / "COMPLETE").is_file()


def test_check_recomputes_the_whole_run(job: Job) -> None:
    whole = rotdistill(job.where, "check", str(job.folder))
    assert (whole.code, whole.err.strip().rpartition(" files, ")[2]) == (
        0,
        "2 models, 23 maps, 1 folds undone, 0 problems",
    )
