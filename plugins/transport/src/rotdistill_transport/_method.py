"""The run of a transport: open the fine-tune, find the maps, carry it over, choose the strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.lora import Factors, Lora, truncate_rank, write_lora
from rotdistill_core.checkpoint.models import is_unedited
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import TextScores, accept_if_better
from rotdistill_core.evaluation.guard import guard_of
from rotdistill_core.evaluation.kl_scorer import EditScorer
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.store.files import tensor_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import Remedy
from rotdistill_transport._carry import Carried, carry_changes
from rotdistill_transport._source import open_source
from rotdistill_transport._spaces import Target, find_spaces, random_spaces
from rotdistill_transport.step import SCORED_ROWS

if TYPE_CHECKING:
    from rotdistill_transport.step import Transport

ALL = "all layers"
AFTER_CUT = "layers after the first cut"
CHANGE = "change.safetensors"
"""File of a whole model's change, so that it is computed once."""


def carry(
    step: Transport,
    target: Target,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Weights:
    """Return the student with as much of the fine-tune as validation texts ask for.

    Processes share the teacher's pass. The leading one does all else, and alone returns the edited
    student; the others return the student as it is.

    Raises:
        RecipeError: the fine-tune, its base and the student do not fit together.
        SetupError: a model is missing or torn, or the LoRA is none that can be carried.
        RotdistillError: a weight is not finite.
    """
    weights, pair = target.weights, target.pair
    scorer = guard = None
    if step.require_improvement:
        guard = guard_of(step.guard, samples, step.use)
        scorer = EditScorer(pair, samples, guard, out, progress, ranks, limit=SCORED_ROWS)

    def carried() -> Weights:
        change, layers = _carried(step, target, out, progress)
        if scorer is None:
            return _applied(weights, change, step.strengths[0])
        parts = _parts(weights, change, layers)
        return _best(step, weights, parts, scorer, guard, out, progress)

    return ranks.lead_alone(carried, weights)


def _carried(
    step: Transport, target: Target, out: StepOutput, progress: Progress
) -> tuple[dict[str, LazyTensor], Sequence[int]]:
    """Return parameter of the student -> its change, and for each layer that of the source.

    The LoRA is committed if it is one.
    """
    weights, pair = target.weights, target.pair
    source = open_source(step, pair)
    spaces = find_spaces(source, target)
    out.notes |= {"maps from": spaces.how, "layers of the source": list(spaces.layers)}
    for kind, (score, null) in spaces.similarity.items():
        out.notes[f"similarity of matched {kind}"] = {"matched": score, "all": null}
    if step.control == "random":
        spaces = random_spaces(spaces, source.weights, weights, step.seed)
    found = carry_changes(source, weights, spaces)
    if found.left_out:
        out.notes["left out"] = dict(found.left_out)
    factors = found.changes
    if step.control == "shuffled":
        factors = {name: partial(_shuffled, f, step.seed) for name, f in factors.items()}
    if source.low_rank or step.rank:
        lora = Lora({name: each() for name, each in factors.items()})
        if step.rank:
            lora, error = truncate_rank(lora, step.rank)
            out.notes["relative error of the rank"] = error._asdict()
        own = pair.student.ref.model if is_unedited(weights, pair.student) else ""
        dtype = torch.promote_types(weights.dtype, torch.float32)
        write_lora(lora, out, found.weights, own, dtype)
        change = {name: _product(found.weights, name, f) for name, f in lora.factors.items()}
    else:
        change = _committed(found, factors, out, weights.dtype)
    for name, vector in found.vectors.items():
        change[name] = LazyTensor.from_tensor(vector())
    progress(1, 1, f"{len(change)} parameters")
    return change, spaces.layers


def _shuffled(factors: Callable[[], Factors], seed: int) -> Factors:
    B, A = factors()
    return Factors(B[torch.randperm(len(B), generator=torch.Generator().manual_seed(seed))], A)


def _product(weights: Weights, name: str, factors: Factors) -> LazyTensor:
    shape = weights.entries[name].shape
    return LazyTensor(shape, torch.float64, partial(torch.matmul, *factors))


def _committed(
    found: Carried,
    factors: Mapping[str, Callable[[], Factors]],
    out: StepOutput,
    dtype: torch.dtype,
) -> dict[str, LazyTensor]:
    """Return the changes from a file: each score of a strength reads all of them."""
    wide = torch.promote_types(dtype, torch.float32)
    name = RunLayout.weights(out.step, CHANGE)
    tensors = {
        parameter: (found.weights.entries[parameter].shape, wide, partial(_whole, each))
        for parameter, each in factors.items()
    }
    path = out.find(name) or out.write(name, tensor_blocks(tensors))
    return open_tensors(path)


def _whole(factors: Callable[[], Factors]) -> Tensor:
    B, A = factors()
    return B @ A


def _applied(weights: Weights, change: Mapping[str, LazyTensor], strength: float) -> Weights:
    """Return a view with a share of the change added, in float64, computed when read."""
    ends = (weights.adapter.head, weights.adapter.embedding)
    if any(end in change for end in ends):
        weights = weights.untie()

    def read(name: str) -> Tensor:
        return weights[name].double() + strength * change[name].read()

    return weights.edit(
        {
            name: LazyTensor(weights.entries[name].shape, torch.float64, partial(read, name))
            for name in change
        }
    )


def _parts(
    weights: Weights, change: Mapping[str, LazyTensor], layers: Sequence[int]
) -> dict[str, Mapping[str, LazyTensor]]:
    """Return what may be applied of a change: all of it, or only what comes after the first cut.

    A refit of the last layer before a cut stands for the layers that are gone. It was fitted to the
    student without the change, and may not fit what layers before it then do differently.

    Args:
        weights: the student.
        change: parameter -> its change.
        layers: for each layer of the student, the layer of the source.
    """
    parts = {ALL: change}
    cut = next((i for i, (a, b) in enumerate(pairwise(layers), 1) if b > a + 1), None)
    if cut is not None:
        table = weights.adapter
        before = (table.embedding, *(f"{table.layers}.{i}." for i in range(cut)))
        after = {name: each for name, each in change.items() if not name.startswith(before)}
        if 0 < len(after) < len(change):
            parts[AFTER_CUT] = after
    return parts


def _best(
    step: Transport,
    weights: Weights,
    parts: Mapping[str, Mapping[str, LazyTensor]],
    scorer: EditScorer,
    guard: float | None,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the student with the part, at the strength, of least validation KL, if that is a gain.

    The part is decided on at the strength that is nearest to 1.
    """
    known: list[tuple[Weights, Split, TextScores]] = []

    def score(view: Weights, split: Split) -> TextScores:
        for scored, its_split, scores in known:
            if scored is view and its_split == split:
                return scores
        # It holds the view itself: that of another one may come to lie at the same address.
        known.append((view, split, scorer(view, split)))
        return known[-1][2]

    start = _nearest_to_one(step.strengths)
    views: dict[tuple[str, float], Weights] = {}

    def kl_at(part: str, strength: float) -> float:
        views[part, strength] = view = _applied(weights, parts[part], strength)
        value = score(view, Split.VALIDATION).mean
        tries = len(step.strengths) + len(parts) - 1
        progress(len(views), tries, f"{part} x {strength:g}: KL {value:.4f}")
        return value

    by_part = {part: kl_at(part, start) for part in parts}
    part = min(by_part, key=lambda each: by_part[each])
    kl = {start: by_part[part]}
    for strength in _downhill(step.strengths, kl):
        kl[strength] = kl_at(part, strength)
    best = min(kl, key=lambda strength: kl[strength])
    if len(parts) > 1:
        out.notes |= {"applied": part, "validation KL by part": by_part}
    out.notes |= {
        "strength": best,
        "validation KL by strength": {f"{strength:g}": kl[strength] for strength in sorted(kl)},
    }
    least = min(step.strengths)
    remedies = [
        Remedy("weaker strengths", (f"strengths=[{least / 4:g}, {least / 2:g}]",)),
        Remedy("a fine-tune of a model nearer to the student, as source with its base"),
    ]
    return accept_if_better(weights, views[part, best], score, guard, out, remedies)


def _nearest_to_one(strengths: tuple[float, ...]) -> float:
    return min(strengths, key=lambda strength: abs(strength - 1))


def _downhill(strengths: tuple[float, ...], kl: Mapping[float, float]) -> Iterator[float]:
    """Yield the strengths to be scored: neighbours of that nearest to 1, as long as it falls.

    Args:
        strengths: all candidates, rising.
        kl: what has been scored, at first that nearest to 1; the caller enters each before it asks
            for the next.
    """
    at = strengths.index(_nearest_to_one(strengths))
    for direction in (1, -1):
        k = at
        while 0 <= k + direction < len(strengths):
            yield strengths[k + direction]
            if not kl[strengths[k + direction]] < kl[strengths[k]]:
                break
            k += direction
        if k != at:
            return  # it fell on this side, so it rises on the other
