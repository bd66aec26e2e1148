"""Whether an edit is better on validation texts by more than chance, and how much of it a guard allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.forward.layerwise import LayerwiseForward

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


BACKOFF = (1.0, 0.5, 0.25, 0.1)
"""Shares of an edit that a guard may choose from."""
MIN_TEXTS = 4
"""Texts below which a spread over texts says nothing."""


def teacher_final_states(
    teacher: Model, layout: PackedTexts, out: StepOutput, progress: Progress
) -> Tensor:
    """Return the teacher's final states [rows, d_t] on a layout. They are walked once and kept for every run under the same folder."""
    kept = out.shared(
        "final states", teacher.sha256, layout.digest(), str(teacher.dtype), teacher.device.type
    )
    path = kept.find("shards/final.safetensors")
    if path is None:
        walk = LayerwiseForward(teacher.weights, layout, teacher.device, teacher.dtype)
        for i in walk:
            walk.run()
            progress(
                i + 1, teacher.depth, f"teacher on {len(layout.texts)} texts, {layout.rows} rows"
            )
        path = kept.tensors("shards/final.safetensors", {"rows": walk.states.cpu()})
    return open_tensors(path)["rows"].read()


class ScoredRows(NamedTuple):
    """Rows by which an edit is judged."""

    rows: Tensor
    """Rows of the layout [n]; each predicts the next token."""
    targets: Tensor
    """Those tokens [n]."""
    text: Tensor
    """The number of each row's text in the layout [n]."""


def scored_rows(
    layout: PackedTexts, samples: Samples, split: str, most: int | None = None
) -> ScoredRows:
    """Return at most about `most` rows, evenly spread, that predict answers in the texts of a split.

    Where the teacher answered some of the split's questions itself only those count: it is such answers that the student is scored on.
    """
    own = {question.id for question in samples.questions if question.answer is None}
    rows, targets, texts = layout.prediction_rows(split)
    number = {text.id: k for k, text in enumerate(layout.texts)}
    text = torch.tensor([number[t.id] for t in texts], dtype=torch.long)
    use = torch.tensor([t.id in own for t in texts], dtype=torch.bool)
    use = use if bool(use.any()) else ~use
    some = slice(None, None, max(1, -(-int(use.sum()) // most)) if most else 1)
    return ScoredRows(rows[use][some], targets[use][some], text[use][some])


class TextScores(NamedTuple):
    """The KL of an edit, text by text."""

    total: Tensor
    """Sum of the KL over each text's judged rows [texts], nats."""
    rows: Tensor
    """How many rows of each text were judged [texts]."""

    @property
    def mean(self) -> float:
        """Mean KL of a row, nats."""
        return float(self.total.sum() / self.rows.sum())


def scores_by_text(kl: Tensor, text: Tensor) -> TextScores:
    """Return the scores of rows `kl [n]` that belong to the texts numbered `text [n]`; a value that is not finite makes the mean so."""
    texts, where, rows = torch.unique(text, return_inverse=True, return_counts=True)
    return TextScores(
        torch.zeros(len(texts), dtype=torch.float64).index_add(0, where, kl.double()), rows.double()
    )


def significantly_lower(before: TextScores, after: TextScores) -> bool:
    """Say whether the mean KL falls by more than one standard error of its change, over texts.

    The error is that of a ratio of sums (Cochran, Sampling Techniques, 1977, section 2.11). Fewer than `FEWEST` texts, or a KL that is
    not finite, are never better.
    """
    change, rows, n = after.total - before.total, after.rows, len(after.rows)
    if n < MIN_TEXTS or not bool(torch.isfinite(change).all()):
        return False
    mean = float(change.sum() / rows.sum())
    error = float((change - mean * rows).pow(2).sum().mul(n / (n - 1)).sqrt() / rows.sum())
    return mean + error < 0


def interpolate(before: Weights, after: Weights, share: float) -> Weights:
    """Return the view `before + share (after - before)`, for two views of one shape."""
    if share == 1.0:
        return after
    changed = {
        name: entry
        for name, entry in after.entries.items()
        if name not in before.entries or entry is not before.entries[name]
    }
    start = before if after.tied else before.untie()

    def read(name: str, entry: LazyTensor) -> Tensor:
        old = start[name].double()
        return (old + share * (entry.read().double() - old)).to(entry.dtype)

    return after.edit(
        {n: LazyTensor(e.shape, e.dtype, lambda n=n, e=e: read(n, e)) for n, e in changed.items()}
    )  # type: ignore[misc]


def accept_if_better(
    before: Weights,
    after: Weights,
    score: Callable[[Weights, str], TextScores],
    guard: float | None,
    out: StepOutput,
) -> Weights:
    """Return as much of an edit as the guard allows, or the weights before it where that is not better; the notes say which and why.

    Args:
        before: the weights that the edit started from.
        after: the whole edit.
        score: KL of a view on a split, `validation` or `guard-validation`.
        guard: most that the KL on the guard's validation half may grow to, as a multiple of what it was; None for no guard.
        out: the step's output; its notes and its report are filled in.
    """
    start, kept = score(before, "validation"), after
    if guard is not None:
        own = score(before, "guard-validation").mean
        costs = {1.0: score(after, "guard-validation").mean}
        for share in BACKOFF:
            kept = interpolate(before, after, share)
            costs[share] = costs.get(share) or score(kept, "guard-validation").mean
            if costs[share] <= guard * own:
                break
        else:
            kept = before
        out.notes |= {
            "guard KL before": own,
            "guard KL by strength": {f"{share:g}": kl for share, kl in costs.items()},
        }
    end = score(kept, "validation")
    out.notes |= {"validation KL before": start.mean, "validation KL after": end.mean}
    if kept is before:
        out.report.refused = f"at every strength the guard's KL would grow beyond {guard:g} times what it was; the weights are left as they were"
    elif not significantly_lower(start, end):
        move = f"from {start.mean:.4f} to {end.mean:.4f}"
        out.report.refused = f"validation KL would go {move}, no gain beyond chance; the weights are left as they were"
        kept = before
    return kept
