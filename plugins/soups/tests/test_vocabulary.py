"""Ingredients with other tokens, another order of tokens, or another tie of the head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_tokenizer, save_folder

FineTune = Callable[..., str]
Merge = Callable[..., Any]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_more_tokens(model: Model, folder: Path, order: list[int]) -> Path:
    """Write a checkpoint with two more tokens, and the others in another order."""
    more = torch.cat([model.weights[EMBEDDING][order], 100 * torch.ones(2, 32)])
    save_folder(model.weights.edit({EMBEDDING: more}, vocab_size=66), model.folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    vocabulary = {names[old]: new for new, old in enumerate(order)}
    tokenizer["model"]["vocab"] = vocabulary | {"new1": 64, "new2": 65}
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_tokens_are_matched_by_their_string(tmp_path: Path, merge: Merge, student: Model) -> None:
    more = with_more_tokens(student, tmp_path / "more", [*range(6), *range(63, 5, -1)])
    merged = merge("student", more).weights
    torch.testing.assert_close(merged[EMBEDDING], student.weights[EMBEDDING])
    assert merged.config["vocab_size"] == 64


def test_a_token_that_some_lack_is_averaged_over_the_others(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    E = open_model(ModelRef(model=fine_tune("whole", 3))).weights
    less = E.edit({EMBEDDING: E[EMBEDDING][:60]}, vocab_size=60)
    save_folder(less, student.folder, tmp_path / "less")
    pico_tokenizer(60).save_pretrained(tmp_path / "less")
    other_path = fine_tune("two", 2)
    other = open_model(ModelRef(model=other_path)).weights[EMBEDDING]
    merged = merge(tmp_path / "less", other_path).weights[EMBEDDING]
    torch.testing.assert_close(merged[60:], other[60:])
    torch.testing.assert_close(merged[:60], (other[:60] + E[EMBEDDING][:60]) / 2)
    alone = merge(tmp_path / "less").weights[EMBEDDING]
    torch.testing.assert_close(alone[60:], student.weights[EMBEDDING][60:])


def test_tied_and_untied_heads_are_merged(tmp_path: Path, merge: Merge, student: Model) -> None:
    head = torch.randn(64, 32)
    untied = student.weights.untie().edit({HEAD: head})
    save_folder(untied, student.folder, tmp_path / "untied")
    merged = merge("student", tmp_path / "untied", same_basis="ignore").weights
    torch.testing.assert_close(merged[HEAD], (student.weights.head() + head) / 2)
    assert merged.config["tie_word_embeddings"] is False
    into = open_model(ModelRef(model=str(tmp_path / "untied")))
    other = merge("student", student.folder, into=into, same_basis="ignore").weights
    torch.testing.assert_close(other[HEAD], merged[HEAD])


def test_another_tokenizer_is_refused(merge: Merge, fine_tune: FineTune) -> None:
    path = Path(fine_tune("a", 1))
    text = (path / "tokenizer.json").read_text().replace('"w', '"v')
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(SetupError, match=r"shares 6 of the student's 64 tokens"):
        merge(path)
