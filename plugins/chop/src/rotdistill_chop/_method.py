"""Cut a student: choose layers and size, cut, and keep track of the basis of its stream."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rotdistill_chop._cut import cut_to_size
from rotdistill_chop._depth import LayerSelector
from rotdistill_chop._keep import Trial, best_split
from rotdistill_chop._rows import select_texts
from rotdistill_chop._size import Size
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.store.output import StepOutput

if TYPE_CHECKING:
    from rotdistill_chop.step import Chop


def solve(
    step: Chop,
    weights: Weights,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the cut student.

    Raises:
        RecipeError: an option asks for more than the student has, for a shape that transformers
            refuses, or for a narrower stream of a model that cannot be rotated.
    """
    check_options(step, weights)
    device, dtype = pair.student.device, pair.student.dtype
    # Within this step the basis is that of the stream as it comes in.
    whole = with_basis(weights, None)
    selector = LayerSelector(step, whole, pair, samples, out, progress)
    if step.keep_fraction is None:
        layers = step.layers
        if not isinstance(layers, list):
            layers = selector.keep(layers or whole.depth)
        size = requested_size(step, whole, len(layers))
    else:
        scores: dict[str, Any] = out.notes.setdefault("KL by split", {})
        trial = Trial(whole, samples, max_kl_rows=step.max_kl_rows, device=device, dtype=dtype)
        best = best_split(whole, step.keep_fraction, trial, selector.keep, scores, progress)
        size, layers = best.size, best.layers

    forward_of = partial(
        LayerwiseForward,
        layout=select_texts(samples, Split.FIT, step.max_fit_rows),
        device=device,
        dtype=dtype,
    )
    cut = cut_to_size(whole, layers, size, forward_of, progress)
    kept, total = size.parameters(whole).inner, Size.of(whole).parameters(whole).inner
    out.notes["layers kept"] = layers
    out.notes["neurons"] = size.neurons
    out.notes["kv heads"] = size.kv_heads
    out.notes["width"] = size.width
    out.notes["parameters kept, embedding and head apart"] = kept / total
    return with_basis(cut, basis_after(weights.lineage.basis, cut.lineage.basis, pair.same))


def check_options(step: Chop, weights: Weights) -> None:
    """Raise RecipeError if the student cannot be cut so, before any weight is read."""
    whole, sizes = Size.of(weights), step.requested_sizes()
    if isinstance(step.layers, list):
        rising = sorted(set(step.layers)) == step.layers
        if not rising or step.layers[-1] >= whole.layers:
            raise RecipeError(
                f"chop: layers must rise and stay below {whole.layers}, the student's depth."
            )
        del sizes["layers"]
    for name, size in sizes.items():
        present = getattr(whole, name)
        if size > present:
            raise RecipeError(
                f"chop: {name} = {size}, but the student has {present}. Ask for that or less."
            )
    rejection = whole._replace(**sizes).rejection(weights)
    if rejection:
        asked = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise RecipeError(f"chop: transformers refuses {asked}: {rejection}")


def requested_size(step: Chop, weights: Weights, layers: int) -> Size:
    """Return the size that the options ask for; what they leave out stays as it is."""
    whole = Size.of(weights)
    return Size(
        layers=layers,
        neurons=step.neurons or whole.neurons,
        kv_heads=step.kv_heads or whole.kv_heads,
        width=step.width or whole.width,
    )


def with_basis(weights: Weights, basis: Tensor | None) -> Weights:
    """Return a view whose lineage has this basis."""
    return replace(weights, lineage=replace(weights.lineage, basis=basis))


def basis_after(old: Tensor | None, new: Tensor | None, same: bool) -> Tensor | None:
    """Return the basis of the cut stream relative to the original student.

    Args:
        old: basis before this step.
        new: basis of the cut stream relative to the stream before this step.
        same: whether the student starts as the teacher itself.
    """
    if new is None:
        return old
    if not same:
        # The cut student is what is captured and aligned, so its stream is its own basis.
        return None
    return new if old is None else old @ new
