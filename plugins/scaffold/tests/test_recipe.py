"""A new recipe suits its models and texts: `check` and `plan` accept it, and `run` completes it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rotdistill_core.planning.machine import Machine
from rotdistill_core.testing import TEMPLATE, WORDS, PicoWorkspace, pico_tokenizer

TEXTS = 24


@pytest.fixture
def work(pico_workspace: PicoWorkspace) -> PicoWorkspace:
    """Return a folder with a teacher of three layers, and conversations in JSON lines."""
    pico_workspace.model("teacher", num_hidden_layers=3)
    write_texts(pico_workspace.folder / "mine.jsonl")
    return pico_workspace


def write_texts(path: Path, answered: bool = True) -> None:
    rows = [
        {
            "question": " ".join(WORDS[(k + 5 * j) % 50] for j in range(4)),
            **({"answer": " ".join(WORDS[(7 * k + j) % 50] for j in range(6))} if answered else {}),
            "language": "en",
        }
        for k in range(TEXTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bytes_tokenizer(folder: Path, size: int) -> None:
    """Put a byte-level tokenizer of so many tokens in the place of a model's own."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<unk>", "<end>"],
    )
    inner.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def new(work: PicoWorkspace, *words: str) -> dict[str, Any]:
    """Write a recipe; return it as read, after `check` and `plan` have accepted it."""
    options = ("--teacher", "teacher", "--texts", "mine.jsonl", *words)
    code, out, err = work.command("new", "recipe", "mine", *options)
    assert (code, out.splitlines()[0]) == (0, "mine.toml"), err
    assert "rotdistill run mine.toml" in err
    for verb in ("check", "plan"):
        code, _, err = work.command(verb, "mine.toml")
        assert code == 0, err
    text = (work.folder / "mine.toml").read_text()
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith(("model", "guard")), line
    return tomllib.loads(text)


def uses(recipe: dict[str, Any]) -> list[str]:
    return [step["use"] for step in recipe["step"]]


def finished(work: PicoWorkspace) -> set[str]:
    """Run the recipe without its report, which says nothing about it; return the variants."""
    result = work.run(work.folder / "mine.toml", ("observers=[]",))
    assert not result.failed
    return set(result.checkpoints)


def test_one_model_is_cut(work: PicoWorkspace) -> None:
    recipe = new(work, "--domain", "lamps", "--student", "teacher")
    assert uses(recipe) == ["chop", "residuals", "writer-refit", "fidelity", "answers"]
    assert recipe["variants"] == {"base": ["answers"], "full": ["refit", "answers"]}
    assert recipe["step"][0]["layers"] == 2
    samples = recipe["samples"]
    assert samples["index"] == "mine.jsonl"
    assert samples["heldout_share"] == samples["validation"] == 0.3
    assert samples["style"] == "mine-system.md"
    assert "lamps" in (work.folder / "mine-system.md").read_text()
    assert samples["max_tokens"] < 128
    assert finished(work) == {"base", "full"}
    # No head of its own: the student is not larger than what was cut.
    folder = work.run(work.folder / "mine.toml", ("observers=[]",)).checkpoints["full"]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("width", "runs"), [(16, True), (48, False)])
def test_a_student_of_one_vocabulary_learns_predictions(
    work: PicoWorkspace, width: int, runs: bool
) -> None:
    work.model("student", "qwen2", hidden_size=width, num_hidden_layers=2, seed=1)
    recipe = new(work, "--student", "student")
    assert uses(recipe)[:3] == ["residuals", "lm-head-ridge", "prompt-kl"]
    assert recipe["variants"]["full"] == ["head", "style", "answers"]
    assert "style" not in recipe["samples"]
    if runs:
        assert finished(work) == {"base", "head", "full"}


@pytest.mark.parametrize(("width", "aligner"), [(16, True), (48, False)])
def test_a_student_of_another_vocabulary_is_aligned(
    work: PicoWorkspace, width: int, aligner: bool
) -> None:
    for name, size, changes in (
        ("teacher", 300, {"num_hidden_layers": 3}),
        ("student", 280, {"hidden_size": width}),
    ):
        model = work.model(name, vocab_size=size, max_position_embeddings=512, **changes)
        bytes_tokenizer(model, size)
    recipe = new(work, "--student", "student")
    assert ("procrustes" in uses(recipe)) is ("basis-fold" in uses(recipe)) is aligner
    assert "lm-head-ridge" not in uses(recipe)
    if aligner:
        assert finished(work) == {"base", "rotated"}


def test_vocabularies_that_cannot_be_paired_are_refused(work: PicoWorkspace) -> None:
    student = work.model("student", vocab_size=80)
    pico_tokenizer(80).save_pretrained(student)
    words = ("--teacher", "teacher", "--student", "student", "--texts", "mine.jsonl")
    code, out, err = work.command("new", "recipe", "mine", *words)
    assert (code, out) == (3, "")
    assert "its tokens are not bytes" in err
    assert not (work.folder / "mine.toml").exists()


def test_a_model_whose_writers_cannot_be_refitted_is_trained(work: PicoWorkspace) -> None:
    work.model("teacher", "olmo2", num_hidden_layers=3)
    assert uses(new(work))[:4] == ["chop", "residuals", "prompt-kl", "fidelity"]


def test_it_says_which_texts_guard_and_that_texts_are_few(work: PicoWorkspace) -> None:
    words = ("--teacher", "teacher", "--texts", "mine.jsonl")
    code, _, err = work.command("new", "recipe", "mine", *words)
    assert code == 0, err
    text = (work.folder / "mine.toml").read_text()
    said = "of the 24 texts: options are chosen on them"
    validation = next(line for line in text.splitlines() if line.endswith(said))
    share, number = float(validation.split()[2]), int(validation.split("# ")[1].split()[0])
    assert round(share * TEXTS) == number
    guard, few = (next(x for x in err.splitlines() if x.startswith(k)) for k in ("guard", "texts"))
    assert guard.startswith("guard: ")
    assert "samples/general/index.tsv, 40 shipped texts outside the domain" in guard
    assert f"texts: {TEXTS} conversations show that everything works" in few
    comments = " ".join(
        line.lstrip("# ")
        for line in (work.folder / "mine.toml").read_text().splitlines()
        if line.startswith("#")
    )
    assert guard.partition("tsv, ")[2] in comments
    samples = tomllib.loads(text)["samples"]
    outside = f"outside the recipe's folder: {samples['guard']}. Before you move that folder, copy"
    assert sum(outside in line for line in err.splitlines()) == 1
    scoring = next(line for line in text.splitlines() if "they score variants" in line)
    held = int(scoring.split("# ")[1].split()[0])
    assert (
        f"texts: {TEXTS - number - held} to learn from, {number} to choose options on, {held} held "
        "out to score; with --heldout FILE more are learned\n" in err
    )
    assert few.removeprefix("texts: ") in comments
    sets = [word for word in few.replace("`", "").split() if word.startswith("lessons.")]
    assert len(sets) == 2
    sets = [word.strip(";").replace("1000", "20") for word in sets]
    code, _, err = work.command("plan", "mine.toml", "--set", sets[0], "--set", sets[1])
    assert code == 0, err

    (work.folder / "mine.toml").unlink()
    pico_rows = work.texts()["guard.tsv"]
    code, _, err = work.command("new", "recipe", "mine", *words, "--guard", str(pico_rows))
    assert code == 0, err
    assert "guard.tsv, texts outside the domain, which should stay right" in err


def test_enough_texts_get_no_advice(work: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_scaffold._recipe_text.ENOUGH_TEXTS", TEXTS)
    words = ("--teacher", "teacher", "--texts", "mine.jsonl")
    code, _, err = work.command("new", "recipe", "mine", *words)
    assert code == 0, err
    assert "lessons" not in err
    assert "lessons" not in (work.folder / "mine.toml").read_text()


def test_texts_without_answers_are_answered_by_the_teacher(work: PicoWorkspace) -> None:
    write_texts(work.folder / "mine.jsonl", answered=False)
    assert new(work)["samples"]["own_answers"] > 0


def test_sizes_follow_the_machine(work: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_scaffold._recipe.LONGEST_RUN", -1)
    monkeypatch.setattr("rotdistill_scaffold._recipe.FEW_TEXTS", (18, 12))
    recipe = new(work)
    assert recipe["samples"]["limit"] == 12
    assert "own_answers" not in recipe["samples"]
    (work.folder / "mine.toml").unlink()
    small = Machine(ram=1000, gpus=(), disk=None, cores=1)
    monkeypatch.setattr("rotdistill_scaffold._recipe.this_machine", lambda _: small)
    words = ("--teacher", "teacher", "--texts", "mine.jsonl")
    code, _, err = work.command("new", "recipe", "mine", *words)
    assert code == 3
    assert "teacher do not fit here" in err
    assert not (work.folder / "mine.toml").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("recipe", "new", "--domain", "lamps"), 2, "Name the texts"),
        (
            ("recipe", "new", "--texts", "mine.jsonl", "--domain", "a\nb"),
            2,
            "--domain: write in a few words",
        ),
        (
            ("recipe", "new", "--teacher", "teacher", "--texts", "gone.jsonl"),
            2,
            "--texts gone.jsonl: there is no such file",
        ),
        (("recipe", "new", "--teacher", "owner/gone"), 3, "hf download owner/gone"),
        (("step", "new", "--texts", "mine.jsonl"), 2, "--texts: for a recipe"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_written(
    work: PicoWorkspace, words: tuple[str, ...], code: int, message: str
) -> None:
    found, out, err = work.command("new", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert not list(work.folder.glob("new*"))


def test_a_packaged_teacher_is_said(work: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotdistill_scaffold._recipe.MODEL", "teacher")
    code, _, err = work.command("new", "recipe", "mine", "--texts", "mine.jsonl")
    assert code == 0, err
    assert "teacher: teacher, a small model in a Python package, since --teacher named none" in err


def test_a_prompt_that_all_texts_have_is_no_missing_one(work: PicoWorkspace) -> None:
    path = work.folder / "mine.jsonl"
    rows = [{**json.loads(line), "system": "w1"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "style" not in new(work)["samples"]
    text = (work.folder / "mine.toml").read_text()
    assert "# The system prompt is that of the conversations: all have the same." in text
    assert "there is none" not in text
