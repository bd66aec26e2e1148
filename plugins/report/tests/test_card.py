"""The card of a checkpoint: what it is made of, under which licence, what it scored, how to undo it; no part of what is hashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rotdistill_report._card import licence_of, strictest

from rotdistill_core.testing import pico_folder, pico_head, pico_model, pico_texts, run_recipe

RECIPE = (
    pico_head("carded", "{work}/teacher", "{work}/student")
    + """
[[step]]
use = "residuals"
[[step]]
use = "procrustes"
[[step]]
use = "basis-fold"
[[step]]
use = "lm-head-ridge"
[[step]]
use = "fidelity"
[variants]
base = []
turned = ["procrustes", "basis-fold"]
full = ["procrustes", "basis-fold", "lm-head-ridge"]
"""
)


@pytest.mark.parametrize(("licences", "wanted"), [
    (["apache-2.0", "mit"], "apache-2.0"), (["mit", "gpl-3.0"], "gpl-3.0"), (["gpl-3.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
    (["cc-by-sa-4.0", "cc-by-4.0"], "cc-by-sa-4.0"), (["agpl-3.0", "gpl-2.0"], "agpl-3.0"), (["apache-2.0", "llama3.2"], "llama3.2"),
    (["cc-by-nc-4.0", "unknown"], "unknown"), (["lgpl-3.0", "apache-2.0"], "lgpl-3.0"), (["mit"], "mit"), (["other", "mit"], "other"),
])  # fmt: skip
def test_the_strictest_licence_wins(licences: list[str], wanted: str) -> None:
    assert strictest(licences) == strictest(licences[::-1]) == wanted


@pytest.mark.parametrize(("card", "wanted"), [
    ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"), ('---\nlicense: "MIT"\n---', "mit"),
    ("# Model\nlicense: mit\n", "unknown"),
    ("---\nlicense: other\nlicense_name: qwen-research\n---", "other"), (None, "unknown"),
])  # fmt: skip
def test_a_licence_is_read_from_the_front_of_a_card(
    tmp_path: Path, card: str | None, wanted: str
) -> None:
    model = pico_model(tmp_path / "model")
    if card is not None:
        (model.folder / "README.md").write_text(card, encoding="utf-8")
    assert licence_of(model) == wanted


def test_a_card_says_what_was_made_of_what(tmp_path: Path) -> None:
    pico_texts(tmp_path / "texts")
    for seed, (name, licence) in enumerate(
        (("teacher", "cc-by-nc-4.0"), ("student", "apache-2.0"))
    ):
        (pico_folder(tmp_path / name, seed=seed) / "README.md").write_text(
            f"---\nlicense: {licence}\n---\n", encoding="utf-8"
        )
    path = tmp_path / "carded.toml"
    path.write_text(RECIPE.format(work=tmp_path), encoding="utf-8")
    outcome = run_recipe(path)
    diagnostics = {
        name: (folder / "README.md").read_text(encoding="utf-8")
        for name, folder in outcome.checkpoints.items()
    }
    told = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    assert set(diagnostics) == {"base", "turned", "full"}
    for name, card in diagnostics.items():
        _, front, body = card.split("---\n", 2)
        assert "license: cc-by-nc-4.0\n" in front
        assert "base_model_relation: finetune\n" in front
        assert '- "en"\n' in front
        assert all(f'- "{tmp_path / who}"\n' in front for who in ("student", "teacher"))
        assert all(model.sha256 in body for model in (outcome.pair.student, outcome.pair.teacher))
        assert (
            f"| {told['table'][name]['kl']['shown']} | {told['table'][name]['kl']['change']} |"
            in body
        )
        assert path.read_text(encoding="utf-8").rstrip() in body
    assert "Nothing was changed." in diagnostics["base"]
    assert "basis-fold: exact, logits do not change." in diagnostics["turned"]
    assert "cannot be taken back" not in diagnostics["turned"]
    assert "lm-head-ridge: changed what the model computes" in diagnostics["full"]


def test_a_card_that_is_written_anew_leaves_the_checkpoint_valid(tmp_path: Path) -> None:
    pico_texts(tmp_path / "texts")
    for name in ("teacher", "student"):
        pico_folder(tmp_path / name)
    path = tmp_path / "carded.toml"
    path.write_text(RECIPE.format(work=tmp_path), encoding="utf-8")
    folder = run_recipe(path).checkpoints["full"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    card = (folder / "README.md").stat().st_mtime_ns
    assert run_recipe(path).checkpoints["full"] == folder
    assert (
        folder / "README.md"
    ).stat().st_mtime_ns == card  # nothing has changed, so nothing is written
    (folder / "README.md").unlink()
    again = run_recipe(path).checkpoints["full"]
    assert (again / "README.md").is_file()
    assert (again / "model.safetensors").stat().st_mtime_ns == before
    assert "README.md" not in json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
