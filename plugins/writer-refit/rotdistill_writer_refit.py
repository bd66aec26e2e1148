"""Refit the MLP's writer of each layer so that the student's stream follows the teacher's.

With MLP activations `A [T, f]`, stream behind the layer `X [T, d]` and target `S [T, d]` (the teacher's state at the matched depth, in
the student's basis), rows weighted by `w`: `W_down ← W_down + a Δᵀ`, `Δ = (Aᵀ w A + λI)⁻¹ Aᵀ w (S - X) [f, d]`, layer by layer, each on
the activations of the already refitted student. Step a and ridge λ are chosen on validation rows, and a = 0 is always possible.
With the MLP's output in place of A this is the map of Shopkhoev et al., ReplaceMe, arXiv:2505.02819.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.api import Bank, Layout, Maps, Moments, Out, Pair, Progress, Samples, Walk, Weights

Positive = Annotated[float, Field(gt=0)]
JUDGED_ROWS = 1024
SINK_RMS = 10.0
"""Longest target of a sink row, in medians of the rows' RMS. Readers see its direction only; at full length (over 100 medians) the
regression, which must make it out of activations like any other's, would leak it into every row."""


@step
class WriterRefit:
    """Refit `down_proj` in closed form against the teacher's stream. The whole step is dropped if validation KL does not fall."""

    use: Literal["writer-refit"] = "writer-refit"
    features: Literal["activations", "output"] = "activations"
    """Regress on MLP activations (f x d unknowns per layer) or on the MLP's output (d x d, the published form)."""
    writers: Annotated[tuple[Literal["heads", "neurons"], ...], Field(min_length=1)] = ("neurons",)
    """Which writers of a layer, in this order: `heads` is o_proj, `neurons` is down_proj (the one for `output` features)."""
    rows: Literal["rms", "plain", "distinct"] = "rms"
    """Weight rows by 1/RMS² of their target, those of the shared prompt up, and shorten sinks; or count every token of every text
    alike (`plain`: the shared prompt as often as it is there; `distinct`: once)."""
    prompt: Annotated[float, Field(ge=0)] = 30.0
    """Weight of a row of the shared prompt, which stands there once and is attended to by every text."""
    sinks: Annotated[float, Field(ge=0)] = 1000.0
    """Weight of an attention sink (position 0 and massive activations)."""
    answers: Annotated[float, Field(ge=0)] = 4.0
    """Weight of a row that predicts an answer which the teacher wrote itself: what the student is to say, in the teacher's words."""
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.03, 0.3, 3.0)
    """Candidates for λ, as multiples of the mean diagonal of `AᵀA`."""
    layers: Literal["all", "cut"] = "all"
    """Every layer whose stream differs from the teacher's, or only the layer in front of each cut."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far targets lie from the student's own state (0) towards the teacher's (1); models of different bases want less."""

    exact: ClassVar[bool] = False

    @hookimpl
    def fold(self, weights: Weights, maps: Maps, bank: Bank, pair: Pair, samples: Samples, out: Out, progress: Progress) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.walk import Walk
        from rotdistill_core.weights import file_entries

        own = frozenset(question.id for question in samples.questions if question.answer is None)
        if self.features == "output" and self.writers != ("neurons",):
            raise RecipeError('writer-refit: features = "output" is a map of the MLP\'s output; writers must be ["neurons"].')
        if not set(self.writers) <= set(weights.adapter.writers):
            raise RecipeError(f"writer-refit: in a {weights.config['model_type']} model a norm stands between writers and stream.")
        before = _validation_kl(weights, None, bank, pair, samples)  # ahead of the work: it refuses two tokenizers
        layout = samples.layout.select("fit", "validation")
        walk = Walk(weights, layout, pair.student.device, pair.student.dtype)
        depths, cards = weights.lineage.depths, {}
        made: dict[str, Tensor] = {}
        gaps = [i for i in range(weights.depth) if depths[i + 1] != depths[i] + 1]
        if pair.same and gaps and _follows(weights, maps, bank, pair, samples, gaps[0]):
            walk.boundary = gaps[0]
            walk.states = _targets(weights, maps, bank, pair, layout, gaps[0]).to(walk.dtype)
        for i in walk:
            if self.layers == "cut" and i not in gaps:
                walk.run()
                continue
            goal = self._shortened(_targets(weights, maps, bank, pair, layout, i + 1))
            for site in self.writers:
                name = weights.adapter.writers[site].replace("{i}", str(i))
                file = f"weights/{out.step}/layer_{i:05d}_{site}"
                saved, card = out.find(f"{file}.safetensors"), out.find(f"{file}.json")
                if saved and card:
                    solved = {key: entry.read() for key, entry in file_entries(saved).items()}
                    cards[f"{i} {site}"] = json.loads(card.read_text(encoding="utf-8"))
                else:
                    solved, cards[f"{i} {site}"] = self._solve(walk, site, name, goal, own)
                    out.tensors(f"{file}.safetensors", solved)
                    out.json(f"{file}.json", cards[f"{i} {site}"])
                made |= solved
                for key, tensor in solved.items():
                    walk.replace(key, tensor)
            walk.run()
            progress(i + 1, weights.depth, f"refitted {' and '.join(self.writers)}")
        out.notes["layers"] = cards
        refitted = weights.edit(made)
        after = _validation_kl(refitted, walk, bank, pair, samples)
        out.notes |= {"validation KL before": before, "validation KL after": after}
        if not after < before:
            out.notes["refused"] = f"validation KL would go from {before:.4f} to {after:.4f}; the weights are left as they were"
            return weights
        return refitted

    def _solve(self, walk: Walk, site: str, name: str, goal: Tensor, own: frozenset[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a new writer `[d, f]` of the open layer (and bias, if the MLP's output carries one), and what was chosen."""
        from rotdistill_core.moments import Moments, ridge

        f, d = walk.weights.entries[name].shape[::-1]
        fit_rows, weight = walk.layout.split("fit"), self._row_weights(goal, walk.layout, own)
        width = f if self.features == "activations" else d
        fit, validation = Moments(width, d), Moments(width, d)
        seen: list[Tensor] = []

        def output(rows: Tensor, X: Tensor) -> None:
            A, E = seen.pop(), self.strength * (goal[rows].to(X) - X)
            for moments, use in ((fit, fit_rows[rows]), (validation, ~fit_rows[rows])):
                moments.add(A[use], E[use], weight[rows][use])

        where = site if self.features == "activations" else "mlp"
        walk.run({where: lambda _, A: seen.append(A), "output": output}, keep=False)
        best: tuple[float, float, float, Tensor | None] = (validation.yy, 0.0, 0.0, None)
        for strength in self.ridge:
            delta = ridge(fit.xx, fit.xy, strength, f"writer-refit: {name}")
            step = _best_step(validation, delta)
            best = min(best, (validation.error(step * delta), step, strength, delta), key=lambda b: b[0])
        error, step, strength, best_delta = best
        new = {name: walk.weights[name].to("cpu").double()}
        if best_delta is not None and self.features == "activations":
            new[name] = new[name] + step * best_delta.T
        elif best_delta is not None:
            if (bias := f"{name.removesuffix('weight')}bias") in walk.weights.entries:
                new[bias] = walk.weights[bias].to("cpu").double()
            new = {key: tensor + step * best_delta.T @ tensor for key, tensor in new.items()}
        card = {"ridge": strength, "step": step, "validation error": error / validation.yy if validation.yy else 0.0}
        return {key: tensor.to(walk.dtype) for key, tensor in new.items()}, card

    def _shortened(self, goal: Tensor) -> Tensor:
        """Return the targets with sinks cut to `SINK_RMS` medians."""
        if self.rows != "rms":
            return goal
        rms = goal.double().pow(2).mean(-1).sqrt()
        return goal * (SINK_RMS * rms.median() / rms.clamp_min(1e-30)).clamp_max(1.0).to(goal)[:, None]

    def _row_weights(self, goal: Tensor, layout: Layout, own: frozenset[str] = frozenset()) -> Tensor:
        """Return the weight of each row [rows]: 1/RMS², as every reader sees it; prompt, sinks and answers of the texts `own` up."""
        import torch

        from rotdistill_core.bank import massive

        factor = torch.ones(len(goal), dtype=torch.float64)
        if self.rows == "plain":
            factor[: layout.prefix] = sum(text.split == "fit" for text in layout.texts)
        if self.rows != "rms":
            return factor.float()
        factor[: layout.prefix] = self.prompt
        for text, start, end in zip(layout.texts, layout.starts, layout.starts[1:], strict=False):
            if text.id in own:
                factor[max(start, start + text.answer - 1 - layout.prefix) : end] = self.answers
        factor[massive(goal).index_fill(0, torch.zeros(1, dtype=torch.long), True)] = self.sinks
        return (factor / goal.double().pow(2).mean(-1).clamp_min(1e-12)).float()


def _best_step(validation: Moments, delta: Tensor) -> float:
    """Return the step in [0, 1] with the least validation error along `delta`."""
    curvature = float(((validation.xx @ delta) * delta).sum())
    return min(1.0, max(0.0, float((delta * validation.xy).sum()) / curvature)) if curvature > 0 else 0.0


def _targets(weights: Weights, maps: Maps, bank: Bank, pair: Pair, layout: Layout, boundary: int) -> Tensor:
    """Return the teacher's states at the matched depth, in the student's basis `[rows, d_s]`.

    A student cut from the teacher shares its basis. Else the aligner's map of this boundary carries the teacher's rows back, and
    each is scaled to the length of the student's own row: readers see directions only, and sinks stay what they are.

    Raises RecipeError for models of different bases when no aligner stands before this step.
    """
    import torch

    from rotdistill_core.errors import RecipeError

    lineage = weights.lineage
    depth = lineage.depths[boundary]
    T = bank.teacher(layout, depth).double()
    if not pair.same:
        captured = bank.depths.index(depth)
        rotation = maps.rotation(captured)
        if rotation is None or pair.anchor:
            raise RecipeError(
                "writer-refit: teacher and student have different bases; put an aligner (procrustes) before this step, and no [anchor]."
            )
        T = T @ rotation.matrix.T.double() / rotation.scale
        own, side = torch.full((len(T),), torch.nan, dtype=torch.float64), bank.layouts["student"]
        both = replace(side, texts=tuple(text for text in side.texts if text in layout.texts))
        own[both.rows_in(layout)] = bank.rows("student", captured).double().norm(dim=-1)[both.rows_in(side)]
        T = torch.where(own.isnan()[:, None], T, T * (own / T.norm(dim=-1).clamp_min(1e-12))[:, None])
    if lineage.basis is not None:
        T = T @ lineage.basis.to(T)
    return T.float() if weights.dtype != torch.float64 else T


def _follows(weights: Weights, maps: Maps, bank: Bank, pair: Pair, samples: Samples, boundary: int) -> bool:
    """Try on two texts whether the student's stream is still the teacher's up to a boundary, so that it need not be walked again."""
    from rotdistill_core.walk import Walk

    walk = Walk(weights, samples.layout.select("validation", most=2), pair.student.device, pair.student.dtype)
    for i in walk:
        if i == boundary:
            break
        walk.run()
    goal = _targets(weights, maps, bank, pair, walk.layout, boundary)
    return bool((walk.states - goal.to(walk.states)).norm() <= 1e-3 * goal.norm())


def _validation_kl(weights: Weights, walk: Walk | None, bank: Bank, pair: Pair, samples: Samples) -> float:
    """Return the mean KL on answer tokens of the validation texts; `walk` has the final states already, or is made here."""
    from rotdistill_predictions import compare, shared_tokens

    from rotdistill_core.walk import Walk

    if walk is None:
        walk = Walk(weights, samples.layout.select("validation"), pair.student.device, pair.student.dtype)
        for _ in walk:
            walk.run()
    rows, targets, _ = walk.layout.predicting("validation")
    some = slice(None, None, max(1, len(rows) // JUDGED_ROWS))
    rows, targets = rows[some], targets[some]
    T, S = bank.teacher(walk.layout, pair.student.depth)[rows], walk.states[rows]
    return float(compare(pair.teacher.weights, T, weights, S, targets, shared_tokens(pair)).kl.mean())


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [WriterRefit]
