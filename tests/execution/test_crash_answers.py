"""kill -9 while a model writes answers or trains costs what is in flight, and changes no file.

In turn the teacher answers held-out questions, the texts' own, and continues place names; then the
variants answer. Each is killed at the third prompt of its second chunk of three. `prompt-kl` is
killed in its second step of training.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHUNK = 4
"""Prompts of a chunk in the driver."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ["-m", "tests.execution.crash_answers", str(tmp_path_factory.mktemp("work"))]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert printed["undisturbed"]["code"] == 0, done.stderr[-2000:]
    for kill in printed["kills"]:
        ended = (kill["killed"]["code"], kill["again"]["code"])
        assert ended == (-signal.SIGKILL, 0), (kill["series"], done.stderr[-2000:])
    return printed


@pytest.mark.slow
def test_at_most_one_chunk_is_generated_again(report: dict[str, Any]) -> None:
    undisturbed = report["undisturbed"]["read"]
    assert len(undisturbed) == 50
    assert len(report["kills"]) == 5
    for kill in report["kills"]:
        before, after = kill["killed"]["read"], kill["again"]["read"]
        assert 0 < len(before) + len(after) - len(undisturbed) < CHUNK, kill["series"]


@pytest.mark.slow
def test_a_resumed_run_reads_in_the_same_order(report: dict[str, Any]) -> None:
    undisturbed = report["undisturbed"]["read"]
    for kill in report["kills"]:
        after = kill["again"]["read"]
        assert undisturbed[-len(after) :] == after, kill["series"]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_files(report: dict[str, Any]) -> None:
    undisturbed = report["undisturbed"]["files"]
    names = {Path(path).name for path in undisturbed}
    assert {"results.jsonl", "model.safetensors", "00002.json", "samples.tsv"} <= names
    for kill in report["kills"]:
        of_teacher = kill["series"].endswith("questions")
        # reports, and so the ledger, say which steps an earlier process had finished
        told = () if of_teacher else ("ledger.jsonl", "report.")
        assert undisturbed.keys() == kill["files"].keys()
        for path, sha256 in undisturbed.items():
            if not Path(path).name.startswith(told):
                assert kill["files"][path] == sha256, (kill["series"], path)


@pytest.mark.slow
def test_a_killed_training_goes_on_after_what_it_had_saved(report: dict[str, Any]) -> None:
    undisturbed, training = report["undisturbed"], report["training"]
    killed, again = training["killed"], training["again"]
    assert (killed["code"], again["code"]) == (-signal.SIGKILL, 0)
    assert len(undisturbed["trained"]) > 1
    assert killed["trained"] == undisturbed["trained"][:1]
    assert again["trained"] == undisturbed["trained"][1:]
    for path, sha256 in undisturbed["files"].items():
        # They say which steps an earlier process had finished.
        if not Path(path).name.startswith(("ledger.jsonl", "report.")):
            assert training["files"][path] == sha256, path
