"""The gradient of the loss over a batch: that of its parts, added up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotdistill_core.evaluation.divergence import kl_divergence
from rotdistill_core.linalg.exact import ExactSum
from rotdistill_prompt_kl._loss import Divergence
from rotdistill_prompt_kl._targets import DistillationTargets

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.weights import Weights

LARGEST_GRADIENT = 2.0**30
"""What entries of gradients add up to at most. Integers below it resolve `2^-71`."""


def add_gradients(
    student: Any,
    view: Weights,
    targets: DistillationTargets,
    batch: Sequence[int],
    trainable: Sequence[torch.nn.Parameter],
    divergence: Divergence = kl_divergence,
    at_once: int = 1,
) -> float:
    """Give parameters the gradient of the mean loss over a batch; return that loss, nats a token.

    Parts of the batch go through the student one after the other, and processes share them. Their
    gradients are added as integers, so the sum has the same bits for any number of processes.

    Args:
        student: the model that trains.
        view: the weights that it was made of.
        targets: the texts and the teacher's states.
        batch: indices of texts.
        trainable: the parameters that get the gradient.
        divergence: the loss of a token.
        at_once: texts of a part.

    Returns:
        The mean loss; NaN if training has diverged, and then there is no gradient.
    """
    ranks, tokens = targets.ranks, targets.tokens(batch)
    parts = [list(batch[k : k + at_once]) for k in range(0, len(batch), at_once)]
    size = sum(parameter.numel() for parameter in trainable)
    total = ExactSum((size,), LARGEST_GRADIENT, "prompt-kl: gradient")
    losses = torch.zeros(len(parts), dtype=torch.float64)
    largest = torch.zeros(len(parts), dtype=torch.float64)
    for k in ranks.mine(range(len(parts))):
        loss = targets.losses(student, view, parts[k], divergence).sum() / tokens
        torch.autograd.backward(loss)
        gradient = torch.cat([_gradient(parameter).flatten() for parameter in trainable])
        for parameter in trainable:
            parameter.grad = None
        losses[k] = float(loss.detach())
        largest[k] = float(gradient.abs().max())
        if largest[k] < LARGEST_GRADIENT / len(parts):
            total.add(gradient)
    ranks.add_up(losses)
    ranks.add_up(largest)
    if not bool((largest < LARGEST_GRADIENT / len(parts)).all()):
        return math.nan
    total.combine(ranks.add_up, trainable[0].device)
    shares = torch.split(total.value(), [parameter.numel() for parameter in trainable])
    for parameter, share in zip(trainable, shares, strict=True):
        parameter.grad = share.view_as(parameter).to(parameter)
    return float(losses.sum())


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Return the gradient of a parameter; zero where the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
