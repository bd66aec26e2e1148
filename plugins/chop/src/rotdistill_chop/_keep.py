"""How much depth and how much width to cut for one share of the parameters: a few splits, each measured behind a small refit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_chop._depth import chosen
from rotdistill_chop._width import narrower, slimmer, weight_of
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.head import log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.row_weights import clip_sinks
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import ridge

STRENGTH = 0.3
"""λ of the small refit, as a multiple of the mean diagonal of its moments."""
FIT_ROWS = 2048
MULTIPLE = 8
"""Widths that a search may choose are multiples of this: kernels are slow between."""
SLACK = 1.002
"""How much above its share a split may come: a final norm shall not cost every layer some neurons."""


class Size(NamedTuple):
    """What is left of a model: numbers of layers, neurons of an MLP, key/value groups, and the width of the stream."""

    layers: int
    neurons: int
    groups: int
    width: int

    @staticmethod
    def of(weights: Weights) -> Size:
        """Return the size of a model."""
        sizes = weights.adapter.sizes(weights.config)
        return Size(
            weights.depth,
            sizes["neurons.0"],
            weights.adapter.heads(weights.config).groups,
            weights.width,
        )

    def config(self, weights: Weights) -> dict[str, Any]:
        """Return the config of a model at this size."""
        adapter, heads = weights.adapter, weights.adapter.heads(weights.config)
        query = self.groups * (heads.query // heads.groups)
        return {**weights.config, adapter.depth_key: self.layers, adapter.neurons_key: self.neurons, adapter.groups_key: self.groups,
                adapter.query_key: query, adapter.width_key: self.width, "head_dim": heads.width}  # fmt: skip

    def refused(self, weights: Weights) -> str:
        """Return why transformers would not load a model of this size, or nothing."""
        from transformers import AutoConfig

        try:
            AutoConfig.for_model(
                **{
                    key: value
                    for key, value in self.config(weights).items()
                    if key not in ("layer_types", "dtype")
                }
            )
        except Exception as error:
            return str(error.__cause__ or error).strip().rpartition("\n")[2].strip()
        return ""

    def parameters(self, weights: Weights) -> tuple[int, int]:
        """Return how many parameters a model would have at this size: in layers and norms, and in embedding and head.

        A narrower stream unties the head, which then counts beside the embedding.
        """
        adapter, config = weights.adapter, self.config(weights)
        sizes, counted = adapter.sizes(config), [0, 0]
        for name, param in adapter.expand(config).items():
            if name in weights.entries or (name == adapter.head and self.width < weights.width):
                counted["vocab" in param.axes] += math.prod(sizes[axis] for axis in param.axes)
        return counted[0], counted[1]


def splits(weights: Weights, keep: float, layers: int | None = None) -> dict[str, Size]:
    """Return ways to keep that share of the parameters outside embedding and head, by name: from width alone to depth alone.

    With `layers`, other kinds of width at that depth: groups of heads, and the stream, each with neurons to make up the rest.
    """
    whole, head = Size.of(weights), weights.adapter.heads(weights.config)
    inner, outer = whole.parameters(weights)
    budget = SLACK * keep * inner + outer
    fewest = min(whole.layers, max(2, math.ceil(keep * whole.layers - 0.05)))
    step = MULTIPLE if whole.neurons > 8 * MULTIPLE else 1

    def filled(size: Size) -> Size | None:
        fits = [
            n
            for n in range(step, whole.neurons + 1, step)
            if sum(size._replace(neurons=n).parameters(weights)) <= budget
        ]
        return size._replace(neurons=fits[-1]) if fits else None

    if layers is None:
        found = {
            f"{n} layers": filled(whole._replace(layers=n)) for n in _spaced(fewest, whole.layers)
        }
    else:
        here = whole._replace(layers=layers)
        share = (filled(here) or here).neurons / whole.neurons
        found = {}
        fewer = [g for g in range(1, whole.groups) if not here._replace(groups=g).refused(weights)]
        if fewer:
            groups = min(fewer, key=lambda g: abs(g - share * whole.groups))
            found[f"{layers} layers, {groups} groups"] = filled(here._replace(groups=groups))
        multiple = math.lcm(head.query, MULTIPLE if whole.width > 8 * MULTIPLE else 1)
        fits = [
            w
            for w in range(multiple, whole.width, multiple)
            if sum(here._replace(width=w).parameters(weights)) <= budget
        ]
        wider = min((fits[-1] if fits else 0) + multiple, whole.width - multiple)
        if multiple <= wider and not weights.adapter.gains(weights.config)[1]:
            found[f"{layers} layers, stream {wider}"] = filled(here._replace(width=wider))
    least = budget - 0.02 * inner  # where even all neurons leave less, the share is given away
    return {
        name: size
        for name, size in found.items()
        if size and sum(size.parameters(weights)) >= least
    }


def _spaced(least: int, most: int) -> list[int]:
    return sorted({round(most - (most - least) * k / 4) for k in range(5)})


class Trial:
    """Judges what was made of a student: a refit on a few fit rows against the student's own stream, then KL on validation rows."""

    def __init__(
        self,
        weights: Weights,
        samples: Samples,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        fit, judged = chosen(samples, "fit", FIT_ROWS), chosen(samples, "validation", rows)
        self.layout = PackedTexts((*fit.texts, *judged.texts), max(fit.prefix, judged.prefix))
        self.device, self.dtype = device, dtype
        self.fit, self.rows = self.layout.split("fit"), self.layout.prediction_rows("validation")[0]
        walk, self.whole = self.walk(weights), weights
        self.weights, self.goals = [weight_of(walk)], [clip_sinks(walk.states)]
        for _ in walk:
            walk.run()
            self.weights.append(weight_of(walk))
            self.goals.append(clip_sinks(walk.states))
        self.said = log_probs(weights, walk.states[self.rows])

    def walk(self, weights: Weights) -> LayerwiseForward:
        """Return a walk of the texts that stands at the start."""
        return LayerwiseForward(weights, self.layout, self.device, self.dtype)

    def kl(self, weights: Weights) -> float:
        """Return the KL of refitted `weights` on validation rows, nats per row. The refit is not kept: one on all texts comes later."""
        walk, basis, depths = self.walk(weights), weights.lineage.basis, weights.lineage.depths
        narrow = Size.of(weights)[1:] != Size.of(self.whole)[1:]
        for i in walk:
            if not narrow and depths[: i + 2] == self.whole.lineage.depths[: i + 2]:
                walk.run()
                continue
            depth = self.whole.lineage.depths.index(depths[i + 1])
            goal = (
                self.goals[depth]
                if basis is None
                else self.goals[depth] @ basis.to(self.goals[depth])
            )
            for site, template in weights.adapter.writers.items():
                name = template.replace("{i}", str(i))
                moments = self._moments(
                    walk, site, weights.entries[name].shape[1], goal, self.weights[depth]
                )
                walk.replace(
                    name,
                    weights[name].to("cpu").double()
                    + ridge(moments.xx, moments.xy, STRENGTH, f"chop: {name}").T,
                )
            walk.run()
        made = log_probs(weights, walk.states[self.rows])
        return float((self.said.exp() * (self.said - made)).sum(-1).double().mean())

    def _moments(
        self, walk: LayerwiseForward, site: str, n: int, goal: Tensor, weight: Tensor
    ) -> Moments:
        moments, seen = Moments(n, goal.shape[1]), list[Tensor]()

        def output(rows: Tensor, X: Tensor) -> None:
            A, use = seen.pop(), self.fit[rows]
            moments.add(A[use], goal[rows].to(X)[use] - X[use], weight[rows][use])

        walk.run({site: lambda _, A: seen.append(A), "output": output}, keep=False)
        return moments


def cut(
    weights: Weights,
    keep: list[int],
    size: Size,
    walk: Callable[[Weights], LayerwiseForward],
    progress: Progress,
) -> Weights:
    """Return what is left of a model: first the layers `keep`, then the stream, then heads and neurons, on the rows of `walk`."""
    made = weights.cut(keep)
    whole = Size.of(weights)
    if size.width < whole.width:
        made = narrower(made, lambda: walk(made), size.width, progress)
    if (size.neurons, size.groups) != (whole.neurons, whole.groups):
        made = slimmer(made, walk(made), size.neurons, size.groups, progress)
    return made


def best_split(
    weights: Weights,
    keep: float,
    trial: Trial,
    layers: Callable[[int], list[int]],
    notes: dict[str, str],
    progress: Progress,
) -> tuple[Size, list[int]]:
    """Return the split of least KL, and the layers that stay: depth against neurons first, then other widths at the best depth.

    Raises:
        RecipeError: nothing so small can be made.
    """
    tried: list[tuple[float, Size, list[int]]] = []

    def measure(found: dict[str, Size]) -> None:
        for name, size in found.items():
            kept = layers(size.layers)
            kl = trial.kl(cut(weights, kept, size, trial.walk, lambda *_: None))
            tried.append((kl, size, kept))
            notes[name] = (
                f"{size.neurons} neurons, {size.groups} groups, stream {size.width}: KL {kl:.4f}"
            )
            progress(len(tried), 7, f"{name}: KL {kl:.4f}")

    measure(splits(weights, keep))
    if not tried:
        raise RecipeError(
            f"chop: keep = {keep:g} leaves less than two layers of {MULTIPLE} neurons; raise it."
        )
    measure(splits(weights, keep, min(tried)[1].layers))
    _, size, kept = min(tried)
    return size, kept
