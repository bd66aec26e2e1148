"""Refit what writes into the student's stream so that the stream follows the teacher's.

With activations `A [T, f]` in front of a writer, stream behind the layer `X [T, d]` and target `S [T, d]` (the teacher's state at the
matched depth, in the student's basis), rows weighted by `w`: `W ← W + a Δᵀ`, `Δ = (Aᵀ w A + λI)⁻¹ Aᵀ w (S - X) [f, d]`, layer by layer,
each on the activations of the student as refitted so far. Step a and ridge λ are chosen on validation rows, and a = 0 is always possible.
With the MLP's output in place of A this is the map of Shopkhoev et al., ReplaceMe, arXiv:2505.02819.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    Cost,
    CostContext,
    answer_rows,
    forward_cost,
    logits_memory,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.evaluation.acceptance import TextScores
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.linalg.moments import Moments
    from rotdistill_core.store.output import StepOutput


Positive = Annotated[float, Field(gt=0)]


class _LayerFit(NamedTuple):
    """The open layer: what it leads to in the teacher, how much each row counts, and which rows are fitted."""

    walk: LayerwiseForward
    goal: Tensor
    counts: Tensor
    fit: Tensor


@step
class WriterRefit:
    """Refit writers in closed form against the teacher's stream, layer by layer.

    The step is dropped when validation KL does not fall beyond chance. Models of different bases need an aligner before it.
    """

    use: Literal["writer-refit"] = "writer-refit"
    features: Literal["activations", "output"] = "activations"
    """Regress on MLP `"activations"` (f x d unknowns per layer) or on the MLP's `"output"` (d x d, the published form)."""
    writers: Annotated[tuple[Literal["heads", "neurons"], ...], Field(min_length=1)] = ("neurons",)
    """Which writers of a layer, in this order: `heads` is o_proj, `neurons` is down_proj (the one for `output` features)."""
    rows: Literal["rms", "plain", "distinct"] = "rms"
    """`"rms"`: weight rows by 1/RMS² of their target, those of the shared prompt up, and shorten sinks. `"plain"`: count every token of
    every text alike, the shared prompt as often as it is there. `"distinct"`: the same, the shared prompt once."""
    prompt: Annotated[float, Field(ge=0)] = 30.0
    """Weight of a row of the shared prompt, which is stored once and attended to by every text. Only with `rows = "rms"`."""
    sinks: Annotated[float, Field(ge=0)] = 1000.0
    """Weight of an attention sink (position 0 and massive activations). Only with `rows = "rms"`."""
    answers: Annotated[float, Field(ge=0)] = 4.0
    """Weight of a row that predicts an answer which the teacher wrote itself (`samples.own_answers`): what the student is to say, in the
    teacher's words. Only with `rows = "rms"`."""
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.03, 0.3, 3.0)
    """Candidates for λ, as multiples of the mean diagonal of the normal equations, `AᵀA`."""
    layers: Literal["all", "cut"] = "all"
    """`"all"`: every layer whose stream differs from the teacher's. `"cut"`: only the layer in front of each cut."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far targets lie from the student's own state (0) towards the teacher's (1); models of different bases want less."""
    guard: Annotated[float, Field(ge=1)] | None = None
    """Take only so much of the refit (all, 1/2, 1/4, 1/10) that the KL on the guard's validation half is at most this multiple of what it
    was (1.02: 2 % worse)."""

    exact: ClassVar[bool] = False

    def cost(self, context: CostContext) -> Cost:
        """One pass through the student per writer, and its normal equations layer by layer."""
        student, number = context.student, context.student_bytes
        rows = context.texts.rows_of("fit", "validation")
        walk = forward_cost(student, rows, number)
        widths = {"neurons": student.neurons, "heads": student.query_width}
        sizes = [widths[writer] for writer in self.writers]
        largest = max(sizes)
        made = student.depth * sum(sizes) * student.width * number
        targets = rows * student.width * (FLOAT64_BYTES + 2 * number)
        moments = (7 * largest**2 + 6 * largest * student.width) * FLOAT64_BYTES
        solves = sum(2.0 * rows * n * (n + student.width) + 5 * n**3 for n in sizes)
        judged = logits_memory(context, answer_rows(context, "validation"))
        return replace(
            walk,
            host_bytes=walk.host_bytes + max(targets + moments, judged) + made,
            disk_bytes=2 * made,
            operations=walk.operations * (1 + len(sizes)) + student.depth * solves,
        )

    @hookimpl
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_core.evaluation.acceptance import accept_if_better
        from rotdistill_core.evaluation.divergence import shared_vocabulary
        from rotdistill_core.forward.layerwise import LayerwiseForward
        from rotdistill_core.forward.row_weights import clip_sinks
        from rotdistill_writer_refit._targets import kl_on, matches_teacher_until, target_states

        self._check(weights, samples)
        own = frozenset(question.id for question in samples.questions if question.answer is None)
        shared_vocabulary(pair)  # ahead of the work: it refuses two tokenizers
        layout = samples.layout.select("fit", "validation")
        walk = LayerwiseForward(weights, layout, pair.student.device, pair.student.dtype)
        depths, diagnostics = weights.lineage.depths, {}
        made: dict[str, Tensor] = {}
        gaps = [i for i in range(weights.depth) if depths[i + 1] != depths[i] + 1]
        if (
            pair.same
            and gaps
            and matches_teacher_until(weights, maps, activations, pair, samples, gaps[0])
        ):
            walk.boundary = gaps[0]
            walk.states = target_states(weights, maps, activations, pair, layout, gaps[0]).to(
                walk.dtype
            )
        for i in walk:
            if self.layers == "cut" and i not in gaps:
                walk.run()
                continue
            goal = target_states(weights, maps, activations, pair, layout, i + 1)
            goal = clip_sinks(goal) if self.rows == "rms" else goal
            here = _LayerFit(walk, goal, self._counts(goal, layout, own), layout.split("fit"))
            for site in self.writers:
                file = f"weights/{out.step}/layer_{i:05d}_{site}"
                saved, card = out.find(f"{file}.safetensors"), out.find(f"{file}.json")
                if saved and card:
                    solved, diagnostics[f"{i} {site}"] = (
                        _stored(saved),
                        json.loads(card.read_text(encoding="utf-8")),
                    )
                else:
                    solved, diagnostics[f"{i} {site}"] = self._writer(here, site)
                    out.tensors(f"{file}.safetensors", solved)
                    out.json(f"{file}.json", diagnostics[f"{i} {site}"])
                made |= solved
                for key, tensor in solved.items():
                    walk.replace(key, tensor)
            walk.run()
            progress(i + 1, weights.depth, f"refitted {' and '.join(self.writers)}")
        out.notes["layers"] = diagnostics
        refitted = weights.edit(made)

        def score(view: Weights, split: str) -> TextScores:
            there = walk if view is refitted and split == "validation" else None
            return kl_on(split, view, there, activations, pair, samples)

        return accept_if_better(weights, refitted, score, self.guard, out)

    def _check(self, weights: Weights, samples: Samples) -> None:
        from rotdistill_core.errors import RecipeError

        if self.features == "output" and self.writers != ("neurons",):
            raise RecipeError(
                'writer-refit: features = "output" is a map of the MLP\'s output; writers must be ["neurons"].'
            )
        if not set(self.writers) <= set(weights.adapter.writers):
            raise RecipeError(
                f"writer-refit: in a {weights.config['model_type']} model a norm stands between writers and stream."
            )
        if self.guard and not samples.layout.select("guard-validation").texts:
            raise RecipeError(
                "writer-refit: guard needs texts outside the domain; name them as samples.guard."
            )

    def _counts(self, goal: Tensor, layout: PackedTexts, own: frozenset[str]) -> Tensor:
        """Return how often each row counts [rows]."""
        import torch

        from rotdistill_core.forward.row_weights import row_weights

        if self.rows == "rms":
            return row_weights(goal, layout, self.prompt, self.sinks, self.answers, own)
        factor = torch.ones(len(goal), dtype=torch.float64)
        if self.rows == "plain":
            factor[: layout.prefix] = sum(text.split == "fit" for text in layout.texts)
        return factor

    def _writer(self, here: _LayerFit, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a new writer `[d, f]` of the open layer (and bias, if the MLP's output carries one), and what was chosen."""
        from rotdistill_core.linalg.moments import Moments

        walk, goal = here.walk, here.goal
        name = walk.weights.adapter.writers[site].replace("{i}", str(walk.boundary))
        f, d = walk.weights.entries[name].shape[::-1]
        width = f if self.features == "activations" else d
        weight = (
            (here.counts / goal.double().pow(2).mean(-1).clamp_min(1e-12)).float()
            if self.rows == "rms"
            else here.counts.float()
        )
        fit, validation = Moments(width, d), Moments(width, d)
        seen: list[Tensor] = []

        def output(rows: Tensor, X: Tensor) -> None:
            A, E = seen.pop(), self.strength * (goal[rows].to(X) - X)
            for moments, use in ((fit, here.fit[rows]), (validation, ~here.fit[rows])):
                moments.add(A[use], E[use], weight[rows][use])

        where = site if self.features == "activations" else "mlp"
        walk.run({where: lambda _, A: seen.append(A), "output": output}, keep=False)
        delta, card = self._solved(fit, validation, f"writer-refit: {name}")
        new = {name: walk.weights[name].to("cpu").double()}
        if self.features == "activations":
            new[name] = new[name] + delta.T
        else:
            if (bias := f"{name.removesuffix('weight')}bias") in walk.weights.entries:
                new[bias] = walk.weights[bias].to("cpu").double()
            new = {key: tensor + delta.T @ tensor for key, tensor in new.items()}
        return {key: tensor.to(walk.dtype) for key, tensor in new.items()}, card

    def _solved(
        self, fit: Moments, validation: Moments, where: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the ridge solution `[f, d]` that is best on validation rows, times its best step; zeros if none helps."""
        import torch

        from rotdistill_core.errors import SingularError
        from rotdistill_core.linalg.solvers import ridge

        best: tuple[float, float, float, Tensor] = (
            validation.yy,
            0.0,
            0.0,
            torch.zeros_like(fit.xy),
        )
        for strength in self.ridge:
            try:
                delta = ridge(fit.xx, fit.xy, strength, where)
            except (
                SingularError
            ):  # fewer rows than unknowns, and a λ that is rounding: no candidate
                continue
            step = _best_step(validation, delta)
            best = min(
                best,
                (validation.error(step * delta), step, strength, step * delta),
                key=lambda b: b[0],
            )
        error, step, strength, delta = best
        return delta, {
            "ridge": strength,
            "step": step,
            "validation error": error / validation.yy if validation.yy else 0.0,
        }


def _stored(path: Any) -> Mapping[str, Tensor]:
    from rotdistill_core.checkpoint.lazy import open_tensors

    return {key: entry.read() for key, entry in open_tensors(path).items()}


def _best_step(validation: Moments, delta: Tensor) -> float:
    """Return the step in [0, 1] with the least validation error along `delta`."""
    curvature = float(((validation.xx @ delta) * delta).sum())
    return (
        min(1.0, max(0.0, float((delta * validation.xy).sum()) / curvature))
        if curvature > 0
        else 0.0
    )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [WriterRefit]
