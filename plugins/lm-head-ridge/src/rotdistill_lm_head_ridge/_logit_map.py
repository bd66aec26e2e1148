"""A linear map before the head, fitted to the KL itself.

Problem, for rows x after the final norm, the head H `[V, d]` and the teacher's distribution p:

    argmin_M  mean KL(p ‖ softmax((x + x M) Hᵀ)) + (α/2) tr(Mᵀ C M G)

C is the second moment of the rows x, and G that of the rows of H. So the penalty is the mean
square of what the map adds to the logits. Logits are linear in M `[d, d]`, hence the problem is
convex. In coordinates where C and G are the identity, L-BFGS (Liu and Nocedal, Mathematical
Programming 45, 1989) needs few steps. The mapped head is `H (I + M)ᵀ`.

The KL distinguishes only the most likely tokens. All others count as one token: the map changes
their total probability only through the logits of the distinguished ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.linalg.precision import SUM_DTYPE, float64_device
from rotdistill_core.linalg.solvers import eigh, require_finite

BLOCK_ROWS = 256
"""Rows whose logits are held at once."""
TOKENS_PER_ROW = 48
"""Most likely tokens of a row that are candidates for being distinguished."""
PATIENCE = 3
"""L-BFGS stops after so many steps in a row without gain in validation KL."""

RowFunction = Callable[[Tensor], Tensor]
"""Row numbers [n] -> a value for every token, `[n, V]`: log-probabilities or logits."""


@dataclass(frozen=True)
class ReducedTargets:
    """The teacher's distribution over k distinguished tokens and the rest of the vocabulary."""

    tokens: Tensor
    """Ids of the distinguished tokens [k]."""
    probs: Tensor
    """The teacher's probabilities `[n, k + 1]`; the last column is the rest."""
    rest_logit: Tensor
    """`log Σ exp` of the student's logits of the rest [n]. The map does not change it."""

    def kl(self, logits: Tensor) -> Tensor:
        """Return the KL of each row [n] for logits of the distinguished tokens `[n, k]`."""
        q = torch.cat([logits, self.rest_logit[:, None]], 1).log_softmax(-1)
        # xlogy: a probability may be 0 here, so this is not `kl_divergence` of log-probabilities.
        kl: Tensor = torch.special.xlogy(self.probs, self.probs).sum(-1) - (self.probs * q).sum(-1)
        return kl


def top_tokens(
    teacher_log_probs: RowFunction,
    student_logits: RowFunction,
    rows: Tensor,
    limit: int,
    per_row: int = TOKENS_PER_ROW,
) -> Tensor:
    """Return the most likely tokens of some rows, sorted by id.

    Candidates are the `per_row` most likely tokens of each row, for either model. The `limit`
    candidates with the largest sum of probability are kept.

    Args:
        teacher_log_probs: the teacher's log-probabilities of rows.
        student_logits: the student's logits of rows.
        rows: row numbers [n].
        limit: most tokens to return.
        per_row: candidates of a row.
    """
    mass = torch.zeros(0)
    for block in _blocks(rows):
        for log_probs in (teacher_log_probs(block), student_logits(block).log_softmax(-1)):
            vocabulary = log_probs.shape[1]
            if not len(mass):
                mass = torch.zeros(vocabulary)
            top, ids = log_probs.topk(min(per_row, vocabulary), -1)
            mass.index_add_(0, ids.flatten().cpu(), top.exp().flatten().cpu().float())
    count = min(limit, int((mass > 0).sum()))
    return mass.topk(count).indices.sort().values


def reduced_targets(
    teacher_log_probs: RowFunction, student_logits: RowFunction, rows: Tensor, tokens: Tensor
) -> ReducedTargets:
    """Return the teacher's distribution on rows [n], with all but `tokens` [k] put together."""
    probs: list[Tensor] = []
    rest_logits: list[Tensor] = []
    for block in _blocks(rows):
        p, logits = teacher_log_probs(block).exp(), student_logits(block)
        rest = torch.ones(p.shape[1], dtype=torch.bool).index_fill(0, tokens, False)
        others = rest.nonzero().flatten().to(p.device)
        distinguished = p[:, tokens.to(p.device)]
        probs.append(torch.cat([distinguished, p[:, others].sum(-1, keepdim=True)], 1))
        # Without a rest its logit is one that softmax takes for zero probability.
        missing = torch.full_like(logits[:, 0], -1e30)
        rest_logits.append(logits[:, others].logsumexp(-1) if len(others) else missing)
    return ReducedTargets(tokens, torch.cat(probs), torch.cat(rest_logits))


def fit_logit_map(
    X: Tensor,
    H: Tensor,
    targets: ReducedTargets,
    validation_kl: Callable[[Tensor], float],
    penalty: float,
    max_iter: int,
    report: Callable[[int, float], None],
) -> Tensor:
    """Return the map M `[d, d]` with the least validation KL along the path of L-BFGS from 0.

    M is zero if no step improves on it.

    Args:
        X: fit rows after the final norm `[n, d]`.
        H: the head's rows of the distinguished tokens `[k, d]`.
        targets: the teacher's distribution on the fit rows.
        validation_kl: map -> mean KL on the validation rows.
        penalty: α, the weight of the mean square change of a logit.
        max_iter: most steps.
        report: called with the number of each step and its validation KL.

    Raises:
        RotdistillError: rows or head are not finite.
    """
    require_finite(X, "head map: rows")
    require_finite(H, "head map: head")
    # M = left N right: in N both second moments are the identity and the penalty is α/2 ‖N‖².
    left, right = _inverse_root(X), _inverse_root(H)
    N = torch.zeros(X.shape[1], X.shape[1], device=X.device, dtype=X.dtype, requires_grad=True)
    white_rows, white_head, start_logits = X @ left, right @ H.T, X @ H.T
    lbfgs = torch.optim.LBFGS(
        [N], lr=1.0, max_iter=1, max_eval=4, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        lbfgs.zero_grad()
        kl = targets.kl(start_logits + white_rows @ N @ white_head)
        value = kl.mean() + 0.5 * penalty * N.pow(2).sum()
        torch.autograd.backward(value)
        return value

    best_map = torch.zeros_like(left)
    best = validation_kl(best_map)
    worse = 0
    for k in range(max_iter):
        lbfgs.step(loss)  # type: ignore[no-untyped-call]
        M = left @ N.detach() @ right
        kl = validation_kl(M)
        report(k + 1, kl)
        if kl < best:
            best, best_map, worse = kl, M.clone(), 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    return best_map


def _blocks(rows: Tensor) -> list[Tensor]:
    """Return rows [n] in blocks."""
    return [rows[k : k + BLOCK_ROWS] for k in range(0, len(rows), BLOCK_ROWS)]


def _inverse_root(rows: Tensor, floor: float = 1e-6) -> Tensor:
    """Return `(XᵀX / n)^-1/2` of rows X `[n, d]`, eigenvalues clamped to `floor` of their mean."""
    X = rows.to(float64_device(rows.device), SUM_DTYPE)
    moment = ((X.T @ X) / len(X)).cpu()
    values, vectors = eigh(moment, "head map: second moment", rows.device)
    root: Tensor = (vectors * values.clamp_min(floor * float(values.mean())).rsqrt()) @ vectors.T
    return root.to(rows)
