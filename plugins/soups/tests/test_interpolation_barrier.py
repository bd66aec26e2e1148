"""Between kin there is no barrier, between two bases of one model there is; ends are judged as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._kl_scorer import KLScorer
from rotdistill_soups.barrier import InterpolationBarrier, _line

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_model, pico_output, pico_samples, rotated_twin, save_folder

SAMPLES = pico_samples()


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def measured(
    teacher: Model, weights: Weights, root: Path, between: tuple[str, ...], **options: Any
) -> tuple[list[MetricRow], dict[str, Any]]:
    out = pico_output(root / "runs", "-".join(Path(b).name for b in between))
    variant = Variant("full", weights, Maps(), 0.0, root)
    rows = InterpolationBarrier(between=between, **options).evaluate(
        variant, Pair(teacher, teacher), SAMPLES, out, quiet
    )
    return rows, out.notes


@pytest.fixture
def teacher(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "teacher")


def kin(model: Model, folder: Path, seed: int) -> Path:
    maker, view = torch.Generator().manual_seed(seed), model.weights
    noise = {
        n: view[n] + 0.2 * view[n].std() * torch.randn(view[n].shape, generator=maker)
        for n in view.entries
    }
    save_folder(view.edit(noise), model.folder, folder)
    return folder


def test_a_line_between_kin_has_no_barrier_and_ends_at_the_ends(
    tmp_path: Path, teacher: Model
) -> None:
    one, two = kin(teacher, tmp_path / "one", 1), kin(teacher, tmp_path / "two", 2)
    rows, notes = measured(teacher, teacher.weights, tmp_path, (str(one), str(two)))
    [line] = notes["lines"]
    assert (len(line["t"]), line["t"][0], line["t"][-1]) == (11, 0.0, 1.0)
    judge = KLScorer(
        Pair(teacher, teacher), SAMPLES, "heldout", pico_output(tmp_path / "runs"), quiet
    )
    assert line["loss"][0] == pytest.approx(
        judge(open_model(ModelRef(model=str(one))).weights).mean, rel=1e-6
    )
    assert line["loss"][-1] == pytest.approx(
        judge(open_model(ModelRef(model=str(two))).weights).mean, rel=1e-6
    )
    assert min(line["loss"]) < 0.7 * min(line["loss"][0], line["loss"][-1])
    assert rows[0][:4] == ("full", "barrier", line["barrier"], "heldout")
    assert 0 <= line["barrier"] < 1e-3


def test_another_basis_is_behind_a_barrier(tmp_path: Path, teacher: Model) -> None:
    rotated_twin(teacher, tmp_path / "twin")
    rows, notes = measured(
        teacher, teacher.weights, tmp_path, ("variant", str(tmp_path / "twin")), points=5
    )
    [line] = notes["lines"]
    assert max(line["loss"][0], line["loss"][-1]) < 1e-6
    assert rows[0].value == line["barrier"] == pytest.approx(max(line["loss"]), abs=1e-6)
    assert line["barrier"] > 0.1
    assert 0 < line["at"] < 1


@pytest.mark.parametrize(
    ("loss", "barrier", "at"),
    [([1.0, 3.0, 2.0], 1.5, 0.5), ([2.0, 1.0, 1.0], 0.0, 0.0), ([0.0, 1.0, 1.0, 3.0], 0.0, 0.0)],
)
def test_the_chord_between_the_ends_is_taken_off(
    loss: list[float], barrier: float, at: float
) -> None:
    line = _line("a", "b", loss)
    assert (line["barrier"], line["at"]) == pytest.approx((barrier, at))


def test_each_end_is_joined_with_each(tmp_path: Path, teacher: Model) -> None:
    ends = ("variant", *(str(kin(teacher, tmp_path / str(k), k)) for k in range(2)))
    rows, notes = measured(teacher, teacher.weights, tmp_path, ends, points=3, split="validation")
    assert [(line["from"], line["to"]) for line in notes["lines"]] == [
        (ends[0], ends[1]),
        (ends[0], ends[2]),
        (ends[1], ends[2]),
    ]
    assert rows[0].value == max(line["barrier"] for line in notes["lines"])
    assert rows[0].split == "validation"
