"""The teacher's distribution on its continuations, and the student's KL to it.

The KL is measured in two ways: of the model that trains (`losses`, `kl`), and of a view of the
weights with the LoRA folded in (`scores`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.evaluation.acceptance import TextScores, scored_rows, scores_by_text
from rotdistill_core.evaluation.divergence import compare_logits, kl_divergence
from rotdistill_core.forward.head import head_for, log_probs, logits_of
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.forward.rope import tables_by_length
from rotdistill_prompt_kl._cost import EVALUATION_BATCH
from rotdistill_prompt_kl._lora import model_inside, wide_lora_product
from rotdistill_prompt_kl._loss import Divergence
from rotdistill_prompt_kl._student_texts import with_answers
from rotdistill_prompt_kl._teacher_states import KnownStates, states_beside, states_of_teacher

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


class Batch(NamedTuple):
    """Padded texts, as a model takes them."""

    ids: Tensor
    """Token ids `[texts, longest]`."""
    mask: Tensor
    """1 for tokens, 0 for padding `[texts, longest]`."""
    predicts_answer: Tensor
    """Places in the flattened batch whose next token is one of the answer [n]."""
    rows: Tensor
    """Rows of the layout at these positions [n]."""


class TrainingTexts(NamedTuple):
    """The texts that a LoRA is trained and validated on; both readings have the same order."""

    student: PackedTexts
    """As the student reads them."""
    teacher: PackedTexts
    """As the teacher reads them: the same ones, or with the system prompt that is baked in."""


class DistillationTargets:
    """Continuations, and the teacher's final states at their tokens (not its logits)."""

    def __init__(
        self,
        pair: Pair,
        texts: TrainingTexts,
        vocabulary: int,
        out: StepOutput,
        progress: Progress,
        bfloat16: bool = False,
        activations: ActivationStore | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.pair = pair
        self.vocabulary = vocabulary
        self.bfloat16 = bfloat16
        self.ranks = ranks
        states = states_of_teacher(pair, texts.teacher, activations, out, progress, ranks)
        self._take(texts, states)
        device = pair.student.device
        self.head = head_for(pair.teacher.weights, states[:0].to(device), vocabulary)

    def _take(self, texts: TrainingTexts, states: Tensor) -> None:
        """Take texts, and the teacher's states on them as it reads them."""
        self.layout = texts.student
        self.read = KnownStates(texts.teacher, states)
        if texts.teacher is not texts.student:
            # For each row of the student, that of the same token after the system prompt.
            states = states[pair_tokens(texts.student, texts.teacher)[:, 0]]
        self.states = states

    def answered(
        self,
        answers: Mapping[int, Sequence[int]],
        ending: str,
        out: StepOutput,
        progress: Progress,
    ) -> DistillationTargets:
        """Return the same texts, some with other answers, and the teacher's states on those.

        Args:
            answers: number of a text -> token ids of its answer.
            ending: tells these texts from others with the same prompts.
            out: takes what the teacher computes.
            progress: called once for each of its layers.
        """
        student = with_answers(self.layout, answers, ending)
        teacher = student
        if self.read.layout is not self.layout:
            teacher = with_answers(self.read.layout, answers, ending)
        states = states_beside(self.read, self.pair, teacher, out, progress, self.ranks)
        changed = copy(self)
        changed._take(TrainingTexts(student, teacher), states)
        return changed

    def losses(
        self,
        student: Any,
        weights: Weights,
        texts: list[int],
        divergence: Divergence = kl_divergence,
    ) -> Tensor:
        """Return the loss of every continuation token [n] of some texts, in float32 at least.

        Args:
            student: the model that trains.
            weights: the view that it was made of.
            texts: indices of texts of the layout.
            divergence: the loss of a token.
        """
        # Texts share a call only where each of them alone would have the same rotary tables.
        table_of = tables_by_length(model_inside(student).config)
        groups: dict[Hashable, list[int]] = {}
        for k in texts:
            groups.setdefault(table_of(len(self.layout.texts[k].tokens)), []).append(k)
        parts = [self._losses(student, weights, each, divergence) for each in groups.values()]
        return torch.cat(parts)

    def _losses(
        self, student: Any, weights: Weights, texts: list[int], divergence: Divergence
    ) -> Tensor:
        adapter, device = weights.adapter, self.pair.student.device
        batch = self._batch(texts)
        base = model_inside(student)
        body = base.get_submodule(adapter.body)
        head = base.get_submodule(adapter.head.removesuffix(".weight"))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            states = body(
                input_ids=batch.ids.to(device),
                attention_mask=batch.mask.to(device),
                use_cache=False,
            )[0].flatten(0, 1)[batch.predicts_answer.to(device)]
        # Outside of autocast: both heads multiply in float32.
        with torch.no_grad():
            T = self.states[batch.rows].to(device)
            p = log_probs(self.pair.teacher.weights, T, self.head)
        products = wide_lora_product(head, states)[:, : self.vocabulary]
        logits = logits_of(weights, products)
        return divergence(p, logits.log_softmax(-1))

    def _batch(self, texts: list[int]) -> Batch:
        """Return some texts of the layout as one batch, padded on the right."""
        chosen = [self.layout.texts[k] for k in texts]
        shape = len(chosen), max(len(text.tokens) for text in chosen)
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        predicts_answer = torch.zeros(shape, dtype=torch.bool)
        rows: list[Tensor] = []
        for b, (k, text) in enumerate(zip(texts, chosen, strict=True)):
            length = len(text.tokens)
            # Row of the text's token 0, if the shared prefix were the text's own.
            first = self.layout.starts[k] - self.layout.prefix_length(text)
            ids[b, :length] = torch.tensor(text.tokens)
            mask[b, :length] = 1
            predicts_answer[b, text.answer - 1 : length - 1] = True
            rows.append(torch.arange(first + text.answer - 1, first + length - 1))
        places = predicts_answer.flatten().nonzero().flatten()
        return Batch(ids, mask, places, torch.cat(rows))

    def kl(self, student: Any, weights: Weights, split: str) -> float:
        """Return the mean KL of the model that trains, over the tokens of a split, nats."""
        texts = [k for k, text in enumerate(self.layout.texts) if text.split == split]
        batches = [texts[k : k + EVALUATION_BATCH] for k in range(0, len(texts), EVALUATION_BATCH)]
        ends = list(accumulate((self.tokens(batch) for batch in batches), initial=0))
        values = torch.zeros(ends[-1], dtype=torch.float64)
        with torch.no_grad():
            for k in self.ranks.mine(range(len(batches))):
                losses = self.losses(student, weights, batches[k])
                values[ends[k] : ends[k + 1]] = losses.cpu().double()
        # All but one of the numbers that are added up are zero, so the sums are exact.
        self.ranks.add_up(values)
        return float(values.mean())

    def tokens(self, texts: Sequence[int]) -> int:
        """Return how many tokens of answers some texts of the layout have."""
        chosen = (self.layout.texts[k] for k in texts)
        return sum(len(text.tokens) - text.answer for text in chosen)

    def scores(self, samples: Samples, view: Weights, split: str) -> TextScores:
        """Return the KL of a view of the weights on a split, text by text."""
        layout, model = self.layout.select(split), self.pair.student
        forward = LayerwiseForward(view, layout, model.device, model.dtype, ranks=self.ranks)
        for _ in forward:
            forward.run()
        scored = scored_rows(layout, samples, split)
        states = forward.collected(scored.rows)

        def compare() -> TextScores:
            assert states is not None
            T = self.states[layout.row_indices_in(self.layout)][scored.rows]
            S = states.to(forward.device)
            teacher = self.pair.teacher.weights
            compared = compare_logits(teacher, T, view, S, scored.targets, self.vocabulary)
            return scores_by_text(compared.kl, scored.text)

        return self.ranks.lead(compare)
