"""benchmarks/transfer.py writes its table from what runs and peers recorded, and nothing else."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rotdistill_core import load_recipe
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.rows import MetricRow, rows_as_json
from rotdistill_core.testing import PicoWorkspace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = """
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""
SCORES = 'step = [{ use = "residuals" }, { use = "fidelity" }]\n'
PEER = {
    "trainer": "gkd",
    "rate": 5e-4,
    "seconds": {"wall": 1300.0, "processor": 1234.0},
    "steps": 200,
    "texts": 800,
    "fit texts": 1160,
    "memory": 2_500_000_000,
    "validation KL": 0.41,
    "threads": 1,
    "versions": {"trl": "1.16.0"},
}


@pytest.fixture(scope="module")
def transfer() -> ModuleType:
    spec = spec_from_file_location("transfer", BENCHMARKS / "transfer.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))  # as for a script, which imports its neighbours
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def figures(name: str, *kl: float) -> list[dict[str, Any]]:
    """Return a KL for each text, all of one length, their mean, and a guard without texts."""
    texts = [
        MetricRow(name, "kl", value, "heldout", language="en", n=10, text=f"t{k}")
        for k, value in enumerate(kl)
    ]
    mean = MetricRow(name, "kl", sum(kl) / len(kl), "heldout", n=10 * len(kl))
    return rows_as_json([mean, *texts, MetricRow(name, "guard_kl", 1.5, "guard", n=99)])


def test_the_table_has_figures_intervals_and_paired_changes(transfer: ModuleType) -> None:
    rows = [
        transfer.Row("base", "a", seconds=6.0, figures=figures("base", 4.0, 5.0, 3.0)),
        transfer.Row("trained", "b", 120.0, 2_000_000_000, figures=figures("trained", 1, 2, 0)),
        transfer.Row("other", "c", figures=figures("other", 1, 3, 0)),
    ]
    head, _, base, trained, other = transfer.table(rows, "trained").splitlines()
    assert "its change against refit, then prompt-kl" in head
    # The same change in every text leaves no width to the paired interval, only to the figures.
    assert base.startswith("| the cut student | 4.000 [")
    assert "| +3.000 [+3.000, +3.000] | 1.500 |" in base
    assert base.endswith("| 0.1 |  |")
    assert trained.endswith("| 2.0 | 2.00 |")
    assert "| +0.333 [" in other
    assert other.endswith("|  |  |")


def test_the_best_rate_on_validation_texts_trains_for_the_whole_time(
    transfer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def peer(command: list[str], check: bool) -> None:
        asked.append(command)
        value = dict(pairwise(command))
        kl = {"1e-4": 0.5, "5e-4": 0.4, "1e-3": 0.6}[value["--rate"]]
        folder = Path(value["--out"])
        folder.mkdir(parents=True)
        record = PEER | {"rate": float(value["--rate"]), "validation KL": kl}
        (folder / "peer.json").write_text(json.dumps(record))

    monkeypatch.setattr(transfer, "subprocess", SimpleNamespace(run=peer))
    options = argparse.Namespace(
        out=tmp_path,
        peers="python-of-peers",
        rates=["1e-4", "5e-4", "1e-3"],
        seconds=1200.0,
        search_seconds=60.0,
        clock="wall",
    )
    start = transfer.Row("refit", "checkpoint", seconds=100.0, memory=3_000_000_000)
    row = transfer.peer_row(options, "gkd", start)
    assert [line[line.index("--seconds") + 1] for line in asked] == ["60.0"] * 3 + ["1200.0"]
    assert asked[-1][asked[-1].index("--rate") + 1] == "5e-4"
    assert all(line[line.index("--student") + 1] == "checkpoint" for line in asked)
    assert (row.seconds, row.memory) == (1400.0, 3_000_000_000)
    assert row.search == {"1e-4": 0.5, "5e-4": 0.4, "1e-3": 0.6}
    [line] = transfer.searches([row])
    assert "5e-4: 0.4000" in line
    assert "800 texts of 1,160" in line

    # What is recorded is not trained again.
    transfer.peer_row(options, "gkd", start)
    assert len(asked) == 4


def test_peers_learn_from_the_texts_of_prompt_kl(transfer: ModuleType, tmp_path: Path) -> None:
    def conversation(name: str, split: Split, answer: str | None) -> Conversation:
        return Conversation(name, "en", split, "Q?", answer)

    conversations = (
        conversation("written", Split.FIT, "by a human"),
        conversation("lesson", Split.FIT, None),
        conversation("checked", Split.VALIDATION, None),
        conversation("asked", Split.HELDOUT, None),
    )
    texts = tuple(Text(each.id, "en", each.split, (1, 2, 3, 4), 2) for each in conversations)
    samples = Samples(PackedTexts(texts, 1), conversations, "style")
    transfer.write_texts(samples, tmp_path / "texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [(line["id"], line["split"]) for line in lines] == [
        ("lesson", "fit"),
        ("checked", "validation"),
    ]
    assert (lines[0]["tokens"], lines[0]["answer"]) == ([1, 2, 3, 4], 2)


def test_our_rows_count_the_steps_that_make_them(transfer: ModuleType) -> None:
    recipe = load_recipe(BENCHMARKS / "transfer.toml")
    assert transfer.edits(recipe, "base") == ["chop"]
    assert transfer.edits(recipe, "published") == ["chop", "residuals", "published"]
    assert transfer.edits(recipe, "trained") == ["chop", "residuals", "refit", "lora"]
    # The rows of others are scored on the same questions.
    scores = load_recipe(BENCHMARKS / "transfer_scores.toml").recipe
    assert scores.teacher == recipe.recipe.teacher
    for name in ("heldout", "guard", "style", "max_tokens", "answer_tokens"):
        assert getattr(scores.samples, name) == getattr(recipe.recipe.samples, name)


def test_a_peer_that_learns_nothing_scores_as_its_start(
    transfer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(command: list[str], check: bool) -> None:
        value = dict(pairwise(command))
        shutil.copytree(value["--student"], value["--out"])
        Path(value["--out"], "COMPLETE").unlink()
        (Path(value["--out"]) / "peer.json").write_text(json.dumps(PEER))

    monkeypatch.setattr(transfer, "subprocess", SimpleNamespace(run=peer))
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model(num_hidden_layers=3)
    recipe = workspace.recipe(STEPS + 'variants = { base = [], refit = ["refit"] }')
    scores = workspace.recipe(SCORES + "variants = { scored = [] }", name="scores")
    page = tmp_path / "page.md"
    page.write_text(f"{transfer.BEGIN}{transfer.END}")
    words = ["transfer", str(recipe), "--set", "samples.own_answers=4", "--scores", str(scores)]
    words += ["--runs", str(workspace.runs), "--out", str(tmp_path / "out"), "--page", str(page)]
    words += ["--peers", "PYTHON", "--trainers", "gkd", "--rates", "1e-3", "--against", "refit"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    transfer.main()

    rows = {row.name: row for row in transfer.read(tmp_path / "out/rows.jsonl")}
    kl = {
        name: next(each["value"] for each in row.figures if each["metric"] == "kl")
        for name, row in rows.items()
    }
    assert kl["gkd"] == pytest.approx(kl["refit"], rel=1e-6)
    assert kl["base"] != pytest.approx(kl["refit"], rel=1e-3)
    assert rows["refit"].memory > 0
    assert rows["gkd"].seconds == pytest.approx(rows["refit"].seconds + 1300.0)
    assert "| refit, then TRL's GKD | " in page.read_text()

    before = page.read_text()
    transfer.main()
    assert page.read_text() == before


def test_the_page_keeps_its_words_and_rows_come_back(transfer: ModuleType, tmp_path: Path) -> None:
    page = f"# Title\n\n{transfer.BEGIN}\nold\n{transfer.END}\n\nWords.\n"
    assert transfer.page_with(page, "new") == page.replace("old", "new")
    row = transfer.Row("gkd", "folder", 1.0, 2, PEER, {"5e-4": 0.4}, figures("gkd", 1.0))
    (tmp_path / "rows.jsonl").write_text(json.dumps(asdict(row)) + "\n")
    assert transfer.read(tmp_path / "rows.jsonl") == [row]
