"""The report says what results.jsonl says, and is made from what a run hands to its observers."""

from __future__ import annotations

import json
from pathlib import Path

from rotdistill_core import pipeline
from rotdistill_core.testing import carry_out, pico_folder, pico_texts

RECIPE = """
name = "told"
{observers}
[teacher]
model = "{work}/model"
[student]
model = "{work}/model"
[samples]
index = "texts/index.tsv"
style = "texts/style.md"
heldout = "texts/heldout.tsv"
answer_tokens = 4
[[step]]
use = "residuals"
[[step]]
use = "chop"
layers = 1
[[step]]
use = "toggles"
[variants]
base = []
cut = ["chop"]
"""


def ended(work: Path, observers: str = "") -> pipeline.Outcome:
    pico_texts(work / "texts")
    pico_folder(work / "model")
    path = work / "told.toml"
    path.write_text(RECIPE.format(work=work, observers=observers), encoding="utf-8")
    return carry_out(path)


def test_the_report_holds_the_figures_of_the_results(tmp_path: Path) -> None:
    outcome = ended(tmp_path)
    text = (outcome.folder / "report.md").read_text(encoding="utf-8")
    results = [json.loads(line) for line in (outcome.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = {(r["variant"], r["metric"]): r["value"] for r in results if r["layer"] is None and r["language"] is None}
    for variant in ("base", "cut"):
        assert f"| {variant} | {whole[variant, 'kl']:.4f} | {whole[variant, 'top1']:.3f} |" in text
        [said] = outcome.answers[variant].values()
        assert f"- **{variant}**: {' '.join(said.split())}" in text
    assert "- **chop** (cut," in text
    assert "- **teacher**:" in text


def test_without_the_observer_there_are_results_and_no_report(tmp_path: Path) -> None:
    outcome = ended(tmp_path, "observers = []")
    assert not (outcome.folder / "report.md").exists()
    assert (outcome.folder / "results.jsonl").exists()


def test_both_are_committed_and_written_again_by_the_next_run(tmp_path: Path) -> None:
    for _ in range(2):
        outcome = ended(tmp_path)
        records = [json.loads(line) for line in (outcome.folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
        newest = {r["name"]: r for r in records if r["kind"] == "file"}
        assert {newest[name]["bytes"] for name in ("report.md",)} == {(outcome.folder / "report.md").stat().st_size}
        assert newest["results.jsonl"]["path"] == f"{outcome.folder.name}/results.jsonl"
