"""Accept, scale down or revert an edit: paired test on validation KL, cap on out-of-domain KL.

An edit is scored on rows that predict answers of validation texts. It is kept when the KL to the
teacher falls there by more than chance. A guard caps the KL on texts outside the domain: only so
much of the edit is kept that the KL on them stays within a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.guard import HARMLESS_KL, largest_allowed_kl
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.plugin.source_code import core_digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.results import Caution, CautionKind, Remedy

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


BACKOFF = (1.0, 0.5, 0.25, 0.1)
"""Shares of an edit that are tried until one is within the guard."""
MAX_SCORED_ROWS = 1024
"""Rows on which a step scores an edit, unless it needs more."""
MIN_TEXTS = 4
"""Fewest texts over which a standard error is estimated."""
MORE_LESSONS = "lessons.count"
"""Override that the run completes (`execution.remedies`): how many lessons, and where from."""
MORE_TEXTS = Remedy("more texts to fit on: your own, or lessons of the teacher", (MORE_LESSONS,))
"""What helps an edit of any kind that does not carry over to validation texts."""

SHARES_IN_WORDS = {0.5: "half", 0.25: "a quarter", 0.1: "a tenth"}
OVERFIT_RATIO = 5.0
"""KL on validation texts over that on fitted ones from which an edit is called overfitted. Refits
on hundreds of texts have 2 to 3."""

Score = Callable[[Weights, Split], "TextScores"]
"""View of the weights, split -> the KL to the teacher, text by text."""


def teacher_final_states(
    teacher: Model,
    layout: PackedTexts,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the teacher's states after the last layer, before the final norm, `[rows, d_t]`.

    They are computed once. Every run under the same folder finds them again by models and texts.
    Processes share the texts; the leading one gathers and commits the rows.
    """
    shared = out.shared(
        "final states",
        teacher.sha256,
        teacher.table_code,
        layout.digest(),
        str(teacher.dtype),
        teacher.device.type,
        code=core_digest("evaluation.acceptance"),
    )

    def found() -> str:
        path = shared.find(RunLayout.FINAL_STATES)
        return shared.relative(path) if path else ""

    path = ranks.lead(found)
    if not path:
        forward = LayerwiseForward(
            teacher.weights, layout, teacher.device, teacher.dtype, ranks=ranks
        )
        size = f"{len(layout.texts)} texts, {layout.rows} rows"
        for layer in forward:
            forward.run()
            progress(layer + 1, teacher.depth, f"teacher on {size}")
        states = forward.collected()

        def commit() -> str:
            assert states is not None
            return shared.relative(shared.tensors(RunLayout.FINAL_STATES, {"rows": states}))

        path = ranks.lead(commit)
    return open_tensors(out.store.root / path)["rows"].read()


def paired_final_states(
    teacher: Model,
    samples: Samples,
    layout: PackedTexts,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the teacher's final states for the rows of texts as the student reads them.

    Args:
        teacher: the teacher, of the student's vocabulary.
        samples: all texts, in both readings.
        layout: texts of `samples.layout`.
        out: takes what has to be computed; see `teacher_final_states`.
        progress: called once for each layer.
        ranks: the processes that share the texts.

    Returns:
        A row for each row of `layout`, `[rows, d_t]`. With a baked system prompt it is that of the
        same token after the prompt; rows of the template alone have none of their own.
    """
    read = samples.read_by_teacher(layout)
    states = teacher_final_states(teacher, read, out, progress, ranks)
    return states if read is layout else states[pair_tokens(layout, read)[:, 0]]


class ScoredRows(NamedTuple):
    """Rows on which an edit is scored."""

    rows: Tensor
    """Rows of the layout [n]; each predicts the next token."""
    targets: Tensor
    """Those tokens [n]."""
    text: Tensor
    """The number of each row's text in the layout [n]; copies have that of the first of them."""


def scored_rows(
    layout: PackedTexts, samples: Samples, split: str, limit: int | None = None
) -> ScoredRows:
    """Return rows that predict answers in the texts of a split: all, or `limit` evenly spread.

    Variants are reported on answers that the teacher wrote. So where the teacher answered some
    questions of the split, only the rows of those answers are scored. Copies of a text are one text
    to a test over texts: they say the same about a change.
    """
    teacher_answered = samples.teacher_answered()
    rows, targets, texts = layout.prediction_rows(split)
    first: dict[tuple[int, ...], int] = {}
    for k, each in enumerate(layout.texts):
        first.setdefault(each.tokens, k)
    text = torch.tensor([first[t.tokens] for t in texts], dtype=torch.long)
    use = torch.tensor([t.id in teacher_answered for t in texts], dtype=torch.bool)
    if not bool(use.any()):
        use = ~use
    stride = max(1, -(-int(use.sum()) // limit)) if limit else 1
    spread = slice(None, None, stride)
    return ScoredRows(rows[use][spread], targets[use][spread], text[use][spread])


class TextScores(NamedTuple):
    """The KL of a view of the weights, text by text."""

    total: Tensor
    """Sum of the KL over each text's scored rows [texts], nats."""
    rows: Tensor
    """Number of scored rows of each text [texts]."""

    @property
    def mean(self) -> float:
        """Mean KL of a row, nats."""
        return float(self.total.sum() / self.rows.sum())


def scores_by_text(kl: Tensor, text: Tensor) -> TextScores:
    """Add up the KL of rows `kl [n]` over the texts with numbers `text [n]`.

    A value that is not finite makes the mean not finite.
    """
    texts, place, rows = torch.unique(text, return_inverse=True, return_counts=True)
    total = torch.zeros(len(texts), dtype=torch.float64).index_add(0, place, kl.double())
    return TextScores(total, rows.double())


def significantly_lower(before: TextScores, after: TextScores) -> bool:
    """Return whether the mean KL falls by more than one standard error of its change, over texts.

    The mean is a ratio of sums, `Σ change / Σ rows`, and so is its error (Cochran, Sampling
    Techniques, 1977, section 2.11). The answer is no for fewer than `MIN_TEXTS` texts, and for
    a KL that is not finite.
    """
    change = after.total - before.total
    rows = after.rows
    n = len(rows)
    if n < MIN_TEXTS or not bool(torch.isfinite(change).all()):
        return False
    mean = float(change.sum() / rows.sum())
    # Residuals of the ratio estimate: what a text changes beyond its share of rows.
    squares = (change - mean * rows).pow(2).sum()
    error = float(squares.mul(n / (n - 1)).sqrt() / rows.sum())
    return mean + error < 0


def interpolate(before: Weights, after: Weights, share: float) -> Weights:
    """Return the view `before + share (after - before)` of two views of one shape.

    Tensors are blended in float64 when they are read.
    """
    if share == 1.0:
        return after
    start = before if after.tied else before.untie()
    changed = {
        name: entry
        for name, entry in after.entries.items()
        if name not in before.entries or entry is not before.entries[name]
    }

    def read(name: str, entry: LazyTensor) -> Tensor:
        old = start[name].double()
        return (old + share * (entry.read().double() - old)).to(entry.dtype)

    between = {
        name: LazyTensor(entry.shape, entry.dtype, partial(read, name, entry))
        for name, entry in changed.items()
    }
    return after.edit(between)


def largest_allowed_share(
    shares: Sequence[float], ood_kl: Callable[[float], float], limit: float
) -> float:
    """Return the first of `shares` whose out-of-domain KL is at most `limit`, or 0.

    Args:
        shares: shares of an edit, the largest first.
        ood_kl: share -> KL on texts outside the domain, nats.
        limit: largest KL that is allowed, nats.
    """
    for share in shares:
        if ood_kl(share) <= limit:
            return share
    return 0.0


def refuse(out: StepOutput, reason: str, remedies: Sequence[Remedy]) -> None:
    """Report that a step leaves the weights as they were.

    Args:
        out: output of the step.
        reason: why; no sentence end.
        remedies: what to try next, the most promising first.
    """
    out.report.refused = f"{reason}; the weights are left as they were"
    out.report.remedies = tuple(dict.fromkeys(remedies))


def refuse_without_gain(
    out: StepOutput, before: TextScores, after: TextScores, remedies: Sequence[Remedy]
) -> None:
    """Report that an edit is no gain on validation texts, and why that can be.

    Args:
        out: output of the step.
        before: validation KL before the edit.
        after: validation KL of the best candidate.
        remedies: what to change in the step's options.
    """
    change = f"validation KL would go from {before.mean:.4f} to {after.mean:.4f}"
    texts = len(after.rows)
    if texts < MIN_TEXTS:
        few = f"{change}, but {texts} validation texts are too few to tell a gain from chance"
        more = f"more texts in samples.index, so that {MIN_TEXTS} or more are for validation"
        refuse(out, few, [Remedy(more), Remedy("a larger share of them as samples.validation")])
        return
    # A fall that is within chance may be a gain that more texts would show.
    lower = after.mean < before.mean
    judged_by = Remedy("more texts to judge by, in samples.index or as samples.validation")
    first = [judged_by] if lower else []
    refuse(out, f"{change}, no gain beyond chance", [*first, *remedies, MORE_TEXTS])


def wider_guard(guard: float) -> list[Remedy]:
    """Return what to try next where a guard does not allow all of an edit."""
    wider = 1 + 2 * (guard - 1) if guard > 1 else 1.1
    general = "lessons outside the domain, which the edit then learns too"
    return [
        Remedy("a wider guard", (f"guard={wider:g}",)),
        Remedy(general, (MORE_LESSONS, "lessons.general=0.5")),
    ]


def refuse_by_guard(
    out: StepOutput, where: str, guard: float, remedies: Sequence[Remedy] = ()
) -> None:
    """Report that a guard allows nothing of an edit.

    Args:
        out: output of the step.
        where: of which edits that is so: `at every strength`.
        guard: the limit, as a multiple of the KL before the edit.
        remedies: what to change in the step's options, after the guard.
    """
    reason = f"{where} the KL on the guard's texts would exceed {guard:g} times its value before"
    shown = f"{reason} the edit, and {HARMLESS_KL:g} nats"
    refuse(out, shown, [*wider_guard(guard), *remedies])


def caution_of_guard(
    part: str, guard: float, *, before: float, whole: float, allowed: float, subject: str
) -> Caution:
    """Return what a user should know of an edit of which the guard allows a part only.

    Args:
        part: what is applied: `half of it`.
        guard: the limit, as a multiple of the KL before the edit.
        before: KL on the guard's texts before the edit, nats per token.
        whole: the same after what the guard does not allow.
        allowed: the largest that is allowed.
        subject: what the guard does not allow: `all of it`.
    """
    reason = (
        f"{part}, the guard allows no more ({subject} would bring the KL on the half of the guard's"
        f" texts that decides from {before:.3f} to {whole:.3f}, and {allowed:.3f} is allowed "
        "there; the reported guard KL is of the other half and may differ)"
    )
    return Caution(CautionKind.GUARDED, reason, tuple(wider_guard(guard)))


def accept_if_better(
    before: Weights,
    after: Weights,
    score: Score,
    guard: float | None,
    out: StepOutput,
    remedies: Sequence[Remedy] = (),
) -> Weights:
    """Return as much of an edit as the guard allows, or `before` if validation KL does not fall.

    It falls when the change is beyond chance (`significantly_lower`). The reason for a refusal
    and what to try next are written to `out.report`, the KL values to the notes.

    Args:
        before: the weights before the edit.
        after: the whole edit.
        score: KL of a view, text by text; called with `VALIDATION` and `GUARD_VALIDATION`.
        guard: limit on the KL on the guard's validation half, as a multiple of its value before
            the edit (`guard_of`); None for no limit.
        out: output of the step.
        remedies: what to change in the step's options if the edit is no gain.
    """
    start = score(before, Split.VALIDATION)
    kept, caution = after, None
    if guard is not None:
        kept, caution = _within_guard(before, after, score, guard, out)
    end = score(kept, Split.VALIDATION)
    out.notes |= {"validation KL before": start.mean, "validation KL after": end.mean}
    if kept is before:
        assert guard is not None
        refuse_by_guard(out, "at every strength", guard, remedies)
    elif not significantly_lower(start, end):
        refuse_without_gain(out, start, end, [*(caution.remedies if caution else ()), *remedies])
        kept = before
    elif caution:
        out.report.cautions.append(caution)
    return kept


def caution_of_overfit(
    out: StepOutput, fit: float, validation: float, remedies: Sequence[Remedy] = ()
) -> None:
    """Report that an edit learned its texts by heart, where it did.

    Both figures are of the whole edit, also where the guard allows a part of it only.

    Args:
        out: output of the step.
        fit: KL on the texts that it was fitted on, nats per row.
        validation: KL on validation texts.
        remedies: what to change in the step's options, after more texts.
    """
    if out.report.refused or validation <= OVERFIT_RATIO * fit:
        return
    reason = (
        f"it has learned its texts by heart: with all of it the KL is {fit:.3f} on texts that it "
        f"was fitted on, and {validation:.3f} on validation texts"
    )
    caution = Caution(CautionKind.OVERFITTED, reason, (MORE_TEXTS, *remedies))
    out.report.cautions.append(caution)


def _within_guard(
    before: Weights, after: Weights, score: Score, guard: float, out: StepOutput
) -> tuple[Weights, Caution | None]:
    """Return the largest share of an edit that the guard allows: `before` itself if none is.

    With a part comes what the user should know of it.
    """
    kl_before = score(before, Split.GUARD_VALIDATION).mean
    kl_by_share: dict[float, float] = {}

    def ood_kl(share: float) -> float:
        view = interpolate(before, after, share)
        kl_by_share[share] = score(view, Split.GUARD_VALIDATION).mean
        return kl_by_share[share]

    limit = largest_allowed_kl(guard, kl_before)
    share = largest_allowed_share(BACKOFF, ood_kl, limit)
    out.notes |= {
        "guard KL before": kl_before,
        "guard KL allowed": limit,
        "guard KL by strength": {f"{tried:g}": kl for tried, kl in kl_by_share.items()},
    }
    if not share:
        return before, None
    caution = None
    if share < 1:
        caution = caution_of_guard(
            f"{SHARES_IN_WORDS[share]} of it",
            guard,
            before=kl_before,
            whole=kl_by_share[BACKOFF[0]],
            allowed=limit,
            subject="all of it",
        )
    return interpolate(before, after, share), caution
