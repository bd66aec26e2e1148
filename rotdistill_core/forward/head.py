"""TODO: rotdistill_core.forward.head."""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights


def final_norm(weights: Weights, states: Tensor) -> Tensor:
    """Return states `[n, d]` after the final norm."""
    eps = float(weights.config[weights.adapter.eps_key])
    wide = states if states.dtype == torch.float64 else states.float()
    gain = weights.gain(weights.adapter.norm).to(
        wide
    )  # 1 + w, rounded to bfloat16, would be off by more than w is
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(states.dtype)


def head_logits(weights: Weights, states: Tensor, head: Tensor) -> Tensor:
    """Return the logits of states `[n, d]` behind the final norm, with a head `[tokens, d]`; capped where the model caps them."""
    made = states @ head.T
    cap = weights.config.get(weights.adapter.softcap_key)
    return made if cap is None else cap * (made / cap).tanh()


def log_probs(
    weights: Weights, states: Tensor, head: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """Return `log softmax` of the logits of raw final states `[n, d]` over the first `tokens` rows of the head."""
    H = (weights.head() if head is None else head)[:tokens].to(states)
    return head_logits(weights, final_norm(weights, states), H).log_softmax(-1)
