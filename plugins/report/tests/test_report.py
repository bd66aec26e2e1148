"""The report holds the figures of results.jsonl, the same in HTML, Markdown and JSON."""

from __future__ import annotations

import html
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rotdistill_report._data import Advice, ReportData, ShownFigure, Tone, collect, with_interval
from rotdistill_report._findings import collect_issues, next_step, verdict, with_findings
from rotdistill_report._plots import plots
from rotdistill_report._templates import LONGEST_EXCERPT, excerpt, table_cell
from rotdistill_report._terminal import terminal_summary
from rotdistill_report._write import html as html_report

from rotdistill_core.evaluation.intervals import Estimate, Interval, TextFigure, estimates
from rotdistill_core.evaluation.metrics import metric_named
from rotdistill_core.evaluation.rows import MetricRow, overall_figures, row_from_json
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import Answer, Caution, CautionKind, Remedy, TrainingCurve
from rotdistill_core.testing import PicoWorkspace

STEPS = """
# <script> of the recipe
[[step]]
use = "residuals"
[[step]]
use = "chop"
layers = 1
[[step]]
use = "fidelity"
{answers}
[variants]
{variants}
"""
ANSWERS = '[[step]]\nuse = "answers"'
VARIANTS = 'base = []\ncut = ["chop"]\nfull = ["chop"]'


def run(
    work: Path,
    observers: Sequence[str] = ("report",),
    answers: str = ANSWERS,
    variants: str = VARIANTS,
) -> RunResult:
    workspace = PicoWorkspace(work)
    workspace.texts()
    model = workspace.model()
    steps = STEPS.format(answers=answers, variants=variants)
    recipe = workspace.recipe(
        steps, name="reported", teacher=model, student=model, observers=observers
    )
    return workspace.run(recipe)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Return one run for everything that only reads it."""
    return run(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def markdown(outcome: RunResult) -> str:
    return (outcome.folder / RunLayout.REPORT_MARKDOWN).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(outcome: RunResult) -> str:
    return (outcome.folder / RunLayout.REPORT_HTML).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(outcome: RunResult) -> dict[str, Any]:
    text = (outcome.folder / RunLayout.REPORT_JSON).read_text(encoding="utf-8")
    return json.loads(text)


def results(folder: Path) -> list[MetricRow]:
    lines = RunLayout(folder).results.read_text(encoding="utf-8").splitlines()
    return [row_from_json(json.loads(line)) for line in lines]


def rebuild(outcome: RunResult) -> ReportData:
    """Return the report of a run from its files, without opening its models."""
    recipe = load_recipe(outcome.folder.parents[1] / "reported.toml")
    parities = Ledger(outcome.folder).parities
    unopened = RunResult(
        outcome.folder,
        results(outcome.folder),
        outcome.steps,
        outcome.checkpoints,
        [],
        model_parity={each.role: each.result for each in parities if each.role},
        parity={each.variant: each.result for each in parities if each.variant},
    )
    out = StepOutput(ArtifactStore(outcome.folder.parent), Ledger(outcome.folder), "report")
    return with_findings(collect(recipe, unopened, out), recipe, unopened)


def table_row(markdown: str, variant: str, figure: str) -> str:
    """Return the one row of a Markdown table that begins with a variant and holds a figure."""
    (row,) = [
        line
        for line in markdown.splitlines()
        if line.startswith(f"| {variant} | ") and figure in line
    ]
    return row.replace("*", "")


def test_markdown_holds_the_figures_of_the_results(outcome: RunResult, markdown: str) -> None:
    overall = overall_figures(results(outcome.folder))
    for variant in ("base", "cut"):
        figures = overall[variant]
        row = table_row(markdown, variant, f"{figures['perplexity']:.2f}")
        assert row.startswith(f"| {variant} | {figures['kl']:.4f} | {figures['top1']:.3f} |")
    assert "- **chop** (cut," in markdown


def test_json_holds_the_figures_of_the_results(outcome: RunResult, report: dict[str, Any]) -> None:
    rows = results(outcome.folder)
    figures = {
        variant: {metric: figure["value"] for metric, figure in row.items()}
        for variant, row in report["figures"].items()
    }
    assert figures == overall_figures(rows)
    for metric, variants in report["layer_curves"].items():
        for variant, points in variants.items():
            assert points == {
                str(row.layer): row.value
                for row in rows
                if (row.variant, row.metric) == (variant, metric) and row.layer
            }


@pytest.mark.parametrize(
    "metric",
    ["kl", "top1", "perplexity", "hidden_cosine", "residual_rms_diff", "parameters", "answer_chrf"],
)
def test_page_and_markdown_hold_the_figures_of_the_json(
    page: str, markdown: str, report: dict[str, Any], metric: str
) -> None:
    words = metric_named(metric).title.split()
    for variant in ("base", "cut", "full"):
        figure = report["figures"][variant][metric]
        assert figure["text"] == format(figure["value"], metric_named(metric).format)
        assert any(
            line.startswith(f"| {variant} |") and figure["text"] in line
            for line in markdown.splitlines()
        )
        assert figure["change"] in markdown or metric not in report["estimates"]
        words += f"{figure['text']} {figure['change']}".split()
    # The page has one line for each metric.
    lines = [re.sub(r"<[^>]*>", " ", line).split() for line in page.splitlines()]
    assert words in lines


def test_parity_stands_in_every_form_of_the_report_and_in_the_cards(
    outcome: RunResult, markdown: str, page: str, report: dict[str, Any]
) -> None:
    assert set(report["model_parity"]) == {"teacher", "student", "after chop"}
    assert set(report["parity"]) == {*outcome.checkpoints} == {*outcome.parity}
    for name, parity in {**report["model_parity"], **report["parity"]}.items():
        assert 0 <= parity["difference"] <= parity["allowed"]
        figure = f"{parity['difference']:.1e}"
        assert f"| {name} | {figure} | " in markdown
        assert f'<tr><th>{name}</th><td data-label="difference">{figure}</td>' in page
    for text in (markdown, page):
        assert "As transformers computes it" in text
        assert "More than 1e-04 is refused" in text
    for variant, folder in outcome.checkpoints.items():
        card = (folder / RunLayout.CARD).read_text(encoding="utf-8")
        figure = f"{report['parity'][variant]['difference']:.1e}"
        assert "As transformers computes it: `AutoModelForCausalLM` on this folder" in card
        assert f"agree to {figure} of the spread" in card


def test_the_verdict_is_the_same_everywhere(
    page: str, markdown: str, report: dict[str, Any]
) -> None:
    assert report["verdict"] in markdown
    assert report["verdict"].replace("`", "") in html.unescape(re.sub(r"</?code>", "", page))


def test_a_smaller_variant_within_noise_of_the_best_is_named_with_its_size(
    outcome: RunResult,
) -> None:
    data = rebuild(outcome)
    recipe = load_recipe(outcome.folder.parents[1] / "reported.toml")
    kl = {"base": 2.0, "cut": 1.1, "full": 1.0}
    sizes = {"base": 100e6, "cut": 113.3e6, "full": 141.6e6}
    figures = {
        name: {
            "kl": ShownFigure(kl[name], f"{kl[name]:.4f}"),
            "parameters": ShownFigure(sizes[name], ""),
        }
        for name in kl
    }
    lower = Interval(-0.9, -1.0, -0.8), Interval(-1.0, -1.1, -0.9)
    own = Interval(1.0, 0.9, 1.1)
    changes = {"base": None, "cut": lower[0], "full": lower[1]}
    data = replace(
        data,
        figures=figures,
        estimates={"kl": {name: Estimate(own, changes[name]) for name in kl}},
        teacher_parameters=134_515_008,
    )
    texts = {name: {f"{k}": TextFigure(kl[name] + (k - 2) * (name == "cut"), 1.0)
                    for k in range(5)} for name in kl}  # fmt: skip
    sentence, tone = verdict(data, recipe, [], texts)
    assert sentence.startswith(
        "It worked: `cut` is as near to the teacher as `full`, which is larger, with a held-out KL "
        "of 1.1000 nats per token instead of 2.0000 (-0.900 [-1.000, -0.800]). It has 113.3 "
        "million parameters, the teacher 134.5 million."
    )
    assert tone is Tone.GOOD
    doubted, tone = verdict(data, recipe, [], texts, ["`cut` has learned its texts by heart"])
    assert doubted.startswith("It worked in part: `cut` is")
    assert doubted.endswith(" But `cut` has learned its texts by heart.")
    assert tone is Tone.NEUTRAL


def test_the_next_step_is_a_command_also_where_nothing_is_to_mend(report: dict[str, Any]) -> None:
    command = report["next_step"]["command"]
    assert command.startswith("rotdistill ")
    remedies = [each["command"] for issue in report["issues"] for each in issue["advice"]]
    assert command in remedies or " chat reported-" in command or " show reported-" in command


@pytest.mark.parametrize("command", ["rotdistill run more.toml", "rotdistill chat reported"])
def test_a_run_that_is_advised_comes_with_the_way_to_ask_what_it_takes(
    outcome: RunResult, command: str
) -> None:
    data = replace(rebuild(outcome), next_step=Advice("more texts", command))
    out = io.StringIO()
    Console(file=out, width=200).print(terminal_summary(data))
    after = out.getvalue().partition(f"Next, more texts:\n  {command}")[2]
    told = "(plan in place of run says what that takes)"
    assert after.split("\n")[1].strip() == (told if " run " in command else "")


@pytest.mark.parametrize(
    ("full", "tone", "wanted"),
    [
        ('"chop", "refit"', Tone.NEUTRAL, "rotdistill run more"),
        ('"chop", "refit"', Tone.GOOD, " chat "),
        ('"chop"', Tone.NEUTRAL, " chat "),
    ],
)
def test_more_texts_are_the_next_step_of_a_variant_that_learns(
    outcome: RunResult, tmp_path: Path, full: str, tone: Tone, wanted: str
) -> None:
    refit = '[[step]]\nid = "refit"\nuse = "writer-refit"' if "refit" in full else ""
    text = (outcome.folder.parents[1] / "reported.toml").read_text(encoding="utf-8")
    text = text.replace("[variants]", f"{refit}\n[variants]")
    path = tmp_path / "reported.toml"
    path.write_text(text.replace('full = ["chop"]', f"full = [{full}]"), encoding="utf-8")
    data = replace(rebuild(outcome), more_lessons=Advice("more texts", "rotdistill run more"))
    assert wanted in next_step(data, load_recipe(path), outcome, [], tone).command


def test_the_size_of_the_teacher_is_known_where_it_was_opened(report: dict[str, Any]) -> None:
    assert report["is_cut"] is True
    assert report["teacher_parameters"] == report["figures"]["base"]["parameters"]["value"]


def test_cautions_of_steps_are_issues_with_what_to_try(outcome: RunResult) -> None:
    guarded = Caution(
        CautionKind.GUARDED, "half of it", (Remedy("a wider guard", ("chop.layers=2",)),)
    )
    by_heart = Caution(CautionKind.OVERFITTED, "by heart")
    data = rebuild(outcome)
    first = replace(data.steps[0], cautions=[guarded, by_heart])
    data = replace(data, steps=[first, *data.steps[1:]])
    recipe = load_recipe(outcome.folder.parents[1] / "reported.toml")
    issues = [
        each for each in collect_issues(data, recipe) if each.kind in ("guarded", "overfitted")
    ]
    assert [each.text for each in issues] == ["half of it.", "by heart."]
    (advice,) = issues[0].advice
    assert advice.command.startswith("rotdistill run ")
    assert advice.command.endswith("reported.toml --set chop.layers=2")
    assert not issues[1].advice
    assert issues[0].subject == f"{first.step} (in {first.variant})"


def test_answers_to_all_questions_stand_side_by_side(outcome: RunResult, markdown: str) -> None:
    base, full = (outcome.steps[name, "answers"].report.answers for name in ("base", "full"))
    assert len(base) == 3
    assert "| id | language | question | teacher | base | full |" in markdown
    for question, answer in base.items():
        texts = (answer.question, answer.teacher, answer.student, full[question].student)
        cells = " | ".join(table_cell(text) for text in texts)
        assert f"| {question} | en | {cells} |" in markdown


def test_three_answers_stand_before_all_figures(
    outcome: RunResult, page: str, markdown: str, report: dict[str, Any]
) -> None:
    answers = outcome.steps["base", "answers"].report.answers
    assert report["first_questions"] == list(answers)
    first = answers["held-0"]
    header, _, line = re.split("\n", markdown[markdown.index("| question | teacher |") :])[:3]
    assert header == "| question | teacher | base | full |"
    assert line.startswith(f"| {first.question} | {table_cell(excerpt(first.teacher))} | ")
    assert markdown.index(header) < markdown.index("## Variants")
    screen, _, below = page.partition('<h2 id="variants">')
    for question, answer in answers.items():
        for part in (screen, below):
            assert part.count(f'<span class="count" lang="en">{question}, en</span>') == 1
            assert html.escape(excerpt(answer.teacher), quote=False) in html.unescape(part)
    words = report["answer_verdict"].replace("`", "")
    assert words in html.unescape(re.sub(r"</?code>", "", screen))
    assert report["answer_verdict"] in markdown.partition("## Variants")[0]


def test_an_excerpt_is_cut_with_a_mark_only() -> None:
    assert excerpt("a  b\nc") == "a b c"
    whole = "x" * LONGEST_EXCERPT
    assert excerpt(whole) == whole
    assert excerpt(whole + "y") == whole + " …"
    words = "word " * LONGEST_EXCERPT
    assert excerpt(words).endswith("word …")
    assert len(excerpt(words)) <= LONGEST_EXCERPT + 2


def test_answers_of_scripts_from_right_to_left_have_a_direction_of_their_own(
    outcome: RunResult,
) -> None:
    answer = Answer(language="ar", question="أين؟", teacher="هنا.", student="هناك.")
    data = replace(
        rebuild(outcome),
        answers={"base": {"q": answer}, "full": {"q": answer}},
        first_questions=["q"],
    )
    text = html_report(data, outcome.folder.parent)
    for words in (answer.teacher, answer.student):
        assert len(re.findall(rf'<p dir="auto">{words}</p>', text)) == text.count(words) > 0
    assert text.count('<h3 dir="auto">أين؟ ') == 2


def test_answers_are_in_no_note_of_a_step(report: dict[str, Any]) -> None:
    (step,) = [s for s in report["steps"] if (s["step"], s["variant"]) == ("answers", "base")]
    assert "answers" not in step["notes"]


def test_intervals_are_those_of_the_results(outcome: RunResult, markdown: str) -> None:
    estimate = estimates(outcome.rows, "base")["kl"]["cut"]
    assert "| variant | held-out KL, nats/token | change | top-1 | change |" in markdown
    row = table_row(markdown, "cut", with_interval(estimate.own, "kl"))
    change = estimate.change
    assert change is not None
    # Layers are random: without one of them the student is farther from its teacher on every text.
    assert change.low > 0
    assert f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" in row


def test_the_terminal_shows_intervals_and_one_question(outcome: RunResult) -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    for summary in outcome.summaries:
        console.print(summary)
    text = console.export_text()
    assert with_interval(estimates(outcome.rows, "base")["kl"]["cut"].own, "kl") in text
    answers = [line.split() for line in text.splitlines() if " answers held-" in line]
    assert [(words[0], words[2]) for words in answers] == [
        ("teacher", "held-0:"),
        ("base", "held-0:"),
        ("full", "held-0:"),
    ]
    assert "Answers, base → full" in text
    assert "chrF against the teacher's answers, of 100: " in text
    assert "teacher's language" not in text  # pico models speak none


def test_the_page_loads_nothing_and_its_links_stay_inside(page: str) -> None:
    assert not re.search(r"<script|<link|<iframe|@import|\ssrc=|url\((?!#)", page)
    links = set(re.findall(r'href="([^"]*)"', page))
    assert links >= {"#variants", "#answers"}
    assert all(link.startswith("#") for link in links)
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r'(?:href="|url\()(#[^")]*)', page)} <= set(ids)


def test_plots_take_the_colour_of_the_page(page: str) -> None:
    assert page.count("<svg ") >= 3
    assert "currentColor" in page
    assert "#010203" not in page


def test_facts_and_errors_stand_above_the_answers_that_state_them(outcome: RunResult) -> None:
    answer = Answer(
        language="en",
        question="Where?",
        teacher="Here.",
        student="There.",
        teacher_facts=("stands here",),
        student_errors=("stands there",),
    )
    answers = {"base": {"q": answer}, "full": {"q": answer}}
    data = replace(rebuild(outcome), answers=answers, first_questions=["q"])
    text = re.sub(r"<[^>]*>", "", html_report(data, outcome.folder.parent))
    assert "teacher · names: stands hereHere." in text
    assert "full · wrongly: stands thereThere." in text


def test_a_run_without_answers_has_no_section_of_them(tmp_path: Path) -> None:
    outcome = run(tmp_path, answers="")
    markdown = (outcome.folder / RunLayout.REPORT_MARKDOWN).read_text(encoding="utf-8")
    assert "## Answers" not in markdown
    assert "## How certain the figures are" in markdown


def test_only_variants_that_answered_are_among_the_answers(tmp_path: Path) -> None:
    variants = 'base = []\ncut = ["chop"]\nfull = ["chop", "answers"]\nmore = ["answers"]'
    outcome = run(tmp_path, variants=variants)
    markdown = (outcome.folder / RunLayout.REPORT_MARKDOWN).read_text(encoding="utf-8")
    assert "| id | language | question | teacher | full |" in markdown
    answers = markdown.partition("## Answers")[2].partition("## Steps")[0]
    assert "| base |" not in answers
    page = (outcome.folder / RunLayout.REPORT_HTML).read_text(encoding="utf-8")
    assert "Empty cells: `base`, `cut` did not answer the held-out questions." in markdown
    assert "Empty cells: <code>base</code>, <code>cut</code> did not answer" in page


def test_without_the_observer_there_are_results_and_no_report(tmp_path: Path) -> None:
    outcome = run(tmp_path, observers=())
    assert not (outcome.folder / RunLayout.REPORT_MARKDOWN).exists()
    assert RunLayout(outcome.folder).results.exists()


def test_report_and_results_are_committed_again_by_the_next_run(tmp_path: Path) -> None:
    for _ in range(2):
        folder = run(tmp_path).folder
        lines = RunLayout(folder).ledger.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        newest = {record["name"]: record for record in records if record["kind"] == "file"}
        size = (folder / RunLayout.REPORT_MARKDOWN).stat().st_size
        assert newest[RunLayout.REPORT_MARKDOWN]["bytes"] == size
        assert newest[RunLayout.RESULTS]["path"] == f"{folder.name}/{RunLayout.RESULTS}"


def test_a_report_is_rebuilt_from_the_files_of_the_run(
    outcome: RunResult, report: dict[str, Any]
) -> None:
    rebuilt = rebuild(outcome).as_json()
    # Models are not opened, so their hashes and sizes are not known.
    unknown = ("provenance", "teacher_parameters", "is_cut")
    assert all(rebuilt.pop(name) != report[name] for name in unknown)
    assert rebuilt == {name: value for name, value in report.items() if name not in unknown}


def test_a_figure_that_rounds_to_zero_has_no_sign() -> None:
    assert with_interval(Interval(-1e-7, -2e-7, 1e-7), "kl", "+") == "0.000 [0.000, 0.000]"
    assert with_interval(Interval(-0.0104, -0.2, 10.0), "kl", "+") == "-0.010 [-0.200, +10.000]"
    assert with_interval(Interval(0.5, math.nan, math.nan), "kl") == "0.500"


def test_text_does_not_end_a_table_cell() -> None:
    assert table_cell("a | b\n<br> c\\") == "a \\| b &lt;br> c\\\\"


def test_observers_load_without_heavy_libraries() -> None:
    code = (
        "import sys, rotdistill_report.observer, rotdistill_report.rotation_sanity;"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'jinja2', 'nbclient')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_lessons_are_shown_with_what_was_dropped(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    (tmp_path / "forms.tsv").write_text("en\tw1 {topic} <b>\nen\tw2 {topic}\n", encoding="utf-8")
    model = workspace.model()
    lessons = '[lessons]\ncount = 12\ntokens = 6\nforms = "forms.tsv"\n'
    steps = STEPS.format(answers="", variants=VARIANTS) + lessons
    recipe = workspace.recipe(
        steps, name="taught", teacher=model, student=model, observers=["report"]
    )
    outcome = workspace.run(recipe)
    read = {
        name: (outcome.folder / name).read_text(encoding="utf-8")
        for name in (RunLayout.REPORT_MARKDOWN, RunLayout.REPORT_HTML, RunLayout.LESSONS)
    }
    summary = json.loads(read[RunLayout.LESSONS])
    assert summary["written"] == 12
    told = "The teacher wrote 12 of 12 texts that were asked for"
    assert told in read[RunLayout.REPORT_MARKDOWN]
    assert told in read[RunLayout.REPORT_HTML]
    assert "&lt;b&gt;" in read[RunLayout.REPORT_HTML]
    for lesson in summary["examples"]:
        assert lesson["id"] in read[RunLayout.REPORT_MARKDOWN]
        assert lesson["id"] in read[RunLayout.REPORT_HTML]
    for reason, dropped in summary["dropped"].items():
        line = f"- {dropped['count']}: {reason}, such as "
        assert line in read[RunLayout.REPORT_MARKDOWN]
    card = (outcome.checkpoints["full"] / RunLayout.CARD).read_text(encoding="utf-8")
    assert "12 of the texts that it was fitted on were written by the teacher" in card


def test_without_lessons_nothing_is_said_of_them(markdown: str, page: str) -> None:
    assert "Lessons" not in markdown
    assert "Lessons" not in page


def test_losses_of_a_training_are_drawn_and_stand_in_the_json(outcome: RunResult) -> None:
    report = rebuild(outcome)
    curve = TrainingCurve("reverse", (0.75, 0.5, 0.25), (0, 2, 3), (0.625, 0.375, 0.4375))
    steps = [replace(report.steps[0], training=curve), *report.steps[1:]]
    trained = replace(report, steps=steps)
    out = StepOutput(ArtifactStore(outcome.folder.parent), Ledger(outcome.folder), "report")
    [plot] = [plot for plot in plots(trained, out) if "training" in plot.title]
    assert "reverse KL" in plot.svg
    assert "0.375" in plot.caption
    drawn = re.findall(r'<path d="(M[^"]*)" clip-path', plot.svg)
    # Lines of the grid have two points.
    assert [len(re.findall("[ML]", line)) for line in drawn].count(3) == 2
    assert trained.as_json()["steps"][0]["training"] == {
        "loss": "reverse",
        "losses": [0.75, 0.5, 0.25],
        "checks": [0, 2, 3],
        "validation_kl": [0.625, 0.375, 0.4375],
    }
    assert not [plot for plot in plots(report, out) if "training" in plot.title]
