"""The run of a transport: open the fine-tune, find the maps, carry it over, choose the strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.lora import Factors, Lora, truncate_rank, write_lora
from rotdistill_core.checkpoint.models import is_unedited
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import TextScores, accept_if_better, require_guard_texts
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.store.files import tensor_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_transport._carry import Carried, carry_changes
from rotdistill_transport._source import open_source
from rotdistill_transport._spaces import Target, find_spaces, random_spaces
from rotdistill_transport.step import SCORED_ROWS

if TYPE_CHECKING:
    from rotdistill_transport.step import Transport

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
    scorers: dict[str, KLScorer] = {}
    if step.require_improvement:
        if step.guard:
            require_guard_texts("transport", samples)
        splits = [Split.VALIDATION, *([Split.GUARD_VALIDATION] if step.guard else [])]
        for split in splits:
            scorers[split] = KLScorer(pair, samples, split, out, progress, ranks, limit=SCORED_ROWS)

    def carried() -> Weights:
        change = _carried(step, target, out, progress)
        if not step.require_improvement:
            return _applied(weights, change, step.strengths[0])
        return _best(step, weights, change, scorers, out, progress)

    return ranks.lead_alone(carried, weights)


def _carried(
    step: Transport, target: Target, out: StepOutput, progress: Progress
) -> dict[str, LazyTensor]:
    """Return parameter of the student -> its change, and commit the LoRA if it is one."""
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
    return change


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


def _best(
    step: Transport,
    weights: Weights,
    change: Mapping[str, LazyTensor],
    scorers: Mapping[str, KLScorer],
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the student at the strength of least validation KL, if that is a gain."""
    known: dict[tuple[int, str], TextScores] = {}

    def score(view: Weights, split: str) -> TextScores:
        if (id(view), split) not in known:
            known[id(view), split] = scorers[split](view)
        return known[id(view), split]

    views = {strength: _applied(weights, change, strength) for strength in step.strengths}
    kl: dict[float, float] = {}
    for strength in _downhill(step.strengths, kl):
        kl[strength] = score(views[strength], Split.VALIDATION).mean
        progress(len(kl), len(step.strengths), f"strength {strength:g}: KL {kl[strength]:.4f}")
    best = min(kl, key=lambda strength: kl[strength])
    out.notes |= {
        "strength": best,
        "validation KL by strength": {f"{strength:g}": kl[strength] for strength in sorted(kl)},
    }
    least = min(step.strengths)
    remedies = [
        f"weaker strengths (strengths = [{least / 4:g}, {least / 2:g}])",
        "a fine-tune of a model nearer to the student (source, base)",
    ]
    return accept_if_better(weights, views[best], score, step.guard, out, remedies)


def _downhill(strengths: tuple[float, ...], kl: Mapping[float, float]) -> Iterator[float]:
    """Yield the strengths to be scored: that nearest to 1, then its neighbours as long as it falls.

    Args:
        strengths: all candidates, rising.
        kl: what has been scored so far; the caller enters each before it asks for the next.
    """
    at = min(range(len(strengths)), key=lambda k: abs(strengths[k] - 1))
    yield strengths[at]
    for direction in (1, -1):
        k = at
        while 0 <= k + direction < len(strengths):
            yield strengths[k + direction]
            if not kl[strengths[k + direction]] < kl[strengths[k]]:
                break
            k += direction
        if k != at:
            return  # it fell on this side, so it rises on the other
