"""The model that an adapter was trained on, compared with the student as far as it is here."""

from __future__ import annotations

from pathlib import Path

from rotdistill_core.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig
from rotdistill_core.checkpoint.config_differences import config_differences, listed
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_soups._basis_check import basis_distances, is_other_basis
from rotdistill_soups._basis_check import listed as listed_distances


def compare_base(config: AdapterConfig, student: Model, ignore_basis: bool) -> str:
    """Compare the base that an adapter names with the student as it was opened.

    Nothing is downloaded: of a base that is not a folder here, only the name is compared.

    Args:
        config: the adapter's.
        student: the student of the recipe.
        ignore_basis: accept a base whose weights are far from the student's.

    Returns:
        What is known of it, for the notes; empty where it is the student itself, or not named.

    Raises:
        RecipeError: it is another model: of another architecture, shape or config, or in another
            basis.
    """
    if not config.base:
        return ""
    folder = Path(config.base).expanduser()
    if not (folder / RunLayout.CONFIG).is_file():
        if config.base != student.ref.model:
            return f"trained on {config.base}, which is not here; not compared with the student"
        one, two = config.revision, student.ref.revision or ""
        return "" if one == two else f"trained on revision {one or '(main)'}, not {two or '(main)'}"
    if folder.resolve() == student.folder.resolve():
        return ""
    try:
        base = open_model(ModelRef(model=str(folder)))
    except RotdistillError as error:
        return f"trained on {config.base}, which cannot be opened: {error}"
    if base.fingerprint == student.fingerprint:
        return ""
    _require_one_config(config, base, student)
    if base.depth != student.depth:
        return (
            f"trained on {config.base}, which has {base.depth} layers; the student {student.depth}"
        )
    distances = basis_distances(base.weights, student.weights)
    if is_other_basis(distances) and not ignore_basis:
        raise RecipeError(
            f"soups: {config.folder} was trained on {config.base} (base_model_name_or_path of its "
            f"{ADAPTER_CONFIG}), which is another model than the student, or in another basis. "
            f"Relative distances of weights: {listed_distances(distances)} (0 equal, 1.41 "
            "unrelated). Leave the adapter out, correct the name if it is wrong, or merge it all "
            'the same with same_basis = "ignore".'
        )
    return f"trained on {config.base}, at distances {listed_distances(distances)} from the student"


def _require_one_config(config: AdapterConfig, base: Model, student: Model) -> None:
    problem = ""
    if base.config["model_type"] != student.config["model_type"]:
        problem = (
            f"a {base.config['model_type']} model, and the student {student.config['model_type']}"
        )
    elif _sizes(base) != _sizes(student):
        problem = "of another shape than the student"
    else:
        differences = config_differences(base.config, student.config, config.base)
        # Layers differ where the student was cut.
        told = [d for d in differences if base.depth == student.depth or d.key != "layer_types"]
        problem = listed(told, "the student") and f"another model: {listed(told, 'the student')}"
    if problem:
        raise RecipeError(
            f"soups: {config.folder} was trained on {config.base} (base_model_name_or_path of its "
            f"{ADAPTER_CONFIG}), which is {problem}. Its matrices mean something else there. Leave "
            "it out, or correct the name if it is wrong."
        )


def _sizes(model: Model) -> tuple[object, ...]:
    """Return what does not change with the number of layers."""
    sizes = model.adapter.sizes(model.config)
    first = {space: size for space, size in sizes.items() if not space[-1].isdigit()}
    first |= {space: size for space, size in sizes.items() if space.endswith(".0")}
    return (tuple(model.adapter.heads(model.config)), first)
