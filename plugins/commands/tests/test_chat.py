"""Variants answer side by side, with the tokens of plain generation."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import prompt_tokens
from rotdistill_core.forward.generate import AnsweringModel, greedy_answers
from rotdistill_core.testing import PicoWorkspace, command_line

STEPS = """
variants = { base = [], full = ["basis", "fold"] }
step = [
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""
QUESTION = "w3 w5 w8"


@pytest.fixture(scope="module")
def finished(make_workspace: Callable[..., PicoWorkspace]) -> Path:
    """Return a folder in which the recipe has run."""
    workspace = make_workspace()
    workspace.run(workspace.recipe(STEPS))
    return workspace.folder


@pytest.fixture(autouse=True)
def work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def test_answers_are_those_of_plain_generation(work: Path) -> None:
    code, out, err = command_line(
        "chat", "trial", "--prompt", QUESTION, "--tokens", "7", "--teacher", "--json"
    )
    assert (code, err) == (0, "")
    [found] = json.loads(out)
    assert found["prompt"] == QUESTION
    assert list(found["answers"]) == ["base", "full", "teacher"]
    tokenizer = load_tokenizer(work / "model")
    style = (work / "texts/style.md").read_text().strip()
    asked = prompt_tokens(
        tokenizer,
        style,
        [Conversation("q", "en", Split.FIT, QUESTION, None)],
        ChatFormat.of(tokenizer),
    )
    teacher = open_checkpoint(work / "model")
    model = AnsweringModel(teacher.folder, teacher.weights, torch.device("cpu"), torch.float32)
    tokens = greedy_answers(model, asked, 7)["q"]
    # The fold is exact, so that both variants answer as the student does, which is the teacher.
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    assert set(found["answers"].values()) == {answer}


def test_questions_are_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nw7\n\nw9\n"))
    code, out, err = command_line("chat", "trial", "--variant", "full", "--tokens", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 2  # the empty line ends it
    assert all(line.startswith("full: ") for line in lines)


def test_another_system_prompt_changes_the_answer(work: Path) -> None:
    (work / "other.md").write_text("w40 w41 w42 w43 w44")
    answers = [
        json.loads(command_line("chat", "trial", "--prompt", QUESTION, "--json", *more)[1])
        for more in ((), ("--system", "other.md"))
    ]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nothing",), 2, 'there is no run "nothing"'),
        (("trial", "--variant", "ful"), 2, 'Did you mean "full"'),
        (("trial", "--system", "nowhere.md"), 2, "the system prompt cannot be read"),
        (("trial", "--tokens", "0"), 2, "--tokens"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = command_line("chat", *words, "--prompt", QUESTION)
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/full/model.safetensors",
        "checkpoints/full/tokenizer.json",
        "checkpoints/full/COMPLETE",
        "system.md",
    ],
)
def test_a_damaged_file_answers_nothing(work: Path, name: str) -> None:
    [path] = (work / "runs").glob(f"*/{name}")
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 8]) + data[1:])
    code, out, err = command_line("chat", "trial", "--prompt", QUESTION, "--variant", "full")
    path.write_bytes(data)
    assert (code, out) == (4, "")
    assert f"{name}: does not match its sha256 in the ledger" in err


def test_variants_are_asked_on_the_day_of_their_texts(
    make_workspace: Callable[..., PicoWorkspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace()
    template = workspace.folder / "model/chat_template.jinja"
    template.write_text("w{{ strftime_now('%d') | int }} " + template.read_text())
    recipe = workspace.recipe('step = [{ use = "chop", layers = 1 }]', name="dated")
    workspace.run(recipe, ["samples.date=2024-02-29"])
    rendered: list[str] = []
    render = ChatFormat.render

    def watched(chat: ChatFormat, *words: Any, **more: Any) -> list[str]:
        rendered.extend(render(chat, *words, **more))
        return rendered[-1:]

    monkeypatch.setattr(ChatFormat, "render", watched)
    assert workspace.command("chat", "dated", "--prompt", QUESTION, "--tokens", "2")[0] == 0
    assert rendered
    assert all(text.startswith("w29 ") for text in rendered)


def test_a_model_answers_before_there_is_a_run(work: Path) -> None:
    words = ("chat", "--prompt", QUESTION, "--tokens", "3", "--json")
    code, out, err = command_line(*words, "--model", "model", "--system", "texts/style.md")
    assert code == 0, err
    [found] = json.loads(out)
    of_run = json.loads(command_line(*words, "trial", "--variant", "base")[1])[0]
    assert found["answers"] == {"model": of_run["answers"]["base"]}
    for more, message in (
        ((), "or a model with --model"),
        (("trial", "--model", "model"), "alone"),
    ):
        code, out, err = command_line(*words, *more)
        assert (code, out) == (2, "")
        assert message in err


@pytest.mark.parametrize("differ", [False, True])
def test_a_prompt_of_the_rows_is_that_of_the_run_or_is_said_to_differ(
    make_workspace: Callable[..., PicoWorkspace], differ: bool
) -> None:
    workspace = make_workspace()
    rows = [
        {"question": f"w{k} w4", "answer": "w5", "language": "en", "system": "w6 w7"}
        for k in range(20)
    ]
    if differ:
        rows[3]["system"] = "w8"
    texts = "".join(json.dumps(row) + "\n" for row in rows)
    (workspace.folder / "rows.jsonl").write_text(texts)
    (workspace.folder / "own.toml").write_text(
        'name = "own"\nobservers = []\nteacher.model = "model"\nstudent.model = "model"\n'
        'samples = { index = "rows.jsonl", answer_tokens = 2 }\n'
        'step = [{ use = "chop", layers = 1 }]\n'
    )
    workspace.run(workspace.folder / "own.toml")
    [prompt] = workspace.folder.glob("runs/own-*/system.md")
    assert prompt.read_text() == ("" if differ else "w6 w7")
    code, _, err = workspace.command("chat", "own", "--prompt", QUESTION, "--tokens", "2")
    assert code == 0, err
    assert ("which differ, so none is used here. --system FILE" in err) is differ
