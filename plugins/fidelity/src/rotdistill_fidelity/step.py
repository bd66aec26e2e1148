"""Score every variant on the held-out questions, against the teacher's own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, evaluation_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.data.packed import Samples, Text
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress


HIDDEN = ("hidden_cosine", "residual_rms_diff", "channel_rms_gap")


@step
class Fidelity:
    """Compare each saved variant with the teacher on held-out answers.

    `kl` (nats per answer token, over the shared vocabulary), `top1` agreement, `perplexity` of the teacher's answers,
    `hidden_cosine`, `residual_rms_diff` (over the teacher's RMS) and `channel_rms_gap` (mean |ln| of the ratio of each channel's RMS to
    the teacher's) per layer and on average, `parameters`, `seconds`.
    Hidden states are compared in the teacher's frame: the student's change of basis is taken back first, and between models
    of different bases the best rotation per layer (from the fit texts and the unedited student) stands between them.
    `guard_kl` and `guard_perplexity` are those of every token of the guard's reported half: what the domain's gain costs elsewhere.
    `kl`, `top1` and `guard_kl` also by text, which is what their spread can be told from: the report makes 95 % intervals
    of every row of `results.jsonl` with a `text`, whose weight in the mean is its `n`.
    """

    use: Literal["fidelity"] = "fidelity"
    per_layer: bool = True
    """Also report hidden states layer by layer."""

    def cost(self, context: CostContext) -> Cost:
        """The variant on held-out texts, and both heads."""
        return evaluation_cost(context)

    @hookimpl
    def evaluate(
        self,
        variant: Variant,
        pair: Pair,
        activations: ActivationStore,
        samples: Samples,
        progress: Progress,
    ) -> list[MetricRow]:
        """See `Specs.evaluate`."""
        import torch

        from rotdistill_core.evaluation.divergence import (
            BLOCK_ROWS,
            compare_logits,
            shared_vocabulary,
        )
        from rotdistill_core.evaluation.rows import MetricRow
        from rotdistill_core.forward.head import log_probs
        from rotdistill_core.forward.layerwise import LayerwiseForward

        weights, student = variant.weights, pair.student
        layout = samples.layout.select("heldout", "guard")
        rows, targets, texts = layout.prediction_rows("heldout")
        walk = LayerwiseForward(weights, layout, student.device, student.dtype)
        beside = activations.paired(layout)[rows]
        found: list[MetricRow] = []

        def measure(boundary: int) -> None:
            X = _in_teacher_frame(
                walk.states[rows][beside].double(), boundary, variant, pair, activations
            )
            T = activations.teacher(layout, weights.lineage.depths[boundary])[rows][beside].double()
            n = len(X)
            cosine = float((X * T).sum(-1).div(X.norm(dim=-1) * T.norm(dim=-1)).mean())
            difference = float((X - T).pow(2).mean().sqrt() / T.pow(2).mean().sqrt())
            mine, its = (rows.pow(2).mean(0).sqrt().clamp_min(1e-30) for rows in (X, T))
            values = (cosine, difference, float((mine / its).log().abs().mean()))
            found.extend(
                MetricRow(variant.name, m, v, "heldout", boundary, None, n)
                for m, v in zip(HIDDEN, values, strict=True)
            )

        for i in walk:
            walk.run()
            measure(i + 1)
            progress(i + 1, weights.depth, f"{len(layout.texts)} held-out texts")
        S, result = walk.states[rows], list[MetricRow]()
        if pair.one_tokenizer:
            T = activations.teacher(layout, student.depth)[rows]
            seen = compare_logits(
                pair.teacher.weights, T, weights, S, targets, shared_vocabulary(pair)
            )
            nll, result = (
                seen.nll,
                _by_text(variant.name, "kl", seen.kl, texts)
                + _by_text(variant.name, "top1", seen.top1, texts),
            )
            result += _by_language(variant.name, "kl", seen.kl, texts)
        else:  # probabilities of different tokens cannot be compared; how likely the teacher's words are can be told
            head, blocks = (
                weights.head().to(S),
                [range(k, min(k + BLOCK_ROWS, len(S))) for k in range(0, len(S), BLOCK_ROWS)],
            )
            nll = torch.cat(
                [
                    -log_probs(weights, S[b], head).gather(-1, targets[b][:, None])[:, 0]
                    for b in blocks
                ]
            ).double()
        overall = {name: _mean(found, name) for name in HIDDEN} | {
            "perplexity": float(nll.mean().exp())
        }
        result += [
            MetricRow(variant.name, name, value, "heldout", None, None, len(rows))
            for name, value in overall.items()
        ]
        guard, words, texts = layout.prediction_rows("guard")
        if len(guard):
            T = activations.teacher(layout, student.depth)[guard]
            seen = compare_logits(
                pair.teacher.weights, T, weights, walk.states[guard], words, shared_vocabulary(pair)
            )
            result += _by_text(variant.name, "guard_kl", seen.kl, texts)
            result.append(
                MetricRow(
                    variant.name,
                    "guard_perplexity",
                    float(seen.nll.mean().exp()),
                    "guard",
                    None,
                    None,
                    len(guard),
                )
            )
        result += [
            MetricRow(variant.name, "parameters", float(weights.parameters)),
            MetricRow(variant.name, "seconds", variant.seconds),
        ]
        return result + (found if self.per_layer else [])


def _mean(rows: list[MetricRow], metric: str) -> float:
    values = [row.value for row in rows if row.metric == metric]
    return sum(values) / len(values)


def _by_text(variant: str, metric: str, values: Tensor, texts: list[Text]) -> list[MetricRow]:
    """Return the mean of values `[n]`, one per token, over all of them and over those of each text; `texts[k]` is the text of value k."""
    from rotdistill_core.evaluation.rows import MetricRow

    rows = [
        MetricRow(variant, metric, float(values.mean()), texts[0].split, None, None, len(values))
    ]
    for text, mine in _where([text.id for text in texts]).items():
        about = texts[mine[0]]
        rows.append(
            MetricRow(
                variant,
                metric,
                float(values[mine].mean()),
                about.split,
                None,
                about.language,
                len(mine),
                text,
            )
        )
    return rows


def _by_language(variant: str, metric: str, values: Tensor, texts: list[Text]) -> list[MetricRow]:
    """Return the mean of values `[n]` over the tokens of each language."""
    from rotdistill_core.evaluation.rows import MetricRow

    where = _where([text.language for text in texts])
    return [
        MetricRow(
            variant, metric, float(values[where[k]].mean()), texts[0].split, None, k, len(where[k])
        )
        for k in sorted(where)
    ]


def _where(names: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        found.setdefault(name, []).append(k)
    return found


def _in_teacher_frame(
    X: Tensor, boundary: int, variant: Variant, pair: Pair, activations: ActivationStore
) -> Tensor:
    """Carry student rows `[n, d_s]` into the teacher's frame `[n, d_t]`."""
    from rotdistill_core.forward.activations import massive_activation_mask
    from rotdistill_core.linalg.solvers import polar

    lineage = variant.weights.lineage
    if lineage.basis is not None:
        X = X @ lineage.basis.T.to(X)
    if pair.same:
        return X
    depth = lineage.depths[boundary]
    side = activations.layouts["student"]
    S = activations.rows("student", activations.depths.index(depth)).double()
    T = activations.teacher(side, depth).double()
    use = (
        side.split("fit")
        & ~massive_activation_mask(S)
        & ~massive_activation_mask(T)
        & activations.paired(side)
    )
    R, spectrum = polar(S[use].T @ T[use], f"toggles: boundary {boundary}")
    return X @ R * float(spectrum.sum() / S[use].pow(2).sum())


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Fidelity]
