"""The certificate of an exact step: how little logits change, and that `unfold` takes it back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.batching import LOGIT_ROWS
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import CheckFailed
from rotdistill_core.forward.head import final_norm, head_for, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.precision import float64_device
from rotdistill_core.recipe.document import Check
from rotdistill_core.store.results import Certificate

CERTIFICATE_TEXTS = 2
"""Number of validation texts on which logits are compared."""


class _Change(NamedTuple):
    """How predictions differ between two views of one model."""

    logit: float
    """Largest absolute change of a logit."""
    kl: float
    """Mean KL over rows, nats."""


def enforce_certificate(certificate: Certificate, check: Check, where: str) -> None:
    """Hold a certificate to the tolerances of a recipe.

    Raises:
        CheckFailed: naming the first figure beyond its tolerance; a NaN is beyond every one.
    """
    for name in ("logits_float64", "logits_float32", "unfold"):
        value, allowed = getattr(certificate, name), getattr(check, name)
        if not value <= allowed:
            raise CheckFailed(
                f"{where}: the certificate fails: {name} is {value:.2e}, more than {allowed:.0e}. "
                "A step that says it is exact is not: leave it out, and report it to the authors "
                "of the step or of the architecture's table."
            )


def certify(
    before: Weights,
    after: Weights,
    back: Weights,
    layout: PackedTexts,
    device: torch.device,
    texts: int = CERTIFICATE_TEXTS,
) -> Certificate:
    """Measure the certificate of an edit.

    Args:
        before: the model before the edit.
        after: the model after it.
        back: `after`, unfolded; it is compared with `before` weight by weight.
        layout: packed texts; the first validation texts are used.
        device: where to compute; float64 is computed there only if it is fast.
        texts: how many texts.
    """
    prompts = layout.select(Split.VALIDATION, limit=texts)
    double = _compare(before, after, prompts, float64_device(device), torch.float64)
    single = _compare(before, after, prompts, device, torch.float32)
    return Certificate(
        logits_float64=double.logit,
        logits_float32=single.logit,
        kl_float32=single.kl,
        unfold=_largest_weight_change(before, back),
        texts=len(prompts.texts),
    )


def _largest_weight_change(before: Weights, back: Weights) -> float:
    """Return the largest change of a weight in float64; infinity if the tensors' names differ."""
    if set(back.entries) != set(before.entries):
        return float("inf")
    changes = [(before[name].double() - back[name].double()).abs().max() for name in before.entries]
    # torch's maximum keeps a NaN, Python's may lose it.
    return float(torch.stack(changes).max())


@torch.no_grad()
def _compare(
    before: Weights, after: Weights, layout: PackedTexts, device: torch.device, dtype: torch.dtype
) -> _Change:
    """Compare the logits of all rows, in blocks; the KL of a block is taken in float64."""
    A = _normed_final_states(before, layout, device, dtype)
    B = _normed_final_states(after, layout, device, dtype)
    H_before = head_for(before, A)
    H_after = head_for(after, B)
    changes = []
    kl = 0.0
    place = float64_device(A.device)
    for k in range(0, len(A), LOGIT_ROWS):
        a = head_logits(before, A[k : k + LOGIT_ROWS], H_before)
        b = head_logits(after, B[k : k + LOGIT_ROWS], H_after)
        changes.append((a - b).abs().max())
        p, q = (logits.to(place).double().log_softmax(-1) for logits in (a, b))
        kl += float((p.exp() * (p - q)).sum())
    return _Change(logit=float(torch.stack(changes).max()), kl=kl / len(A))


def _normed_final_states(
    weights: Weights, layout: PackedTexts, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the states `[rows, d]` after the final norm."""
    forward = LayerwiseForward(weights, layout, device, dtype)
    for _ in forward:
        forward.run()
    return final_norm(weights, forward.states.to(forward.device))
