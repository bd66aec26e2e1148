"""What a recipe names as ingredients, opened: checked to be of the student's kind, and seen with its names, shapes and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.models import Model, load_tokenizer, tokenizer_files
from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.output import StepOutput
from rotdistill_soups._lora import ADAPTER, Lora
from rotdistill_soups._merge import Ingredient, Rows

STUDENT = "student"


def found(reference: str) -> Path:
    """Return the folder of an ingredient: a folder, a hub id (with `@revision`), `run:NAME/VARIANT`, any model reference."""
    return locate_model(_ref(reference), lambda _: None)


def _ref(reference: str) -> ModelRef:
    name, _, revision = reference.partition("@")
    whole = Path(reference).expanduser().is_dir() or not revision
    return ModelRef(model=reference if whole else name, revision=None if whole else revision)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds a LoRA and no model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def content(reference: str) -> str:
    """Return the sha256 of what a reference names now: a soup is made anew when an ingredient has changed."""
    if reference == STUDENT:
        return STUDENT
    folder = found(reference)
    if is_adapter(folder):
        return " ".join(sha256_of(path) for path in sorted(folder.glob("adapter_*")))
    return open_model(_ref(reference)).sha256


def opened(reference: str, weights: Weights, out: StepOutput) -> Model | Path:
    """Return the model that a reference names, checked from its headers against the student; or the folder of an adapter.

    Raises:
        RecipeError: another architecture or other shapes, or the folder that this run writes.
        SetupError: it is not there, is torn, or lacks tensors.
    """
    folder, run = found(reference), out.ledger.folder
    if folder.resolve().is_relative_to(run.resolve()):
        raise RecipeError(
            f"soups: {reference} is {folder}, inside the folder that this run writes ({run}), so what is merged would change with it; "
            f'name a checkpoint of another run, or the student as the steps before left it with "{STUDENT}".'
        )
    if is_adapter(folder):
        return folder
    model = open_model(_ref(reference))
    mine, its = weights.config["model_type"], model.config["model_type"]
    if mine != its:
        raise RecipeError(
            f"soups: {reference} is a {its} model and the student {mine}; only models of one architecture can be merged."
        )
    one, two = (_shape(view) for view in (weights, model.weights))
    differ = [what for what in {**one, **two} if one.get(what) != two.get(what)]
    if differ:
        raise RecipeError(
            f"soups: {reference} has another shape than the student: {differ[0]} is {two.get(differ[0])}, and {one.get(differ[0])} in the "
            "student. Only checkpoints of one shape can be merged, cut the same way if they were cut."
        )
    head = weights.adapter.head
    lack = sorted((set(weights.entries) ^ set(model.weights.entries)) - {head})
    if lack:
        has = "the student" if lack[0] in weights.entries else reference
        raise RecipeError(
            f"soups: {reference}: {lack[0]} and {len(lack) - 1} more tensors are in {has} only; both must have the same."
        )
    return model


def _shape(view: Weights) -> dict[str, Any]:
    sizes = {space: n for space, n in view.adapter.sizes(view.config).items() if space != "vocab"}
    return {"layers": view.depth, "heads": tuple(view.adapter.heads(view.config)), **sizes}


@dataclass(frozen=True)
class Tokens:
    """The rows of an ingredient's vocabulary in the order of the student's."""

    ids: Tensor
    """For each of the student's rows, the ingredient's, or -1 [vocab]."""

    def rows(self, theirs: Tensor, mine: Tensor) -> Rows:
        """Return the ingredient's rows for the student's tokens; the student's own where it has none."""

        def read(a: int, b: int) -> Tensor:
            ids = self.ids[a:b]
            X = theirs[ids.clamp_min(0)]
            return torch.where((ids < 0).reshape(-1, *[1] * (X.ndim - 1)), mine[a:b].to(X), X)

        return read


def matched(model: Model, student: Model, size: int, reference: str) -> Tokens | None:
    """Return the student's tokens in an ingredient, by string; None where all rows mean the same.

    Raises:
        SetupError: it has another number of rows and no tokenizer, or shares hardly any token.
    """
    theirs = model.weights.entries[model.adapter.embedding].shape[0]
    if not tokenizer_files(model.folder):
        if theirs != size:
            raise SetupError(
                f"soups: {reference} has {theirs} rows for tokens, the student {size}, and no tokenizer to match them by."
            )
        return None
    mine, its = student.tokenizer.get_vocab(), load_tokenizer(model.folder).get_vocab()
    if theirs == size and mine == its:
        return None
    ids = torch.full((size,), -1)
    for token, row in mine.items():
        ids[row] = its.get(token, -1) if row < size else -1
    ids[ids >= theirs] = -1
    shared = int((ids >= 0).sum())
    if shared < len(mine) / 2:
        raise SetupError(
            f"soups: {reference} shares {shared} of the student's {len(mine)} tokens: it has another tokenizer."
        )
    return Tokens(ids)


def translated(view: Weights, base: Weights, tokens: Tokens | None, name: str) -> Ingredient:
    """Return an ingredient whose vocabulary is the student's; `view` and `base` agree on tie and norms."""
    if tokens is None:
        return Ingredient(name, view, {})
    table = base.adapter.expand(base.config)
    special: dict[str, Rows] = {}
    new: dict[str, LazyTensor] = {}
    for key, entry in view.entries.items():
        if table[key].axes[0] == "vocab":
            special[key] = rows = _lazily(entry, base.entries[key], tokens)
            shape = (len(tokens.ids), *entry.shape[1:])
            new[key] = LazyTensor(shape, entry.dtype, lambda rows=rows, n=shape[0]: rows(0, n))  # type: ignore[misc]
    same = replace(view.edit(new), config={**view.config, "vocab_size": base.config["vocab_size"]})
    return Ingredient(name, same, special, tokens.ids < 0)


def _lazily(theirs: LazyTensor, mine: LazyTensor, tokens: Tokens) -> Rows:
    return lambda a, b: tokens.rows(theirs.read(), mine.read())(a, b)


def with_lora(lora: Lora, base: Weights, name: str) -> Ingredient:
    """Return the student with an adapter as an ingredient."""
    special: Mapping[str, Callable[[int, int], Tensor]] = {
        n: lambda a, b, n=n: lora.rows(n, base[n][a:b], a, b)  # type: ignore[misc]
        for n in lora.factors
    }
    return Ingredient(name, lora.on(base), special)
