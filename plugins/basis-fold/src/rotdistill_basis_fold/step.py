"""Fold what aligners found into all weights: a change of basis of the stream, of heads, of neurons and inside them.

Exact (but for `block`), and undone by `unfold`. A map `X' = X Q` makes a reader `W Q` and a writer `Qᵀ W`; gauges make what produces
their space `Gᵀ W` and what consumes it `W G^-T`. (Ashkboos et al., SliceGPT, arXiv:2401.15024.)
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import FLOAT64_BYTES, LOGIT_ROWS, Cost, CostContext

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.linalg.maps import Map, Maps, Rotation
    from rotdistill_core.store.output import StepOutput


ROWS = 4096
"""Rows of each boundary that the principal frame is taken from."""


@step
class BasisFold:
    """Express the student in the bases that aligners found. Every map of one space onto itself is folded: heads, neurons, gauges.

    For the residual stream, norm gains are absorbed first and the head is untied; the aligner must have found one rotation for all
    layers (`tie = "all"`), `block` apart. `canonical` folds `Q = polar(R E) [d_s, d_s]`, E `[d_t, d_s]` the leading principal
    directions of the teacher's stream: two students folded this way share a basis without having met. `block` has nothing on the
    skip path that would undo its rotations: it is there to be measured.
    """

    use: Literal["basis-fold"] = "basis-fold"
    mode: Literal["tied", "canonical", "widen", "block"] = "tied"
    """`"tied"`: the aligner's one rotation R, for models of one width. `"canonical"`: into the teacher's principal frame, for any width up
    to the teacher's. `"widen"`: into the teacher's own coordinates, the hidden size becomes the teacher's. `"block"`: each layer by its
    own rotation, between its norms and its writers, **not exact**."""

    @property
    def exact(self) -> bool:
        """Whether the logits stay."""
        return self.mode != "block"

    def cost(self, context: CostContext) -> Cost:
        """Every weight once in float64, and the certificate: logits of two validation texts from both models."""
        student, texts = context.student, context.texts
        head = student.vocab * student.width * FLOAT64_BYTES
        rows = min(LOGIT_ROWS, texts.rows_of("validation", limit=2))
        logits = 8 * rows * student.vocab * FLOAT64_BYTES
        certificate = 16.0 * student.parameters(inside=True) * texts.prefix
        untied = student.changed(tie_word_embeddings=False).parameters()
        return Cost(
            host_bytes=3.5 * head + logits,
            device_bytes=2.5 * student.layer_parameters * FLOAT64_BYTES,
            disk_bytes=untied * context.student_bytes + student.width**2 * FLOAT64_BYTES,
            operations=4.0 * student.parameters() * student.width + certificate,
            read_bytes=student.bytes,
        )

    def context_after(self, context: CostContext) -> CostContext:
        """The final norm's gain is absorbed by the head, so the head is tied no more; `widen` changes the width."""
        changes: dict[str, int | bool] = {"tie_word_embeddings": False}
        if self.mode == "widen":
            adapter = context.student.adapter
            changes[adapter.width_key] = context.teacher.width
            changes["head_dim"] = adapter.heads(context.student.config).width
        return context.with_edited_weights().with_student(**changes)

    @hookimpl
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        out: StepOutput,
    ) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.linalg.maps import Rotation

        stream = any(space.startswith("residual.") for space in maps)
        inner: dict[str, Map] = {
            space: found
            for space, found in maps.items()
            if found.square and not space.startswith("residual.")
        }
        if inner:
            out.notes["folded"] = dict(Counter(space.partition(".")[0] for space in inner))
        if self.mode == "block":
            return _blockwise(weights, maps, activations)
        R = maps.tied()
        if R is not None:
            fold = Rotation(self._frame(R, activations, pair, out))
            fold.verify(1e-8, "basis-fold")
            return weights.fold({"residual": fold, **inner})
        if stream or not inner:
            raise RecipeError(
                'basis-fold: needs an aligner before it that found one rotation for all layers (tie = "all"), or maps of heads or neurons.'
            )
        return weights.fold(inner)

    def _frame(
        self, R: Rotation, activations: ActivationStore, pair: Pair, out: StepOutput
    ) -> Tensor:
        """Return `Q [d, d]` of the mode."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.linalg.solvers import polar

        if self.mode == "canonical":
            E, share = _principal(activations, pair, R.matrix.shape[0])
            out.notes["teacher variance in the frame"] = share
            return polar(R.matrix.double() @ E, "basis-fold: canonical frame")[0]
        if R.square is not (self.mode == "tied"):
            shape = " x ".join(str(n) for n in R.matrix.shape)
            other = (
                'models of one width; use "canonical" or "widen"'
                if self.mode == "tied"
                else 'a wider teacher; use "tied"'
            )
            raise RecipeError(
                f'basis-fold: the rotation is {shape}, and mode "{self.mode}" needs {other}.'
            )
        return R.matrix.double()


def _blockwise(weights: Weights, maps: Maps, activations: ActivationStore) -> Weights:
    """Return a view whose layer l reads `W R_l` and writes `R_lᵀ W` (biases too), R_l `[d, d]` from the boundary in front of it.

    Raises:
        RecipeError: a layer without a square rotation.
    """
    from rotdistill_core.errors import RecipeError
    from rotdistill_core.linalg.maps import transform_param

    edited, table = {}, weights.adapter.expand(weights.config)
    for i in range(weights.depth):
        depth = weights.lineage.depths[i]
        R = maps.rotation(activations.depths.index(depth)) if depth in activations.depths else None
        if R is None or not R.square:
            raise RecipeError(
                f'basis-fold: mode "block" needs a square rotation in front of every layer; layer {i} has none.'
            )
        mine = [
            n
            for n in weights.entries
            if n.startswith(f"{weights.adapter.layers}.{i}.") and not table[n].is_gain
        ]
        for name in (n for n in mine if "residual" in table[n].axes):
            edited[name] = transform_param(
                weights[name].double(), table[name].axes, {"residual": R}
            )
    return weights.edit(edited)


def _principal(activations: ActivationStore, pair: Pair, k: int) -> tuple[Tensor, float]:
    """Return the teacher's k leading principal directions `E [d_t, k]` (uncentred, unit rows, all boundaries) and their share."""
    import torch

    from rotdistill_core.forward.activations import massive_activation_mask, rms_normalise

    fit = activations.layouts["teacher"].split("fit").nonzero().flatten()
    some = fit[:: max(1, len(fit) // ROWS)]
    total = torch.zeros(pair.teacher.width, pair.teacher.width, dtype=torch.float64)
    for boundary in range(pair.teacher.depth + 1):
        X = activations.rows("teacher", boundary)[some]
        X = rms_normalise(X[~massive_activation_mask(X)])
        total += X.T @ X
    values, vectors = torch.linalg.eigh(total)
    E = vectors[:, -k:].flip(-1)
    # An eigenvector's sign is LAPACK's whim; make the largest entry positive so that the frame is one and the same everywhere.
    E = E * E.gather(0, E.abs().argmax(0, keepdim=True)).sign()
    return E, float(values[-k:].sum() / values.sum())


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [BasisFold]
