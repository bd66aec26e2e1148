"""From final states to predictions: final norm, head, log-probabilities.

All of it is computed in float32 at least, whatever the dtype of the states, on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.linalg.precision import wide_dtype, widened


def final_norm(weights: Weights, states: Tensor) -> Tensor:
    """Return states `[n, d]` after the final norm."""
    eps = float(weights.config[weights.adapter.eps_key])
    X = widened(states)
    # In bfloat16 a gain 1 + w would be rounded by more than w itself.
    gain = weights.gain(weights.adapter.norm).to(X.device, X.dtype)
    return X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + eps) * gain


def head_for(weights: Weights, states: Tensor, tokens: int | None = None) -> Tensor:
    """Return the head `[tokens, d]` on the device of states, in the precision that multiplies them.

    Args:
        weights: the model.
        states: rows that the head will read.
        tokens: how many leading rows of the head; all by default.
    """
    return widened_like(weights.head()[:tokens], states)


def widened_like(head: Tensor, states: Tensor) -> Tensor:
    """Return a head `[tokens, d]` on the device of states, in their dtype or in float32."""
    return head.to(states.device, wide_dtype(states.dtype))


def head_logits(weights: Weights, states: Tensor, head: Tensor) -> Tensor:
    """Return the logits `[n, tokens]` of states `[n, d]` after the final norm.

    Args:
        weights: the model, for what it does to the products; see `logits_of`.
        states: rows after the final norm.
        head: rows of a head `[tokens, d]`.
    """
    return logits_of(weights, widened(states) @ widened_like(head, states).T)


def logits_of(weights: Weights, products: Tensor) -> Tensor:
    """Return the logits `[n, tokens]` that a model makes of the products of states and head.

    Some models return `products / s`, some `c tanh(products / c)`. Whoever multiplies states and
    head elsewhere has to call this.

    Args:
        weights: the model, for s and c.
        products: rows after the final norm times rows of the head `[n, tokens]`.
    """
    adapter, config = weights.adapter, weights.config
    scaling = config.get(adapter.logits_scaling_key)
    if scaling is not None:
        products = products / scaling
    cap = config.get(adapter.softcap_key)
    return products if cap is None else cap * (products / cap).tanh()


def logits_scaling(weights: Weights) -> float:
    """Return s where a model's logits are the products of states and head divided by s."""
    scaling = weights.config.get(weights.adapter.logits_scaling_key)
    return 1.0 if scaling is None else float(scaling)


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
    H = (weights.head() if head is None else head)[:tokens]
    return head_logits(weights, final_norm(weights, states), H).log_softmax(-1)
