"""Every method against a plain computation in float64, and what of the student it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._merge import Ingredient, elected, trimmed
from rotdistill_soups.step import Soups, steps
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_model, pico_output, pico_samples, save_folder


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def kin(
    model: Model, folder: Path, seed: int, size: float = 0.02, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a checkpoint a little way from a model, as a fine-tune is."""
    maker = torch.Generator().manual_seed(seed)
    view = model.weights
    moved = {
        n: view[n] + size * view[n].std() * torch.randn(view[n].shape, generator=maker)
        for n in view.entries
    }
    save_folder(view.edit(moved), model.folder, folder, dtype)
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "student")


def soup(
    student: Model, ingredients: tuple[str | Path, ...], root: Path, **options: Any
) -> Weights:
    step = Soups(ingredients=tuple(map(str, ingredients)), only_better=False, **options)
    return step.fold(
        student.weights, Pair(student, student), pico_samples(), pico_output(root / "runs"), quiet
    )


def dense(path: Path | str) -> dict[str, Tensor]:
    view = open_model(ModelRef(model=str(path))).weights
    return {n: view[n].double() for n in view.entries}


def close(made: Weights, wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(made[name].double(), tensor, rtol=0, atol=atol)


def test_it_is_a_fold_that_is_not_exact() -> None:
    assert steps() == [Soups]
    assert (stage_of(Soups), Soups.exact) == ("fold", False)


def test_uniform_is_the_mean_and_weights_are_shares(tmp_path: Path, student: Model) -> None:
    paths = tuple(kin(student, tmp_path / str(k), k) for k in range(3))
    all_ = [dense(p) for p in paths]
    close(soup(student, paths, tmp_path), {n: sum(x[n] for x in all_) / 3 for n in all_[0]})
    close(
        soup(student, paths, tmp_path, weights=(2.0, 1.0, 1.0)),
        {n: (2 * all_[0][n] + all_[1][n] + all_[2][n]) / 4 for n in all_[0]},
    )
    close(
        soup(student, (*paths[:1], "student"), tmp_path),
        {n: (all_[0][n] + dense(student.folder)[n]) / 2 for n in all_[0]},
    )


def test_bfloat16_ingredients_are_summed_in_float32(tmp_path: Path, student: Model) -> None:
    paths = tuple(kin(student, tmp_path / str(k), k, dtype=torch.bfloat16) for k in range(3))
    exact = {n: sum(dense(p)[n] for p in paths) / 3 for n in dense(paths[0])}
    close(soup(student, paths, tmp_path), exact, atol=2e-7)


def test_task_arithmetic_adds_differences(tmp_path: Path, student: Model) -> None:
    one, two, base = (
        dense(p)
        for p in (kin(student, tmp_path / "a", 1), kin(student, tmp_path / "b", 2), student.folder)
    )
    made = soup(
        student,
        (tmp_path / "a", tmp_path / "b"),
        tmp_path,
        method="task-arithmetic",
        weights=(1.0, -1.0),
        strength=0.5,
    )
    close(made, {n: base[n] + 0.5 * (one[n] - two[n]) for n in base})


def test_slerp_goes_along_the_arc(tmp_path: Path, student: Model) -> None:
    one, two = (
        dense(kin(student, tmp_path / "a", 1, size=0.5)),
        dense(kin(student, tmp_path / "b", 2, size=0.5)),
    )
    made = soup(
        student, (tmp_path / "a", tmp_path / "b"), tmp_path, method="slerp", weights=(0.75, 0.25)
    )
    for n in one:
        angle = torch.acos((one[n] * two[n]).sum() / one[n].norm() / two[n].norm())
        wanted = (torch.sin(0.75 * angle) * one[n] + torch.sin(0.25 * angle) * two[n]) / torch.sin(
            angle
        )
        if float(angle.cos()) < 0.9995:
            torch.testing.assert_close(made[n].double(), wanted, rtol=0, atol=1e-6)
    assert float(angle) > 0.1


def test_parallel_ingredients_are_mixed_along_the_line(tmp_path: Path, student: Model) -> None:
    close(soup(student, ("student", "student"), tmp_path, method="slerp"), dense(student.folder))


def test_ties_trims_elects_and_averages(tmp_path: Path, student: Model) -> None:
    base = dense(student.folder)
    others = [dense(kin(student, tmp_path / str(k), k)) for k in range(3)]
    made = soup(
        student,
        tuple(tmp_path / str(k) for k in range(3)),
        tmp_path,
        method="ties",
        density=0.3,
        weights=(1.0, 2.0, 1.0),
    )
    for n, start in base.items():
        deltas = []
        for other in others:
            delta = other[n] - start
            least = (
                delta.abs()
                .flatten()
                .sort(descending=True)
                .values[max(1, int(0.3 * delta.numel())) - 1]
            )
            deltas.append(torch.where(delta.abs() >= least, delta, 0.0))
        D, w = (
            torch.stack(deltas),
            torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).reshape(3, *[1] * start.ndim),
        )
        sign = torch.where((w * D).sum(0) >= 0, 1.0, -1.0)
        agree = D.sign() == sign
        wanted = start + (w * D * agree).sum(0) / (w * agree).sum(0).clamp_min(1e-12)
        torch.testing.assert_close(made[n].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_the_threshold_keeps_exactly_so_many(
    tmp_path: Path, student: Model, density: float
) -> None:
    kin(student, tmp_path / "a", 1)
    one = Ingredient("a", open_model(ModelRef(model=str(tmp_path / "a"))).weights, {})
    base = Ingredient("student", student.weights, {})
    name = "model.layers.0.mlp.down_proj.weight"
    delta = (one.view[name] - student.weights[name]).abs()
    kept = int((delta >= trimmed(name, base, one, density)).sum())
    assert kept == max(1, int(density * delta.numel()))


def test_opposite_signs_do_not_cancel_in_ties() -> None:
    parts = [torch.zeros(1), torch.tensor([3.0]), torch.tensor([-1.0])]
    opened = [lambda a, b, t=t: t[a:b] for t in parts]
    assert float(elected([0.0, 0.0], 1.0)(opened, 0, 1, torch.tensor([[0.0], [1.0], [1.0]]))) == 3.0


def test_layers_and_patterns_choose_what_is_merged(tmp_path: Path, student: Model) -> None:
    one, base = dense(kin(student, tmp_path / "a", 1)), dense(student.folder)
    made = soup(student, (tmp_path / "a",), tmp_path, layers=(1, 1))
    close(made, {n: (one if ".layers.1." in n else base)[n] for n in base})
    assert all(made.entries[n] is student.weights.entries[n] for n in base if ".layers.1." not in n)
    made = soup(
        student,
        (tmp_path / "a", "student"),
        tmp_path,
        tensors={"*.mlp.*": (1.0, 0.0), "*.down_proj.*": (0.0, 1.0)},
    )
    for n in base:
        share = 0.0 if "down_proj" in n else 1.0 if ".mlp." in n else 0.5
        torch.testing.assert_close(
            made[n].double(), share * one[n] + (1 - share) * base[n], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": (1, 2)}, r"layers = \[1, 2\]: write first and last, from 0 to 1"),
        ({"layers": (1, 0)}, "write first and last"),
        (
            {"tensors": {"*.mlp.gates": (1.0,)}},
            r'no parameter that is merged matches "\*\.mlp\.gates"',
        ),
        ({"layers": (0, 0), "tensors": {"*.layers.1.*": (1.0,)}}, "no parameter that is merged"),
    ],
)
def test_what_chooses_nothing_is_refused(
    tmp_path: Path, student: Model, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        soup(student, ("student",), tmp_path, **options)
