"""How much rows count in a regression on the stream."""

from __future__ import annotations

from dataclasses import replace

import torch

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.forward.row_rms import massive_activation_mask, mean_square, rms_normalise
from rotdistill_core.forward.row_weights import (
    SINK_RMS,
    clip_sinks,
    over_mean_square,
    row_weights,
    sharing_texts,
)
from rotdistill_core.testing import pico_samples


def packed() -> PackedTexts:
    return pico_samples(texts=6).layout


def rows_with_a_sink(layout: PackedTexts, sink: int) -> torch.Tensor:
    """Return random rows `[rows, 16]`, one of which is 100 times longer."""
    rows = torch.randn(layout.rows, 16, generator=torch.Generator().manual_seed(0))
    rows[sink] *= 100
    return rows


def test_long_rows_are_shortened_and_all_others_stay() -> None:
    layout = packed()
    rows = rows_with_a_sink(layout, 20)
    clipped = clip_sinks(rows)
    rms = clipped.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms[20], SINK_RMS * rows.pow(2).mean(-1).sqrt().median())
    others = torch.arange(layout.rows) != 20
    assert torch.equal(clipped[others], rows[others])
    torch.testing.assert_close(rms_normalise(clipped), rms_normalise(rows), rtol=1e-5, atol=1e-6)


def test_each_kind_of_row_has_its_weight() -> None:
    layout = packed()
    sink = layout.prefix + 5
    rows = rows_with_a_sink(layout, sink)
    text, start, end = layout.texts[3], layout.starts[3], layout.starts[4]
    weights = row_weights(
        mean_square(rows),
        layout,
        prompt=30.0,
        sink=1000.0,
        own_sink=8.0,
        teacher_answer=4.0,
        teacher_answered={text.id},
    )
    first = start + text.answer - 1 - layout.prefix
    assert weights[0] == 1000  # position 0 is a sink whatever its length
    assert (weights[1 : layout.prefix] == 30).all()
    assert weights[sink] == 8
    assert (weights[first:end] == 4).all()
    kinds = torch.ones(layout.rows, dtype=torch.bool)
    kinds[: layout.prefix] = False
    kinds[sink] = False
    kinds[first:end] = False
    assert (weights[kinds] == 1).all()


def test_the_sink_of_a_text_without_the_prefix_is_its_own_and_its_answer_counts() -> None:
    shared = packed()
    plain = tuple(
        replace(text, id=f"p{k}", tokens=text.tokens[:9], answer=1, plain=True)
        for k, text in enumerate(shared.texts[:2])
    )
    layout = PackedTexts((*shared.texts, *plain), shared.prefix)
    first, second = layout.starts[-3:-1]
    rows = rows_with_a_sink(layout, first)
    rows[second] *= 100
    weights = row_weights(
        mean_square(rows),
        layout,
        prompt=30.0,
        sink=1000.0,
        own_sink=8.0,
        teacher_answer=4.0,
        teacher_answered={"p0"},
    )
    assert weights[0] == 1000
    assert weights[first] == weights[second] == 8
    assert (weights[first + 1 : second] == 4).all()
    assert (weights[second + 1 :] == 1).all()


def test_without_a_prefix_position_0_is_the_sink_of_one_text() -> None:
    shared = packed()
    plain = tuple(replace(text, plain=True) for text in shared.texts)
    layout = PackedTexts(plain, 0)
    rows = rows_with_a_sink(layout, layout.starts[2])
    weights = row_weights(mean_square(rows), layout, prompt=30.0, sink=1000.0, own_sink=8.0)
    assert (weights == 8).nonzero().flatten().tolist() == [0, layout.starts[2]]
    assert weights.sum() == layout.rows - 2 + 2 * 8
    assert sharing_texts(layout) == 0


def test_only_the_massive_row_is_a_sink() -> None:
    layout = packed()
    mask = massive_activation_mask(rows_with_a_sink(layout, 7))
    assert mask.nonzero().flatten().tolist() == [7]


def test_weights_over_mean_square_make_errors_relative() -> None:
    rows = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    weights = over_mean_square(torch.tensor([1.0, 1.0, 1.0]), mean_square(rows))
    torch.testing.assert_close(weights[0], torch.tensor(1 / 12.5, dtype=torch.float64))
    torch.testing.assert_close(weights[1], weights[0] / 100)
    assert torch.isfinite(weights).all()
