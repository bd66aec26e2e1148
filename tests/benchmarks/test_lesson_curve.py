"""benchmarks/lesson_curve.py runs each arm once and fits the law that its figures follow."""

from __future__ import annotations

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/lesson_curve.py"


@pytest.fixture(scope="module")
def curve() -> ModuleType:
    spec = spec_from_file_location("lesson_curve", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_planted_power_law_is_found(curve: ModuleType) -> None:
    points = [(n, 0.2 + 9.0 * n**-0.6) for n in (320, 720, 1120, 1920, 4320)]
    floor, scale, exponent = curve.power_law(points)
    assert floor == pytest.approx(0.2, abs=1e-3)
    assert scale == pytest.approx(9.0, rel=0.02)
    assert exponent == pytest.approx(0.6, abs=0.01)
    assert curve.power_law(points[:3]) is None


def test_without_lessons_their_settings_make_no_other_arm(curve: ModuleType) -> None:
    asked = argparse.Namespace(
        counts=[0, 500],
        general=[0.0, 0.2],
        general_from=["texts"],
        sources=["questions"],
        temperatures=[0.0, 1.0],
    )
    assert len(list(curve.arms(asked))) == 5


def test_the_table_has_a_row_for_each_arm(curve: ModuleType) -> None:
    about = {"general": 0.2, "general_from": "texts", "source": "questions", "temperature": 0.0}
    figures = {
        "fit": 0.1,
        "validation": 0.5,
        "guard": 2.0,
        "guard_validation": 1.9,
        "seconds": 60.0,
    }
    lines = [
        {**about, **figures, "count": n, "texts": 320 + n, "heldout": 0.2 + 9.0 * (320 + n) ** -0.6}
        for n in (0, 500, 1000, 2000)
    ]
    table = curve.table(lines)
    assert table.count("| 0.2 | texts | questions | 0 |") == 4
    assert "Held-out KL (0.2, texts, questions, 0.0) = 0.200 + 9 n^-0.60" in table
