"""The KL of a student on the answers of a split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_writer_refit import score_split

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.testing import (
    captured_activations,
    logits,
    pico_model,
    pico_output,
    pico_samples,
)


def test_score_is_the_kl_of_logits_whether_or_not_a_forward_pass_is_given(tmp_path: Path) -> None:
    samples = pico_samples(texts=40)
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    pair, weights = Pair(model, model), model.weights.cut([0, 1, 3])
    out = pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    layout = samples.layout.select(Split.VALIDATION)
    rows = layout.prediction_rows(Split.VALIDATION)[0]
    p = logits(model.weights, layout)[rows].log_softmax(-1)
    q = logits(weights, layout)[rows].log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())

    scores = score_split(Split.VALIDATION, weights, activations, pair, samples)
    assert scores.mean == pytest.approx(expected, rel=1e-4)
    assert len(scores.rows) == len(layout.texts)

    whole = samples.layout.select(Split.FIT, Split.VALIDATION)
    forward = LayerwiseForward(weights, whole, torch.device("cpu"), torch.float32)
    for _ in forward:
        forward.run()
    again = score_split(Split.VALIDATION, weights, activations, pair, samples, forward)
    assert again.mean == pytest.approx(expected, rel=1e-4)
