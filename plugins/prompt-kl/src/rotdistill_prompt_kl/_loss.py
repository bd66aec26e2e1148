"""What training minimises on each token: a divergence of the student from the teacher.

Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rotdistill_core.evaluation.divergence import kl_divergence

Loss = Literal["forward", "reverse", "jensen-shannon"]
Divergence = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities `[n, V]` of teacher and student -> a divergence for each row [n], nats."""


def divergence_of(loss: Loss, beta: float) -> Divergence:
    """Return the divergence of that name; `beta` is a weight in (0, 1), see `jensen_shannon`."""
    if loss == "forward":
        return kl_divergence
    if loss == "reverse":
        return reverse_kl
    return partial(jensen_shannon, beta=beta)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return `KL(student ‖ teacher)` [n] in nats from log-probabilities `[n, V]` of both.

    The forward KL asks the student to cover all that the teacher may say; this one asks it to say
    nothing that the teacher would not.
    """
    return kl_divergence(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence [n] in nats.

    With p of the teacher, q of the student, and m = β p + (1 − β) q:

        JSD(β) = β KL(p ‖ m) + (1 − β) KL(q ‖ m)

    It is at most the entropy of (β, 1 − β). For small β it is about β times the forward KL, for β
    near 1 about 1 − β times the reverse KL.

    Args:
        teacher: log-probabilities `[n, V]`, the logarithm of p.
        student: log-probabilities `[n, V]`, the logarithm of q.
        beta: weight of the teacher, above 0 and below 1.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = kl_divergence(teacher, mixture)
    of_student = kl_divergence(student, mixture)
    return beta * of_teacher + (1 - beta) * of_student
