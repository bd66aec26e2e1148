"""Sizes follow from configs, as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotdistill_core.planning.cost import CostContext
from rotdistill_core.planning.models import model_info
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_model

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("0.5B", 494_032_768),
        ("1.5B", 1_543_714_304),
        ("3B", 3_085_938_688),
        ("32B", 32_763_876_352),
    ],
)
def test_shipped_configs_lead_to_the_published_parameters(name: str, parameters: int) -> None:
    found = model_info(ModelRef(model=f"Qwen/Qwen2.5-{name}-Instruct"), SAMPLES, print)
    assert found.shape.parameters() == parameters
    assert found.shape.bytes == 2 * parameters
    assert found.model is None


def test_parameters_are_those_of_the_weight_files(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", tie_word_embeddings=False)
    shape = model_info(ModelRef(model=str(tmp_path / "model")), tmp_path, print).shape
    stored = {name: model.weights[name].numel() for name in model.weights.entries}
    assert shape.parameters() == sum(stored.values())
    inside = sum(size for name, size in stored.items() if name.startswith("model.layers."))
    assert shape.parameters(inside=True) == inside
    assert shape.parameters(inside=False) == sum(stored.values()) - inside
    assert shape.layer_parameters == inside / 2


def test_a_tied_head_counts_once(pico_context: CostContext) -> None:
    student = pico_context.student
    untied = student.changed(tie_word_embeddings=False)
    assert untied.parameters() - student.parameters() == student.vocab * student.width


def test_a_cut_keeps_a_share_of_the_layers_alone(pico_context: CostContext) -> None:
    student = pico_context.student
    cut = student.changed(keep=0.5).changed(keep=0.5)
    assert cut.parameters(inside=True) == round(student.parameters(inside=True) / 4)
    assert cut.parameters(inside=False) == student.parameters(inside=False)


def test_widths_are_those_of_the_config(pico_context: CostContext) -> None:
    student = pico_context.student
    sizes = (student.depth, student.width, student.neurons, student.vocab)
    assert sizes == (2, 32, 48, 64)
    assert (student.query_width, student.kv_width) == (4 * 8, 2 * 8)
