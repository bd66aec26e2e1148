"""Ridge regression of the head onto the teacher's logits, without any logits.

The teacher's logits are `h_t W_tᵀ`. So with states after the final norm `X_s [T, d_s]` and
`X_t [T, d_t]`, their second moments are all that the fit needs:

    C_ss = X_sᵀ X_s,   C_st = X_sᵀ X_t
    argmin_W  Σ ‖x_s Wᵀ - x_t W_tᵀ‖² + λ ‖W - W_s‖²
        = (W_t C_stᵀ + λ W_s)(C_ss + λI)⁻¹ = W_t Aᵀ + W_s Bᵀ   [V, d_s]
    A = (C_ss + λI)⁻¹ C_st [d_s, d_t],   B = λ (C_ss + λI)⁻¹ [d_s, d_s]

Only A and B are solved for, whatever the size of the vocabulary (Hoerl and Kennard,
Technometrics 12, 1970).

Where models divide their logits (by s_s and s_t), the student's products have to be `s_s / s_t`
times the teacher's: W_t stands for `s_s / s_t W_t` above. A soft cap is left out of the fit. Every
KL that heads are compared by is that of the logits as the models compute them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SingularError
from rotdistill_core.evaluation.acceptance import (
    MAX_SCORED_ROWS,
    MORE_TEXTS,
    SHARES_IN_WORDS,
    ScoredRows,
    TextScores,
    caution_of_guard,
    largest_allowed_share,
    refuse,
    refuse_by_guard,
    refuse_without_gain,
    scored_rows,
    scores_by_text,
    significantly_lower,
)
from rotdistill_core.evaluation.divergence import kl_divergence, shared_vocabulary
from rotdistill_core.evaluation.guard import guard_of, largest_allowed_kl
from rotdistill_core.forward.head import logits_of, logits_scaling
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import ridge
from rotdistill_core.store.results import Remedy
from rotdistill_lm_head_ridge._final_states import StudentStates, TeacherStates
from rotdistill_lm_head_ridge._logit_map import (
    RowFunction,
    fit_logit_map,
    reduced_targets,
    top_tokens,
)
from rotdistill_lm_head_ridge._reading import NormedRows, ReadStates, read_states
from rotdistill_lm_head_ridge.step import BLOCK_ROWS

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_core.store.results import Caution
    from rotdistill_lm_head_ridge.step import LmHeadRidge


MAP_SHARES = (1.0, 0.5, 0.25)
"""Shares of the map that are tried until one is within the guard. The core's `BACKOFF` goes one
step further down; the figures of this step are with these three."""
MIN_GAIN = 1e-6
"""A head is better if its KL is lower by this many nats; less is rounding."""


class RidgeSolution(NamedTuple):
    """The two matrices of a ridge head, `W = W_t Aᵀ + W_s Bᵀ`."""

    A: Tensor
    """`(C_ss + λI)⁻¹ C_st [d_s, d_t]`."""
    B: Tensor
    """`λ (C_ss + λI)⁻¹ [d_s, d_s]`."""


class Candidate(NamedTuple):
    """A head to choose from: the student's own plus a share of its difference to a ridge head."""

    ridge: float
    """λ as a multiple of the mean diagonal of `C_ss`; 0 for the student's own head."""
    blend: float
    """Share of the ridge head."""

    def __str__(self) -> str:
        """Return its options in words."""
        return f"ridge {self.ridge:g} and blend {self.blend:g}"


OWN_HEAD = Candidate(0.0, 0.0)


class ScoredHead(NamedTuple):
    """A head and its mean KL on the validation rows."""

    head: Tensor
    """`[V, d_s]`."""
    kl: float
    """Nats per row."""
    cautions: tuple[Caution, ...] = ()
    """What the guard did not allow, of what would have been better on the validation rows."""


class TeacherHead(NamedTuple):
    """The teacher's final states and its head: together, its logits."""

    rows: NormedRows
    """On the student's rows `[rows, d_t]`."""
    head: Tensor
    """`[V, d_t]`, without padding tokens."""
    moments: Moments
    """Of both models' rows to fit on that are paired, after their final norms."""

    def head_for(self, problem: HeadProblem) -> Tensor:
        """Return the head whose products with the teacher's rows a student's should be `[V, d_t]`.

        It is the teacher's, unless the two models divide their logits by different numbers.
        """
        ratio = logits_scaling(problem.X.weights) / logits_scaling(self.rows.weights)
        return self.head if ratio == 1.0 else ratio * self.head


class OutOfDomain(NamedTuple):
    """The limit that a guard sets."""

    rows: Tensor
    """Rows of the guard's texts [n]."""
    guard: float
    """Multiple of the KL before that is allowed."""
    kl_before: float
    """Mean KL of the student's own head on these rows, nats."""
    max_kl: float
    """Largest mean KL on these rows that a head may have, nats."""

    def caution(self, part: str, subject: str, kl: float) -> Caution:
        """Return that `part` is applied, because the KL on these rows would be `kl` with
        `subject`."""
        return caution_of_guard(
            part,
            self.guard,
            before=self.kl_before,
            whole=kl,
            allowed=self.max_kl,
            subject=subject,
        )


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """States on which heads are fitted and compared, and the distribution that they should have."""

    layout: PackedTexts
    X: NormedRows
    """The student's rows `[rows, d_s]`."""
    head: Tensor
    """The student's own head `[V, d_s]`, without padding tokens."""
    target_log_probs: RowFunction
    """Rows [n] -> log-probabilities `[n, V]`: the teacher's, or those of the next tokens."""
    validation: Tensor
    """Rows by whose KL heads are chosen [n]."""
    validation_text: Tensor
    """The number of each validation row's text [n]."""

    def kl(self, rows: Tensor, head: Tensor) -> Tensor:
        """Return the KL of rows [n] under a head.

        `compare_logits` of the core starts from states before the norm, and takes other blocks: its
        last digits differ.
        """
        parts = []
        for k in range(0, len(rows), BLOCK_ROWS):
            block = rows[k : k + BLOCK_ROWS]
            q = self.student_logits(head, block).log_softmax(-1)
            parts.append(kl_divergence(self.target_log_probs(block), q))
        return torch.cat(parts).cpu()

    def student_logits(self, head: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of rows `[n, V]` under a head."""
        return self.X.logits(rows, head)

    def linear_logits(self, head: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of rows `[n, V]` under a head as they are before a soft cap."""
        return self.X[rows] @ (head / logits_scaling(self.X.weights)).T

    def validation_kl(self, head: Tensor) -> float:
        """Return the mean KL of a head on the validation rows, nats."""
        return float(self.kl(self.validation, head).mean())


def fit_head(
    step: LmHeadRidge,
    weights: Weights,
    activations: ActivationStore,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Weights:
    """Return the weights with the fitted head, or as they are if none is better beyond chance.

    Processes share the passes and the sums. The leading one fits and chooses the head, and alone
    returns it; the others return the weights as they are.

    Raises:
        RecipeError: a guard without texts outside the domain.
        SetupError: teacher and student have different tokenizers.
    """
    shared_vocabulary(pair)  # raises before the work
    guard = guard_of(step.guard, samples, step.use)
    texts = FitTexts.of(step, ranks.lead(partial(_texts_of, step, samples, guard)), samples)
    read = read_states(
        StudentStates.of(weights, activations, pair.student, texts.layout, ranks),
        None if step.objective == "next-token" else TeacherStates(activations, pair, samples),
        texts.layout,
        texts.judged,
        progress,
        ranks,
    )
    fit = partial(with_best_head, step, weights, pair, texts, read, guard, out, progress)
    return ranks.lead_alone(fit, weights)


class FitTexts(NamedTuple):
    """The texts of a fit, and those of their rows that are looked at one by one."""

    layout: PackedTexts
    scored: ScoredRows
    """Validation rows, by whose KL heads are chosen."""
    mapped: Tensor
    """Rows to fit a map on [n]."""

    @classmethod
    def of(cls, step: LmHeadRidge, layout: PackedTexts, samples: Samples) -> FitTexts:
        """Choose the rows of a layout."""
        mapped = torch.zeros(0, dtype=torch.long)
        if step.objective != "ridge":
            mapped = map_rows(layout, samples.teacher_answered(), step.max_rows)
        scored = scored_rows(layout, samples, Split.VALIDATION, MAX_SCORED_ROWS)
        return cls(layout, scored, mapped)

    @property
    def judged(self) -> Tensor:
        """All rows that heads are judged by, those of the guard among them [n]."""
        outside = self.layout.prediction_rows(Split.GUARD_VALIDATION)[0]
        return torch.cat([self.scored.rows, self.mapped, outside])


def with_best_head(
    step: LmHeadRidge,
    weights: Weights,
    pair: Pair,
    texts: FitTexts,
    read: ReadStates,
    guard: float | None,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the weights with the best head, or as they are if none is better beyond chance.

    Args:
        step: what heads are tried.
        weights: the student.
        pair: both models, of one vocabulary.
        texts: the texts, and the rows that heads are judged by.
        read: what is kept of both models' final states on them.
        guard: how much worse a head may be outside the domain; see `guard_of`.
        out: its notes describe the fit.
        progress: called for each part of the fit.
    """
    vocabulary = shared_vocabulary(pair)
    X = read.student
    H_s = X.head(vocabulary)
    teacher = None
    target_log_probs = partial(next_token_log_probs, texts.layout, vocabulary, X.device)
    if read.teacher is not None:
        head = read.teacher.head(vocabulary)
        teacher = TeacherHead(read.teacher, head, read.moments)
        target_log_probs = partial(teacher_log_probs, teacher)
    problem = HeadProblem(
        layout=texts.layout,
        X=X,
        head=H_s,
        target_log_probs=target_log_probs,
        validation=texts.scored.rows,
        validation_text=texts.scored.text,
    )
    before = best = ScoredHead(H_s, problem.validation_kl(H_s))
    limit = ood_limit(problem, guard)

    if teacher is not None:
        best = choose_ridge_head(step, problem, teacher, before, limit, out)
    progress(1, 1, f"ridge: KL {before.kl:.4f} to {best.kl:.4f}")
    if step.objective != "ridge":
        best = map_head(step, problem, best, texts.mapped, limit, out, progress)

    out.notes |= {"validation KL before": before.kl, "validation KL after": best.kl}
    if limit is not None:
        out.notes |= {"guard KL before": limit.kl_before, "guard KL allowed": limit.max_kl}
    remedies = remedies_of(step)
    if best.head is H_s and best.cautions:
        assert limit is not None
        where = "with every head that lowers the validation KL"
        refuse_by_guard(out, where, limit.guard, [*remedies, MORE_TEXTS])
        return weights
    if best.head is H_s:
        refuse(out, "no candidate lowers the validation KL", [*remedies, MORE_TEXTS])
        return weights
    scores_before, scores_after = (_scores(problem, H) for H in (H_s, best.head))
    if not significantly_lower(scores_before, scores_after):
        wider = [remedy for caution in best.cautions for remedy in caution.remedies]
        refuse_without_gain(out, scores_before, scores_after, [*wider, *remedies])
        return weights
    out.report.cautions += best.cautions
    # Rows of padding tokens keep their values.
    whole = weights.head().to(X.states.dtype, copy=True)
    whole[:vocabulary] = best.head.to(whole)
    return weights.untie().edit({weights.adapter.head: whole})


def remedies_of(step: LmHeadRidge) -> list[Remedy]:
    """Return what to try next where no head is a gain on validation texts."""
    largest = max(step.ridge)
    remedies = [Remedy("a larger ridge", (f"ridge=[{largest:g}, {10 * largest:g}]",))]
    if step.objective == "ridge":
        remedies.append(Remedy("a map that is fitted to the KL itself", ("objective=kl",)))
    return [*remedies, Remedy("leaving the step out where a refit goes before it")]


def _texts_of(step: LmHeadRidge, samples: Samples, guard: float | None) -> PackedTexts:
    """Return the fit texts, then those of validation, and those of the guard if there is one."""
    fit = samples.layout.select(Split.FIT, limit=step.max_texts)
    splits = (Split.VALIDATION, Split.GUARD_VALIDATION) if guard else (Split.VALIDATION,)
    return replace(fit, texts=fit.texts + samples.layout.select(*splits).texts)


def ood_limit(problem: HeadProblem, guard: float | None) -> OutOfDomain | None:
    """Return the rows of the guard and the largest KL that a head may have on them."""
    if guard is None:
        return None
    rows = problem.layout.prediction_rows(Split.GUARD_VALIDATION)[0]
    before = float(problem.kl(rows, problem.head).mean())
    return OutOfDomain(rows, guard, before, largest_allowed_kl(guard, before))


def _scores(problem: HeadProblem, head: Tensor) -> TextScores:
    """Return the validation KL of a head, text by text."""
    return scores_by_text(problem.kl(problem.validation, head), problem.validation_text)


def choose_ridge_head(
    step: LmHeadRidge,
    problem: HeadProblem,
    teacher: TeacherHead,
    before: ScoredHead,
    limit: OutOfDomain | None,
    out: StepOutput,
) -> ScoredHead:
    """Return the head of the best ridge and blend on validation rows, or the student's own.

    Args:
        step: candidates for ridge and blend.
        problem: the student's states.
        teacher: the teacher's states and head, and the moments to fit on.
        before: the student's own head.
        limit: what the guard allows.
        out: its notes list the candidates and the choice.
    """
    X, H_s = problem.X, problem.head
    H_t = teacher.head_for(problem)
    solutions = ridge_solutions(teacher.moments, step.ridge, X.device)
    rows = problem.validation
    scores = {OWN_HEAD: before.kl}
    scores |= candidate_kl(problem, teacher, rows, solutions, step.blend)
    ood_kl: dict[Candidate, float] = {}
    if limit is not None:
        ood_kl = candidate_kl(problem, teacher, limit.rows, solutions, step.blend)
    forbidden = {c for c, kl in ood_kl.items() if limit is not None and kl > limit.max_kl}
    best = min((c for c in scores if c not in forbidden), key=scores.__getitem__)
    if scores[best] > before.kl - MIN_GAIN:
        best = OWN_HEAD
    cautions: tuple[Caution, ...] = ()
    unguarded = min(scores, key=scores.__getitem__)
    if limit is not None and scores[unguarded] < scores[best] - MIN_GAIN:
        part = "nothing of a ridge head" if best == OWN_HEAD else f"the head of {best}"
        cautions = (limit.caution(part, f"that of {unguarded}, the best,", ood_kl[unguarded]),)
    out.notes["validation KL by (ridge, blend)"] = {
        f"{candidate.ridge:g}, {candidate.blend:g}": kl for candidate, kl in scores.items()
    }
    out.notes["chosen (ridge, blend)"] = list(best)
    if best == OWN_HEAD:
        return before._replace(cautions=cautions)
    A, B = solutions[best.ridge]
    head = H_s + best.blend * (H_t @ A.T.to(H_s) + H_s @ B.T.to(H_s) - H_s)
    return ScoredHead(head, scores[best], cautions)


def ridge_solutions(
    moments: Moments, strengths: tuple[float, ...], device: torch.device = CPU
) -> dict[float, RidgeSolution]:
    """Solve the regression of `T [n, d_t]` on `X [n, d_s]` for each λ, from their moments.

    A λ at which the normal equations are singular has no solution: there are fewer rows than
    unknowns, and λ is within rounding of 0.
    """
    eye = torch.eye(len(moments.xx), dtype=torch.float64) * float(moments.xx.diagonal().mean())
    solutions: dict[float, RidgeSolution] = {}
    for strength in strengths:
        with suppress(SingularError):
            A = ridge(moments.xx, moments.xy, strength, "lm-head-ridge", device)
            B = ridge(moments.xx, strength * eye, strength, "lm-head-ridge", device)
            solutions[strength] = RidgeSolution(A, B)
    return solutions


def candidate_kl(
    problem: HeadProblem,
    teacher: TeacherHead,
    rows: Tensor,
    solutions: dict[float, RidgeSolution],
    blends: tuple[float, ...],
) -> dict[Candidate, float]:
    """Return the mean KL of every ridge and blend on rows [n], without forming their heads.

    Args:
        problem: the student's rows and its head.
        teacher: the teacher's states and head.
        rows: numbers of the rows.
        solutions: A and B for each ridge.
        blends: shares of the ridge head.
    """
    H_s, H_t = problem.head, teacher.head_for(problem)
    total = {Candidate(strength, share): 0.0 for strength in solutions for share in blends}
    for k in range(0, len(rows), BLOCK_ROWS):
        block = rows[k : k + BLOCK_ROWS]
        x = problem.X[block]
        p = teacher_log_probs(teacher, block)
        own = x @ H_s.T
        for strength, (A, B) in solutions.items():
            fitted = (x @ A.to(x)) @ H_t.T + (x @ B.to(x)) @ H_s.T
            for share in blends:
                products = own + share * (fitted - own)
                q = logits_of(problem.X.weights, products).log_softmax(-1)
                # One sum over rows and tokens. `kl_divergence(p, q).sum()` sums each row first,
                # which differs in the last digits, and with them the choice could.
                total[Candidate(strength, share)] += float((p.exp() * (p - q)).sum())
    return {candidate: value / len(rows) for candidate, value in total.items()}


def map_head(
    step: LmHeadRidge,
    problem: HeadProblem,
    start: ScoredHead,
    fit: Tensor,
    limit: OutOfDomain | None,
    out: StepOutput,
    progress: Progress,
) -> ScoredHead:
    """Return the head after the best map, `head (I + M)ᵀ`, or `start` if none is better.

    Args:
        step: sizes and penalty of the fit.
        problem: the student's states and the target distribution.
        start: the head that the map is fitted before.
        fit: rows to fit the map on [n].
        limit: what the guard allows.
        out: its notes describe the fit.
        progress: called for each step of the fit.
    """
    X, head, validation = problem.X, start.head, problem.validation
    # The fit is convex, so it leaves a soft cap out. The map is then judged by the true logits.
    logits = partial(problem.linear_logits, head)
    targets = problem.target_log_probs
    tokens = top_tokens(targets, logits, torch.cat([fit, validation]), step.max_tokens)
    fit_targets = reduced_targets(targets, logits, fit, tokens)
    validation_targets = reduced_targets(targets, logits, validation, tokens)
    H = head[tokens.to(head.device)] / logits_scaling(X.weights)

    def validation_kl(M: Tensor) -> float:
        rows = X[validation]
        return float(validation_targets.kl((rows + rows @ M) @ H.T).mean())

    def report(iteration: int, kl: float) -> None:
        progress(iteration, step.max_iter, f"map: KL {kl:.4f}")

    M = fit_logit_map(
        X=X[fit],
        H=H,
        targets=fit_targets,
        validation_kl=validation_kl,
        penalty=step.logit_penalty,
        max_iter=step.max_iter,
        report=report,
    )
    change = head @ M.T
    share = allowed_share(problem, head, change, limit)
    mapped = head + share * change if share else head
    kl = problem.validation_kl(mapped)
    out.notes["map"] = {
        "rows": len(fit),
        "tokens": len(tokens),
        "strength": share,
        "validation KL before": start.kl,
        "validation KL after": kl,
    }
    cautions = start.cautions
    if limit is not None and share < 1 and problem.validation_kl(head + change) < kl - MIN_GAIN:
        part = f"{SHARES_IN_WORDS[share]} of the map" if share else "nothing of the map"
        cautions += (limit.caution(part, "all of it", _ood_kl(problem, head + change, limit)),)
    if kl < start.kl - MIN_GAIN:
        return ScoredHead(mapped, kl, cautions)
    return start._replace(cautions=cautions)


def _ood_kl(problem: HeadProblem, head: Tensor, limit: OutOfDomain) -> float:
    """Return the mean KL of a head on the rows of the guard, nats."""
    return float(problem.kl(limit.rows, head).mean())


def allowed_share(
    problem: HeadProblem, head: Tensor, change: Tensor, limit: OutOfDomain | None
) -> float:
    """Return the largest share of a change of the head `[V, d_s]` that the guard allows."""
    if limit is None:
        return MAP_SHARES[0]

    def ood_kl(share: float) -> float:
        return _ood_kl(problem, head + share * change, limit)

    return largest_allowed_share(MAP_SHARES, ood_kl, limit.max_kl)


def map_rows(layout: PackedTexts, preferred: frozenset[str], limit: int) -> Tensor:
    """Return at most `limit` rows that predict answers of fit texts, evenly spread.

    Rows of the texts `preferred` come first; the others take the room that is left.
    """
    rows, _, texts = layout.prediction_rows(Split.FIT)
    first = torch.tensor([text.id in preferred for text in texts], dtype=torch.bool)
    chosen: list[Tensor] = []
    room = limit
    for group in (rows[first], rows[~first]):
        if room > 0 and len(group):
            stride = -(-len(group) // room)
            chosen.append(group[::stride])
            room -= len(chosen[-1])
    return torch.cat(chosen)


def teacher_log_probs(teacher: TeacherHead, rows: Tensor) -> Tensor:
    """Return the teacher's log-probabilities of rows [n], `[n, V]`."""
    return teacher.rows.logits(rows, teacher.head).log_softmax(-1)


def next_token_log_probs(
    layout: PackedTexts, vocabulary: int, device: torch.device, rows: Tensor
) -> Tensor:
    """Return log-probabilities of rows `[n, V]` that put all probability on the next token."""
    targets = layout.tokens[rows + 1].to(device)
    nothing = torch.full((len(rows), vocabulary), -1e30, device=device)
    return nothing.scatter(1, targets[:, None], 0.0)
