"""From final states to predictions: final norm, head, log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights


def final_norm(weights: Weights, states: Tensor) -> Tensor:
    """Return states `[n, d]` after the final norm, in their own dtype.

    The norm computes in float32 at least.
    """
    eps = float(weights.config[weights.adapter.eps_key])
    wide = states if states.dtype == torch.float64 else states.float()
    # In bfloat16 a gain 1 + w would be rounded by more than w itself.
    gain = weights.gain(weights.adapter.norm).to(wide)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(states.dtype)


def head_logits(weights: Weights, states: Tensor, head: Tensor) -> Tensor:
    """Return the logits `[n, tokens]` of states `[n, d]` after the final norm.

    Args:
        weights: the model, for its soft cap: some models return `c tanh(logits / c)`.
        states: rows after the final norm.
        head: rows of a head `[tokens, d]`, in the dtype of the states.
    """
    logits = states @ head.T
    cap = weights.config.get(weights.adapter.softcap_key)
    return logits if cap is None else cap * (logits / cap).tanh()


def log_probs(
    weights: Weights, states: Tensor, head: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """Return log-probabilities `[n, tokens]` of raw final states `[n, d]`.

    Args:
        weights: the model.
        states: rows before the final norm.
        head: a head `[V, d]` to use instead of the model's own.
        tokens: how many leading rows of the head take part; all by default.
    """
    H = (weights.head() if head is None else head)[:tokens].to(states)
    return head_logits(weights, final_norm(weights, states), H).log_softmax(-1)
