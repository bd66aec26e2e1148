"""Logits are compared row by row: KL, agreement on the first token, likelihood of the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import SetupError
from rotdistill_core.evaluation import divergence
from rotdistill_core.evaluation.divergence import (
    compare_logits,
    kl_divergence,
    shared_vocabulary,
)
from rotdistill_core.testing import (
    final_states,
    logits,
    pico_model,
    pico_samples,
    pico_tokenizer,
)

TOKENS = 50
CAP = {"final_logit_softcapping": 5.0}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    return Pair(teacher, pico_model(tmp_path / "student", "gemma3_text", seed=1, **CAP))


@pytest.fixture
def layout() -> PackedTexts:
    return pico_samples(texts=8).layout.select("fit")


def answers(pair: Pair, layout: PackedTexts) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of final states of both models, and the next tokens."""
    rows, targets, _ = layout.prediction_rows("fit")
    T, S = (
        final_states(m.weights, layout, torch.float32)[rows] for m in (pair.teacher, pair.student)
    )
    return T, S, targets % TOKENS


def test_kl_divergence_is_that_of_torch() -> None:
    maker = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 9, generator=maker).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert kl_divergence(p, p).tolist() == [0.0] * 5
    assert (kl_divergence(p, q) > 0).all()


def test_comparison_is_that_of_whole_logits(pair: Pair, layout: PackedTexts) -> None:
    T, S, targets = answers(pair, layout)
    rows, _, _ = layout.prediction_rows("fit")
    found = compare_logits(pair.teacher.weights, T, pair.student.weights, S, targets, TOKENS)
    p, q = (
        logits(model.weights, layout)[rows, :TOKENS].log_softmax(-1)
        for model in (pair.teacher, pair.student)
    )
    torch.testing.assert_close(found.kl, kl_divergence(p, q), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.top1, (p.argmax(-1) == q.argmax(-1)).double())
    nll = -q.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.nll, nll, rtol=1e-4, atol=1e-5)
    assert {values.dtype for values in (found.kl, found.top1, found.nll)} == {torch.float64}


def test_blocks_of_rows_change_only_rounding(
    pair: Pair, layout: PackedTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    T, S, targets = answers(pair, layout)
    assert len(S) > 7
    whole = compare_logits(pair.teacher.weights, T, pair.student.weights, S, targets, TOKENS)
    monkeypatch.setattr(divergence, "BLOCK_ROWS", 7)
    blocks = compare_logits(pair.teacher.weights, T, pair.student.weights, S, targets, TOKENS)
    torch.testing.assert_close(blocks.kl, whole.kl, rtol=1e-5, atol=1e-6)
    assert torch.equal(blocks.top1, whole.top1)


def test_another_head_stands_in_for_the_students(pair: Pair, layout: PackedTexts) -> None:
    T, S, targets = answers(pair, layout)
    head = 2.0 * pair.student.weights.head()
    edited = pair.student.weights.untie().edit({pair.student.weights.adapter.head: head})
    given = compare_logits(pair.teacher.weights, T, pair.student.weights, S, targets, TOKENS, head)
    own = compare_logits(pair.teacher.weights, T, edited, S, targets, TOKENS)
    assert torch.equal(given.kl, own.kl)


@pytest.mark.parametrize(("rows", "words", "shared"), [(64, 56, 56), (72, 64, 64), (56, 56, 56)])
def test_padding_rows_are_not_shared(tmp_path: Path, rows: int, words: int, shared: int) -> None:
    models = []
    for name, size in (("teacher", rows), ("student", 64)):
        model = pico_model(tmp_path / name, vocab_size=size)
        pico_tokenizer(words).save_pretrained(model.folder)
        models.append(open_model(model.ref))
    assert shared_vocabulary(Pair(*models)) == shared


def test_two_tokenizers_share_no_vocabulary(tmp_path: Path) -> None:
    teacher, student = pico_model(tmp_path / "teacher", seed=1), pico_model(tmp_path / "student")
    pico_tokenizer(56).save_pretrained(teacher.folder)
    with pytest.raises(SetupError, match="different tokenizers: 8 of 64 tokens"):
        shared_vocabulary(Pair(open_model(teacher.ref), student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kl_of_narrow_states_is_that_of_float64(
    pair: Pair, layout: PackedTexts, dtype: torch.dtype
) -> None:
    T, S, targets = (
        rows.to(dtype) if rows.is_floating_point() else rows for rows in answers(pair, layout)
    )
    narrow, exact = (
        compare_logits(
            pair.teacher.weights, T.to(wide), pair.student.weights, S.to(wide), targets, TOKENS
        )
        for wide in (dtype, torch.float64)
    )
    assert float((narrow.kl - exact.kl).abs().max()) < 1e-5
    assert float((narrow.nll - exact.nll).abs().max()) < 1e-5
    assert narrow.top1.tolist() == exact.top1.tolist()
