"""Refit what writes into the student's stream so that the stream follows the teacher's.

A writer `W [d, f]` carries activations `A [T, f]` into the stream. Let `X [T, d]` be the stream
after the layer, `S [T, d]` the target (the teacher's state at the matched depth, in the student's
basis) and `w [T]` the row weights:

    W ← W + a Δᵀ,   Δ = (Aᵀ w A + λI)⁻¹ Aᵀ w (S - X)   [f, d]

Layers are solved in order, each on the activations of the student as refitted so far. Step a and
ridge λ are chosen on validation rows, and a = 0 is always possible. With the MLP's output in place
of A this is the map of Shopkhoev et al., ReplaceMe, arXiv:2505.02819.

Teacher and student walk side by side. The states of both at the boundary at hand lie in files, so
memory does not grow with the texts, but for a few numbers a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.shards import in_shard
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import (
    TextScores,
    accept_if_better,
    caution_of_overfit,
)
from rotdistill_core.evaluation.divergence import shared_vocabulary
from rotdistill_core.evaluation.guard import guard_of
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.forward.row_rms import mean_square
from rotdistill_core.forward.row_weights import (
    over_mean_square,
    row_weights,
    sharing_texts,
    shortened,
    sink_factors,
)
from rotdistill_core.forward.writer_moments import RowTargets, writer_moments
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text
from rotdistill_core.store.results import Remedy
from rotdistill_writer_refit._regression import best_ridge
from rotdistill_writer_refit._scoring import Scorer
from rotdistill_writer_refit._targets import Targets, TeacherTargets

if TYPE_CHECKING:
    from rotdistill_writer_refit.step import WriterRefit


class LayerProblem(NamedTuple):
    """The regression of the open layer."""

    targets: RowTargets
    """The teacher's states, for the rows of this process."""
    row_weights: Tensor
    """Weight of each row of the whole [rows]."""
    fit: Tensor
    """Mask of the rows of the whole that are fitted [rows]; all others are validation rows."""


class WriterFit(NamedTuple):
    """New values of one writer, and how they were chosen."""

    tensors: dict[str, Tensor]
    """Parameter -> its new value."""
    diagnostics: dict[str, float]
    """Ridge, step, and validation error relative to that of doing nothing."""


class CommittedWriter(NamedTuple):
    """Where a solved writer lies, relative to the folder of runs."""

    tensors: str
    diagnostics: str


def solve(
    step: WriterRefit,
    targets: TeacherTargets,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Weights:
    """Return the refitted student, or the one before where the refit does not lower validation KL.

    Every solved writer is committed at once, so an interrupted step resumes after the last one.
    Processes share the texts and the candidates for λ; the leading one commits, and the others read
    that.

    Raises:
        RecipeError: the options do not fit the model or the texts, or no aligner ran.
        SetupError: teacher and student have different tokenizers, or the disk refuses the states.
    """
    weights, pair, samples = targets.weights, targets.pair, targets.samples
    step.check_writers(weights.adapter, weights.config)
    guard = guard_of(step.guard, samples, step.use)
    shared_vocabulary(pair)  # raises before the work
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    layout = layout.where(in_shard(samples, step.shard))
    student, folder = pair.student, out.ledger.folder
    forward = LayerwiseForward(
        weights, layout, student.device, student.dtype, ranks=ranks, folder=folder
    )
    with targets.beside(forward, folder) as beside:
        refitted = refit(step, targets, beside, forward, out, progress)
        beside.finish()
        scorer = Scorer(beside.final_states, pair, samples, ranks, folder)

        def score(view: Weights, split: str) -> TextScores:
            finished = forward if view is refitted and split == Split.VALIDATION else None
            return scorer.score(split, view, finished)

        # How much of the KL on validation texts is that of texts which were not fitted.
        fit_kl = scorer.score(Split.FIT, refitted, forward).mean
        out.notes["fit KL after"] = fit_kl
        remedies = remedies_of(step)
        kept = accept_if_better(weights, refitted, score, guard, out, remedies)
        if not out.report.refused:
            whole = out.notes["validation KL after"]
            if kept is not refitted:  # the guard allows a part, and the fit KL is of the whole
                whole = score(refitted, Split.VALIDATION).mean
            caution_of_overfit(out, fit_kl, whole, remedies)
        return kept


def remedies_of(step: WriterRefit) -> list[Remedy]:
    """Return what to try next where a refit is no gain on validation texts."""
    largest = max(step.ridge)
    return [
        Remedy("a larger ridge", (f"ridge=[{largest:g}, {10 * largest:g}]",)),
        Remedy("fewer layers cut, where chop goes before it"),
        Remedy("targets nearer to the student", (f"alpha={step.alpha / 2:g}",)),
    ]


def refit(
    step: WriterRefit,
    parts: TeacherTargets,
    targets: Targets,
    forward: LayerwiseForward,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Send a student through its layers beside its teacher, and refit one after the other.

    Returns:
        The refitted student; its diagnostics go to the notes.
    """
    weights = parts.weights
    cuts = layers_before_cuts(weights)
    if parts.pair.same and cuts and forward.ranks.lead(lambda: parts.reached_by_student(cuts[0])):
        # The layers before the first cut reproduce the teacher: start with its states there.
        targets.move_to(cuts[0])
        forward.start_at(cuts[0], targets.rows)

    edited: dict[str, Tensor] = {}
    diagnostics: dict[str, dict[str, float]] = {}
    for i in forward:
        if step.layers == "cut" and i not in cuts:
            forward.run()
            continue
        targets.move_to(i + 1)
        problem = layer_problem(step, targets.rows, forward, parts.samples)
        for site in step.writers:
            fit = solve_or_restore(step, forward, problem, site, out)
            edited |= fit.tensors
            diagnostics[f"{i} {site}"] = fit.diagnostics
            for name, tensor in fit.tensors.items():
                forward.replace(name, tensor)
        forward.run()
        progress(i + 1, weights.depth, f"refitted {' and '.join(step.writers)}")
    out.notes["layers"] = diagnostics
    return weights.edit(edited)


def layers_before_cuts(weights: Weights) -> list[int]:
    """Return the layers after which layers of the original student are missing."""
    depths = weights.lineage.depths
    return [i for i in range(weights.depth) if depths[i + 1] != depths[i] + 1]


def layer_problem(
    step: WriterRefit, targets: RowTargets, forward: LayerwiseForward, samples: Samples
) -> LayerProblem:
    """Return the regression towards `targets` with its row weights."""
    layout = forward.whole
    if step.row_weighting == "rms":
        squares = mean_squares(targets, forward)
        factors = sink_factors(squares)
        squares = squares * factors**2
        targets = shorter(targets, factors[forward.rows])
        # Every text attends to the shared rows: they count more where there are more texts.
        readers = sharing_texts(layout)
        counts = row_weights(
            squares,
            layout,
            prompt=readers * step.prompt_weight,
            sink=readers * step.sink_weight,
            own_sink=step.sink_weight,
            teacher_answer=step.teacher_answer_weight,
            teacher_answered=samples.teacher_answered(),
        )
        counts = over_mean_square(counts, squares)
    else:
        counts = torch.ones(layout.rows, dtype=torch.float64)
        if step.row_weighting == "plain":
            # The prompt's rows are stored once; here they count once for each fitted text.
            counts[: layout.prefix] = sharing_texts(layout)
    return LayerProblem(targets, counts.float(), layout.split(Split.FIT))


def mean_squares(targets: RowTargets, forward: LayerwiseForward) -> Tensor:
    """Return the mean square of the target of each row of the whole [rows], on the host."""
    squares = torch.zeros(forward.layout.rows, dtype=torch.float64)
    for rows in forward.blocks:
        squares[rows] = mean_square(targets(rows))
    return forward.assembled(squares)


def shorter(targets: RowTargets, factors: Tensor) -> RowTargets:
    """Return targets of which each is multiplied by its factor [rows]."""

    def of_rows(rows: Tensor) -> Tensor:
        return shortened(targets(rows), factors[rows])

    return of_rows


def solve_or_restore(
    step: WriterRefit,
    forward: LayerwiseForward,
    problem: LayerProblem,
    site: str,
    out: StepOutput,
) -> WriterFit:
    """Return the new writer at a site of the open layer; solve it if it is not committed yet."""
    name = RunLayout.writer(out.step, forward.boundary, site)

    def find() -> CommittedWriter | None:
        tensors, diagnostics = out.find(f"{name}.safetensors"), out.find(f"{name}.json")
        if tensors and diagnostics:
            return CommittedWriter(out.relative(tensors), out.relative(diagnostics))
        return None

    def commit() -> CommittedWriter:
        tensors = out.tensors(f"{name}.safetensors", fit.tensors)
        diagnostics = out.json(f"{name}.json", fit.diagnostics)
        return CommittedWriter(out.relative(tensors), out.relative(diagnostics))

    committed = forward.ranks.lead(find)
    if committed is None:
        moments = regression_moments(step, forward, problem, site)
        fit = solve_writer(step, forward, moments, site)
        committed = forward.ranks.lead(commit)
    root = out.store.root
    stored = {key: entry.read() for key, entry in open_tensors(root / committed.tensors).items()}
    return WriterFit(stored, json.loads(read_text(root / committed.diagnostics)))


def regression_moments(
    step: WriterRefit, forward: LayerwiseForward, problem: LayerProblem, site: str
) -> list[Moments]:
    """Return the moments over fit rows and validation rows of the writer at a site."""
    name = writer_name(forward, site)
    d, f = forward.weights.entries[name].shape
    on_output = step.features == "output"
    return writer_moments(
        forward,
        site="mlp" if on_output else site,
        width=d if on_output else f,
        targets=problem.targets,
        weights=problem.row_weights,
        row_sets=(problem.fit, ~problem.fit),
        alpha=step.alpha,
    )


def writer_name(forward: LayerwiseForward, site: str) -> str:
    """Return the parameter that writes at a site of the open layer."""
    return forward.weights.adapter.writers[site].replace("{i}", str(forward.boundary))


def solve_writer(
    step: WriterRefit, forward: LayerwiseForward, moments: Sequence[Moments], site: str
) -> WriterFit:
    """Solve the writer `[d, f]` at a site of the open layer by its moments.

    All processes call it; only the leading one gets the new values.
    """
    weights = forward.weights
    name = writer_name(forward, site)
    fit, validation = moments
    where = f"writer-refit: {name}"
    best = best_ridge(fit, validation, step.ridge, where, forward.device, forward.ranks)
    error = best.validation_error / validation.yy if validation.yy else 0.0
    edit = map_output if step.features == "output" else add_to_writer
    tensors = {
        key: tensor.to(forward.dtype) for key, tensor in edit(weights, name, best.delta).items()
    }
    return WriterFit(
        tensors, {"ridge": best.strength, "step": best.step, "validation error": error}
    )


def add_to_writer(weights: Weights, name: str, delta: Tensor) -> dict[str, Tensor]:
    """Return `W + Δᵀ` for a writer `W [d, f]` and `Δ [f, d]`, in float64."""
    return {name: weights[name].to("cpu").double() + delta.T}


def map_output(weights: Weights, name: str, delta: Tensor) -> dict[str, Tensor]:
    """Return `(I + Δᵀ) W`, and the same of its bias, for a map `I + Δ` `[d, d]` of the output."""
    names = [name]
    bias = f"{name.removesuffix('weight')}bias"
    if bias in weights.entries:
        names.append(bias)
    tensors = {key: weights[key].to("cpu").double() for key in names}
    return {key: tensor + delta.T @ tensor for key, tensor in tensors.items()}
