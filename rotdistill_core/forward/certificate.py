"""Exact steps are proved: logits before and after, in float64 and float32, and the way back to the old weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import CheckFailed
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.recipe.document import Check
from rotdistill_core.store.results import Certificate

TEXTS = 2


def enforce_certificate(certificate: Certificate, check: Check, where: str) -> None:
    """Raise CheckFailed for the first figure of a certificate beyond its tolerance."""
    for name in ("logits_float64", "logits_float32", "unfold"):
        value, allowed = getattr(certificate, name), getattr(check, name)
        if not value <= allowed:
            raise CheckFailed(
                f"{where}: the certificate fails: {name} is {value:.2e}, more than {allowed:.0e}."
            )


def certify(
    before: Weights,
    after: Weights,
    back: Weights,
    layout: PackedTexts,
    device: torch.device,
    seed_texts: int = TEXTS,
) -> Certificate:
    """Compare two views of one model on the validation texts, and `back` (after, unfolded) with `before` weight by weight."""
    some = layout.select("validation", most=seed_texts)
    wide = _change(before, after, some, device, torch.float64)[0]
    narrow, kl = _change(before, after, some, device, torch.float32)
    worst = float("inf")
    if set(back.entries) == set(
        before.entries
    ):  # torch's maximum keeps a NaN, Python's may lose it
        worst = float(
            torch.stack(
                [(before[n].double() - back[n].double()).abs().max() for n in before.entries]
            ).max()
        )
    return Certificate(wide, narrow, kl, worst, len(some.texts))


@torch.no_grad()
def _change(
    before: Weights, after: Weights, layout: PackedTexts, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    A, B = (_final(weights, layout, device, dtype) for weights in (before, after))
    changes, kl = [], 0.0
    H, G = before.head().to(device, dtype), after.head().to(device, dtype)
    for k in range(0, len(A), 256):
        a, b = head_logits(before, A[k : k + 256], H), head_logits(after, B[k : k + 256], G)
        changes.append((a - b).abs().max())
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
    return float(torch.stack(changes).max()), kl / len(A)


def _final(
    weights: Weights, layout: PackedTexts, device: torch.device, dtype: torch.dtype
) -> Tensor:
    walk = LayerwiseForward(weights, layout, device, dtype)
    for _ in walk:
        walk.run()
    return final_norm(weights, walk.states.to(device))
