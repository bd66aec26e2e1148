"""benchmarks/gcv.py scores each λ as its definition says, and prints a row for each way."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rotdistill_core.linalg.moments import Moments
from rotdistill_core.testing import PicoWorkspace

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gcv.py"
STEPS = """
variants = { base = [], refit = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit", guard = "off" },
    { use = "fidelity" },
]
check.logits_float32 = 1e-2
"""


@pytest.fixture(scope="module")
def gcv() -> ModuleType:
    specification = spec_from_file_location("gcv", SCRIPT)
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    sys.modules["gcv"] = module
    specification.loader.exec_module(module)
    return module


def test_scores_are_those_of_the_definition(gcv: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    A, E = (torch.randn(40, d, generator=generator, dtype=torch.float64) for d in (6, 3))
    w = torch.rand(40, generator=generator, dtype=torch.float64)
    moments = Moments(6, 3)
    moments.add(A, E, w)
    strengths = (0.01, 0.5, 4.0)
    found = gcv.scores(moments, 40, strengths)
    root = w.sqrt()[:, None]
    X, Y = root * A, root * E
    for strength, score in zip(strengths, found, strict=True):
        ridge = strength * (X.T @ X).diagonal().mean() * torch.eye(6, dtype=torch.float64)
        hat = X @ torch.linalg.solve(X.T @ X + ridge, X.T)
        residual = float((Y - hat @ Y).square().sum())
        wanted = residual / 40 / (1 - float(hat.trace()) / 40) ** 2
        assert score == pytest.approx(wanted, rel=1e-9)


def test_a_strength_is_small_for_what_can_be_predicted_and_large_for_noise(gcv: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    A, noise = (torch.randn(60, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    picked = []
    for E in (A + 0.01 * noise, noise):
        moments = Moments(20, 20)
        moments.add(A, E)
        found = gcv.scores(moments, 60, gcv.STRENGTHS)
        picked.append(gcv.STRENGTHS[found.index(min(found))])
    assert picked[0] == min(gcv.STRENGTHS)
    assert picked[1] >= 1.0


def test_no_more_rows_than_freedoms_have_no_score(gcv: ModuleType) -> None:
    moments = Moments(20, 2)
    moments.add(torch.randn(30, 20), torch.randn(30, 2))
    assert gcv.scores(moments, 10, (1e-6,)) == [float("inf")]


def test_the_effective_count_of_equal_weights_is_their_number(gcv: ModuleType) -> None:
    assert gcv.effective_count(torch.full((50,), 0.3)) == pytest.approx(50)
    assert gcv.effective_count(torch.tensor([1.0, 1.0, 1e-9])) == pytest.approx(2)
    assert gcv.count_of_rows(torch.tensor([1.0, 0.0, 2.0])) == 2


@pytest.mark.slow
def test_a_pico_run_has_a_row_for_each_way(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model(num_hidden_layers=3)
    recipe = workspace.recipe(STEPS, teacher=tmp_path / "model", student=tmp_path / "model")
    more = ["--set", "refit.ridge=[0.3]", "--set", "residuals.student_texts=4"]
    command = [sys.executable, str(SCRIPT), str(recipe), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\| ([a-z ]+).* \| (\S+) to (\S+) \| (\S+) \|", done.stdout, re.MULTILINE)
    assert [way for way, *_ in found] == ["validation", "rows", "effective rows"]
    # Each way has been in place: they lead to other students.
    assert len({kl for *_, kl in found}) == 3, done.stdout
