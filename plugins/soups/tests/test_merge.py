"""Every method agrees with a plain computation in float64, and leaves the rest of the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._merge import METHODS, ties_election, trim_threshold
from rotdistill_soups._mixture import Ingredient, rows_of
from rotdistill_soups.step import Soups
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.document import ModelRef

FineTune = Callable[..., str]
Merge = Callable[..., Any]


def dense(path: Path | str) -> dict[str, Tensor]:
    view = open_model(ModelRef(model=str(path))).weights
    return {n: view[n].double() for n in view.entries}


def assert_close(weights: Weights, wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name].double(), tensor, rtol=0, atol=atol)


def test_every_method_of_the_step_is_in_the_table() -> None:
    names = validator_of(Soups).json_schema()["properties"]["method"]["enum"]
    assert set(names) == set(METHODS)


def test_uniform_is_the_mean_and_weights_are_shares(
    merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    paths = [fine_tune(str(k), k) for k in range(3)]
    a, b, c = (dense(path) for path in paths)
    base = dense(student.folder)
    assert_close(merge(*paths).weights, {n: (a[n] + b[n] + c[n]) / 3 for n in a})
    assert_close(
        merge(*paths, weights=(2.0, 1.0, 1.0)).weights,
        {n: (2 * a[n] + b[n] + c[n]) / 4 for n in a},
    )
    assert_close(merge(paths[0], "student").weights, {n: (a[n] + base[n]) / 2 for n in a})


def test_bfloat16_ingredients_are_summed_in_float32(merge: Merge, fine_tune: FineTune) -> None:
    paths = [fine_tune(str(k), k, dtype=torch.bfloat16) for k in range(3)]
    a, b, c = (dense(path) for path in paths)
    assert_close(merge(*paths).weights, {n: (a[n] + b[n] + c[n]) / 3 for n in a}, atol=2e-7)


def test_task_arithmetic_adds_differences(
    merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    paths = fine_tune("a", 1), fine_tune("b", 2)
    one, two = (dense(path) for path in paths)
    base = dense(student.folder)
    merged = merge(*paths, method="task-arithmetic", weights=(1.0, -1.0), scaling=0.5)
    assert_close(merged.weights, {n: base[n] + 0.5 * (one[n] - two[n]) for n in base})


def test_weights_of_differences_may_sum_to_nothing(
    merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    merged = merge(
        fine_tune("a", 1), fine_tune("b", 2), method="task-arithmetic", weights=(1.0, -1.0)
    )
    norm = "model.norm.weight"
    assert float((merged.weights[norm] - student.weights[norm]).abs().max()) > 0


def test_slerp_goes_along_the_arc(merge: Merge, fine_tune: FineTune) -> None:
    paths = fine_tune("a", 1, size=0.5), fine_tune("b", 2, size=0.5)
    one, two = (dense(path) for path in paths)
    merged = merge(*paths, method="slerp", weights=(0.75, 0.25)).weights
    compared = 0
    for n in one:
        angle = torch.acos((one[n] * two[n]).sum() / one[n].norm() / two[n].norm())
        if float(angle.cos()) < 0.9995:
            ends = torch.sin(0.75 * angle) * one[n] + torch.sin(0.25 * angle) * two[n]
            wanted = ends / torch.sin(angle)
            torch.testing.assert_close(merged[n].double(), wanted, rtol=0, atol=1e-6)
            compared += 1
    assert compared > len(one) / 2


def test_parallel_ingredients_are_mixed_along_the_line(merge: Merge, student: Model) -> None:
    assert_close(merge("student", "student", method="slerp").weights, dense(student.folder))


def test_ties_trims_elects_and_averages(merge: Merge, fine_tune: FineTune, student: Model) -> None:
    base = dense(student.folder)
    paths = [fine_tune(str(k), k) for k in range(3)]
    others = [dense(path) for path in paths]
    merged = merge(*paths, method="ties", density=0.3, weights=(1.0, 2.0, 1.0)).weights
    for n, start in base.items():
        deltas = torch.stack([trimmed(other[n] - start, 0.3) for other in others])
        weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
        w = weights.reshape(3, *[1] * start.ndim)
        sign = torch.where((w * deltas).sum(0) >= 0, 1.0, -1.0)
        agree = deltas.sign() == sign
        mean = (w * deltas * agree).sum(0) / (w * agree).sum(0).clamp_min(1e-12)
        torch.testing.assert_close(merged[n].double(), start + mean, rtol=0, atol=1e-6)


def trimmed(delta: Tensor, density: float) -> Tensor:
    sizes = delta.abs().flatten().sort(descending=True).values
    least = sizes[max(1, int(density * delta.numel())) - 1]
    return torch.where(delta.abs() >= least, delta, 0.0)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_the_trim_threshold_keeps_exactly_its_share(
    fine_tune: FineTune, student: Model, density: float
) -> None:
    view = open_model(ModelRef(model=fine_tune("a", 1))).weights
    name = "model.layers.0.mlp.down_proj.weight"
    threshold = trim_threshold(
        name, Ingredient("student", student.weights, {}), Ingredient("a", view, {}), density
    )
    delta = (view[name] - student.weights[name]).abs()
    assert int((delta >= threshold).sum()) == max(1, int(density * delta.numel()))


def test_opposite_signs_do_not_cancel_in_ties() -> None:
    student, one, two = (rows_of(torch.tensor([x])) for x in (0.0, 3.0, -1.0))
    coefficients = torch.tensor([[0.0], [1.0], [1.0]])
    assert float(ties_election([0.0, 0.0], 1.0)([student, one, two], 0, 1, coefficients)) == 3.0


def test_layers_choose_what_is_merged(merge: Merge, fine_tune: FineTune, student: Model) -> None:
    path = fine_tune("a", 1)
    one, base = dense(path), dense(student.folder)
    merged = merge(path, layers=(1, 1)).weights
    assert_close(merged, {n: (one if ".layers.1." in n else base)[n] for n in base})
    for n in base:
        if ".layers.1." not in n:
            assert merged.entries[n] is student.weights.entries[n]


def test_the_last_pattern_that_matches_gives_the_weights(
    merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    path = fine_tune("a", 1)
    one, base = dense(path), dense(student.folder)
    patterns = {"*.mlp.*": (1.0, 0.0), "*.down_proj.*": (0.0, 1.0)}
    merged = merge(path, "student", tensors=patterns).weights
    for n in base:
        share = 0.0 if "down_proj" in n else 1.0 if ".mlp." in n else 0.5
        wanted = share * one[n] + (1 - share) * base[n]
        torch.testing.assert_close(merged[n].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 2)}, r"layers = \[1, 2\]: write first and last, from 0 to 1"),
        ({"layers": (1, 0)}, "write first and last"),
        ({"tensors": {"*.mlp.gates": (1.0,)}}, r'is merged matches "\*\.mlp\.gates"'),
        ({"layers": (0, 0), "tensors": {"*.layers.1.*": (1.0,)}}, "no parameter that is merged"),
    ],
)
def test_options_that_choose_nothing_are_refused(
    merge: Merge, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        merge("student", **options)
