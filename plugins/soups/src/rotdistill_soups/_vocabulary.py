"""Ingredients with another vocabulary: their rows in the order of the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.models import Model, has_vocabulary, load_tokenizer
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import SetupError
from rotdistill_soups._mixture import Ingredient, Rows

SHARED_TOKENS = 0.5
"""Share of the student's tokens that an ingredient must have to count as of one tokenizer."""


def match_tokens(model: Model, student: Model, student_rows: int, reference: str) -> Tensor | None:
    """Match the tokens of an ingredient by their string.

    A model without the files of a vocabulary counts as of the student's tokens if it has as many
    rows: fine-tunes are often saved without a tokenizer.

    Returns:
        For each of the student's rows the ingredient's row, or -1 `[vocab]`; None where all rows
        mean the same.

    Raises:
        SetupError: another number of rows and no tokenizer, or hardly any token is shared.
    """
    model_rows = model.weights.entries[model.adapter.embedding].shape[0]
    if not has_vocabulary(model.folder):
        if model_rows != student_rows:
            raise SetupError(
                f"soups: {reference} has {model_rows} rows for tokens, the student {student_rows}, "
                "and no tokenizer to match them by. Put its tokenizer files into its folder."
            )
        return None
    student_vocab = student.tokenizer.get_vocab()
    model_vocab = load_tokenizer(model.folder).get_vocab()
    if model_rows == student_rows and student_vocab == model_vocab:
        return None
    rows = _matched_rows(student_vocab, model_vocab, student_rows, model_rows)
    shared = int((rows >= 0).sum())
    if shared < SHARED_TOKENS * len(student_vocab):
        raise SetupError(
            f"soups: {reference} shares {shared} of the student's {len(student_vocab)} tokens: it "
            "has another tokenizer. Leave it out: only models of one tokenizer can be merged."
        )
    return rows


def _matched_rows(
    student_vocab: Mapping[str, int],
    model_vocab: Mapping[str, int],
    student_rows: int,
    model_rows: int,
) -> Tensor:
    rows = torch.full((student_rows,), -1)
    for token, row in student_vocab.items():
        if row < student_rows:
            rows[row] = model_vocab.get(token, -1)
    rows[rows >= model_rows] = -1
    return rows


def as_ingredient(view: Weights, base: Weights, token_rows: Tensor | None, name: str) -> Ingredient:
    """Return a model as an ingredient with the student's vocabulary.

    Args:
        view: the model; it agrees with `base` on tie and norms.
        base: the student.
        token_rows: see `match_tokens`.
        name: as the recipe names it.
    """
    if token_rows is None:
        return Ingredient(name, view, {})
    table = base.adapter.expand(base.config)
    special: dict[str, Rows] = {}
    translated: dict[str, LazyTensor] = {}
    for key, entry in view.entries.items():
        if table[key].axes[0] == VOCAB:
            rows = _TranslatedRows(entry, base.entries[key], token_rows)
            special[key] = rows
            shape = (len(token_rows), *entry.shape[1:])
            translated[key] = LazyTensor(shape, entry.dtype, partial(rows, 0, shape[0]))
    config = {**view.config, "vocab_size": base.config["vocab_size"]}
    translated_view = replace(view.edit(translated), config=config)
    return Ingredient(name, translated_view, special, token_rows < 0)


@dataclass(frozen=True)
class _TranslatedRows:
    """The ingredient's rows for the student's tokens; the student's own where it has none."""

    ingredient: LazyTensor
    student: LazyTensor
    token_rows: Tensor

    def __call__(self, a: int, b: int) -> Tensor:
        rows = self.token_rows[a:b]
        X = self.ingredient.read()[rows.clamp_min(0)]
        absent = (rows < 0).reshape(-1, *[1] * (X.ndim - 1))
        return torch.where(absent, self.student.read()[a:b].to(X), X)
