"""The texts and rows on which cuts are fitted and scored."""

from __future__ import annotations

import hashlib

from torch import Tensor

from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.evaluation.divergence import kl_divergence
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.row_rms import mean_square
from rotdistill_core.forward.row_weights import clip_sinks, over_mean_square, row_weights

PROMPT_WEIGHT = 30.0
"""Weight of a row of the shared prompt, as in `writer-refit`."""
SINK_WEIGHT = 1000.0
"""Weight of an attention sink in the shared prompt, as in `writer-refit`."""
OWN_SINK_WEIGHT = 3.125
"""Weight of a sink that only its own text attends to, as in `writer-refit`."""


def select_texts(samples: Samples, split: str, max_rows: int) -> PackedTexts:
    """Return texts of a split with at most `max_rows` rows, but at least one text.

    Texts that the teacher answered come first. Otherwise the order is that of a hash of their id,
    so that a few of them are of all languages.
    """
    answered = samples.teacher_answered()
    layout = samples.layout.select(split)

    def rank(text: Text) -> tuple[bool, bytes]:
        return text.id not in answered, hashlib.sha256(text.id.encode()).digest()

    texts = sorted(layout.texts, key=rank)
    selected = texts[:1]
    room = max_rows - len(texts[0].tokens)
    for text in texts[1:]:
        room -= len(text.tokens) - layout.prefix_length(text)
        if room < 0:
            break
        selected.append(text)
    prefix = 0 if all(text.plain for text in selected) else layout.prefix
    return PackedTexts(tuple(selected), prefix)


def mean_kl(p: Tensor, q: Tensor) -> float:
    """Return the mean over rows of `KL(p ‖ q)`, nats, for log-probabilities `[n, V]`."""
    return float(kl_divergence(p, q).cpu().double().mean())


def token_weights(states: Tensor, layout: PackedTexts) -> Tensor:
    """Return how much each token counts [rows]: shared prompt and sinks more than all others."""
    return row_weights(
        mean_square(states),
        layout,
        prompt=PROMPT_WEIGHT,
        sink=SINK_WEIGHT,
        own_sink=OWN_SINK_WEIGHT,
    )


def regression_weights(forward: LayerwiseForward) -> Tensor:
    """Return the weight of each row [rows] in a regression at the boundary of a forward pass."""
    weights = token_weights(forward.states, forward.layout)
    return over_mean_square(weights, mean_square(clip_sinks(forward.states)))
