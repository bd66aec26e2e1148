"""Which head and which neuron of one model is which of another: linear assignment on weights or on activations.

Problem: `max_P sum_j score[P(j), j]` over one-to-one assignments (Kuhn, Naval Research Logistics 2, 1955; Ainsworth et al., Git
Re-Basin, arXiv:2209.04836). Heads in two levels: query heads inside each pair of groups first, then groups on those totals, since
the query heads of a key/value head can only move together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.assignment import (
    HeadScores,
    assign,
    layer_rows,
    match,
    stream_map,
    teacher_layers,
    unit_rows,
    weight_scores,
)
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.planning.cost import Cost, CostContext, assignment_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
    from rotdistill_core.linalg.maps import Map, Maps
    from rotdistill_core.store.output import StepOutput


@step
class HungarianPermute:
    """Match the student's heads and SwiGLU neurons with those of the teacher's layer at the same depth.

    Between layers of one shape the maps are permutations that `basis-fold` folds exactly. Between different shapes they are
    assignments for blending. The cards say how much a permutation gains over the identity and over a random one.
    """

    use: Literal["hungarian-permute"] = "hungarian-permute"
    criterion: Literal["weights", "activations"] = "weights"
    """`"weights"`: QK and OV circuits; gate, up and down; wants a map of the stream before it. `"activations"`: attention maps;
    correlation of what `down_proj` reads."""
    within_stage: PositiveInt = 1
    """A layer may be matched with any teacher layer of its stage of this many layers, one to one (1: the one at its depth)."""
    texts: PositiveInt = 32
    """How many fit texts the activations are taken from."""

    def cost(self, context: CostContext) -> Cost:
        """Two layers at a time, and the similarities of their heads and neurons."""
        return assignment_cost(context)

    @hookimpl
    def align(
        self,
        weights: Weights,
        maps: Maps,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """See `Specs.align`."""
        import torch

        partner = teacher_layers(weights, pair)
        s, t = (
            weights.adapter.heads(weights.config),
            pair.teacher.adapter.heads(pair.teacher.config),
        )
        pictures: dict[tuple[int, int], Tensor] = {}
        compare = (
            by_weights(weights, pair, maps)
            if self.criterion == "weights"
            else self._by_activations(weights, pair, samples, pictures)
        )
        found: dict[str, Map] = {}
        diagnostics: dict[int, dict[str, Any]] = {}
        for start in range(0, weights.depth, self.within_stage):
            stage = range(start, min(start + self.within_stage, weights.depth))
            tried = {(i, j): match(compare(i, partner[j]), s, t) for i in stage for j in stage}
            taken = assign(
                torch.tensor([[tried[i, j].score for j in stage] for i in stage])
            ).tolist()
            for j, i in zip(stage, (start + k for k in taken), strict=True):
                found |= tried[i, j].maps(i, s.width if s.width == t.width else None)
                diagnostics[i] = {"reference": partner[j], **tried[i, j].about}
            progress(stage.stop, weights.depth, self.criterion)
        for i in sorted({0, weights.depth // 2, weights.depth - 1}) if pictures else ():
            both = {"student": pictures[0, i], "teacher": pictures[1, diagnostics[i]["reference"]]}
            path = out.tensors(f"attention/layer_{i}.safetensors", both)
            diagnostics[i]["attention"] = path.relative_to(out.store.root).as_posix()
        for part in ("heads", "neurons"):
            figures = [card[part] for card in diagnostics.values()]
            out.notes[part] = {
                "layers that change": sum(not f["identity"] for f in figures), "of": len(figures),
                **{k: sum(f[k] for f in figures) / len(figures) for k in figures[0] if k.endswith("score")},
            }  # fmt: skip
        typed = {i: LayerDiagnostics.from_dict(card) for i, card in diagnostics.items()}
        return maps.add(found, typed)

    def _by_activations(
        self,
        weights: Weights,
        pair: Pair,
        samples: Samples,
        pictures: dict[tuple[int, int], Tensor],
    ) -> Callable[[int, int], HeadScores]:
        """Return the comparison by activations; it leaves the attention maps of one text in `pictures[side, layer]`."""
        from rotdistill_core.evaluation.divergence import shared_vocabulary
        from rotdistill_core.forward.activations import massive_activation_mask

        shared_vocabulary(pair)  # attention maps are compared token by token
        layout = samples.layout.select("fit", most=self.texts)
        models = ((weights, pair.student), (pair.teacher.weights, pair.teacher))
        walks = [enumerate(_watched(view, model, layout)) for view, model in models]
        seen: list[dict[int, HeadScores]] = [{}, {}]

        def at(side: int, layer: int) -> HeadScores:
            while layer not in seen[side]:
                number, (rows, pictures[side, number]) = next(walks[side])
                seen[side][number] = rows
                seen[side].pop(
                    number - self.within_stage * (1 + models[side][0].depth // weights.depth), None
                )
            return seen[side][layer]

        def compare(i: int, j: int) -> HeadScores:
            (A, X), (B, Y) = at(0, i), at(1, j)
            use = ~massive_activation_mask(X) & ~massive_activation_mask(Y)
            use[0] = False
            X, Y = (unit_rows((Z[use] - Z[use].mean(0)).T) for Z in (X, Y))
            # A gauge may flip a neuron's sign, so only the size of the correlation counts.
            return unit_rows(A) @ unit_rows(B).T, (X @ Y.T).abs_()

        return compare


def _watched(
    weights: Weights, model: Model, layout: PackedTexts
) -> Iterator[tuple[HeadScores, Tensor]]:
    """Yield for each layer its attention maps `[H, pairs]`, without those onto position 0, and its neurons `[rows, f]`; and the maps
    among the own tokens of the shortest text, `[H, tokens, tokens]`, to be looked at.
    """
    from dataclasses import replace

    from rotdistill_core.forward.layerwise import LayerwiseForward

    # Only this attention returns its maps. One text at a time, so that nothing is padded.
    plain = replace(weights, config={**weights.config, "attn_implementation": "eager"})
    walk = LayerwiseForward(plain, layout, model.device, model.dtype, budget=1)
    for _ in walk:
        yield _layer_seen(walk, weights.adapter.sites["heads"].module.rpartition(".")[0])


def _layer_seen(walk: LayerwiseForward, attention: str) -> tuple[HeadScores, Tensor]:
    import torch

    maps: list[Tensor] = []
    neurons: list[Tensor] = []
    hook = walk.layer.get_submodule(attention).register_forward_hook(
        lambda _, __, made: maps.append(made[1][0].float().cpu())
    )
    walk.run({"neurons": lambda _, X: neurons.append(X.float().cpu())})
    hook.remove()
    last = maps[-1]  # texts go from long to short
    return (torch.cat([each[:, :, 1:].flatten(1) for each in maps], 1), torch.cat(neurons)), last[
        :, :, -last.shape[1] :
    ].clone()


def by_weights(weights: Weights, pair: Pair, maps: Maps) -> Callable[[int, int], HeadScores]:
    """Return the comparison of student layer i with teacher layer j by their weights, in the teacher's basis."""

    def compare(i: int, j: int) -> HeadScores:
        S = layer_rows(weights, i, {"residual": stream_map(weights, pair, maps, i)})
        T = layer_rows(pair.teacher.weights, j, {})
        return weight_scores(
            S,
            T,
            weights.adapter.heads(weights.config),
            pair.teacher.adapter.heads(pair.teacher.config),
        )

    return compare


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [HungarianPermute]
