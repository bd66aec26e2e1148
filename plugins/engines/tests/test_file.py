"""Answers that were made elsewhere: found by id, prompt or messages, or refused with their line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_engines.file import File

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.tokenization import tokens_of
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.plugin.engine import Answer, Asked
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, pico_folder, pico_tokenizer

MESSAGES = ({"role": "user", "content": "where"},)
ASKED = {
    "a": Asked((7, 8, 9), 4),
    "b": Asked((7, 8, 10), 4),
    "c": Asked((7, 8, 11), 4),
    "d": Asked((7, 8, 12), 4, messages=MESSAGES),
}
END = 2
Lines = list[Mapping[str, Any] | str]


@pytest.fixture
def answer(tmp_path: Path) -> Callable[[Lines], dict[str, Answer]]:
    """Return a function that answers all prompts from a file of lines."""
    folder = pico_folder(tmp_path / "model")
    weights = open_checkpoint(folder).weights
    model = AnsweringModel(folder, weights, torch.device("cpu"), torch.float32)

    def answered(lines: Lines) -> dict[str, Answer]:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "answers.jsonl").write_text("\n".join(texts), encoding="utf-8")
        engine = File(path="answers.jsonl")
        return dict(engine.connect(model, tmp_path).answers(ASKED))

    return answered


ALL: Lines = [
    {"id": "a", "answer": "w10 w11"},
    {"prompt": [7, 8, 10], "tokens": [20, 21, END]},
    {"prompt": "w1 w2 w5", "answer": "w10", "finish_reason": "length"},
    {"messages": list(MESSAGES), "tokens": [20, 21, 22, 23, 24, END]},
    {"id": "of nobody", "answer": "w1"},
]


def test_answers_are_found_by_id_prompt_and_messages(
    answer: Callable[[Lines], dict[str, Answer]],
) -> None:
    assert answer(ALL) == {
        "a": Answer([16, 17, END], "stop"),
        "b": Answer([20, 21, END], "stop"),
        "c": Answer([16], "length"),
        "d": Answer([20, 21, 22, 23], "length"),
    }


WRONG: dict[str, tuple[Lines, str]] = {
    "no JSON": ([*ALL[:2], "{"], r"answers.jsonl, line 3, column 2: is no JSON"),
    "a list": (["[]"], r"line 1: must be a JSON object"),
    "nothing asked": ([{"answer": "w1"}], "line 1: does not say what it answers"),
    "no answer": ([{"id": "a"}], "line 1: has no answer"),
    "a number": ([{"id": "a", "answer": 1}], 'line 1: "answer" is no text'),
    "no list": ([{"id": "a", "tokens": "x"}], 'line 1: "tokens" is no list'),
    "twice": ([*ALL, "", {"id": "a", "answer": "w1"}], "line 7: answers the same id as line 1"),
    "missing": (ALL[:1], "does not answer 3 of 4 texts: b, c, d"),
    "foreign text": ([{"id": "a", "answer": "☃"}, *ALL[1:]], "line 1: its answer cannot be used"),
    "foreign ids": ([{"id": "a", "tokens": [64]}, *ALL[1:]], "line 1: .*64 is no token id"),
    "empty": (
        [{"id": "a", "tokens": [], "finish_reason": "length"}, *ALL[1:]],
        r"answers.jsonl, line 1: its answer cannot be used: it is empty\.$",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_its_line(
    answer: Callable[[Lines], dict[str, Answer]], name: str
) -> None:
    lines, problem = WRONG[name]
    with pytest.raises(RecipeError, match=problem):
        answer(lines)


def test_a_file_that_is_not_utf8_is_refused(
    tmp_path: Path, answer: Callable[[Lines], dict[str, Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.write_text

    def written(path: Path, text: str, encoding: str) -> int:
        return plain(path, text, encoding="latin-1")

    monkeypatch.setattr(Path, "write_text", written)
    with pytest.raises(RecipeError, match=r"answers.jsonl: "):
        answer([{"id": "a"}, '{"id": "a", "answer": "\xff"}'])


def test_a_run_takes_its_answers_from_a_file(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.texts(blurbs=3, questions=3)
    pico_workspace.model()
    step = 'step = [{ use = "chop", layers = 1 }]'
    table = 'engine = { use = "file", path = "made.jsonl" }'
    recipe = pico_workspace.recipe(step, tables=table)
    code, _, err = pico_workspace.command("plan", str(recipe))
    assert (code, "made.jsonl: there is no such file" in err) == (2, True)
    plain = pico_workspace.run(pico_workspace.recipe(step, name="plain"))
    [chunk] = plain.folder.glob("answers/teacher-heldout/*.json")
    answers = json.loads(chunk.read_text())["answers"]
    made = [{"id": name, "tokens": each["tokens"]} for name, each in answers.items()]
    path = pico_workspace.folder / "made.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    outcome = pico_workspace.run(recipe)
    assert outcome.rows == plain.rows
    first = load_recipe(recipe).engine.key()
    path.write_text("\n".join(map(json.dumps, made)) + "\n")
    assert load_recipe(recipe).engine.key() != first


def test_chat_finds_the_answer_of_the_teacher_in_the_file(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.texts(blurbs=3, questions=1)
    pico_workspace.model()
    messages = [{"role": "user", "content": "w3 w4"}]
    system = (pico_workspace.folder / "texts/style.md").read_text().strip()
    with_system = [{"role": "system", "content": system}, *messages]
    lines = [
        {"id": "held-0", "answer": "w9"},
        {"messages": messages, "answer": "w10 w11"},
        {"messages": with_system, "answer": "w12 w13"},
    ]
    path = pico_workspace.folder / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    table = 'engine = { use = "file", path = "answers.jsonl" }'
    step = 'step = [{ use = "chop", layers = 1 }]'
    pico_workspace.run(pico_workspace.recipe(step, tables=table))
    words = ("chat", "trial", "--teacher", "--tokens", "3", "--prompt")
    code, out, err = pico_workspace.command(*words, "w3 w4", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["answers"]["teacher"] == "w12 w13"
    code, out, err = pico_workspace.command(*words, "w5")
    assert code == 2
    assert "answers.jsonl: does not answer 1 of 1 texts: w5. Add a line" in err
    assert out.startswith("full: ")
    path.unlink()
    code, out, err = pico_workspace.command(*words, "w3 w4")
    assert (code, out) == (2, "")
    assert "there is no such file" in err


def test_a_plan_says_which_answers_the_file_has(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.texts(blurbs=3, questions=5)
    model = pico_workspace.model()
    step = 'step = [{ use = "chop", layers = 1 }]'
    recipe = pico_workspace.recipe(step, tables='engine = { use = "file", path = "a.jsonl" }')
    tokenizer = load_tokenizer(model)
    chat = ChatFormat.of(tokenizer)
    conversations, style = read_conversations(load_recipe(recipe).recipe.samples, recipe.parent)
    asked = [each for each in conversations if each.answer is None]
    prompts = chat.prompts([chat.chat_of(each, style) for each in asked])
    lines = [
        {"id": asked[0].id, "answer": "w9"},
        {"messages": chat.chat_of(asked[1], style), "answer": "w9"},
        {"prompt": prompts[2], "answer": "w9"},
        {"prompt": tokens_of(tokenizer, prompts[3]), "answer": "w9"},
    ]
    path = pico_workspace.folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    words = ("plan", recipe.name, "--json")
    code, out, _ = pico_workspace.command(*words)
    line = next(each for each in json.loads(out)["steps"] if each["id"] == "teacher's answers")
    assert code == 0
    assert (line["use"], line["prompts"], line["answer_tokens"]) == ("file", 5, 20)
    assert line["missing"] == [asked[4].id]
    assert line["note"] == f"4 of 5 answers are in a.jsonl, not {asked[4].id}"
    assert (line["ram_bytes"], line["seconds"], line["read_bytes"]) == (path.stat().st_size, 0, 0)
    assert "the engine lacks 1 answers" in pico_workspace.command(*words[:2], "--short")[2]
    # What the teacher proposes has no text yet, so an id alone can be known.
    more = ("--set", "lessons.count=4", "--set", "lessons.from=teacher")
    path.write_text(path.read_text() + '\n{"id": "000001.lesson", "answer": "w9"}')
    steps = json.loads(pico_workspace.command(*words, *more)[1])["steps"]
    line = next(each for each in steps if each["id"] == "4 lessons")
    assert line["missing"] == [f"{k:06d}.lesson" for k in (0, 2, 3)]
    path.write_text("{")
    code, out, err = pico_workspace.command(*words)
    assert (code, out) == (2, "")
    assert "a.jsonl, line 1, column 2: is no JSON" in err


def test_answers_of_models_that_think_follow_the_prompt(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tokenizer = pico_tokenizer(64, thinks=True)
    tokenizer.save_pretrained(folder)
    weights = open_checkpoint(folder).weights
    model = AnsweringModel(folder, weights, torch.device("cpu"), torch.float32)
    lines = [
        {"id": "a", "answer": "<think> w1 </think> w2"},
        {"id": "b", "answer": "w3"},
        {"prompt": "w4 <think>", "answer": "w5"},
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    engine = File(path="answers.jsonl")
    for end, texts in (
        ("<think>", {"a": "w1 </think> w2 <end>", "c": "w5 <end>"}),
        ("<think> </think>", {"a": "w2 <end>", "b": "w3 <end>"}),
    ):
        prompt = tuple(tokenizer(f"w4 {end}")["input_ids"])
        asked = dict.fromkeys(texts, Asked(prompt, 9))
        found = engine.connect(model, tmp_path).answers(asked)
        assert {name: tokenizer.decode(answer.tokens) for name, answer in found} == texts


@pytest.mark.parametrize("engine", ["file", "openai"])
def test_the_module_of_an_engine_is_light(engine: str) -> None:
    script = (
        f"import rotdistill_engines.{engine}, sys; "
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
