"""From final states to predictions, compared with plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rotdistill_core.forward.head import (
    final_norm,
    head_logits,
    log_probs,
    logits_of,
    logits_scaling,
)
from rotdistill_core.testing import pico_model, pico_samples, plain_transformers

LAYOUT = pico_samples(texts=6).layout


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("granite", {"logits_scaling": 0.3, "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_logits_are_those_of_plain_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    model = pico_model(tmp_path / "model", model_type, **changes)
    weights = model.weights
    states, expected = plain_transformers(model.adapter, model.folder, LAYOUT, torch.float32)
    X = states[-1]
    logits = head_logits(weights, final_norm(weights, X), weights.head())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_probs(weights, X), expected.log_softmax(-1), rtol=1e-5, atol=1e-5
    )


def test_log_probs_over_some_tokens_are_normalised_over_them(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model").weights
    X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    some = log_probs(weights, X, tokens=20)
    assert some.shape == (5, 20)
    torch.testing.assert_close(some.exp().sum(-1), torch.ones(5))
    whole = log_probs(weights, X)[:, :20]
    torch.testing.assert_close(some, whole.log_softmax(-1))


def test_log_probs_use_the_head_that_is_given(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model").weights
    X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_probs(weights, X, weights.head()), log_probs(weights, X))
    assert not torch.equal(log_probs(weights, X, 2 * weights.head()), log_probs(weights, X))


@pytest.mark.parametrize(
    ("scaling", "cap"), [(None, None), (8.0, None), (None, 2.0), (4.0, 2.0)], ids=str
)
def test_logits_are_divided_first_and_capped_then(
    tmp_path: Path, scaling: float | None, cap: float | None
) -> None:
    weights = pico_model(tmp_path / "model").weights
    table = replace(weights.adapter, logits_scaling_key="scaling", softcap_key="cap")
    weights = replace(weights, adapter=table).edit({}, scaling=scaling, cap=cap)
    products = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    expected = products / (scaling or 1.0)
    if cap:
        expected = cap * (expected / cap).tanh()
    torch.testing.assert_close(logits_of(weights, products), expected)
    assert logits_scaling(weights) == (scaling or 1.0)


def test_final_norm_keeps_gains_of_bfloat16_models_apart(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model", "gemma3_text", head_dim=8).weights
    # 1 + w in bfloat16 is 1 for this w.
    gain = torch.full((32,), 2.0**-10, dtype=torch.bfloat16)
    small = weights.edit({weights.adapter.norm: gain})
    zero = weights.edit({weights.adapter.norm: 0 * gain})
    X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    ratio = final_norm(small, X) / final_norm(zero, X)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 + 2.0**-10), rtol=1e-5, atol=0)
