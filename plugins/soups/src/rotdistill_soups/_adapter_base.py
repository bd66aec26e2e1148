"""The model that an adapter was trained on, compared with the student as far as it is here.

The student may have been cut or folded since it was opened. What counts is the student at the place
where the adapter belongs: as it is now, or before the folds that the adapter is carried through.
"""

from __future__ import annotations

from pathlib import Path

from rotdistill_core.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig
from rotdistill_core.checkpoint.config_differences import config_differences, listed
from rotdistill_core.checkpoint.models import Model, is_unedited
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_soups._basis_check import basis_distances, is_other_basis
from rotdistill_soups._basis_check import listed as listed_distances


def check_base(config: AdapterConfig, student: Model) -> None:
    """Compare the base that an adapter names with the student, before any work.

    Steps before may cut or fold the student, so that sizes and bases are compared later.

    Raises:
        RecipeError: the base is of another architecture, or of the student's size and another
            config.
    """
    base = _base_of(config, student)
    if isinstance(base, str) or base is student:
        return
    _require_one_type(config, base, student)
    if _shape(base) == _shape(student):
        _require_one_config(config, base, student)


def compare_base(
    config: AdapterConfig, student: Model, trained_on: Weights, ignore_basis: bool
) -> str:
    """Compare the base that an adapter names with the model that it is read for.

    Nothing is downloaded: of a base that is not a folder here, only the name is compared.

    Args:
        config: the adapter's.
        student: the student as it was opened.
        trained_on: the student where the adapter belongs: before the folds that are replayed.
        ignore_basis: accept a base whose weights are far from those.

    Returns:
        What is known of it, for the notes; empty where it is the student itself, or not named.

    Raises:
        RecipeError: it is another model: of another architecture, shape or config, or in another
            basis.
    """
    base = _base_of(config, student)
    if isinstance(base, str):
        return base
    if base is student and is_unedited(trained_on, student):
        one, two = config.revision, student.ref.revision or ""
        if config.base != student.ref.model or _is_folder(config.base) or one == two:
            return ""
        return f"trained on revision {one or '(main)'}, not {two or '(main)'}"
    _require_one_type(config, base, trained_on)
    found, wanted = _shape(base), _shape(trained_on)
    if found != wanted:
        size = next(size for size in found | wanted if found.get(size) != wanted.get(size))
        raise RecipeError(
            f"{_named(config)}, which is of another shape than the student where the LoRA is added "
            f"({size}: {found.get(size)} and {wanted.get(size)}). If the student was cut or "
            "widened since, put the soup before that step, or name the fold in replay_folds; else "
            "leave it out, or correct the name if it is wrong."
        )
    _require_one_config(config, base, trained_on)
    distances = basis_distances(base.weights, trained_on)
    if is_other_basis(distances) and not ignore_basis:
        raise RecipeError(
            f"{_named(config)}, which is another model than the student, or in another basis. "
            f"Relative distances of weights: {listed_distances(distances)} (0 equal, 1.41 "
            "unrelated). Leave the adapter out, correct the name if it is wrong, or merge it all "
            'the same with same_basis = "ignore".'
        )
    if base is student:
        return ""
    return f"trained on {config.base}, at distances {listed_distances(distances)} from the student"


def _base_of(config: AdapterConfig, student: Model) -> Model | str:
    """Return the model that an adapter names, or what is known of it where it cannot be opened."""
    if not config.base:
        return ""
    if not _is_folder(config.base):
        if config.base == student.ref.model:
            return student
        return f"trained on {config.base}, which is not here; not compared with the student"
    folder = Path(config.base).expanduser()
    if folder.resolve() == student.folder.resolve():
        return student
    try:
        base = open_model(ModelRef(model=str(folder)))
    except RotdistillError as error:
        return f"trained on {config.base}, which cannot be opened: {error}"
    return student if base.fingerprint == student.fingerprint else base


def _is_folder(base: str) -> bool:
    return (Path(base).expanduser() / RunLayout.CONFIG).is_file()


def _named(config: AdapterConfig) -> str:
    return (
        f"soups: {config.folder} was trained on {config.base} (base_model_name_or_path of its "
        f"{ADAPTER_CONFIG})"
    )


def _require_one_type(config: AdapterConfig, base: Model, other: Model | Weights) -> None:
    found, wanted = base.config["model_type"], other.config["model_type"]
    if found != wanted:
        raise RecipeError(
            f"{_named(config)}, which is a {found} model, and the student {wanted}. Its matrices "
            "mean something else there. Leave it out, or correct the name if it is wrong."
        )


def _require_one_config(config: AdapterConfig, base: Model, other: Model | Weights) -> None:
    differences = config_differences(base.config, other.config, config.base)
    if differences:
        raise RecipeError(
            f"{_named(config)}, which is another model: {listed(differences, 'the student')}. Its "
            "matrices mean something else there. Leave it out, or correct the name if it is wrong."
        )


def _shape(model: Model | Weights) -> dict[str, object]:
    """Return the depth, the heads and the size of every space, by name."""
    sizes = model.adapter.sizes(model.config)
    heads = tuple(model.adapter.heads(model.config))
    return {"layers": model.adapter.depth(model.config), "heads": heads, **sizes}
