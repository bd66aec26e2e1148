"""The main job end to end on the real small model, on half of README's texts so that it can be
checked often."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
Job = tuple[Path, dict[str, dict[str, float]], float]
"""Folder of the run, figures by variant and metric, seconds."""
HALF = ("--set", "samples.limit=100", "--set", "samples.own_answers=32")
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
folder = sys.argv[1]
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


def rotdistill(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("rotdistill")), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=where, env=OFFLINE
    )


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    where, started = tmp_path_factory.mktemp("job"), time.monotonic()
    done = rotdistill(where, "run", str(ROOT / "recipes/tour_guide.toml"), *HALF, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    return Path(document["run_dir"]), figures(document["results"]), time.monotonic() - started


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
    table = job[1]
    assert table["full"]["kl"] <= 0.2 * table["base"]["kl"]
    assert table["refit"]["kl"] <= 0.2 * table["base"]["kl"]
    assert (
        table["full"]["kl"] < 1.02 * table["refit"]["kl"]
    )  # the head was chosen on validation texts; it adds nothing here
    assert table["style-only"]["kl"] < table["base"]["kl"]


def test_exact_steps_change_nothing(job: Job) -> None:
    table = job[1]
    for metric in ("kl", "top1", "hidden_cosine", "residual_rms_diff"):
        assert table["rotated"][metric] == pytest.approx(table["base"][metric], rel=1e-5, abs=1e-5)
    nats = [math.log(table[variant]["perplexity"]) for variant in ("rotated", "base")]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_the_certificate_is_in_the_ledger(job: Job) -> None:
    lines = [json.loads(line) for line in (job[0] / "ledger.jsonl").read_text().splitlines()]
    (certificate,) = [line["report"]["certificate"] for line in lines if line.get("id") == "fold"]
    assert certificate["logits_float64"] <= 1e-9
    assert certificate["logits_float32"] <= 1e-3
    assert certificate["kl_float32"] <= 1e-6
    assert certificate["unfold"] <= 1e-12


def test_the_published_form_is_farther(job: Job) -> None:
    where = job[0].parents[2]
    done = rotdistill(where, "run", str(ROOT / "recipes/replaceme.toml"), *HALF, "--json")
    assert done.returncode == 0, done.stderr
    published = figures(json.loads(done.stdout)["results"])["published"]
    assert job[1]["full"]["kl"] < 0.5 * published["kl"]


def test_a_second_run_recomputes_nothing(job: Job) -> None:
    where, started = job[0].parents[2], time.monotonic()
    before = {p: p.stat().st_mtime_ns for p in (job[0] / "checkpoints").rglob("*")}
    done = rotdistill(where, "run", str(ROOT / "recipes/tour_guide.toml"), *HALF)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused") >= 20
    assert before == {p: p.stat().st_mtime_ns for p in (job[0] / "checkpoints").rglob("*")}
    assert "full answers" in done.stdout
    assert seconds < job[2] / 4


def test_every_checkpoint_loads_without_rotdistill(job: Job, tmp_path: Path) -> None:
    for variant in job[1]:
        folder = tmp_path / variant
        shutil.copytree(job[0] / "checkpoints" / variant, folder)
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder)],
            capture_output=True,
            text=True,
            check=False,
            env=OFFLINE,
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["layers"] == 22
        assert seen["tokens"] >= 1
        assert seen["tied"] == (variant == "base")
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == (
            variant == "base"
        )
        assert (folder / "COMPLETE").is_file()


def test_check_recomputes_and_names_a_flipped_byte(job: Job) -> None:
    where = job[0].parents[2]
    whole = rotdistill(where, "check", str(job[0]))
    assert (whole.returncode, whole.stderr.strip().rpartition(" files, ")[2]) == (
        0,
        "23 maps, 1 folds undone, 0 problems",
    )
    shard = next((job[0] / "shards/student/residual").glob("00003.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    broken = rotdistill(where, "check", str(job[0]))
    assert broken.returncode == 4
    assert "student/residual/00003.safetensors" in broken.stderr.replace("\n", "")
    weights = load_file(job[0] / "checkpoints/full/model.safetensors")
    again = rotdistill(where, "run", str(ROOT / "recipes/tour_guide.toml"), *HALF)
    assert again.returncode == 0
    assert "student/residual/00003.safetensors" in again.stderr.replace("\n", "")
    assert rotdistill(where, "check", str(job[0])).returncode == 0
    after = load_file(job[0] / "checkpoints/full/model.safetensors")
    assert all(weights[name].equal(after[name]) for name in weights)
