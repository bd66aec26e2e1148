"""Texts of a run on both sides of a model's original length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.execution.samples import with_prefix_of_common_tables
from rotdistill_core.testing import PicoWorkspace, pico_model, pico_samples

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "long_factor": [9.0, 9.0, 20.0, 30.0],
    "short_factor": [1.0] * 4,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 6.0}


def model_of(folder: Path, longest: int, rope: dict[str, Any] | None) -> Model:
    changes = {"rope_parameters": dict(rope)} if rope else {}
    return pico_model(folder, max_position_embeddings=longest, **changes)


@pytest.mark.parametrize(
    ("rope", "longest", "shared"),
    [(LONGROPE, 20, 0), (DYNAMIC, 20, 0), (LONGROPE, 128, 6), (DYNAMIC, 128, 6), (None, 20, 6)],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_prefix_is_shared_where_all_texts_have_the_same_tables(
    tmp_path: Path, rope: dict[str, Any] | None, longest: int, shared: int, role: str
) -> None:
    plain = model_of(tmp_path / "plain", 128, None)
    model = model_of(tmp_path / "model", longest, rope)
    pair = Pair(model, plain) if role == "teacher" else Pair(plain, model)
    samples = pico_samples()
    lengths = [len(text.tokens) for text in samples.layout.texts]
    assert min(lengths) <= 20 < max(lengths)
    assert with_prefix_of_common_tables(samples, pair).layout.prefix == shared
    own = replace(samples, theirs=samples.layout)
    apart = with_prefix_of_common_tables(own, pair)
    assert apart.theirs is not None
    found = apart.theirs if role == "teacher" else apart.layout
    other = apart.layout if role == "teacher" else apart.theirs
    assert (found.prefix, other.prefix) == (shared, 6)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_run_goes_over_the_original_length(
    pico_workspace: PicoWorkspace, rope: dict[str, Any]
) -> None:
    pico_workspace.texts()
    pico_workspace.model(max_position_embeddings=40, rope_parameters=dict(rope))
    steps = """
    [[step]]
    use = "residuals"
    [[step]]
    use = "fidelity"
    [variants]
    base = []
    """
    outcome = pico_workspace.run(pico_workspace.recipe(steps))
    divergence = [row.value for row in outcome.rows if row.metric == "kl" and row.text is None]
    assert divergence
    assert max(divergence) < 1e-6
