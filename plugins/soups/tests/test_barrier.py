"""Fine-tunes of one model have no barrier between them; two bases of one model have one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rotdistill_soups._barrier import barrier_of
from rotdistill_soups.barrier import InterpolationBarrier

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.results import Curve
from rotdistill_core.testing import (
    parametrize_with_checks,
    pico_output,
    pico_samples,
    rotated_twin,
)

FineTune = Callable[..., str]


@parametrize_with_checks(InterpolationBarrier, {"between": ["variant", "student"], "points": 3})
def test_interpolation_barrier_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


class Measured(NamedTuple):
    """The rows and the lines of one evaluation."""

    rows: list[MetricRow]
    curves: list[Curve]
    notes: dict[str, Any]


def measure(teacher: Model, root: Path, *between: str, **options: Any) -> Measured:
    out = pico_output(root / "runs", "-".join(Path(end).name for end in between))
    variant = Variant("full", teacher.weights, Maps(), 0.0, root)
    step = InterpolationBarrier(between=between, **options)
    rows = step.evaluate(variant, Pair(teacher, teacher), pico_samples(), out, lambda *_: None)
    return Measured(rows, out.report.curves, out.notes)


@pytest.fixture
def teacher(student: Model) -> Model:
    return student


def test_a_line_between_fine_tunes_has_no_barrier(
    tmp_path: Path, teacher: Model, fine_tune: FineTune
) -> None:
    one, two = fine_tune("one", 1, 0.2), fine_tune("two", 2, 0.2)
    measured = measure(teacher, tmp_path, one, two)
    [curve] = measured.curves
    assert (len(curve.positions), curve.positions[0], curve.positions[-1]) == (11, 0.0, 1.0)
    assert min(curve.losses) < 0.7 * min(curve.losses[0], curve.losses[-1])
    [row] = measured.rows
    barrier = measured.notes["barriers"][f"{one} to {two}"]["barrier"]
    assert row[:4] == ("full", "barrier", barrier, "heldout")
    assert 0 <= barrier < 1e-3


def test_a_line_begins_and_ends_with_the_losses_of_its_ends(
    tmp_path: Path, teacher: Model, fine_tune: FineTune
) -> None:
    one, two = fine_tune("one", 1, 0.2), fine_tune("two", 2, 0.2)
    [curve] = measure(teacher, tmp_path, one, two, points=3).curves
    out = pico_output(tmp_path / "runs")
    pair = Pair(teacher, teacher)
    score = KLScorer(pair, pico_samples(), "heldout", out, lambda *_: None)
    for loss, path in ((curve.losses[0], one), (curve.losses[-1], two)):
        weights = open_model(ModelRef(model=path)).weights
        assert loss == pytest.approx(score(weights).mean, rel=1e-6)


def test_another_basis_has_a_barrier(tmp_path: Path, teacher: Model) -> None:
    rotated_twin(teacher, tmp_path / "twin")
    measured = measure(teacher, tmp_path, "variant", str(tmp_path / "twin"), points=5)
    [curve], [row] = measured.curves, measured.rows
    [barrier] = measured.notes["barriers"].values()
    assert max(curve.losses[0], curve.losses[-1]) < 1e-6
    assert row.value == barrier["barrier"] == pytest.approx(max(curve.losses), abs=1e-6)
    assert row.value > 0.1
    assert 0 < barrier["at"] < 1


@pytest.mark.parametrize(
    ("losses", "height", "position"),
    [([1.0, 3.0, 2.0], 1.5, 0.5), ([2.0, 1.0, 1.0], 0.0, 0.0), ([0.0, 1.0, 1.0, 3.0], 0.0, 0.0)],
)
def test_a_barrier_is_measured_from_the_chord(
    losses: list[float], height: float, position: float
) -> None:
    positions = [k / (len(losses) - 1) for k in range(len(losses))]
    assert barrier_of(positions, losses) == pytest.approx((height, position))


def test_each_end_is_joined_with_each(tmp_path: Path, teacher: Model, fine_tune: FineTune) -> None:
    ends = ("variant", fine_tune("0", 0, 0.2), fine_tune("1", 1, 0.2))
    measured = measure(teacher, tmp_path, *ends, points=3, split="validation")
    assert [(curve.start, curve.end) for curve in measured.curves] == [
        (ends[0], ends[1]),
        (ends[0], ends[2]),
        (ends[1], ends[2]),
    ]
    [row] = measured.rows
    assert row.value == max(found["barrier"] for found in measured.notes["barriers"].values())
    assert row.split == "validation"
