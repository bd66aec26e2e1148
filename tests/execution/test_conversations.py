"""Whole runs on conversations: several turns, own system prompts, one file, no chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.testing import PicoWorkspace

pytestmark = pytest.mark.slow

TABLES = """
samples.index = "own.jsonl"
samples.guard = "guard.jsonl"
samples.own_answers = 3
"""
STEPS = """
[[step]]
use = "residuals"
[[step]]
use = "prompt-kl"
prompts_from = ["topics", "questions"]
max_epochs = 1
max_new_tokens = 3
rank = 2
[[step]]
use = "writer-refit"
[[step]]
use = "fidelity"
[[step]]
use = "answers"
[variants]
base = []
full = ["prompt-kl", "writer-refit"]
"""


def row(k: int) -> dict[str, Any]:
    """Return a conversation of one or two questions, with or without a system prompt."""
    turns = [
        {"role": "user", "content": f"w{k} w{k + 1}"},
        {"role": "assistant", "content": f"w{k + 2}"},
        {"role": "user", "content": f"w{k + 3} w{k % 5}"},
        {"role": "assistant", "content": f"w{k + 5} w{k + 6}"},
    ]
    system = [{"role": "system", "content": "w50 w51"}] if k % 4 == 0 else []
    return {"messages": system + turns[2 * (k % 3 == 0) :], "topic": f"w{k // 2}"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path) -> PicoWorkspace:
    """Return a workspace with a recipe on one file of conversations."""
    workspace = PicoWorkspace(tmp_path)
    workspace.model()
    write(tmp_path / "own.jsonl", [row(k) for k in range(24)])
    plain = [{"text": f"w{k} w{2 * k} w3"} for k in range(5)]
    chats = [{"question": f"w{k}", "answer": f"w{k} w9", "system": "w8"} for k in range(5)]
    write(tmp_path / "guard.jsonl", [*plain, *chats])
    path = workspace.recipe(STEPS, tables=TABLES)
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = ('samples.index = "texts', "samples.style", "samples.heldout")
    path.write_text("\n".join(line for line in lines if not line.startswith(heads)))
    return workspace


@pytest.mark.parametrize("template", [True, False], ids=["template", "no template"])
def test_one_file_of_conversations_is_enough(own: PicoWorkspace, template: bool) -> None:
    if not template:
        (own.folder / "model/chat_template.jinja").unlink()
    code, _, said = own.command("check", "trial.toml")
    assert code == 0
    assert "own.jsonl: the language of 24 of 24 texts is told by their words: und 24" in said
    code, out, said = own.command("run", "trial.toml")
    assert code == 0, said
    assert said.count("own.jsonl: the language of 24") == 1
    plainly = "model: has no chat template; conversations are written plainly"
    assert (plainly in said) is not template
    code, out, _ = own.command("plan", "trial.toml", "--json")
    assert code == 0
    assert all(line["reused"] for line in json.loads(out)["steps"])
    _, out, said = own.command("plan", "trial.toml")
    assert (plainly in " ".join((out + said).split())) is not template
    code, out, _ = own.command("chat", "trial", "--prompt", "w1 w2", "--tokens", "3")
    assert code == 0
    assert out.startswith("base: ")
