"""Cut the student: layers, neurons, groups of heads, the stream."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.cost import FLOAT64_BYTES, Cost, CostContext, forward_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


@step
class Chop:
    """Keep some of the student's layers, neurons, key/value groups or stream: any of them together, or a share of all by `keep`.

    Layers go first. Given a number, `choose = "angle"` cuts the run whose input and output differ least in angle on the samples
    (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887); `"kl"` cuts what costs least KL to
    the uncut student, its own logits. Then the stream is cut in its principal basis (as Ashkboos et al., arXiv:2401.15024, do) and its
    readers are refitted, and heads and neurons are cut by what their removal costs once their writer is refitted, in the same pass.

    `keep` is the share that stays of all parameters but those of embedding and head; a head that a narrower stream unties has to be
    paid for. How it is shared between depth and width is decided by the KL of a few splits behind a small refit; they are in the notes.
    """

    use: Literal["chop"] = "chop"
    layers: (
        PositiveInt | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    ) = None
    """How many layers stay, or a list of which (numbered from 0, rising)."""
    choose: Literal["angle", "kl"] = "angle"
    """`"angle"`: the run of layers goes whose input and output differ least in angle. `"kl"`: the layers go that cost least KL to the
    uncut student. The first and the last layer stay."""
    neurons: PositiveInt | None = None
    """How many neurons stay in each MLP."""
    groups: PositiveInt | None = None
    """How many key/value groups stay in each attention, with their query heads."""
    width: PositiveInt | None = None
    """How wide the residual stream stays; the head is untied."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of these: which share of the parameters stays, embedding and head apart. Depth and width are shared out by validation KL."""
    texts: PositiveInt = 24
    """On how many fit texts the angles are measured."""
    fitted: PositiveInt = 16384
    """On how many rows of fit texts neurons, groups and stream are chosen and refitted."""
    rows: PositiveInt = 768
    """On how many rows of validation texts KL is measured, the teacher's own answers first."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a step that says nothing, or two things."""
        asked = self._asked()
        if self.keep is not None and asked:
            raise ValueError(
                f"keep decides how much goes of everything; leave out {', '.join(asked)}"
            )
        if self.keep is None and not asked:
            raise ValueError(
                "say what stays: layers, neurons, groups, width, or keep for a share of all"
            )

    def _asked(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("layers", "neurons", "groups", "width")
            if getattr(self, name) is not None
        }

    def cost(self, context: CostContext) -> Cost:
        """Passes through the student on some texts: one to choose layers, more where width is cut and refitted."""
        student, texts, number = context.student, context.texts, context.student_bytes
        rows = min(texts.rows_of("fit", limit=self.texts), self.fitted)
        walk = forward_cost(student, rows, number)
        if not (self.keep or self.neurons or self.groups or self.width):
            return replace(walk, host_bytes=2 * walk.host_bytes)
        fit_rows = min(texts.rows_of("fit"), self.fitted)
        refit = fit_rows * student.width * number * 3 + 8 * student.neurons**2 * FLOAT64_BYTES
        return replace(
            walk,
            host_bytes=2 * walk.host_bytes + refit,
            disk_bytes=student.parameters() * number,
            operations=walk.operations * 20,
        )

    def context_after(self, context: CostContext) -> CostContext:
        """The student with fewer layers, neurons, key/value groups or channels.

        Raises:
            RecipeError: a cut asks for more than there is.
        """
        adapter, config = context.student.adapter, context.student.config
        layers = len(self.layers) if isinstance(self.layers, list) else self.layers
        asked = {
            "layers": (adapter.depth_key, layers),
            "neurons": (adapter.neurons_key, self.neurons),
            "groups": (adapter.groups_key, self.groups),
            "width": (adapter.width_key, self.width),
        }
        changes: dict[str, int | bool] = {}
        for option, (key, left) in asked.items():
            if left is None:
                continue
            if left > config.get(key, left):
                raise RecipeError(f"{option} = {left}, but the student has {config[key]}.")
            changes[key] = left
        if self.groups:
            heads = adapter.heads(config)
            changes[adapter.query_key] = self.groups * (heads.query // heads.groups)
            changes["head_dim"] = heads.width
        if self.width:
            changes["tie_word_embeddings"] = False
        return context.with_student(self.keep or 1.0, **changes)

    @hookimpl
    def fold(
        self, weights: Weights, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_chop._depth import chosen
        from rotdistill_chop._keep import Size, Trial, best_split, cut
        from rotdistill_core.forward.layerwise import LayerwiseForward

        self._check(weights)
        device, dtype = pair.student.device, pair.student.dtype
        whole, old = (
            replace(weights, lineage=replace(weights.lineage, basis=None)),
            weights.lineage.basis,
        )
        known: dict[int, list[int]] = {}
        pick = cache(lambda count: self._pick(whole, count, known, pair, samples, out, progress))
        if self.keep is not None:
            tried = out.notes.setdefault("splits", {})
            size, kept = best_split(
                whole,
                self.keep,
                Trial(whole, samples, self.rows, device, dtype),
                pick,
                tried,
                progress,
            )
        else:
            kept = (
                self.layers if isinstance(self.layers, list) else pick(self.layers or whole.depth)
            )
            full = Size.of(whole)
            size = Size(
                len(kept),
                self.neurons or full.neurons,
                self.groups or full.groups,
                self.width or full.width,
            )
        layout = chosen(samples, "fit", self.fitted)
        made = cut(
            whole,
            kept,
            size,
            lambda short: LayerwiseForward(short, layout, device, dtype),
            progress,
        )
        out.notes |= {
            "layers kept": kept,
            **dict(zip(("neurons", "groups", "width"), size[1:], strict=True)),
        }
        inner, all_inner = size.parameters(whole)[0], Size.of(whole).parameters(whole)[0]
        out.notes["parameters kept, embedding and head apart"] = inner / all_inner
        new = made.lineage.basis
        # Between two models the cut student is what is captured and aligned, so that its stream is its own basis.
        basis = old if new is None else (new if old is None else old @ new) if pair.same else None
        return replace(made, lineage=replace(made.lineage, basis=basis))

    def _check(self, weights: Weights) -> None:
        """Refuse what cannot be cut so, before any weight is read."""
        from rotdistill_chop._keep import Size
        from rotdistill_core.errors import RecipeError

        full, asked = Size.of(weights), self._asked()
        if isinstance(self.layers, list):
            if sorted(set(self.layers)) != self.layers or self.layers[-1] >= full.layers:
                raise RecipeError(
                    f"chop: layers must rise and stay below {full.layers}, the student's depth."
                )
            del asked["layers"]
        for name, value in asked.items():
            if value > getattr(full, name):
                raise RecipeError(
                    f"chop: {name} = {value}, but the student has {getattr(full, name)}."
                )
        if why := full._replace(**asked).refused(weights):
            raise RecipeError(
                f"chop: transformers refuses {', '.join(f'{k} = {v}' for k, v in asked.items())}: {why}"
            )

    def _pick(
        self,
        weights: Weights,
        count: int,
        known: dict[int, list[int]],
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> list[int]:
        """Return which layers stay, `count` of them; `known` keeps what one search finds for all smaller cuts too."""
        from rotdistill_chop._depth import PruningLoss, least_angle, least_kl
        from rotdistill_core.forward.layerwise import LayerwiseForward

        depth, drop = weights.depth, weights.depth - count
        if drop == 0 or count < 2:
            return list(range(count))
        if self.choose == "kl":
            if drop not in known:
                judge = PruningLoss(
                    weights, samples, self.rows, pair.student.device, pair.student.dtype
                )
                found = least_kl(judge, drop, progress)
                known |= {
                    r: [i for i in range(depth) if i not in gone] for r, (gone, _) in found.items()
                }
                out.notes["KL by number of layers cut"] = {
                    str(r): kl for r, (_, kl) in found.items()
                }
            return known[drop]
        walk = LayerwiseForward(
            weights,
            samples.layout.select("fit", most=self.texts),
            pair.student.device,
            pair.student.dtype,
        )
        angles = least_angle(walk, drop, progress)
        out.notes["angle over the cut, by first layer"] = angles
        cut = min(range(1, depth - drop), key=angles.__getitem__, default=1)
        return [*range(cut), *range(cut + drop, depth)]


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Chop]
