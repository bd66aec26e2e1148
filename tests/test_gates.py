"""A variant that breaks a check is marked in every output, the others are made, everything is kept, and the run ends with exit code 4."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.errors import CheckFailed
from rotdistill_core.evaluation.divergence import LogitComparison, compare_logits
from rotdistill_core.evaluation.gates import broken_gates
from rotdistill_core.evaluation.rows import MetricRow, rows_as_json
from rotdistill_core.forward.certificate import Certificate
from rotdistill_core.recipe.document import Check
from rotdistill_core.testing import command_line, pico_folder, pico_head, pico_texts, run_recipe

RECIPE = (
    pico_head("gated", "{work}/model", "{work}/model")
    + """
samples.guard = "texts/guard.tsv"
[check]
{check}
[[step]]
use = "residuals"
[[step]]
use = "procrustes"
[[step]]
use = "basis-fold"
[[step]]
use = "chop"
layers = 1
[[step]]
use = "fidelity"
[variants]
{variants}
"""
)
VARIANTS = {"base": [], "rotated": ["procrustes", "basis-fold"], "cut": ["chop"]}


def written(work: Path, check: str = "", variants: Any = None) -> Path:
    pico_texts(work / "texts")
    pico_folder(work / "model")
    path = work / "gated.toml"
    lines = "\n".join(
        f"{name} = {json.dumps(steps)}" for name, steps in (variants or VARIANTS).items()
    )
    path.write_text(RECIPE.format(work=work, check=check, variants=lines), encoding="utf-8")
    return path


def outputs(work: Path) -> tuple[dict[tuple[str, str], Any], dict[str, str]]:
    """Return the figures of results.jsonl over all texts, and the other outputs."""
    (folder,) = (work / "runs").iterdir()
    rows = [
        json.loads(line)
        for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    whole = {
        (r["variant"], r["metric"]): r["value"]
        for r in rows
        if (r["layer"], r["language"], r["text"]) == (None, None, None)
    }
    diagnostics = {
        f"card of {path.parent.name}": path for path in folder.glob("checkpoints/*/README.md")
    }
    files = {
        name: folder / name for name in ("report.md", "report.html", "report.json")
    } | diagnostics
    return whole, {name: path.read_text(encoding="utf-8") for name, path in files.items()}


@pytest.mark.parametrize(("key", "limit", "metric", "values", "failing"), [
    ("kl_ratio", 1.0, "kl", {"base": 1.0, "a": 1.0009, "b": 1.1}, {"b"}),
    ("guard", 2.0, "guard_kl", {"a": 1.0, "b": 2.1, "c": math.nan}, {"b", "c"}),
    ("facts", 0.9, "factual_completeness", {"base": 0.5, "a": 0.45, "b": 0.4}, {"b"}),
    ("kl_ratio", 0.5, "kl", {"base": 1.0, "a": 0.6}, {"a"}),
    ("guard", 1.0, "kl", {"base": 1.0, "a": 1.0}, {"base", "a"}),
])  # fmt: skip
def test_ratios_are_to_base(
    key: str, limit: float, metric: str, values: dict[str, float], failing: set[str]
) -> None:
    rows = [MetricRow(name, metric, value) for name, value in values.items()]
    found = broken_gates(rows, Check(**{key: limit}))
    assert set(found) == failing
    assert all(
        f"check.{key}" in fault or "not a number" in fault
        for faults in found.values()
        for fault in faults
    )
    assert broken_gates([row for row in rows if math.isfinite(row.value)], Check()) == {}


def test_a_value_that_json_does_not_have_is_text_and_reads_back() -> None:
    values = [
        float(str(item["value"]))
        for item in rows_as_json(
            [
                MetricRow("a", "kl", math.nan),
                MetricRow("a", "kl", math.inf),
                MetricRow("a", "kl", 0.5),
            ]
        )
    ]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, 0.5]


def test_a_variant_beyond_a_gate_is_marked_everywhere_and_everything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        CheckFailed, match=r'variant "cut" failed: kl is .* check\.kl_ratio = 1.5 of base'
    ) as caught:
        run_recipe(written(tmp_path, "kl_ratio = 1.5"))
    assert caught.value.exit_code == 4
    whole, files = outputs(tmp_path)
    assert whole["cut", "failed"] == 1
    assert ("base", "failed") not in whole
    assert "| cut (failed) |" in files["report.md"]
    assert "cut (failed)" in files["report.html"]
    assert list(json.loads(files["report.json"])["failed"]) == ["cut"]
    assert json.loads(files["report.json"])["verdict"].startswith(
        "Failed: `cut` breaks a check: kl is"
    )
    assert "**This variant failed:** kl is" in files["card of cut"]
    assert "failed" not in files["card of base"].partition("## Recipe")[0]
    monkeypatch.chdir(tmp_path)
    code, out, err = command_line("run", "gated.toml", "--json")
    assert code == 4
    assert 'variant "cut" failed' in err
    assert {row["variant"] for row in json.loads(out)["results"]} >= {"base", "cut"}


def test_a_certificate_that_does_not_hold_fails_its_variant_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def false(*given: Any) -> Certificate:
        return Certificate(1e-3, 1e-3, 0.0, 0.0, 2)

    monkeypatch.setattr("rotdistill_core.execution.executor.certify", false)
    with pytest.raises(
        CheckFailed,
        match=r'variant "rotated" failed: step "basis-fold": the certificate fails: logits_float64 is 1\.00e-03',
    ):
        run_recipe(written(tmp_path))
    whole, files = outputs(tmp_path)
    assert {name for name, metric in whole if metric == "kl"} >= {"base", "cut"}
    assert whole["rotated", "failed"] == 1
    assert '- **failed**, rotated: step "basis-fold": the certificate fails' in files["report.md"]
    assert "card of rotated" not in files


def test_where_every_variant_fails_there_is_a_report_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rotdistill_core.execution.executor.certify",
        lambda *_: Certificate(math.nan, 0.0, 0.0, 0.0, 2),
    )
    with pytest.raises(CheckFailed, match='variant "only" failed') as caught:
        run_recipe(written(tmp_path, variants={"only": []}))
    whole, files = outputs(tmp_path)
    assert list(whole) == [("only", "failed")]
    assert (
        str(caught.value).splitlines()[-1]
        == f"Everything is kept in {next((tmp_path / 'runs').iterdir())}."
    )
    assert json.loads(files["report.json"])["verdict"].startswith(
        "Failed: `only` breaks a check: step"
    )


def test_a_figure_that_is_not_a_number_is_kept_and_flagged_and_not_averaged_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = compare_logits

    def one_is_none(teacher: Any, T: Any, student: Any, *more: Any) -> LogitComparison:
        made = right(teacher, T, student, *more)
        kl = made.kl.clone()
        kl[0] = kl[0] if student.depth == 2 else math.nan
        return replace(made, kl=kl)

    monkeypatch.setattr("rotdistill_fidelity._method.compare_logits", one_is_none)
    with pytest.raises(CheckFailed, match='variant "cut" failed: kl is not a number'):
        run_recipe(written(tmp_path))
    whole, files = outputs(tmp_path)
    assert whole["cut", "kl"] == "nan"
    assert whole["base", "kl"] < 1e-9
    told = json.loads(files["report.json"])
    assert (
        told["table"]["cut"]["kl"]["value"],
        told["table"]["cut"]["kl"]["shown"],
        told["table"]["cut"]["kl"]["best"],
    ) == (
        "nan",
        "nan",
        False,
    )
    assert "- **failed**, cut: kl is not a number." in files["report.md"]


def test_rows_are_the_same_in_another_order_and_twice(tmp_path: Path) -> None:
    def rows(work: Path, variants: dict[str, list[str]]) -> dict[tuple[Any, ...], float]:
        found = run_recipe(written(work, variants=variants)).rows
        return {
            (r.variant, r.metric, r.layer, r.language, r.text): r.value
            for r in found
            if r.metric != "seconds"
        }

    first = rows(tmp_path / "one", VARIANTS)
    assert rows(tmp_path / "one", VARIANTS) == first
    assert rows(tmp_path / "two", dict(reversed(VARIANTS.items()))) == first


def test_a_checkpoint_that_is_gone_is_made_again(tmp_path: Path) -> None:
    outcome = run_recipe(written(tmp_path))
    lost = outcome.checkpoints["cut"] / "model.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    again = run_recipe(written(tmp_path))
    assert again.checkpoints == outcome.checkpoints
    assert lost.read_bytes() == before
    assert again.rows == outcome.rows
