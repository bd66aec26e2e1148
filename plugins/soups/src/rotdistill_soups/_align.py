"""Bringing an ingredient to the student: into its basis, and to one form of the norms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from rotdistill_weight_matching import WeightMatching

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.store.files import tensor_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_soups._basis_check import basis_distances, is_other_basis, listed


@dataclass(frozen=True)
class EditedModel(Model):
    """A model as earlier steps left it."""

    view: Weights | None = None

    @property
    def weights(self) -> Weights:
        """The view."""
        assert self.view is not None
        return self.view


def edited_model(model: Model, view: Weights) -> EditedModel:
    """Return a model with other weights, in the place of a model that others are aligned to."""
    return EditedModel(
        ref=model.ref,
        folder=model.folder,
        config=view.config,
        adapter=view.adapter,
        table_code=model.table_code,
        view=view,
    )


def align_to_student(
    name: str,
    model: Model,
    view: Weights,
    target: EditedModel,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return an ingredient in the student's basis, folded exactly.

    Rotation, heads, neurons and gauges are found from weights alone.

    Args:
        name: as the recipe names the ingredient.
        model: the ingredient.
        view: its weights, with the student's vocabulary.
        target: the student.
        out: the step's output.
        progress: reports the alignment.

    Raises:
        RecipeError: the two are still in different bases afterwards.
    """
    pair = Pair(teacher=target, student=replace(model, config=view.config))
    maps = WeightMatching().align(view, Maps(), pair, out, progress)
    stream = maps.tied()
    assert stream is not None
    inner = {space: found for space, found in maps.items() if not space.startswith("residual.")}
    aligned = view.fold({"residual": stream, **inner})
    distances = basis_distances(aligned, fold_norms(target.weights))
    if is_other_basis(distances):
        raise RecipeError(
            f"soups: {name} could not be aligned: relative distances of its weights are still "
            f"{listed(distances)} (0: equal, 1.41: unrelated). It was trained apart from the "
            "student, or too far from it; leave it out."
        )
    return aligned


def norms_are_folded(view: Weights) -> bool:
    """Return whether readers have absorbed the norm gains: each norm multiplies by one number."""
    gains = [view.gain(name) for name in view.adapter.gains(view.config).absorbed]
    return all(float((g - g[0]).abs().max()) <= 1e-6 * float(g[0].abs()) for g in gains)


def fold_norms(view: Weights) -> Weights:
    """Return the view with its norm gains absorbed and its head untied; logits do not change."""
    if norms_are_folded(view):
        return view
    return view.fold({"residual": Rotation(torch.eye(view.width, dtype=torch.float64))})


def commit_view(view: Weights, name: str, out: StepOutput, dtype: torch.dtype) -> Weights:
    """Return the view with every tensor that a read would compute committed to a file instead."""
    computed = {n: (e.shape, dtype, e.read) for n, e in view.entries.items() if e.stored is None}
    if not computed:
        return view
    file = RunLayout.weights(out.step, f"{name}.safetensors")
    path = out.find(file) or out.write(file, tensor_blocks(computed))
    return replace(view.edit(open_tensors(path)), undo=view.undo)
