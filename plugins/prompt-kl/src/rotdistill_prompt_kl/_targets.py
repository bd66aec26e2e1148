"""What the teacher says behind a prompt, and how far the student is from it: as it trains, and as it is folded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotdistill_core.evaluation.acceptance import (
    TextScores,
    scored_rows,
    scores_by_text,
    teacher_final_states,
)
from rotdistill_core.evaluation.divergence import compare_logits
from rotdistill_core.forward.head import log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


class DistillationTargets:
    """The continuations, and the teacher's final states at their tokens."""

    def __init__(
        self,
        pair: Pair,
        layout: PackedTexts,
        tokens: int,
        out: StepOutput,
        progress: Progress,
        narrow: bool = False,
    ) -> None:
        self.pair, self.layout, self.tokens, self.narrow = pair, layout, tokens, narrow
        self.states = teacher_final_states(pair.teacher, layout, out, progress).clone()
        self.head = pair.teacher.weights.head()[:tokens].to(self.states.dtype)

    def losses(self, student: Any, weights: Weights, texts: list[int]) -> Tensor:
        """Return the KL of every continuation token of some texts [n], in float32 at least."""
        device, adapter = self.pair.student.device, weights.adapter
        some = [self.layout.texts[k] for k in texts]
        longest = max(len(text.tokens) for text in some)
        ids, mask = (
            torch.zeros(len(some), longest, dtype=torch.long),
            torch.zeros(len(some), longest, dtype=torch.long),
        )
        wanted, rows = torch.zeros(len(some), longest, dtype=torch.bool), []
        for b, (k, text) in enumerate(zip(texts, some, strict=True)):
            n, first = len(text.tokens), self.layout.starts[k] - self.layout.prefix_length(text)
            ids[b, :n], mask[b, :n] = torch.tensor(text.tokens), 1
            wanted[b, text.answer - 1 : n - 1] = True
            rows.append(torch.arange(first + text.answer - 1, first + n - 1))
        base = student.get_base_model()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.narrow):
            body = base.get_submodule(adapter.body)
            states = body(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            )[0][wanted.to(device)]
            made = base.get_submodule(adapter.head.removesuffix(".weight"))(states)[
                :, : self.tokens
            ]
            with torch.no_grad():
                p = log_probs(
                    self.pair.teacher.weights, self.states[torch.cat(rows)], self.head, self.tokens
                ).to(device)
        cap = weights.config.get(adapter.softcap_key)
        wide = torch.promote_types(made.dtype, torch.float32)
        q = (made if cap is None else cap * (made / cap).tanh()).to(wide).log_softmax(-1)
        kl: Tensor = (p.exp() * (p - q)).sum(-1)
        return kl

    def kl(self, student: Any, weights: Weights, split: str) -> float:
        """Return the mean KL over the continuation tokens of a split, nats, of the student as it trains."""
        texts = [k for k, text in enumerate(self.layout.texts) if text.split == split]
        with torch.no_grad():
            parts = [
                self.losses(student, weights, texts[k : k + 4]) for k in range(0, len(texts), 4)
            ]
        return float(torch.cat(parts).double().mean())

    def scores(self, view: Weights, split: str, samples: Samples) -> TextScores:
        """Return the KL of a view of weights on a split, text by text."""
        layout = self.layout.select(split)
        walk = LayerwiseForward(view, layout, self.pair.student.device, self.pair.student.dtype)
        for _ in walk:
            walk.run()
        rows, targets, text = scored_rows(layout, samples, split)
        T = self.states[layout.row_indices_in(self.layout)][rows]
        return scores_by_text(
            compare_logits(
                self.pair.teacher.weights, T, view, walk.states[rows], targets, self.tokens
            ).kl,
            text,
        )
