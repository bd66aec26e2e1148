"""The report says what results.jsonl says, and is made from what a run hands to its observers."""

from __future__ import annotations

import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rotdistill_report._data import collect, span
from rotdistill_report._findings import compare, with_findings
from rotdistill_report.observer import _cell

from rotdistill_core.evaluation.intervals import Estimate, Interval, estimates
from rotdistill_core.evaluation.metrics import column
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_folder, pico_head, pico_texts, run_recipe

RECIPE = (
    pico_head("told", "{work}/model", "{work}/model")
    + """
# <script> of the recipe
{observers}
[[step]]
use = "residuals"
[[step]]
use = "chop"
layers = 1
[[step]]
use = "fidelity"
[[step]]
use = "answers"
[variants]
base = []
cut = ["chop"]
full = ["chop"]
"""
)


def ended(work: Path, observers: str = "", without: str = "", variants: str = "") -> RunResult:
    pico_texts(work / "texts")
    pico_folder(work / "model")
    path = work / "told.toml"
    text = RECIPE.format(work=work, observers=observers)
    text = text.replace(f'[[step]]\nuse = "{without}"\n', "") if without else text
    path.write_text(
        text.replace('full = ["chop"]', variants) if variants else text, encoding="utf-8"
    )
    return run_recipe(path)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Return one run for everything that only reads it."""
    return ended(tmp_path_factory.mktemp("told"))


def test_the_report_holds_the_figures_of_the_results(outcome: RunResult) -> None:
    text = (outcome.folder / "report.md").read_text(encoding="utf-8")
    results = [
        json.loads(line)
        for line in (outcome.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    whole = {
        (r["variant"], r["metric"]): r["value"]
        for r in results
        if r["layer"] is None and r["language"] is None
    }
    for variant in ("base", "cut"):
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith(f"| {variant} | ") and f"{whole[variant, 'perplexity']:.2f}" in line
        ]
        assert line.replace("*", "").startswith(
            f"| {variant} | {whole[variant, 'kl']:.4f} | {whole[variant, 'top1']:.3f} |"
        )
    assert "- **chop** (cut," in text


def test_answers_to_all_questions_stand_side_by_side(outcome: RunResult) -> None:
    text = (outcome.folder / "report.md").read_text(encoding="utf-8")
    base, cut = (outcome.steps[variant, "answers"].notes["answers"] for variant in ("base", "full"))
    assert len(base) == 3
    assert "| id | language | question | teacher | base | full |" in text
    for question, about in base.items():
        cells = [
            _cell(words)
            for words in (about["question"], about["teacher"], about["said"], cut[question]["said"])
        ]
        assert f"| {question} | en | {' | '.join(cells)} |" in text
    assert "- answers:" not in text  # not once more among what steps noted


def test_intervals_are_those_of_the_results(outcome: RunResult) -> None:
    text = (outcome.folder / "report.md").read_text(encoding="utf-8")
    found = estimates(outcome.rows, "base")
    assert "| variant | held-out KL, nats/token | change | top-1 | change |" in text
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("| cut |") and span(found["kl"]["cut"].own, "kl") in line
    ]
    change = found["kl"]["cut"].change
    assert change is not None
    assert (
        change.low > 0
    )  # random layers: without one of them the student is farther from its teacher on every text
    assert f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" in line


def test_the_terminal_shows_intervals_and_one_question(outcome: RunResult) -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    for told in outcome.told:
        console.print(told)
    shown = console.export_text()
    found = estimates(outcome.rows, "base")["kl"]
    assert span(found["cut"].own, "kl") in shown
    assert [line.split()[2] for line in shown.splitlines() if " answers held-" in line] == [
        "held-0:"
    ] * 3
    assert "Answers, base → full" in shown
    assert "chrF against the teacher's answers: " in shown
    assert "Language:" not in shown  # pico models speak none


def judged(gap: Interval, language: Interval, chrf: Interval) -> list[str]:
    changes = {"answer_length": gap, "answer_length_gap": gap, "answer_language": language, "answer_language_teacher": language,
               "answer_chrf": chrf}  # fmt: skip
    one = Estimate(Interval(1.0, 0.9, 1.1), None)
    return compare(
        {
            metric: {"base": one, "full": Estimate(one.own, change)}
            for metric, change in changes.items()
        },
        "base",
        "full",
    )


def test_words_follow_the_intervals() -> None:
    up, down, flat, alone = (
        Interval(*ends) for ends in ((2, 1, 3), (-2, -3, -1), (1, -1, 2), (2, math.nan, math.nan))
    )
    assert ["towards" in line for line in judged(down, up, up)] == [True] * 3
    assert ["away" in line for line in judged(up, down, down)] == [True] * 3
    assert ["no change beyond noise" in line for line in judged(flat, flat, alone)] == [True] * 3
    assert [line.partition(":")[0] for line in judged(up, up, up)] == [
        "Length",
        "Language",
        "chrF against the teacher's answers",
    ]


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert span(Interval(-1e-7, -2e-7, 1e-7), "kl", "+") == "0.000 [0.000, 0.000]"
    assert span(Interval(-0.0104, -0.2, 10.0), "kl", "+") == "-0.010 [-0.200, +10.000]"
    assert span(Interval(0.5, math.nan, math.nan), "kl") == "0.500"


def test_a_run_without_answers_has_no_section_of_them(tmp_path: Path) -> None:
    outcome = ended(tmp_path, without="answers")
    assert "## Answers" not in (outcome.folder / "report.md").read_text(encoding="utf-8")
    assert "## How sure the figures are" in (outcome.folder / "report.md").read_text(
        encoding="utf-8"
    )


def test_a_variant_that_a_judge_left_out_has_empty_cells(tmp_path: Path) -> None:
    outcome = ended(tmp_path, variants='full = ["chop", "answers"]\nmore = ["answers"]')
    text = (outcome.folder / "report.md").read_text(encoding="utf-8")
    assert "| id | language | question | teacher | full |" in text
    assert "| base |" not in text.partition("## Answers")[2]


def test_what_would_end_a_cell_is_written_out() -> None:
    assert _cell("a | b\n<br> c\\") == "a \\| b &lt;br> c\\\\"


def test_without_the_observer_there_are_results_and_no_report(tmp_path: Path) -> None:
    outcome = ended(tmp_path, "observers = []")
    assert not (outcome.folder / "report.md").exists()
    assert (outcome.folder / "results.jsonl").exists()


def test_both_are_committed_and_written_again_by_the_next_run(tmp_path: Path) -> None:
    for _ in range(2):
        outcome = ended(tmp_path)
        records = [
            json.loads(line)
            for line in (outcome.folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        newest = {r["name"]: r for r in records if r["kind"] == "file"}
        assert {newest[name]["bytes"] for name in ("report.md",)} == {
            (outcome.folder / "report.md").stat().st_size
        }
        assert newest["results.jsonl"]["path"] == f"{outcome.folder.name}/results.jsonl"


def test_page_markdown_json_and_results_hold_the_same_figures(outcome: RunResult) -> None:
    page, text = (
        (outcome.folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")
    )
    told = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    results = [
        json.loads(line)
        for line in (outcome.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    whole = {
        (r["variant"], r["metric"]): r["value"]
        for r in results
        if (r["layer"], r["language"], r["text"]) == (None, None, None)
    }
    assert {
        (v, m): figure["value"] for v, row in told["table"].items() for m, figure in row.items()
    } == whole
    lines = [re.sub(r"<[^>]*>", " ", line).split() for line in page.splitlines()]
    for metric in (
        "kl",
        "top1",
        "perplexity",
        "hidden_cosine",
        "residual_rms_diff",
        "parameters",
        "answer_chrf",
    ):
        row = [told["table"][variant][metric] for variant in ("base", "cut", "full")]
        for variant, figure in zip(("base", "cut", "full"), row, strict=True):
            assert figure["shown"] == f"{whole[variant, metric]:{column(metric).form}}"
            assert any(
                line.startswith(f"| {variant} |") and figure["shown"] in line
                for line in text.splitlines()
            )
            assert figure["change"] in text or metric not in told["estimates"]
        said = [
            *column(metric).title.split(),
            *(word for figure in row for word in f"{figure['shown']} {figure['change']}".split()),
        ]
        assert said in lines, metric
    for metric, variants in told["layers"].items():
        for variant, points in variants.items():
            assert points == {
                str(r["layer"]): r["value"]
                for r in results
                if (r["variant"], r["metric"]) == (variant, metric) and r["layer"]
            }
    assert told["verdict"] in text
    assert told["verdict"].replace("`", "") in html.unescape(re.sub(r"</?code>", "", page))


def test_the_page_stands_alone(outcome: RunResult) -> None:
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<iframe|@import|\ssrc=|url\((?!#)", page)
    assert set(re.findall(r'href="([^"]*)"', page)) >= {"#variants", "#answers"}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in re.findall(r'(?:href="|url\()(#[^")]*)', page)} <= set(ids)
    assert page.count("<svg ") >= 3
    assert "currentColor" in page
    assert "#010203" not in page


def test_what_is_quoted_is_no_markup(outcome: RunResult) -> None:
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert "# &lt;script&gt; of the recipe" in page


def test_a_report_is_written_anew_from_what_lies_in_the_run(outcome: RunResult) -> None:
    told = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    loaded = load_recipe(outcome.folder.parents[1] / "told.toml")
    rows = [
        MetricRow(**json.loads(line))
        for line in (outcome.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    bare = RunResult(
        outcome.folder, [row._replace(value=str(row.value)) for row in rows], outcome.steps, {}, []
    )  # type: ignore[arg-type]
    out = StepOutput(ArtifactStore(outcome.folder.parent), Ledger(outcome.folder), "report")
    again = with_findings(
        collect(replace(loaded, path=outcome.folder / "recipe.toml"), bare, out), loaded, bare
    ).json()
    assert again.pop("made") != told.pop(
        "made"
    )  # models and texts are not opened, so there are no hashes
    assert again == told
