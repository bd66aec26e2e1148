"""How to share a cut between depth and width: a few splits, each scored after a small refit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rotdistill_chop._cost import FIT_ROWS, MAX_TRIALS, fewest_layers
from rotdistill_chop._cut import cut_to_size
from rotdistill_chop._rows import mean_kl, regression_weights, select_texts
from rotdistill_chop._size import Size
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.head import log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.row_weights import clip_sinks
from rotdistill_core.forward.writer_moments import writer_moments
from rotdistill_core.linalg.solvers import ridge

RIDGE = 0.3
"""λ of the small refit, as a multiple of the mean diagonal of its moments."""
MULTIPLE = 8
"""Neurons and stream stay multiples of this: kernels are slow at other widths."""
TOLERANCE = 1.002
"""How far a split may exceed its share, as a factor.

Without it the parameters of a final norm would cost every layer some neurons.
"""


class Budget:
    """How many parameters may stay of a model."""

    def __init__(self, weights: Weights, keep_fraction: float) -> None:
        self.weights = weights
        self.whole = Size.of(weights)
        inner, vocabulary = self.whole.parameters(weights)
        self.most = TOLERANCE * keep_fraction * inner + vocabulary
        # Where even all neurons leave less than this, a split gives away too much.
        self.least = self.most - 0.02 * inner
        self.neuron_step = MULTIPLE if self.whole.neurons > 8 * MULTIPLE else 1

    def allows(self, size: Size) -> bool:
        """Whether a size stays within the budget."""
        return size.parameters(self.weights).total <= self.most

    def fill(self, size: Size) -> Size | None:
        """Return a size with as many neurons as the budget allows, or None if it allows none."""
        choices = range(self.neuron_step, self.whole.neurons + 1, self.neuron_step)
        allowed = [n for n in choices if self.allows(size._replace(neurons=n))]
        return size._replace(neurons=allowed[-1]) if allowed else None

    def fill_all(self, sizes: list[Size]) -> list[Size]:
        """Return the filled sizes that use up the budget."""
        filled = [self.fill(size) for size in sizes]
        return [
            size
            for size in filled
            if size is not None and size.parameters(self.weights).total >= self.least
        ]


def depth_splits(weights: Weights, keep_fraction: float) -> list[Size]:
    """Return up to five splits between depth and neurons, from depth alone to neurons alone."""
    budget = Budget(weights, keep_fraction)
    whole = budget.whole
    fewest = fewest_layers(keep_fraction, whole.layers)
    span = whole.layers - fewest
    depths = sorted({round(whole.layers - span * k / 4) for k in range(5)})
    return budget.fill_all([whole._replace(layers=layers) for layers in depths])


def width_splits(weights: Weights, keep_fraction: float, layers: int) -> list[Size]:
    """Return other kinds of width at a depth: fewer key/value heads, and a narrower stream.

    Each has as many neurons as the budget leaves.
    """
    budget = Budget(weights, keep_fraction)
    whole = budget.whole._replace(layers=layers)
    sizes = []

    # The share of key/value heads closest to the share of neurons that stays at this depth.
    share = (budget.fill(whole) or whole).neurons / whole.neurons
    kv_heads = [
        n for n in range(1, whole.kv_heads) if not whole._replace(kv_heads=n).rejection(weights)
    ]
    if kv_heads:
        closest = min(kv_heads, key=lambda n: abs(n - share * whole.kv_heads))
        sizes.append(whole._replace(kv_heads=closest))

    # One step above the widest stream that needs no fewer neurons. Norms after attention or MLP
    # rule a narrower stream out.
    queries = weights.adapter.heads(weights.config).query
    multiple = math.lcm(queries, MULTIPLE if whole.width > 8 * MULTIPLE else 1)
    widths = [
        width
        for width in range(multiple, whole.width, multiple)
        if budget.allows(whole._replace(width=width))
    ]
    width = min((widths[-1] if widths else 0) + multiple, whole.width - multiple)
    rotates = not weights.adapter.gains(weights.config)[1]
    if multiple <= width and rotates:
        sizes.append(whole._replace(width=width))
    return budget.fill_all(sizes)


class Trial:
    """Scores a cut student: a refit on a few rows towards the uncut student, then its KL to it."""

    def __init__(
        self,
        weights: Weights,
        samples: Samples,
        *,
        max_kl_rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        fit = select_texts(samples, Split.FIT, FIT_ROWS)
        validation = select_texts(samples, Split.VALIDATION, max_kl_rows)
        texts = (*fit.texts, *validation.texts)
        self.whole = weights
        self.layout = PackedTexts(texts, max(fit.prefix, validation.prefix))
        self.device = device
        self.dtype = dtype
        self.fit = self.layout.split(Split.FIT)
        self.rows = self.layout.prediction_rows(Split.VALIDATION)[0]
        forward = self.forward_of(weights)
        self.targets = [clip_sinks(forward.states)]
        """The uncut student's stream at each boundary `[rows, d]`."""
        self.weights = [regression_weights(forward)]
        """Weight of each row at each boundary [rows]."""
        for _ in forward:
            forward.run()
            self.weights.append(regression_weights(forward))
            self.targets.append(clip_sinks(forward.states))
        self.reference = log_probs(weights, forward.states_of(self.rows))
        """Log-probabilities of the uncut student on the scored rows `[n, V]`."""

    def forward_of(self, weights: Weights) -> LayerwiseForward:
        """Return a forward pass of a model over the texts of the trial, at boundary 0."""
        return LayerwiseForward(weights, self.layout, self.device, self.dtype)

    def kl(self, weights: Weights) -> float:
        """Return the KL of a cut student on validation rows after a refit, nats per row.

        The refit is thrown away: a refit on all texts comes later.
        """
        forward = self.forward_of(weights)
        depths, whole_depths = weights.lineage.depths, self.whole.lineage.depths
        narrow = Size.of(weights)[1:] != Size.of(self.whole)[1:]
        for i in forward:
            unchanged = not narrow and depths[: i + 2] == whole_depths[: i + 2]
            if not unchanged:
                self._refit(forward, whole_depths.index(depths[i + 1]))
            forward.run()
        return mean_kl(self.reference, log_probs(weights, forward.states_of(self.rows)))

    def _refit(self, forward: LayerwiseForward, boundary: int) -> None:
        """Refit the writers of the open layer towards the uncut student's stream at a boundary."""
        weights = forward.weights
        targets = self.targets[boundary]
        if weights.lineage.basis is not None:
            targets = targets @ weights.lineage.basis.to(targets)
        # Where the states are on the device, targets go there too, once.
        targets = targets.to(forward.states.device)
        for site, template in weights.adapter.writers.items():
            name = template.replace("{i}", str(forward.boundary))
            (moments,) = writer_moments(
                forward,
                site=site,
                width=weights.entries[name].shape[1],
                targets=lambda rows: targets[rows.to(targets.device)],
                weights=self.weights[boundary],
                row_sets=[self.fit],
            )
            delta = ridge(moments.xx, moments.xy, RIDGE, f"chop: {name}", self.device)
            forward.replace(name, weights[name].to("cpu").double() + delta.T)


class ScoredSplit(NamedTuple):
    """A split and its KL. Tuples compare by KL first."""

    kl: float
    size: Size
    layers: list[int]
    """Which layers stay."""


def best_split(
    weights: Weights,
    keep_fraction: float,
    trial: Trial,
    layers_of: Callable[[int], list[int]],
    notes: dict[str, Any],
    progress: Progress,
) -> ScoredSplit:
    """Return the split of least KL.

    Depth against neurons is tried first, then other kinds of width at the best depth.

    Args:
        weights: the uncut student.
        keep_fraction: share of the parameters to keep, embedding and head apart.
        trial: scores cut students.
        layers_of: number of layers -> which of them to keep.
        notes: the KL of each split is entered here.
        progress: called after each split.

    Raises:
        RecipeError: no split is that small.
    """
    scored: list[ScoredSplit] = []

    def score(sizes: list[Size]) -> None:
        for size in sizes:
            layers = layers_of(size.layers)
            cut = cut_to_size(weights, layers, size, trial.forward_of, lambda *_: None)
            kl = trial.kl(cut)
            scored.append(ScoredSplit(kl, size, layers))
            notes[size.describe()] = kl
            progress(len(scored), MAX_TRIALS, f"{size.describe()}: KL {kl:.4f}")

    score(depth_splits(weights, keep_fraction))
    if not scored:
        raise RecipeError(
            f"chop: keep_fraction = {keep_fraction:g} leaves less than two layers of {MULTIPLE} "
            "neurons; raise it."
        )
    score(width_splits(weights, keep_fraction, min(scored).size.layers))
    return min(scored)
