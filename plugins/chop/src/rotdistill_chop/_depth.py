"""Which layers go: the run of least angular change, or the best that a dynamic programme on the KL finds.

Angles: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress

ROWS = 2048


def chosen(samples: Samples, split: str, rows: int) -> PackedTexts:
    """Return texts of a split, those that the teacher answered itself first, with at most `rows` rows (but at least one text).

    They come in the order of a hash of their id, so that a few of them are of all languages.
    """
    own = {question.id for question in samples.questions if question.answer is None}
    layout = samples.layout.select(split)
    texts = sorted(
        layout.texts,
        key=lambda text: (text.id not in own, hashlib.sha256(text.id.encode()).digest()),
    )
    taken, room = texts[:1], rows - len(texts[0].tokens)
    for text in texts[1:]:
        room -= len(text.tokens) - layout.prefix_length(text)
        if room < 0:
            break
        taken.append(text)
    return PackedTexts(tuple(taken), 0 if all(text.plain for text in taken) else layout.prefix)


class PruningLoss:
    """The KL on validation rows of streams of the uncut student, to what it says itself."""

    def __init__(
        self,
        weights: Weights,
        samples: Samples,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.walk = LayerwiseForward(weights, chosen(samples, "validation", rows), device, dtype)
        self.start = self.walk.states.clone()
        self.rows = self.walk.layout.prediction_rows("validation")[0]
        self.head = weights.head().to(self.start)
        self.said = self.says(weights, self.through([self.start], 0)[0])

    def says(self, weights: Weights, states: Tensor) -> Tensor:
        """Return the log-probabilities of the judged rows `[n, V]`, given final states `[rows, d]`."""
        head = self.head if weights is self.walk.weights else weights.head().to(states)
        return head_logits(weights, final_norm(weights, states[self.rows]), head).log_softmax(-1)

    def kl(self, states: Tensor, weights: Weights | None = None) -> float:
        """Return the mean KL of final states `[rows, d]`, of the uncut student or of what was made of it; nats per row."""
        made = self.says(weights or self.walk.weights, states)
        return float((self.said.exp() * (self.said - made)).sum(-1).double().mean())

    def through(
        self, streams: Iterable[Tensor], first: int, last: int | None = None
    ) -> list[Tensor]:
        """Send streams `[rows, d]` that stand at boundary `first` through all layers from there on, or up to boundary `last`."""
        made, walk = list(streams), self.walk
        walk.boundary = first
        for i in walk if made else ():
            if i == last:
                break
            for k, states in enumerate(made):
                walk.states, walk.boundary = states.clone(), i
                walk.run()
                made[k] = walk.states
        return made


class Stream(NamedTuple):
    """The rows behind some kept layers, and what it would cost to keep all layers that follow."""

    states: Tensor
    dropped: tuple[int, ...]
    kl: float


def least_kl(
    judge: PruningLoss, most: int, progress: Progress
) -> dict[int, tuple[list[int], float]]:
    """Return, for every number of layers to drop up to `most`, which to drop, and the KL without them.

    `D[l][r]` is the stream of least KL at boundary l with r layers dropped, where the KL is that of the stream sent through all
    layers from l on. It comes from `D[l-1][r]` through layer l-1, whose KL is known already, or from `D[l-1][r-1]` as it is.
    The first and the last layer stay. About `most * depth² / 2` passes of a layer over the rows.
    """
    depth = judge.walk.weights.depth
    best = {0: Stream(judge.start, (), 0.0)}
    for i in range(depth):
        free = [r for r in best if r < most] if 0 < i < depth - 1 else []
        ends = judge.through([best[r].states for r in free], i + 1)
        shorter = {
            r + 1: Stream(best[r].states, (*best[r].dropped, i), judge.kl(end))
            for r, end in zip(free, ends, strict=True)
        }
        kept = judge.through([stream.states for stream in best.values()], i, i + 1)
        best = {
            r: stream._replace(states=states)
            for (r, stream), states in zip(best.items(), kept, strict=True)
        }
        best |= {
            r: stream for r, stream in shorter.items() if r not in best or stream.kl < best[r].kl
        }
        progress(i + 1, depth, f"KL without layers, on {len(judge.rows)} rows")
    return {r: (list(stream.dropped), stream.kl) for r, stream in best.items()}


def least_angle(walk: LayerwiseForward, drop: int, progress: Progress) -> dict[int, float]:
    """Return the mean angle between input and output of each run of `drop` layers, by first layer; `walk` stands at the start.

    Rows of the shared prompt are left out: they are few, and position 0 is an attention sink.
    """
    some = torch.arange(walk.layout.prefix, walk.layout.rows)
    some = some[:: max(1, len(some) // ROWS)]
    recent = [walk.states[some]]
    angles: dict[int, float] = {}
    for i in walk:
        walk.run()
        recent.append(walk.states[some])
        if len(recent) > drop:
            before = recent.pop(0)
            cosine = torch.cosine_similarity(before.double(), recent[-1].double(), dim=-1).clamp(
                -1, 1
            )
            angles[i + 1 - drop] = float(cosine.acos().mean())
        progress(i + 1, walk.weights.depth, f"angles on {len(some)} rows")
    return angles
