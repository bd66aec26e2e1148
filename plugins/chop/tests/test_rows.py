"""The texts on which cuts are fitted and scored."""

from __future__ import annotations

import pytest
import torch
from rotdistill_chop._rows import mean_kl, select_texts

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import Samples
from rotdistill_core.testing import pico_samples

LAYOUT = pico_samples(texts=50).layout
ANSWERED = tuple(Conversation(text.id, "en", text.split, "?", None) for text in LAYOUT.texts[3::10])
SAMPLES = Samples(LAYOUT, ANSWERED, "")


def test_texts_answered_by_the_teacher_come_first() -> None:
    selected = select_texts(SAMPLES, "validation", 100)
    assert {text.id for text in selected.texts} <= {question.id for question in ANSWERED}


@pytest.mark.parametrize("rows", [60, 100, 200])
def test_selected_texts_have_at_most_the_rows_asked_for(rows: int) -> None:
    assert select_texts(SAMPLES, "validation", rows).rows <= rows


def test_at_least_one_text_and_at_most_the_split_is_selected() -> None:
    assert len(select_texts(SAMPLES, "validation", 1).texts) == 1
    assert len(select_texts(SAMPLES, "validation", 10**6).texts) == 10


def test_mean_kl_is_the_mean_over_rows() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    q = torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=torch.float64).log()
    assert mean_kl(p, q) == pytest.approx(0.5 * 0.8 * torch.log(torch.tensor(9.0)).item())
