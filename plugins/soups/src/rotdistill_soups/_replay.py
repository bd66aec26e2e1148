"""LoRA adapters carried to the student as it is, through the exact folds since their training.

An adapter fits the model that it was trained on. The ledger has every edit that led to the student:
exact folds are replayed on the adapter (`transform_lora`), edits of single weights leave it as it
is, and what cannot be replayed is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint.adapter_config import read_adapter_config
from rotdistill_core.checkpoint.lora import Lora, read_lora, transform_lora
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Undo, Weights, restore_undo, restore_weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.records import WeightsRef
from rotdistill_soups._adapter_base import compare_base
from rotdistill_soups._ingredients import OpenIngredients

FOLD = "basis-fold"
"""The step that folds maps; with `mode = "block"` it is not exact and keeps no record."""


def replayed_loras(
    opened: OpenIngredients,
    base: Weights,
    replay_folds: Sequence[str] | None,
    out: StepOutput,
    ignore_basis: bool,
) -> dict[str, Lora]:
    """Return the adapters in the student's basis.

    Args:
        opened: the ingredients.
        base: the student, in the form that the ingredients have.
        replay_folds: ids of the exact folds since the adapters were trained; they are applied to
            the adapters in the order in which they were made. None where the recipe does not name
            any.
        out: the step's output, whose ledger has the folds.
        ignore_basis: accept an adapter that was trained on weights far from those it is added to.

    Raises:
        RecipeError: an adapter was trained on another model; the student's basis has changed, and
            the recipe does not say whether before or after the adapters were trained; or the folds
            that it names do not lead from there to the student.
        SetupError: an adapter is torn, or does not fit the model before the folds.
    """
    if not opened.adapters:
        return {}
    edits = _edits(opened, out)
    if replay_folds is None:
        _require_first_basis(edits, next(iter(opened.adapters)))
    replay = replay_of(replay_folds or (), edits, opened.weights, opened.student)
    trained_on = replay.trained_on if base.tied else replay.trained_on.untie()
    table = base.adapter.expand(base.config)
    folds = [*replay.folds, *([base.undo] if base.undo else [])]
    loras: dict[str, Lora] = {}
    for name, folder in opened.adapters.items():
        config = read_adapter_config(folder)
        about = compare_base(config, opened.student, replay.trained_on, ignore_basis)
        if about:
            out.notes.setdefault("bases of adapters", {})[name] = about
        lora = read_lora(folder, trained_on, replay.earlier)
        for fold in folds:
            lora = transform_lora(lora, fold, table)
        loras[name] = lora
    return loras


@dataclass(frozen=True)
class Edit:
    """A step before this one that gave the student other weights."""

    step: str
    """Its id in the recipe."""
    use: str
    before: Weights
    config_after: Config
    undo: Undo | None
    """What takes it back; None unless it is exact."""
    is_based: bool
    """Whether the student's stream has another basis after it than when it was opened."""

    @property
    def changes_basis(self) -> bool:
        """Whether stream, heads or neurons have another basis or order after the edit."""
        new_stream = self.is_based and self.before.lineage.basis is None
        return bool(self.undo) or new_stream or self.use == FOLD


@dataclass(frozen=True)
class Replay:
    """The way from the model that adapters were trained on to the student as it is."""

    trained_on: Weights
    folds: list[Undo]
    """In the order in which they were made."""
    earlier: list[Weights]
    """States of the student before `trained_on`."""


def _edits(opened: OpenIngredients, out: StepOutput) -> list[Edit]:
    """Return the edits that led to the student as it is, the first one first."""
    records = [each for each in out.earlier_steps() if isinstance(each.result, WeightsRef)]
    view, root = opened.student.weights, out.store.root
    edits: list[Edit] = []
    for record in reversed(records):
        result = record.result
        assert isinstance(result, WeightsRef)
        undo = None
        if result.undo:
            undo = restore_undo(root / result.undo, view.config, view.adapter)
        edits.append(
            Edit(
                step=record.id,
                use=record.use,
                before=view,
                config_after=result.config,
                undo=undo,
                is_based=result.basis is not None,
            )
        )
        view = restore_weights(result.as_dict(), opened.student.weights, root)
    return edits


def _require_first_basis(edits: Sequence[Edit], adapter: str) -> None:
    """Refuse an adapter for a student whose basis changed: nobody said on which side it belongs.

    A fold of heads or neurons alone leaves the basis of the stream, and puts them in another order.
    """
    changes = [edit for edit in edits if edit.changes_basis]
    if not changes:
        return
    lost = next((edit for edit in changes if not edit.undo), None)
    if lost:
        raise RecipeError(
            f'soups: step "{lost.step}" changed the student\'s basis in a way that cannot be '
            f"replayed on a LoRA, and {adapter} is one. Put the soup before that step; or write "
            "replay_folds = [], if the LoRA was trained after it."
        )
    names = ", ".join(f'"{edit.step}"' for edit in changes)
    raise RecipeError(
        f"soups: the student was folded into another basis, and {adapter} is a LoRA, which fits "
        f"one basis only. Name the folds that it is to be carried through, replay_folds = "
        f"[{names}], or none if it was trained after them, replay_folds = []."
    )


def replay_of(
    steps: Sequence[str], edits: Sequence[Edit], weights: Weights, student: Model
) -> Replay:
    """Return the way that adapters go which were trained before the first of some folds.

    Args:
        steps: ids of exact folds, in any order; without any, adapters belong to the student as it
            is.
        edits: those that led to the student as it is.
        weights: the student as it is.
        student: the student as it was opened.

    Raises:
        RecipeError: an id is that of no exact fold; or an edit after the first named fold is one
            that adapters cannot be carried through, or is not named.
    """
    exact = {edit.step for edit in edits if edit.undo}
    for step in steps:
        if step not in exact:
            _refuse_name(step, edits)
    first = next(
        (k for k, edit in enumerate(edits) if edit.undo and edit.step in steps), len(edits)
    )
    states = [edit.before for edit in edits] or [student.weights]
    folds: list[Undo] = []
    for edit in edits[first:]:
        if edit.undo is None:
            _require_replayable(edit, edits[first], weights.adapter)
        elif edit.step not in steps:
            raise RecipeError(
                f'soups: replay_folds names "{edits[first].step}" and leaves out "{edit.step}", '
                "an exact fold after it. An adapter that is carried through the first goes "
                "through the second too; name both."
            )
        else:
            folds.append(edit.undo)
    trained_on = edits[first].before if first < len(edits) else weights
    return Replay(trained_on, folds, states[: max(first, 1)])


def _refuse_name(step: str, edits: Sequence[Edit]) -> None:
    if any(edit.step == step and edit.use == FOLD for edit in edits):
        raise RecipeError(
            f'soups: replay_folds names "{step}", which is not exact (mode = "block"): it cannot '
            "be replayed on a LoRA. Put the soup before it."
        )
    raise RecipeError(
        f'soups: replay_folds names "{step}", which is no exact fold that stands before this step; '
        "name the id of a basis-fold."
    )


def _require_replayable(edit: Edit, fold: Edit, adapter: Adapter) -> None:
    """Refuse an edit after a replayed fold that changes more than single weights."""
    before, after = _shape(adapter, edit.before.config), _shape(adapter, edit.config_after)
    if before != after:
        size = next(size for size in before | after if before.get(size) != after.get(size))
        raise RecipeError(
            f'soups: replay_folds names "{fold.step}", and step "{edit.step}" after it changed the '
            f"student: {size} was {before.get(size)} and is {after.get(size)}. A LoRA cannot be "
            "carried through a cut; put the cut before the fold, or the soup before the cut."
        )
    if edit.changes_basis:
        raise RecipeError(
            f'soups: replay_folds names "{fold.step}", and step "{edit.step}" after it changed the '
            "student's basis in a way that cannot be replayed on a LoRA. Put the soup before it."
        )


def _shape(adapter: Adapter, config: Config) -> dict[str, int]:
    """Return the depth and the size of every space, by name."""
    return {"layers": adapter.depth(config), **adapter.sizes(config)}
