"""The step `chop`: its options, its cost and the student's shape after it.

The mathematics is in `_method` and the modules that it imports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_chop._cost import chop_cost, fewest_layers
from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.cost import Cost, CostContext

if TYPE_CHECKING:
    from rotdistill_core import Adapter, Pair, Progress, Samples, StepOutput, Weights
    from rotdistill_core.planning.shape import ModelShape

LayerIndices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


@step
class Chop:
    """Keep some of the student's layers, neurons, key/value heads or stream channels.

    Options may be combined, or `keep_fraction` gives the share of all parameters. Layers are cut
    first. Given a number of layers, `criterion = "angle"` cuts the run whose input and output
    differ least in angle (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers,
    arXiv:2403.17887). `"kl"` cuts the layers that cost least KL to the uncut student. Then the
    stream is cut in its principal basis (Ashkboos et al., SliceGPT, arXiv:2401.15024), and its
    readers are refitted. Last come the heads and neurons that cost least once their writer is
    refitted.

    `keep_fraction` counts all parameters but those of embedding and head. A narrower stream unties
    the head, and the untied head counts. Several splits between depth and width are tried; the KL
    after a small refit decides, and the notes list all of them.
    """

    use: Literal["chop"] = "chop"
    layers: PositiveInt | LayerIndices | None = None
    """Number of layers to keep, or the list of them (numbered from 0, rising)."""
    criterion: Literal["angle", "kl"] = "angle"
    """Which layers to cut when `layers` is a number. `"angle"`: the run whose input and output
    differ least in angle. `"kl"`: the layers that cost least KL to the uncut student. The first and
    the last layer are always kept."""
    neurons: PositiveInt | None = None
    """Number of neurons to keep in each MLP."""
    kv_heads: PositiveInt | None = None
    """Number of key/value heads to keep in each attention, with their query heads."""
    width: PositiveInt | None = None
    """Width of the residual stream to keep; the head is untied."""
    keep_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the parameters to keep, embedding and head apart. Excludes the options above;
    validation KL decides between depth and width."""
    max_angle_texts: PositiveInt = 24
    """Largest number of fit texts on which angles are measured."""
    max_fit_rows: PositiveInt = 16384
    """Largest number of rows of fit texts for choosing and refitting neurons, heads and stream."""
    max_kl_rows: PositiveInt = 768
    """Largest number of rows of validation texts on which KL is measured. Texts that the teacher
    answered come first."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a step without a size, or with two."""
        sizes = self.requested_sizes()
        if self.keep_fraction is not None and sizes:
            raise ValueError(
                f"keep_fraction decides on the size of everything; leave out {', '.join(sizes)}"
            )
        if self.keep_fraction is None and not sizes:
            raise ValueError(
                "say what stays: layers, neurons, kv_heads, width, or keep_fraction for a share "
                "of all"
            )

    def requested_sizes(self) -> dict[str, int]:
        """Return the size options that are set; a list of layers counts by its length."""
        layers = len(self.layers) if isinstance(self.layers, list) else self.layers
        sizes = {
            "layers": layers,
            "neurons": self.neurons,
            "kv_heads": self.kv_heads,
            "width": self.width,
        }
        return {name: size for name, size in sizes.items() if size is not None}

    def check_models(self, pair: Pair) -> None:
        """Raise what a narrower stream would end with, of a model that cannot be rotated.

        Raises:
            RecipeError: see `Adapter.require_rotations`.
        """
        if self.width:
            pair.student.adapter.require_rotations(pair.student.config)

    def cost(self, context: CostContext) -> Cost:
        """The search for layers, the trials of `keep_fraction`, and the cut with its refits."""
        return chop_cost(self, context)

    def edits_weights(self) -> bool:
        """Whether weights change; a cut of layers alone keeps the others as they are."""
        return bool(self.keep_fraction or self.neurons or self.kv_heads or self.width)

    def context_after(self, context: CostContext) -> CostContext:
        """The student with fewer layers, neurons, key/value heads or channels.

        Raises:
            RecipeError: an option asks for more than the student has.
        """
        config = context.student.config
        keys = _config_keys(context.student.adapter)
        for option, size in self.requested_sizes().items():
            key = keys[option]
            if size > config.get(key, size):
                raise RecipeError(
                    f"{option} = {size}, but the student has {config[key]}. Ask for that or less."
                )
        cuts = context.cuts + self.places_cut(context.student.depth)
        if self.edits_weights():
            context = context.with_edited_weights()
        return replace(context, student=self.shape_after(context.student), cuts=cuts)

    def shape_after(self, student: ModelShape) -> ModelShape:
        """Return the shape of the cut student; sizes are taken as they are asked for."""
        adapter, config = student.adapter, student.config
        keys = _config_keys(adapter)
        changes: dict[str, int | bool] = {}
        for option, size in self.requested_sizes().items():
            changes[keys[option]] = size
        if self.kv_heads:
            heads = adapter.heads(config)
            changes[adapter.query_key] = self.kv_heads * (heads.query // heads.groups)
            changes["head_dim"] = heads.width
        if self.width:
            changes["tie_word_embeddings"] = False
        return student.changed(self.keep_fraction or 1.0, **changes)

    def places_cut(self, depth: int) -> int:
        """Return at how many places layers go, at most: one by angle, any of them by KL."""
        if isinstance(self.layers, list):
            after = [*self.layers[1:], depth]
            return sum(b != a + 1 for a, b in zip(self.layers, after, strict=True))
        max_cut = depth - self.layers if self.layers else 0
        if self.keep_fraction is not None:
            max_cut = depth - fewest_layers(self.keep_fraction, depth)
        # A kept layer is before and after each place; keep_fraction may cut fewer than it may.
        most_places = depth - max_cut - 1 if self.layers else (depth - 1) // 2
        return min(max_cut, 1 if self.criterion == "angle" else max(most_places, 1))

    @hookimpl
    def fold(
        self, weights: Weights, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> Weights:
        """See `HookSpecs.fold`."""
        from rotdistill_chop._method import solve

        return solve(self, weights, pair, samples, out, progress)


def _config_keys(adapter: Adapter) -> dict[str, str]:
    """Return for each size option the key of a config that has this size."""
    return {
        "layers": adapter.depth_key,
        "neurons": adapter.neurons_key,
        "kv_heads": adapter.groups_key,
        "width": adapter.width_key,
    }


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Chop]
