"""The `basis-fold` step: options, cost, and the hook."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rotdistill_basis_fold._cost import FOLDED_TWICE, fold_cost
from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.cost import Cost, CostContext

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.store.output import StepOutput


@step
class BasisFold:
    """Express the student in the bases that aligners found: stream, heads, neurons and gauges.

    Every map of a space onto itself is folded. Before the residual stream is rotated, readers
    absorb the norm gains and the head is untied. The aligner must have found one rotation for all
    layers (`tie = "all"`); only `block` takes one per layer.

    `canonical` folds `Q = polar(R E) [d_s, d_s]`, with `E [d_t, d_s]` the leading principal
    directions of the teacher's stream. Two students folded this way share a basis without having
    met. `block` leaves the skip connection in the old basis, which breaks the model; it is there to
    be measured.
    """

    use: Literal["basis-fold"] = "basis-fold"
    mode: Literal["tied", "canonical", "widen", "block"] = "tied"
    """`"tied"`: the aligner's one rotation R, for models of one width. `"canonical"`: into the
    teacher's principal frame, for any width up to the teacher's. `"widen"`: into the teacher's own
    coordinates; the hidden size becomes the teacher's. `"block"`: each layer by its own rotation,
    between its norms and its writers, **not exact**."""

    @property
    def exact(self) -> bool:
        """Whether the logits stay."""
        return self.mode != "block"

    def cost(self, context: CostContext) -> Cost:
        """Every weight once in float64, the certificate if it is exact, and a canonical frame."""
        return fold_cost(self, context.for_alignment, self.context_after(context).student)

    def rotates_stream(self, context: CostContext) -> bool:
        """Whether the stream itself is rotated; maps of heads and neurons alone leave it."""
        return self.exact and context.stages > 0

    def context_after(self, context: CostContext) -> CostContext:
        """Before a rotation the head absorbs the final gain, so it is no longer tied.

        `widen` changes the width. Permutations, gauges and `block` leave the head alone.

        Raises:
            RecipeError: a step before has folded the same maps.
        """
        if context.folded:
            raise RecipeError(FOLDED_TWICE)
        edited = replace(context.with_edited_weights(), folded=True)
        if not self.rotates_stream(context):
            return edited
        changes: dict[str, int | bool] = {"tie_word_embeddings": False}
        if self.mode == "widen":
            adapter = context.student.adapter
            changes[adapter.width_key] = context.for_alignment.teacher.width
            changes["head_dim"] = adapter.heads(context.student.config).width
        return edited.with_student(**changes)

    def check_models(self, pair: Pair) -> None:
        """Raise what norms after the student's writers would end with, where the stream is rotated.

        In the mode `tied` an aligner may have found a permutation, which such norms commute with.

        Raises:
            RecipeError: no reader could absorb the gains of these norms.
        """
        if self.mode in ("canonical", "widen"):
            pair.student.adapter.require_rotations(pair.student.config)

    @hookimpl
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        out: StepOutput,
    ) -> Weights:
        """See `HookSpecs.fold`."""
        from rotdistill_basis_fold._method import fold_maps

        return fold_maps(self, weights, maps, activations, pair, out)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [BasisFold]
