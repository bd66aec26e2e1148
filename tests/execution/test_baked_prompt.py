"""A run that bakes the system prompt in: the teacher reads it, the student does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import PicoWorkspace, SilentObserver

STEPS = """
variants = { base = [], refit = ["refit"], head = ["head"], lora = ["lora"] }
step = [
    { use = "residuals" },
    { id = "refit", use = "writer-refit", writers = ["heads", "neurons"] },
    { id = "head", use = "lm-head-ridge", objective = "kl" },
    { id = "lora", use = "prompt-kl", prompts_from = ["questions"], learning_rate = 5e-3 },
    { use = "fidelity" },
    { use = "answers" },
]
"""
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)
BAKED = "samples.bake_prompt = true\nsamples.own_answers = 6"


@pytest.fixture(scope="module")
def workspace(make_workspace: Callable[..., PicoWorkspace]) -> PicoWorkspace:
    """Return a workspace whose system prompt matters to its model."""
    workspace = make_workspace()
    workspace.texts(blurbs=40, questions=5)
    (workspace.folder / "texts/style.md").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12")
    return workspace


@pytest.fixture(scope="module")
def finished(workspace: PicoWorkspace) -> tuple[RunResult, SilentObserver]:
    """Return a run of a model that is its own teacher, and what it said."""
    observer = SilentObserver()
    recipe = workspace.recipe(STEPS, tables=BAKED, observers=["report"])
    return workspace.run(recipe, observer=observer), observer


def test_variants_are_scored_without_the_prompt_and_come_nearer(
    finished: tuple[RunResult, SilentObserver],
) -> None:
    figures = overall_figures(finished[0].rows)
    base = figures["base"]["kl"]
    assert base > 0.01
    # The student is the teacher: untaught, it lacks what the teacher lacks without the prompt.
    for variant in figures:
        assert figures[variant]["kl_teacher"] == pytest.approx(base, rel=1e-3)
        assert figures[variant]["top1_teacher"] == figures["base"]["top1"]
    assert figures["lora"]["kl"] < 0.8 * base
    assert figures["refit"]["kl"] < base
    assert figures["head"]["kl"] < base


def test_the_student_reads_what_the_template_writes_without_a_system_turn(
    finished: tuple[RunResult, SilentObserver], workspace: PicoWorkspace
) -> None:
    tokenizer = load_tokenizer(workspace.folder / "model")
    lines = (finished[0].folder / "samples.tsv").read_text().splitlines()[1:]
    first = next(line.split("\t") for line in lines if line.startswith("en-0\t"))
    question = "w0 w3 w6 w9 w12"
    assert int(first[4]) == len(tokenizer(f"<user> {question} <end> <assistant>")["input_ids"])
    said = [line for line in finished[1].lines if "samples.bake_prompt" in line]
    assert said == [
        "samples.bake_prompt: the teacher reads the system prompt, the student does not. Before a "
        "question the student reads '<user> ', as the chat template begins without one."
    ]


def test_the_report_and_the_cards_say_so(finished: tuple[RunResult, SilentObserver]) -> None:
    run = finished[0]
    figures = overall_figures(run.rows)
    markdown = (run.folder / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| teacher, no prompt"))
    assert f" {figures['base']['kl_teacher']:.4f} " in row
    assert "teacher, no prompt" in (run.folder / "report.html").read_text()
    assert "kl_teacher" in json.loads((run.folder / "report.json").read_text())["figures"]["base"]
    cards = {name: (path / "README.md").read_text() for name, path in run.checkpoints.items()}
    assert "Ask it without a system prompt" in cards["lora"]
    assert "Ask it" not in cards["base"]
    assert "without a system prompt, next to a teacher that reads one" in cards["base"]


def test_chat_asks_variants_without_the_prompt_and_says_so(
    finished: tuple[RunResult, SilentObserver], workspace: PicoWorkspace
) -> None:
    asked = ("--prompt", "w3 w5 w8", "--tokens", "6", "--json", "--variant", "base")
    code, out, err = workspace.command("chat", "trial", *asked, "--teacher")
    assert code == 0
    assert "its system prompt is baked in: base are asked without one" in " ".join(err.split())
    answers = json.loads(out)[0]["answers"]
    nothing, prompt = workspace.folder / "nothing.md", workspace.folder / "texts/style.md"
    nothing.write_text("")
    alone = workspace.command("chat", "trial", *asked, "--system", str(nothing))
    told = workspace.command("chat", "trial", *asked, "--system", str(prompt))
    # Base and teacher are one model: what differs is the prompt.
    assert json.loads(alone[1])[0]["answers"]["base"] == answers["base"]
    assert json.loads(told[1])[0]["answers"]["base"] == answers["teacher"]
    assert answers["base"] != answers["teacher"]


def test_the_switch_is_part_of_the_key(workspace: PicoWorkspace) -> None:
    steps = 'step = [{ use = "residuals" }, { use = "fidelity" }]'
    alike = workspace.run(workspace.recipe(steps, name="alike"))
    baked = workspace.run(
        workspace.recipe(steps, name="baked", tables="samples.bake_prompt = true")
    )
    keys, inputs = (
        [getattr(Ledger(run.folder).starts[-1], name) for run in (alike, baked)]
        for name in ("key", "inputs")
    )
    assert keys[0] != keys[1]
    assert inputs[0]["texts"] != inputs[1]["texts"]
    assert not any(result.reused for result in baked.steps.values())
    plain = overall_figures(alike.rows)["full"]
    assert plain["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl_teacher" not in plain


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_without_a_prompt_there_is_nothing_to_bake(
    make_workspace: Callable[..., PicoWorkspace], verb: str
) -> None:
    workspace = make_workspace()
    (workspace.folder / "texts/style.md").write_text("")
    recipe = workspace.recipe(STEPS, tables=BAKED)
    code, _, err = workspace.command(verb, str(recipe))
    assert code == 2
    assert "there is no system prompt to bake in" in " ".join(err.split())


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_two_vocabularies_are_refused(
    make_workspace: Callable[..., PicoWorkspace], verb: str
) -> None:
    workspace = make_workspace()
    workspace.model("other", vocab_size=60)
    steps = 'step = [{ use = "answers" }]'
    recipe = workspace.recipe(steps, teacher="other", tables=BAKED)
    code, _, err = workspace.command(verb, str(recipe))
    assert code == 3
    assert "which needs one vocabulary" in " ".join(err.split())
    assert "should not happen" not in err


def test_a_template_that_needs_a_system_turn_is_refused_before_any_work(
    make_workspace: Callable[..., PicoWorkspace],
) -> None:
    workspace = make_workspace()
    path = Path(workspace.folder / "model" / "chat_template.jinja")
    needs = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    path.write_text(needs + path.read_text())
    recipe = workspace.recipe(STEPS, tables=BAKED)
    code, _, err = workspace.command("run", str(recipe))
    assert code == 3
    assert "no system turn" in err
    assert not list(workspace.runs.glob("*/answers*"))
