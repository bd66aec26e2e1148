"""Ridge regression of the head onto the teacher's logits, without any logits.

The teacher's logits are `h_t W_tᵀ`, so with states after the final norm `X_s [T, d_s]`, `X_t [T, d_t]`, `C_ss = X_sᵀX_s`, `C_st = X_sᵀX_t`:
`argmin_W Σ‖x_s Wᵀ - x_t W_tᵀ‖² + λ‖W - W_s‖² = (W_t C_stᵀ + λ W_s)(C_ss + λI)⁻¹ = W_t Aᵀ + W_s Bᵀ [V, d_s]`, with
`A = (C_ss + λI)⁻¹ C_st [d_s, d_t]` and `B = λ (C_ss + λI)⁻¹ [d_s, d_s]`: only A and B are solved for, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, converted_bytes, forward_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


Said = Callable[["Tensor"], "Tensor"]
"""Rows [n] -> log-probabilities `[n, V]`."""
Guard = tuple["Tensor", float]
"""Rows [n], none without a guard, and the KL on them that no head may go beyond."""
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
JUDGED_ROWS, BLOCK = 1024, 128
STRENGTHS = (1.0, 0.5, 0.25)
"""Shares of the map that a guard may choose from."""
MARGIN = 1e-6
"""Nats by which a fitted head must be better: less is rounding."""


@step
class LmHeadRidge:
    """Fit the head to the teacher's logits, ridge towards the student's own head. Rows of padding tokens stay as they are.

    Ridge and blend are chosen on the KL of validation texts, and leaving the head alone is always a candidate. `objective = "kl"` then
    fits a linear map in front of that head to the KL itself, on rows that predict answers; it is taken if validation KL falls further.
    """

    use: Literal["lm-head-ridge"] = "lm-head-ridge"
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.01, 0.1, 1.0)
    """Candidates for λ, as multiples of the mean diagonal of `C_ss`."""
    blend: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 1.0)
    """Candidates for the share of the fitted head in the new one."""
    texts: PositiveInt | None = None
    """Fit on this many fit texts; without it, on all. A head has few unknowns per row of the vocabulary and needs few."""
    objective: Literal["ridge", "kl", "text"] = "ridge"
    """`"ridge"`, or `"kl"`: then a linear map in front of that head is fitted to the KL itself. `"text"` is the control without a teacher:
    the map alone, to the texts' own next tokens."""
    anchor: Annotated[float, Field(ge=0)] = 30.0
    """Penalty on the mean square of what the map adds to the logits, against mean KL."""
    rows: PositiveInt = 4096
    """Most rows that the map is fitted on, the teacher's own answers first."""
    tokens: PositiveInt = 8192
    """Most tokens that the map's KL tells apart; the others count as one."""
    steps: PositiveInt = 24
    """Most steps of L-BFGS."""
    guard: Annotated[float, Field(ge=1)] | None = None
    """Choose only among heads whose KL on the guard's validation half is at most this multiple of the student's own (1.02: 2 % worse)."""

    exact: ClassVar[bool] = False

    def cost(self, context: CostContext) -> Cost:
        """One pass through the student, three heads of its own, both heads as computed with, and blocks of logits."""
        student, teacher, number = context.student, context.teacher, context.student_bytes
        rows = context.texts.rows_of("fit", limit=self.texts) + context.texts.rows_of("validation")
        walk = forward_cost(student, rows, number)
        head = student.vocab * student.width * number
        states = rows * (2 * student.width + 2 * teacher.width) * number
        targets = 0 if self.objective == "ridge" else self.rows * self.tokens * number * 2
        blocks = 3 * min(128, rows) * student.vocab * number
        per_token = student.width * converted_bytes(student, number)
        per_token += teacher.width * converted_bytes(teacher, number)
        fit = 10.0 * 1024 * student.vocab * (student.width + teacher.width)
        return replace(
            walk,
            host_bytes=walk.host_bytes
            + states
            + 3 * head
            + student.vocab * per_token
            + blocks
            + targets,
            disk_bytes=head,
            operations=walk.operations + fit,
        )

    def context_after(self, context: CostContext) -> CostContext:
        """The head is a tensor of its own."""
        return context.with_edited_weights().with_student(tie_word_embeddings=False)

    @hookimpl
    def style(
        self,
        weights: Weights,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Weights:
        """See `Specs.style`."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.evaluation.acceptance import (
            scored_rows,
            scores_by_text,
            significantly_lower,
        )
        from rotdistill_core.evaluation.divergence import shared_vocabulary
        from rotdistill_core.forward.head import final_norm
        from rotdistill_lm_head_ridge._final_states import final_states

        tokens = shared_vocabulary(pair)
        fit_texts = samples.layout.select("fit", most=self.texts)
        splits = ("validation", "guard-validation") if self.guard else ("validation",)
        layout = replace(fit_texts, texts=fit_texts.texts + samples.layout.select(*splits).texts)
        X = final_norm(weights, final_states(weights, activations, pair.student, layout, progress))
        (rows, _, text), others = (
            scored_rows(layout, samples, "validation", JUDGED_ROWS),
            layout.prediction_rows("guard-validation")[0],
        )
        if self.guard and not len(others):
            raise RecipeError(
                "lm-head-ridge: guard needs texts outside the domain; name them as samples.guard."
            )
        head = H_s = weights.head()[:tokens].to(X)
        if self.objective == "text":
            said = _texts(layout, tokens)
            before = after = float(_kl(said, X, rows, H_s).mean())
            guard = self._limit(said, X, others, H_s)
        else:
            T, H_t = (
                final_norm(
                    pair.teacher.weights, activations.teacher(layout, pair.student.depth).to(X)
                ),
                pair.teacher.weights.head()[:tokens],
            )
            said = _teacher(T, H_t.to(X))
            before = float(_kl(said, X, rows, H_s).mean())
            guard = self._limit(said, X, others, H_s)
            head, after = self._ridged(
                X, T, H_s, H_t.to(X), layout.split("fit"), rows, before, guard, out
            )
        progress(weights.depth + 1, weights.depth + 1, f"ridge: KL {before:.4f} to {after:.4f}")
        if self.objective != "ridge":
            own = frozenset(
                question.id for question in samples.questions if question.answer is None
            )
            head, after = self._mapped(
                said, X, head, _answers(layout, own, self.rows), rows, after, guard, out, progress
            )
        out.notes |= {"validation KL before": before, "validation KL after": after}
        if head is H_s or not significantly_lower(
            *(scores_by_text(_kl(said, X, rows, H), text) for H in (H_s, head))
        ):
            some = "candidate that the guard allows" if self.guard else "candidate"
            out.report.refused = (
                f"no {some} lowers the validation KL beyond chance; the head is left as it was"
            )
            return weights
        whole = weights.head().to(X.dtype).clone()
        whole[:tokens] = head
        return weights.untie().edit({weights.adapter.head: whole})

    def _limit(self, said: Said, X: Tensor, rows: Tensor, head: Tensor) -> Guard:
        """Return the rows of the guard and the KL that no head may go beyond; no rows without a guard."""
        return (
            (rows, self.guard * float(_kl(said, X, rows, head).mean()))
            if self.guard
            else (rows[:0], 0.0)
        )

    def _ridged(
        self,
        X: Tensor,
        T: Tensor,
        H_s: Tensor,
        H_t: Tensor,
        fit: Tensor,
        rows: Tensor,
        before: float,
        guard: Guard,
        out: StepOutput,
    ) -> tuple[Tensor, float]:
        """Return the head `[V, d_s]` of the best ridge and blend on validation rows, or the student's own, and its KL."""
        import torch

        from rotdistill_core.errors import SingularError
        from rotdistill_core.linalg.moments import Moments
        from rotdistill_core.linalg.solvers import ridge

        moments = Moments(X.shape[1], T.shape[1])
        moments.add(X[fit], T[fit])
        eye = torch.eye(X.shape[1], dtype=torch.float64) * float(moments.xx.diagonal().mean())
        solved: dict[float, tuple[Tensor, Tensor]] = {}
        for r in self.ridge:
            with suppress(
                SingularError
            ):  # fewer rows than unknowns, and a λ that is rounding: no candidate
                solved[r] = (
                    ridge(moments.xx, moments.xy, r, "lm-head-ridge"),
                    ridge(moments.xx, r * eye, r, "lm-head-ridge"),
                )
        scores = {(0.0, 0.0): before} | self._scores(X[rows], T[rows], H_t, H_s, solved)
        others, limit = guard
        beyond = (
            {
                key
                for key, kl in self._scores(X[others], T[others], H_t, H_s, solved).items()
                if kl > limit
            }
            if len(others)
            else set()
        )
        best = min((key for key in scores if key not in beyond), key=scores.__getitem__)
        out.notes["validation KL by (ridge, blend)"] = {
            f"{r:g}, {b:g}": kl for (r, b), kl in scores.items()
        }
        if scores[best] > scores[0.0, 0.0] - MARGIN:
            out.notes["chosen (ridge, blend)"] = [0.0, 0.0]
            return H_s, before
        out.notes["chosen (ridge, blend)"] = list(best)
        (A, B), share = solved[best[0]], best[1]
        return H_s + share * (H_t @ A.T.to(X) + H_s @ B.T.to(X) - H_s), scores[best]

    def _mapped(
        self, said: Said, X: Tensor, head: Tensor, fit: Tensor, rows: Tensor, before: float, guard: Guard, out: StepOutput,
        progress: Progress,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """Return the head behind the best map `head (I + M)ᵀ`, or the head as it is, and its KL."""
        import torch

        from rotdistill_lm_head_ridge._kl_head import fit_map, lesson, likeliest

        def given(
            some: Tensor,
        ) -> tuple[Callable[[int, int], Tensor], Callable[[int, int], Tensor], int]:
            return lambda a, b: said(some[a:b]), lambda a, b: X[some[a:b]] @ head.T, len(some)

        tokens = likeliest(*given(torch.cat([fit, rows])), self.tokens)
        lessons = [lesson(*given(some), tokens) for some in (fit, rows)]
        H = head[tokens]

        def judge(M: Tensor) -> float:
            return float(lessons[1].kl((X[rows] + X[rows] @ M) @ H.T).mean())

        M = fit_map(
            X[fit],
            H,
            lessons[0],
            judge,
            self.anchor,
            self.steps,
            lambda k, kl: progress(k, self.steps, f"map: KL {kl:.4f}"),
        )
        for share in STRENGTHS:
            mapped = head + share * (head @ M.T)
            if not len(guard[0]) or float(_kl(said, X, guard[0], mapped).mean()) <= guard[1]:
                break
        else:
            mapped, share = head, 0.0
        after = float(_kl(said, X, rows, mapped).mean())
        out.notes["map"] = {
            "rows": len(fit),
            "tokens": len(tokens),
            "strength": share,
            "validation KL before": before,
            "validation KL after": after,
        }
        return (mapped, after) if after < before - MARGIN else (head, before)

    def _scores(
        self,
        X: Tensor,
        T: Tensor,
        H_t: Tensor,
        H_s: Tensor,
        solved: dict[float, tuple[Tensor, Tensor]],
    ) -> dict[tuple[float, float], float]:
        """Return the mean KL of every (ridge, blend)."""
        total = {(r, b): 0.0 for r in solved for b in self.blend}
        for k in range(0, len(X), BLOCK):
            x, teacher = X[k : k + BLOCK], T[k : k + BLOCK] @ H_t.T
            p = teacher.log_softmax(-1)
            own = x @ H_s.T
            for r, (A, B) in solved.items():
                fitted = (x @ A.to(x)) @ H_t.T + (x @ B.to(x)) @ H_s.T
                for share in self.blend:
                    total[r, share] += float(
                        (p.exp() * (p - (own + share * (fitted - own)).log_softmax(-1))).sum()
                    )
        return {key: value / len(X) for key, value in total.items()}


def _teacher(T: Tensor, H: Tensor) -> Said:
    """Return what the teacher says: log-probabilities of rows, from its states behind the final norm and its head."""
    return lambda rows: (T[rows] @ H.T).log_softmax(-1)


def _texts(layout: PackedTexts, tokens: int) -> Said:
    """Return what the texts say: all of the probability on the token that comes next."""
    import torch

    return lambda rows: torch.full((len(rows), tokens), -1e30).scatter(
        1, layout.tokens[rows + 1][:, None], 0.0
    )


def _kl(said: Said, X: Tensor, rows: Tensor, head: Tensor) -> Tensor:
    """Return the KL of rows [n] of `X [rows, d_s]` (after the final norm) behind a head."""
    import torch

    parts = []
    for some in (rows[k : k + BLOCK] for k in range(0, len(rows), BLOCK)):
        p, q = said(some), (X[some] @ head.T).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _answers(layout: PackedTexts, own: frozenset[str], most: int) -> Tensor:
    """Return at most `most` rows that predict answers of fit texts: those of the texts `own` first, evenly spread."""
    import torch

    rows, _, _ = layout.prediction_rows("fit")
    mine = torch.cat(
        [
            torch.full((len(t.tokens) - t.answer,), t.id in own)
            for t in layout.texts
            if t.split == "fit"
        ]
    )
    chosen: list[Tensor] = []
    for some in (rows[mine], rows[~mine]):
        room = most - sum(map(len, chosen))
        if room > 0 and len(some):
            chosen.append(some[:: -(-len(some) // room)])
    return torch.cat(chosen)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [LmHeadRidge]
