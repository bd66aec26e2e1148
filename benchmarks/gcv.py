"""λ of each refitted writer by generalised cross-validation, beside the choice on validation texts.

    python benchmarks/gcv.py [RECIPE] [--set ID.FIELD=VALUE]...

Carries out a recipe with a `writer-refit` (default: the depth cut) once for each way to choose λ,
in an empty folder of runs, and prints a table. `validation` is what the step does: the candidates
of its `ridge`, and a step along the solution, by the error on validation rows. The other two take
of `STRENGTHS` the one with the least

    GCV(λ) = (RSS(λ) / n) / (1 - df(λ) / n)²,   df(λ) = tr (Aᵀ w A)(Aᵀ w A + λI)⁻¹

on the fit rows alone, and all of the solution. Sums suffice for it, but n has to be known: `rows`
takes the rows that have a weight, `effective rows` takes `(Σw)² / Σw²` (Kish, 1965).
(Golub, Heath and Wahba, Technometrics 21(2), 1979.)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rotdistill_writer_refit import _method
from rotdistill_writer_refit._regression import RidgeFit
from torch import Tensor

from rotdistill_core import RunResult, load_recipe, run
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import ridge
from rotdistill_core.recipe.resolved import ResolvedRecipe

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-6, 4))
"""λ from 0.001 to 31.6, as multiples of the mean diagonal of `AᵀA`."""


def count_of_rows(weights: Tensor) -> float:
    """Return the number of rows that have a weight."""
    return float((weights > 0).sum())


def effective_count(weights: Tensor) -> float:
    """Return `(Σw)² / Σw²`: so many rows of one weight have a mean as uncertain as these."""
    weights = weights.double()
    return float(weights.sum().square() / weights.square().sum())


COUNTS: dict[str, Callable[[Tensor], float]] = {
    "rows": count_of_rows,
    "effective rows": effective_count,
}


def scores(fit: Moments, count: float, strengths: Sequence[float]) -> list[float]:
    """Return GCV(λ) for each strength; infinity where the rows do not exceed the freedoms.

    Args:
        fit: moments of activations `A [n, f]` and residuals `E [n, d]`.
        count: n.
        strengths: λ as multiples of the mean diagonal of `AᵀA`.
    """
    values, vectors = torch.linalg.eigh(fit.xx)
    values = values.clamp_min(0.0)
    explained = (vectors.T @ fit.xy).square().sum(1)
    found = []
    for strength in strengths:
        shifted = values + strength * float(fit.xx.diagonal().mean())
        # In the eigenbasis: tr(Δᵀ xy) = Σ s / (v + λ), and tr(Δᵀ xx Δ) = Σ v s / (v + λ)².
        gained = 2.0 * explained / shifted - values * explained / shifted.square()
        residual = fit.yy - float(gained.sum())
        free = 1.0 - float((values / shifted).sum()) / count
        found.append(residual / count / free**2 if free > 0 else float("inf"))
    return found


class ChosenByGcv:
    """Takes the place of `best_ridge`, and learns n of each regression on its way."""

    def __init__(self, count: Callable[[Tensor], float]) -> None:
        self._count = count
        self._rows = 0.0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Choose so within the context."""
        with ExitStack() as patches:
            for name, replacement in (
                ("regression_moments", self._noting(_method.regression_moments)),
                ("best_ridge", self.best),
            ):
                patches.enter_context(mock.patch.object(_method, name, replacement))
            yield

    def best(
        self, fit: Moments, validation: Moments, _strengths: object, where: str, *_: object
    ) -> RidgeFit:
        """Return all of the solution whose GCV is least; the step's own candidates do not count."""
        found = scores(fit, self._rows, STRENGTHS)
        strength = STRENGTHS[found.index(min(found))]
        delta = ridge(fit.xx, fit.xy, strength, where)
        return RidgeFit(delta, strength, 1.0, validation.error(delta))

    def _noting(self, plain: Callable[..., list[Moments]]) -> Callable[..., list[Moments]]:
        def noted(step: Any, forward: Any, problem: Any, site: str) -> list[Moments]:
            self._rows = self._count(problem.row_weights[problem.fit])
            return plain(step, forward, problem, site)

        return noted


def refit_of(recipe: ResolvedRecipe) -> str:
    """Return the id of the first `writer-refit` of a recipe."""
    ids = [each.id for each in recipe.steps if each.step.use == "writer-refit"]
    if not ids:
        raise SystemExit(f"{recipe.path}: has no writer-refit, whose λ could be chosen.")
    return ids[0]


def row_of(way: str, outcome: RunResult, refit: str) -> str:
    """Return the figures of the refit's first variant as a row of the table."""
    variant, result = next(
        (variant, result) for (variant, step), result in outcome.steps.items() if step == refit
    )
    overall = {
        row.metric: row.value for row in outcome.rows if row.variant == variant and row.is_overall
    }
    if result.report.refused:  # held-out and guard KL are then those of the student without it
        way += ", refused"
    strengths = [float(each["ridge"]) for each in result.notes["layers"].values()]
    return (
        f"| {way} | {min(strengths):.2g} to {max(strengths):.2g} | "
        f"{result.notes['validation KL after']:.4f} | "
        f"{overall['kl']:.4f} | {overall.get('guard_kl', float('nan')):.3f} |"
    )


def main() -> None:
    """Carry out the recipe for each way, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = ROOT / "recipes/depth_cut.toml"
    parser.add_argument("recipe", type=Path, nargs="?", default=recipe)
    parser.add_argument("--set", action="append", default=[], metavar="ID.FIELD=VALUE")
    arguments = parser.parse_args()
    print("| λ chosen by | λ | validation KL | held-out KL | guard KL |")
    print(f"|{'---|' * 5}", flush=True)
    for way in ("validation", *COUNTS):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as context:
            if way in COUNTS:
                context.enter_context(ChosenByGcv(COUNTS[way]).in_place())
            resolved = load_recipe(arguments.recipe, arguments.set)
            outcome = run(resolved, runs=Path(folder))
            print(row_of(way, outcome, refit_of(resolved)), flush=True)


if __name__ == "__main__":
    main()
