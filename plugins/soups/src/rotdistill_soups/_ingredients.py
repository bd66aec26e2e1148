"""Ingredients as a recipe names them: located, hashed, and checked to be of the student's kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.architecture.table import Config
from rotdistill_core.checkpoint.adapter_config import read_adapter_config
from rotdistill_core.checkpoint.config_differences import config_differences, listed
from rotdistill_core.checkpoint.headers import read_header
from rotdistill_core.checkpoint.lora import ADAPTER_WEIGHTS
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.checkpoint.references import content_digest, is_adapter, reference_of
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.store.output import StepOutput
from rotdistill_soups._adapter_base import check_base
from rotdistill_soups._merge import STUDENT
from rotdistill_soups._vocabulary import match_tokens


def digest_of(reference: str) -> str:
    """Return the sha256 of what a reference names now: a changed ingredient is merged anew."""
    return STUDENT if reference == STUDENT else content_digest(reference)


@dataclass(frozen=True, kw_only=True)
class OpenIngredients:
    """The ingredients of a recipe, each checked from its headers against the student."""

    references: Sequence[str]
    """As the recipe names them, `student` among them."""
    student: Model
    weights: Weights
    """The student as the earlier steps left it."""
    models: Mapping[str, Model]
    """Reference -> whole model."""
    adapters: Mapping[str, Path]
    """Reference -> folder of a LoRA."""

    @property
    def base(self) -> Weights:
        """The student, with a head of its own where an ingredient has one."""
        untied_model = any(not model.weights.tied for model in self.models.values())
        one_sided = any(_edits_tied(path, self.weights) for path in self.adapters.values())
        return self.weights.untie() if untied_model or one_sided else self.weights


def open_ingredients(
    references: Sequence[str], weights: Weights, pair: Pair, out: StepOutput
) -> OpenIngredients:
    """Open what a recipe names.

    Raises:
        RecipeError: an ingredient of another architecture or shape, or from this run's own folder.
        SetupError: an ingredient is missing, torn, or lacks tensors.
    """
    models: dict[str, Model] = {}
    adapters: dict[str, Path] = {}
    for reference in references:
        if reference == STUDENT:
            continue
        folder = locate_model(reference_of(reference))
        _require_other_run(reference, folder, out.ledger.folder)
        if is_adapter(folder):
            adapters[reference] = folder
        else:
            model = open_model(reference_of(reference))
            _require_student_shape(reference, model, weights)
            models[reference] = model
    return OpenIngredients(
        references=references,
        student=pair.student,
        weights=weights,
        models=models,
        adapters=adapters,
    )


def check_ingredients(references: Sequence[str], pair: Pair) -> None:
    """Check what can be checked before the run's first work, from headers and configs.

    Shapes are compared later: steps before may cut the student.

    Args:
        references: as the recipe names them.
        pair: the models of the recipe.

    Raises:
        RecipeError: an ingredient of another architecture or config than the student.
        SetupError: an ingredient is missing or torn, has another tokenizer, or is no plain LoRA.
    """
    student = pair.student
    for reference in references:
        if reference == STUDENT:
            continue
        folder = locate_model(reference_of(reference))
        if is_adapter(folder):
            check_base(read_adapter_config(folder), student)
            continue
        model = open_model(reference_of(reference))
        _require_student_architecture(reference, model, student.config)
        if model.depth == student.depth:
            _require_student_config(reference, model, student.config)
        rows = student.weights.entries[student.adapter.embedding].shape[0]
        match_tokens(model, student, rows, reference)


def _require_other_run(reference: str, folder: Path, run: Path) -> None:
    if folder.resolve().is_relative_to(run.resolve()):
        raise RecipeError(
            f"soups: {reference} is {folder}, inside the folder that this run writes ({run}), so "
            "what is merged would change with it; name a checkpoint of another run, or the student "
            f'as the steps before left it with "{STUDENT}".'
        )


def _require_student_shape(reference: str, model: Model, weights: Weights) -> None:
    _require_student_architecture(reference, model, weights.config)
    wanted, found = _shape(weights), _shape(model.weights)
    for size in {**wanted, **found}:
        if wanted.get(size) != found.get(size):
            raise RecipeError(
                f"soups: {reference} has another shape than the student: {size} is "
                f"{found.get(size)}, and {wanted.get(size)} in the student. Only checkpoints of "
                "one shape can be merged, cut the same way if they were cut."
            )
    _require_student_config(reference, model, weights.config)
    # Heads may be tied or not; all other tensors have to be in both.
    unmatched = set(weights.entries) ^ set(model.weights.entries)
    unmatched -= {weights.adapter.head}
    if unmatched:
        first = min(unmatched)
        owner = "the student" if first in weights.entries else reference
        raise RecipeError(
            f"soups: {reference}: {first} and {len(unmatched) - 1} more tensors are in {owner} "
            "only; both must have the same."
        )


def _require_student_architecture(reference: str, model: Model, config: Config) -> None:
    student_type, model_type = config["model_type"], model.config["model_type"]
    if student_type != model_type:
        raise RecipeError(
            f"soups: {reference} is a {model_type} model and the student {student_type}; only "
            "models of one architecture can be merged."
        )


def _require_student_config(reference: str, model: Model, config: Config) -> None:
    differences = config_differences(model.config, config, reference)
    if differences:
        raise RecipeError(
            f"soups: {reference} has weights that do not mean what they mean in the student: "
            f"{listed(differences, 'the student')}. The merge keeps the student's config, under "
            "which they would be read wrongly. Leave it out; or correct its config.json, if that "
            "is wrong."
        )


def _shape(view: Weights) -> dict[str, Any]:
    """Return every size of a model but its vocabulary, by name."""
    sizes = {space: n for space, n in view.adapter.sizes(view.config).items() if space != VOCAB}
    return {"layers": view.depth, "heads": tuple(view.adapter.heads(view.config)), **sizes}


def _edits_tied(folder: Path, weights: Weights) -> bool:
    """Return whether an adapter changes the head or the embedding.

    A tied head then has to become a tensor of its own, or both would change.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return False
    tied = [
        f".{name.removesuffix('.weight')}.lora_"
        for name in (weights.adapter.head, weights.adapter.embedding)
    ]
    return any(each in f".{key}" for key in read_header(path) for each in tied)
