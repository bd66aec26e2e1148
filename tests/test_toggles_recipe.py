"""The toggle harness: every variant of recipes/toggles.toml from one recipe, on a pico model; what is off is the identity."""

from __future__ import annotations

import json
from pathlib import Path

from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder, pico_texts

ROOT = Path(__file__).parents[1]
VARIANTS = [
    "base",
    "permutations",
    "permutations-rotations",
    "permutations-rotations-style",
    "style-only",
]
METRICS = {
    "kl", "top1", "perplexity", "guard_kl", "hidden_cosine", "residual_rms_diff", "channel_rms_gap", "answer_chrf", "answer_length",
    "factual_completeness", "hallucination_rate",
}  # fmt: skip


def test_each_variant_is_made_and_judged_and_exact_ones_score_as_base(tmp_path: Path) -> None:
    texts = pico_texts(tmp_path / "texts", 30, 6)
    held = (
        texts["heldout.tsv"]
        .read_text(encoding="utf-8")
        .replace("[]\t[]", '[{"what": "a", "any": ["w1"]}]\t[{"what": "b", "any": ["w2"]}]')
    )
    texts["heldout.tsv"].write_text(held, encoding="utf-8")
    pico_folder(tmp_path / "model", num_hidden_layers=4)
    names = {
        "index": "index.tsv",
        "style": "style.md",
        "heldout": "heldout.tsv",
        "guard": "guard.tsv",
    }
    sets = [f"samples.{key}={texts[name]}" for key, name in names.items()]
    sets += [f"{who}.model={tmp_path / 'model'}" for who in ("teacher", "student")] + [
        "chop.layers=3",
        "samples.answer_tokens=8",
    ]
    sets += [
        "samples.own_answers=8",
        "style.max_prompts=8",
        "check.kl_ratio=9",
        "check.guard=9",
        "check.facts=0",
    ]
    loaded = load_recipe(ROOT / "recipes" / "toggles.toml", sets)
    outcome = Executor(loaded, tmp_path / "runs", SilentObserver(), lambda *_: None).go()
    values = {
        (row.variant, row.metric): row.value
        for row in outcome.rows
        if (row.layer, row.language, row.text) == (None, None, None)
    }
    assert list(dict.fromkeys(row.variant for row in outcome.rows)) == VARIANTS
    assert all((variant, metric) in values for variant in VARIANTS for metric in METRICS)
    layers = {
        row.layer
        for row in outcome.rows
        if row.metric in ("residual_rms_diff", "channel_rms_gap", "hidden_cosine") and row.layer
    }
    assert layers == {1, 2, 3}
    for variant in VARIANTS[1:3]:
        assert abs(values[variant, "kl"] - values["base", "kl"]) < 1e-5
        assert all(
            abs(values[variant, m] - values["base", m]) < 1e-4
            for m in ("top1", "hidden_cosine", "residual_rms_diff", "channel_rms_gap")
        )
    told = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    assert [line.partition(":")[0] for line in told["bought"]] == [
        "`permutations` = `base` + permute, fold",
        "`permutations-rotations` = `permutations` + basis",
        "`permutations-rotations-style` = `permutations-rotations` + head, style",
        "`style-only` = `base` + head, style",
    ]
    assert [line.endswith("Exact steps: nothing is to change.") for line in told["bought"]] == [
        True,
        True,
        False,
        False,
    ]
