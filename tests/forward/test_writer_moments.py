"""The moments of a writer's regression: their solution moves the stream to the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.writer_moments import writer_moments
from rotdistill_core.linalg.solvers import ridge
from rotdistill_core.testing import pico_model, pico_samples

LAYOUT = pico_samples(texts=30).layout
ALL = torch.ones(LAYOUT.rows, dtype=torch.bool)
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "model")


def states_after_layer_0(model: Model, change: torch.Tensor | None = None) -> torch.Tensor:
    """Return the stream after layer 0, with a change of its down projection."""
    weights = model.weights
    if change is not None:
        weights = weights.edit({DOWN: weights[DOWN] + change})
    forward = LayerwiseForward(weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in forward:
        forward.run()
        return forward.states
    raise AssertionError


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_ridge_solution_is_the_planted_change_of_the_writer(model: Model, alpha: float) -> None:
    change = 0.1 * torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    targets = states_after_layer_0(model, change)
    forward = LayerwiseForward(model.weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in forward:
        weights = torch.rand(LAYOUT.rows, generator=torch.Generator().manual_seed(2)) + 0.5
        (moments,) = writer_moments(
            forward, "neurons", 48, targets.__getitem__, weights, [ALL], alpha
        )
        assert forward.boundary == 0
        break
    delta = ridge(moments.xx, moments.xy, 1e-7, "here")
    torch.testing.assert_close(delta.T.float(), alpha * change, rtol=0, atol=1e-3)


@pytest.mark.parametrize("multiplier", [0.22, 1.0, 3.0])
@pytest.mark.parametrize(
    ("site", "name", "width"),
    [("neurons", DOWN, 48), ("heads", "model.layers.0.self_attn.o_proj.weight", 32)],
)
def test_a_layer_that_multiplies_its_branches_is_refitted_to_the_target(
    tmp_path: Path, multiplier: float, site: str, name: str, width: int
) -> None:
    model = pico_model(tmp_path / "model", "granite", residual_multiplier=multiplier)
    forward = LayerwiseForward(model.weights, LAYOUT, torch.device("cpu"), torch.float32)
    wanted = 0.1 * torch.randn(width, 32, generator=torch.Generator().manual_seed(1))
    for _ in forward:
        inputs = torch.zeros(LAYOUT.rows, width)
        after = torch.zeros(LAYOUT.rows, 32)
        forward.run({site: inputs.__setitem__, "output": after.__setitem__}, advance=False)
        targets = after + inputs @ wanted
        ones = torch.ones(LAYOUT.rows)
        (moments,) = writer_moments(forward, site, width, targets.__getitem__, ones, [ALL])
        delta = ridge(moments.xx, moments.xy, 1e-7, "here").float()
        forward.replace(name, model.weights[name] + delta.T)
        moved = torch.zeros(LAYOUT.rows, 32)
        forward.run({"output": moved.__setitem__}, advance=False)
        break
    # What the MLP reads changes with the attention's writer: there the change alone is compared.
    torch.testing.assert_close(multiplier * delta, wanted, rtol=0, atol=2e-3)
    if site == "neurons":
        torch.testing.assert_close(moved, targets, rtol=0, atol=2e-3)


def test_moments_of_disjoint_rows_add_up(model: Model) -> None:
    targets = torch.zeros(LAYOUT.rows, 32)
    weights = torch.ones(LAYOUT.rows)
    fit = LAYOUT.split("fit")
    forward = LayerwiseForward(model.weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in forward:
        row_sets = [fit, ~fit, ALL]
        one, two, whole = writer_moments(forward, "mlp", 32, targets.__getitem__, weights, row_sets)
        break
    assert one.weight == fit.sum()
    assert two.weight == (~fit).sum()
    torch.testing.assert_close(one.xx + two.xx, whole.xx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.xy + two.xy, whole.xy, rtol=1e-5, atol=1e-5)
    assert one.yy + two.yy == pytest.approx(whole.yy)
