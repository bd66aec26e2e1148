"""Metrics of a variant against the teacher: hidden states, predictions, out-of-domain texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import teacher_final_states
from rotdistill_core.evaluation.dealt import answer_nll, compared
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.evaluation.metrics import teacher_metric
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.precision import float64_device
from rotdistill_fidelity._frames import Frame, Frames

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Lineage
    from rotdistill_core.data.packed import PackedTexts, Samples, Text
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_fidelity.step import Fidelity


def score_variant(
    step: Fidelity,
    variant: Variant,
    pair: Pair,
    activations: ActivationStore,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[MetricRow]:
    """Return all metrics of a variant: overall, by text, by language and by layer.

    Processes share the texts. Only the leading one has the metrics of hidden states.
    """
    weights = variant.weights
    layout = samples.layout.select(Split.HELDOUT, Split.GUARD)
    answers = Answers.of(layout, activations)
    student = pair.student
    forward = LayerwiseForward(weights, layout, student.device, student.dtype, ranks=ranks)
    # Models that start in one basis need no rotation.
    frames = None if pair.same else Frames.of(pair, activations, out)
    by_layer: list[MetricRow] = []
    for layer in forward:
        forward.run()
        by_layer += hidden_state_rows(variant, activations, forward, answers, frames)
        progress(layer + 1, weights.depth, f"{len(layout.texts)} held-out texts")
    rows = prediction_rows(variant, pair, activations, forward, by_layer)
    rows += out_of_domain_rows(variant, pair, activations, forward)
    if samples.baked:
        rows += unprompted_teacher_rows(variant, pair, activations, samples, out, progress, ranks)
    rows.append(MetricRow(variant.name, "parameters", float(weights.parameters)))
    rows.append(MetricRow(variant.name, "seconds", variant.seconds))
    return rows + by_layer if step.per_layer else rows


# Hidden states.


class Answers(NamedTuple):
    """The rows that predict tokens of held-out answers, where the teacher has a row of its own."""

    heldout: PackedTexts
    """The held-out texts: of the guard inner states are not captured."""
    in_heldout: Tensor
    """Their rows among those of the held-out texts [n]."""
    rows: Tensor
    """The same rows among those of all texts that go through the variant [n]."""

    @classmethod
    def of(cls, layout: PackedTexts, activations: ActivationStore) -> Answers:
        """Return those of a layout with held-out texts and others."""
        heldout = layout.select(Split.HELDOUT)
        rows, in_heldout = (each.prediction_rows(Split.HELDOUT)[0] for each in (layout, heldout))
        # With two tokenizers, some rows have no rows of the teacher that they are paired with.
        paired = activations.paired_mask(heldout)[in_heldout]
        return cls(heldout, in_heldout[paired], rows[paired])


def hidden_state_rows(
    variant: Variant,
    activations: ActivationStore,
    forward: LayerwiseForward,
    answers: Answers,
    frames: Frames | None,
) -> list[MetricRow]:
    """Return the hidden-state metrics of answers at the boundary that a forward pass reached.

    Processes that do not lead have none.
    """
    collected = forward.collected(answers.rows)
    if collected is None:
        return []
    lineage, boundary = variant.weights.lineage, forward.boundary
    depth = lineage.depths[boundary]
    place = float64_device(forward.device)
    states = collected.to(place, torch.float64)
    X = in_teacher_frame(states, lineage, frames.at(depth) if frames else None)
    T = activations.teacher_states(answers.heldout, depth)[answers.in_heldout]
    T = T.to(place, torch.float64)
    return [
        MetricRow(variant.name, metric, value, Split.HELDOUT, layer=boundary, n=len(X))
        for metric, value in hidden_metrics(X, T).items()
    ]


def hidden_metrics(X: Tensor, T: Tensor) -> dict[str, float]:
    """Compare states `X [n, d]` with the teacher's `T [n, d]`, in one frame."""
    cosine = (X * T).sum(-1).div(X.norm(dim=-1) * T.norm(dim=-1)).mean()
    difference = (X - T).pow(2).mean().sqrt() / T.pow(2).mean().sqrt()
    # 0: every channel is as large as the teacher's.
    channels, teacher_channels = _channel_rms(X), _channel_rms(T)
    gap = (channels / teacher_channels).log().abs().mean()
    return {
        "hidden_cosine": float(cosine),
        "residual_rms_diff": float(difference),
        "channel_rms_gap": float(gap),
    }


def _channel_rms(X: Tensor) -> Tensor:
    """Return the RMS [d] of each channel of rows `[n, d]`."""
    return X.pow(2).mean(0).sqrt().clamp_min(1e-30)


def in_teacher_frame(X: Tensor, lineage: Lineage, frame: Frame | None) -> Tensor:
    """Carry states `[n, d_s]` of a variant into the teacher's frame `[n, d_t]`.

    Args:
        X: the variant's states, float64.
        lineage: the variant's change of basis, which is undone.
        frame: the rotation of their boundary; None if both models start in one basis.
    """
    if lineage.basis is not None:
        X = X @ lineage.basis.T.to(X)
    if frame is None:
        return X
    return X @ frame.R.to(X) * frame.scale.to(X)


# Predictions.


def prediction_rows(
    variant: Variant,
    pair: Pair,
    activations: ActivationStore,
    forward: LayerwiseForward,
    by_layer: list[MetricRow],
) -> list[MetricRow]:
    """Return the metrics over held-out answers, with the means of the hidden-state metrics.

    Args:
        variant: the variant.
        pair: teacher and student. With two tokenizers no KL or agreement is defined.
        activations: holds the teacher's final states.
        forward: the variant's finished forward pass.
        by_layer: hidden-state metrics of all layers.
    """
    name, weights, layout = variant.name, variant.weights, forward.whole
    rows, targets, texts = layout.prediction_rows(Split.HELDOUT)
    found: list[MetricRow] = []
    if pair.one_tokenizer:
        T = activations.teacher_states(layout, pair.student.depth)[rows]
        comparison = compared(pair, T, weights, forward, rows, targets)
        nll = comparison.nll
        found += by_text(name, "kl", comparison.kl, texts)
        found += by_text(name, "top1", comparison.top1, texts)
        found += by_language(name, "kl", comparison.kl, texts)
    else:
        # Probabilities of different tokens cannot be compared. The likelihood of the teacher's
        # answers still can be reported.
        nll = answer_nll(weights, forward, rows, targets)
    overall = layer_means(by_layer)
    overall["perplexity"] = float(nll.mean().exp())
    found += [
        MetricRow(name, metric, value, Split.HELDOUT, n=len(rows))
        for metric, value in overall.items()
    ]
    return found


def out_of_domain_rows(
    variant: Variant, pair: Pair, activations: ActivationStore, forward: LayerwiseForward
) -> list[MetricRow]:
    """Return the metrics on the guard's reported half; none without a guard."""
    rows, targets, texts = forward.whole.prediction_rows(Split.GUARD)
    if not len(rows):
        return []
    T = activations.teacher_states(forward.whole, pair.student.depth)[rows]
    comparison = compared(pair, T, variant.weights, forward, rows, targets)
    perplexity = float(comparison.nll.mean().exp())
    return [
        *by_text(variant.name, "guard_kl", comparison.kl, texts),
        MetricRow(variant.name, "guard_perplexity", perplexity, Split.GUARD, n=len(rows)),
    ]


def unprompted_teacher_rows(
    variant: Variant,
    pair: Pair,
    activations: ActivationStore,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks,
) -> list[MetricRow]:
    """Return how far the teacher without its system prompt is from itself with it.

    That is what the prompt's absence costs before anything is taught. Every variant has the same
    rows, and the teacher's pass is made once. The leading process compares.
    """
    layout = samples.layout.select(Split.HELDOUT)
    rows, targets, texts = layout.prediction_rows(Split.HELDOUT)
    teacher = pair.teacher.weights
    S = teacher_final_states(pair.teacher, layout, out, progress, ranks)[rows]
    if not ranks.leads:
        return []
    T = activations.teacher_states(layout, pair.student.depth)[rows]
    S = S.to(pair.student.device)
    comparison = compare_logits(teacher, T, teacher, S, targets, shared_vocabulary(pair))
    return [
        *by_text(variant.name, teacher_metric("kl"), comparison.kl, texts),
        *by_text(variant.name, teacher_metric("top1"), comparison.top1, texts),
    ]


# Means over layers, texts and languages.


def layer_means(rows: list[MetricRow]) -> dict[str, float]:
    """Return the mean over layers of each metric."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.metric, []).append(row.value)
    return {metric: sum(some) / len(some) for metric, some in values.items()}


def by_text(variant: str, metric: str, values: Tensor, texts: list[Text]) -> list[MetricRow]:
    """Return the mean of per-token values [n] over all tokens, then over those of each text.

    `texts[k]` is the text of value k; all are of one split.
    """
    split = texts[0].split
    rows = [MetricRow(variant, metric, float(values.mean()), split, n=len(values))]
    for text_id, places in _places([text.id for text in texts]).items():
        row = MetricRow(
            variant,
            metric,
            float(values[places].mean()),
            split,
            language=texts[places[0]].language,
            n=len(places),
            text=text_id,
        )
        rows.append(row)
    return rows


def by_language(variant: str, metric: str, values: Tensor, texts: list[Text]) -> list[MetricRow]:
    """Return the mean of per-token values [n] over the tokens of each language."""
    places = _places([text.language for text in texts])
    return [
        MetricRow(
            variant,
            metric,
            float(values[places[language]].mean()),
            texts[0].split,
            language=language,
            n=len(places[language]),
        )
        for language in sorted(places)
    ]


def _places(names: list[str]) -> dict[str, list[int]]:
    """Return name -> its indices, names in the order of their first index."""
    places: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        places.setdefault(name, []).append(k)
    return places
