"""The work from reading texts to their plan grows as the texts do. Calls are counted, not time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import pico_folder

WORDS = ("the", "river", "runs", "below", "an", "old", "bridge", "and", "turns", "west", "again")
RECIPE = """
name = "many"
observers = []
teacher.model = "model"
student.model = "model"
[samples]
index = "index.jsonl"
heldout = "heldout.jsonl"
guard = "guard.jsonl"
max_tokens = 120
answer_tokens = 8
own_answers = 8
[lessons]
count = {lessons}
[[step]]
use = "residuals"
[[step]]
use = "fidelity"
[variants]
base = []
"""


def write_texts(folder: Path, count: int) -> Path:
    """Write a recipe, with texts of which five each have a topic, and none a language."""

    def row(prefix: str, k: int) -> dict[str, object]:
        said = " ".join(WORDS[(k * k + 3 * j * (k + 1)) % len(WORDS)] for j in range(12))
        topic = f"Town {prefix} {k // 5}"
        turns = [f"What of {topic}, number {k}?", f"{said}, {k}."]
        roles = ("user", "assistant")
        messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
        return {"id": f"{prefix}{k}", "topic": topic, "messages": messages}

    for name, texts in (("index", count), ("heldout", count // 4), ("guard", count // 4)):
        lines = [json.dumps(row(name, k)) + "\n" for k in range(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / "many.toml"
    path.write_text(RECIPE.format(lessons=count))
    return path


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions a piece of work calls, those in C included."""
    calls = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_six_times_the_texts_are_six_times_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_folder(tmp_path / "model", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)

    def work(texts: int) -> int:
        recipe = load_recipe(write_texts(tmp_path, texts))
        machine = this_machine(tmp_path)
        return calls_of(lambda: build_plan(recipe, tmp_path / "runs", machine))

    work(40)  # what a process does once
    none, some, many = work(40), work(80), work(280)
    assert some - none > 40 * 50
    assert many - none < 6 * 1.1 * (some - none)
