"""A linear map in front of the head, fitted to the KL itself.

`argmin_M mean KL(p_r ‖ softmax((x_r + x_r M) Hᵀ)) + (α/2) tr(Mᵀ C M G)`, convex because logits are linear in M `[d, d]`; C is the second
moment of the rows x and G that of the head's rows, so that the penalty is the mean square of what the map adds to the logits, and in
coordinates where both are the identity L-BFGS needs few steps (Liu and Nocedal, Math. Prog. 45, 1989). The map becomes the head
`H (I + M)ᵀ`. Only the likeliest tokens are told apart; all others are one token of unchanged probability given them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.linalg.solvers import require_finite

BLOCK = 256


@dataclass(frozen=True)
class Lesson:
    """What the teacher says on some rows: the tokens told apart [k], their probabilities `[n, k + 1]` with all others last, and
    the student's log of the others' weight [n]."""

    tokens: Tensor
    p: Tensor
    rest: Tensor

    def kl(self, made: Tensor) -> Tensor:
        """Return the KL of each row [n] for the student's logits of the tokens told apart `[n, k]`."""
        q = torch.cat([made, self.rest[:, None]], 1).log_softmax(-1)
        kl: Tensor = torch.special.xlogy(self.p, self.p).sum(-1) - (self.p * q).sum(-1)
        return kl


def likeliest(
    teacher: Callable[[int, int], Tensor],
    student: Callable[[int, int], Tensor],
    rows: int,
    most: int,
    each: int = 48,
) -> Tensor:
    """Return the tokens that are among the `each` likeliest of any row, for either model: the `most` of the largest sum of probability.

    `teacher(a, b)` gives log-probabilities of rows [a, b) over all tokens, `student(a, b)` logits.
    """
    mass = torch.zeros(0)
    for k in range(0, rows, BLOCK):
        for logp in (
            teacher(k, min(k + BLOCK, rows)),
            student(k, min(k + BLOCK, rows)).log_softmax(-1),
        ):
            mass = mass if len(mass) else torch.zeros(logp.shape[1])
            top, which = logp.topk(min(each, logp.shape[1]), -1)
            mass.index_add_(0, which.flatten().cpu(), top.exp().flatten().cpu().float())
    return mass.topk(min(most, int((mass > 0).sum()))).indices.sort().values


def lesson(
    teacher: Callable[[int, int], Tensor],
    student: Callable[[int, int], Tensor],
    rows: int,
    tokens: Tensor,
) -> Lesson:
    """Return what the teacher says on rows [0, rows), with all but `tokens` put together."""
    p, rest = torch.zeros(rows, len(tokens) + 1), torch.zeros(rows)
    others = torch.ones(0, dtype=torch.bool)
    for k in range(0, rows, BLOCK):
        b = min(k + BLOCK, rows)
        said, made = teacher(k, b).exp(), student(k, b)
        others = (
            others
            if len(others)
            else torch.ones(said.shape[1], dtype=torch.bool).index_fill(0, tokens, False)
        )
        p[k:b, :-1] = said[:, tokens]
        p[k:b, -1] = said[:, others].sum(-1)
        rest[k:b] = made[:, others].logsumexp(-1) if bool(others.any()) else -1e30
    return Lesson(tokens, p, rest)


def fit_map(
    X: Tensor,
    H: Tensor,
    fit: Lesson,
    judge: Callable[[Tensor], float],
    strength: float,
    steps: int,
    tell: Callable[[int, float], None],
) -> Tensor:
    """Return M `[d, d]` of the least `judge(M)` on the way of L-BFGS from 0; zeros when no step was better than none.

    Args:
        X: rows `[n, d]` of the lesson, after the final norm.
        H: the head's rows of the tokens told apart `[k, d]`.
        fit: the lesson.
        judge: the validation KL of a map.
        strength: α.
        steps: most steps; it stops after three that the validation does not like.
        tell: told of each step and its KL.

    Raises:
        RotdistillError: rows or head are not finite.
    """
    require_finite(X, "head map: rows")
    require_finite(H, "head map: head")
    left, right = _inverse_root(X), _inverse_root(H)
    N = torch.zeros(X.shape[1], X.shape[1], requires_grad=True)
    white, own, answer = X @ left, X @ H.T, right @ H.T
    lbfgs = torch.optim.LBFGS(
        [N], lr=1.0, max_iter=1, max_eval=4, history_size=10, line_search_fn="strong_wolfe"
    )
    best, kept, worse = judge(torch.zeros_like(left)), torch.zeros_like(left), 0

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = fit.kl(own + white @ N @ answer).mean() + 0.5 * strength * N.pow(2).sum()
        torch.autograd.backward(value)
        return value

    for k in range(steps):
        lbfgs.step(loss)  # type: ignore[no-untyped-call]
        M = left @ N.detach() @ right
        now = judge(M)
        tell(k + 1, now)
        worse = 0 if now < best else worse + 1
        if now < best:
            best, kept = now, M.clone()
        if worse == 3:
            break
    return kept


def _inverse_root(rows: Tensor, floor: float = 1e-6) -> Tensor:
    """Return `(XᵀX / n)^-1/2`, eigenvalues below `floor` of the mean held there."""
    values, vectors = torch.linalg.eigh((rows.double().T @ rows.double()) / len(rows))
    root: Tensor = (vectors * values.clamp_min(floor * float(values.mean())).rsqrt()) @ vectors.T
    return root.float()
