"""The losses are what their formulas say, with the gradients that plain autograd gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from rotdistill_prompt_kl._loss import Loss, divergence_of, jensen_shannon, reverse_kl
from rotdistill_prompt_kl.step import PromptKl
from torch import Tensor

from rotdistill_core.evaluation.divergence import kl_divergence
from rotdistill_core.plugin.step import validator_of

BETA = 0.3


def logits(seed: int) -> Tensor:
    """Return logits of 7 rows over 11 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(7, 11, generator=generator, dtype=torch.float64)


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the KL of rows of probabilities, written down as it is defined."""
    return (p * (p / q).log()).sum(-1)


def plain_jsd(p: Tensor, q: Tensor) -> Tensor:
    m = BETA * p + (1 - BETA) * q
    return BETA * plain_kl(p, m) + (1 - BETA) * plain_kl(q, m)


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        ("forward", plain_kl),
        ("reverse", lambda p, q: plain_kl(q, p)),
        ("jensen-shannon", plain_jsd),
    ],
)
def test_value_and_gradient_are_those_of_the_formula(
    loss: Loss, plain: Callable[[Tensor, Tensor], Tensor]
) -> None:
    T = logits(0)
    S, S_plain = (logits(1).requires_grad_() for _ in range(2))
    found = divergence_of(loss, BETA)(T.log_softmax(-1), S.log_softmax(-1))
    expected = plain(T.softmax(-1), S_plain.softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    weights = torch.arange(1.0, 8, dtype=torch.float64)
    for values in (found, expected):
        (weights * values).sum().backward()
    torch.testing.assert_close(S.grad, S_plain.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ["forward", "reverse", "jensen-shannon"])
def test_a_loss_is_zero_without_a_gradient_where_both_agree(loss: Loss) -> None:
    T = logits(0)
    S = T.clone().requires_grad_()
    found = divergence_of(loss, BETA)(T.log_softmax(-1), S.log_softmax(-1))
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-12
    assert S.grad is not None
    assert float(S.grad.abs().max()) < 1e-12


def test_jensen_shannon_lies_between_the_two_kls() -> None:
    p, q = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    small = 1e-7
    torch.testing.assert_close(
        jensen_shannon(p, q, small) / small, kl_divergence(p, q), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        jensen_shannon(p, q, 1 - small) / small, reverse_kl(p, q), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(jensen_shannon(p, q, 0.2), jensen_shannon(q, p, 0.8))


def test_jensen_shannon_of_two_that_share_nothing_is_the_entropy_of_its_weights() -> None:
    p = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    q = p.flip(-1)
    entropy = -BETA * math.log(BETA) - (1 - BETA) * math.log(1 - BETA)
    assert float(jensen_shannon(p, q, BETA)) == pytest.approx(entropy)
    assert float(kl_divergence(p, q)) == pytest.approx(800)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_weight_that_leaves_no_mixture_is_refused(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        validator_of(PromptKl).validate_python({"loss": "jensen-shannon", "beta": beta})
