"""What lessons are worth: KL against their number, their general share, temperature and source.

    python benchmarks/lesson_curve.py recipes/tour_guide.toml --counts 0 500 1000 2000 5000
    python benchmarks/lesson_curve.py recipes/tour_guide.toml --counts 1000 --general 0 0.2 0.4
    python benchmarks/lesson_curve.py recipes/tour_guide.toml --counts 1000 --temperatures 0 1
    python benchmarks/lesson_curve.py --only-table

Each arm is a run of the recipe with the refit alone: neither head nor answers. Its figures are
appended to a file, and arms that are in it are not run again. The table has a fitted power law,
`KL = floor + scale n^-exponent` for n texts. Options are to be chosen on its validation columns.
Captured states are removed after each arm: they are the largest part of a run. Arms of the same
texts share them, so run one command at a time in a folder of runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import curve_fit

import rotdistill_core
from rotdistill_core.store.layout import RunLayout

VARIANT = "refit"
NO_LIMIT = 1e6
"""A limit of the guard that no refit reaches: it is scored, and all of the refit is applied."""
LEAST_POINTS = 4
"""Counts from which a power law of three parameters is fitted."""


@dataclass(frozen=True)
class Arm:
    """One run of the curve."""

    count: int
    general: float
    general_from: str
    source: str
    temperature: float

    def sets(self) -> dict[str, object]:
        """Return the overrides of the recipe."""
        return {
            "lessons.count": self.count,
            "lessons.general": self.general,
            "lessons.general_from": self.general_from,
            "lessons.from": self.source,
            "lessons.temperature": self.temperature,
        }


@dataclass(frozen=True)
class Figures:
    """What an arm ended with, nats per token."""

    texts: int
    """Texts that were fitted, lessons included."""
    fit: float
    """On rows of fitted texts. Where it rises with the texts and `validation` does not fall, the
    student lacks freedom and not texts."""
    heldout: float
    guard: float
    validation: float
    guard_validation: float
    seconds: float


def arms(arguments: argparse.Namespace) -> Iterator[Arm]:
    """Yield the arms that are asked for, each once; without lessons their settings do not count."""
    seen: set[Arm] = set()
    for values in product(
        arguments.counts,
        arguments.general,
        arguments.general_from,
        arguments.sources,
        arguments.temperatures,
    ):
        arm = Arm(*values)
        if not arm.count:
            arm = Arm(0, 0.0, "texts", "questions", 0.0)
        if arm not in seen:
            seen.add(arm)
            yield arm


def figures_of(recipe: Path, arm: Arm, more: dict[str, object], runs: Path) -> Figures:
    """Run an arm and return its figures."""
    sets: dict[str, object] = {
        "variants": {VARIANT: ["basis", "fold", "refit"]},
        "observers": [],
        "baseline": VARIANT,
        "headline": VARIANT,
        "refit.guard": NO_LIMIT,
        **arm.sets(),
        **more,
    }
    outcome = rotdistill_core.run(recipe, set=sets, runs=runs)
    overall = {row.metric: row.value for row in outcome.rows if row.is_overall}
    step = outcome.steps[VARIANT, "refit"]
    lines = RunLayout(outcome.folder).texts.read_text(encoding="utf-8").splitlines()
    shutil.rmtree(outcome.folder / "shards", ignore_errors=True)
    return Figures(
        texts=sum(line.split("\t")[2] == "fit" for line in lines),
        fit=step.notes["fit KL after"],
        heldout=overall["kl"],
        guard=overall["guard_kl"],
        validation=step.notes["validation KL after"],
        guard_validation=step.notes["guard KL by strength"]["1"],
        seconds=round(sum(result.seconds for result in outcome.steps.values()), 1),
    )


def power_law(points: Sequence[tuple[int, float]]) -> tuple[float, float, float] | None:
    """Return floor, scale and exponent of `KL = floor + scale n^-exponent`; None with few points.

    Args:
        points: pairs of the number of texts n, and KL.
    """
    if len({n for n, _ in points}) < LEAST_POINTS:
        return None
    n, kl = np.array(points, dtype=float).T

    def law(n: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return np.asarray(floor + scale * (n / n_first) ** -exponent)

    n_first = float(n.min())
    start = (0.5 * float(kl.min()), float(kl.max() - 0.5 * kl.min()), 0.5)
    found, _ = curve_fit(law, n, kl, start, bounds=((0, 0, 0.01), (np.inf, np.inf, 4)))
    floor, scale, exponent = map(float, found)
    return floor, scale * n_first**exponent, exponent


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return all figures as a table in Markdown, with the power law of each setting."""
    header = (
        "| lessons | general | of | from | temperature | fit texts | fit KL | validation KL | "
        "held-out KL | guard KL, validation half | guard KL | minutes |"
    )
    rows = [header, "|" + "---|" * header.count(" | ") + "---|"]
    curves: dict[tuple[object, ...], list[tuple[int, float]]] = {}
    for line in sorted(lines, key=lambda line: (line["count"], line["general"])):
        rows.append(
            f"| {line['count']:,} | {line['general']:g} | {line['general_from']} | "
            f"{line['source']} | {line['temperature']:g} | {line['texts']:,} | "
            f"{line['fit']:.4f} | {line['validation']:.4f} | {line['heldout']:.4f} | "
            f"{line['guard_validation']:.4f} | {line['guard']:.4f} | {line['seconds'] / 60:.0f} |"
        )
        if line["count"]:
            key = tuple(line[name] for name in ("general", "general_from", "source", "temperature"))
            curves.setdefault(key, []).append((line["texts"], line["heldout"]))
    without = [(line["texts"], line["heldout"]) for line in lines if not line["count"]]
    for key, points in curves.items():
        law = power_law([*without, *points])
        if law:
            floor, scale, exponent = law
            setting = ", ".join(map(str, key))
            rows.append(
                f"\nHeld-out KL ({setting}) = {floor:.3f} + {scale:.3g} n^-{exponent:.2f}, "
                "n texts to fit on."
            )
    return "\n".join(rows)


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/tour_guide.toml"))
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 500, 1000, 2000, 5000])
    parser.add_argument("--general", type=float, nargs="+", default=[0.01])
    parser.add_argument("--general-from", nargs="+", default=["texts"])
    parser.add_argument("--sources", nargs="+", default=["questions"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--figures", type=Path, default=Path("runs/lesson_curve.jsonl"))
    parser.add_argument("--only-table", action="store_true")
    arguments = parser.parse_args()
    pairs = (item.partition("=") for item in arguments.set)
    more = tomllib.loads("\n".join(f'"{key}" = {value}' for key, _, value in pairs))
    lines = read(arguments.figures)
    for arm in () if arguments.only_table else arms(arguments):
        about = {**asdict(arm), "set": more}
        if any(about.items() <= line.items() for line in lines):
            continue
        line = {**about, **asdict(figures_of(arguments.recipe, arm, more, arguments.runs))}
        lines.append(line)
        arguments.figures.parent.mkdir(parents=True, exist_ok=True)
        with arguments.figures.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    print(table([line for line in lines if line["set"] == more]))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the figures of earlier arms; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
