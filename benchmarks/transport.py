"""What a fine-tune brings that is carried into another model, beside one that is trained there.

    python benchmarks/transport.py [--students bare layers neurons turned] [--no-train]

Runs recipes/transport_source.toml and recipes/transport_students.toml, or finds their runs in
`runs` of the current folder, and then recipes/transport.toml for each student (`--set KEY=VALUE`
changes that one). Prints held-out KL to the teacher, the share of the trained LoRA's gain that the
carried one has, and the wall time of both steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rotdistill_core import run
from rotdistill_core.execution.outcome import RunResult

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STUDENTS = ("bare", "layers", "neurons", "turned")
UNTRAINED = {
    "base": [],
    "carried": ["carry"],
    "random": ["by-chance"],
    "shuffled": ["out-of-order"],
}
COLUMNS = (
    "student",
    "base",
    "carried",
    "trained",
    "share of the gain",
    "random maps",
    "shuffled rows",
    "seconds carried",
    "seconds trained",
    "share of the time",
)


class Progress:
    """Reports lines of a run on stderr."""

    def log(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stderr, flush=True)

    def progress(self, *_: object) -> None:
        """Show no progress inside a step."""


def main() -> None:
    """Carry out the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--no-train", action="store_true", help="leave out the trained LoRA")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings: dict[str, object] = dict(each.split("=", 1) for each in options.set)
    for name in ("transport_source", "transport_students"):
        run(RECIPES / f"{name}.toml", observer=Progress())
    print("| " + " | ".join(COLUMNS) + " |", flush=True)
    print("|---" * len(COLUMNS) + "|", flush=True)
    for student in options.students:
        model: dict[str, object] = {"student.model": f"run:transport-students/{student}"}
        if options.no_train:
            model |= {"variants": UNTRAINED}
        print_row(
            student, run(RECIPES / "transport.toml", set=settings | model, observer=Progress())
        )


def print_row(student: str, result: RunResult) -> None:
    """Print the figures of one student."""
    kl = {
        row.variant: row.value
        for row in result.rows
        if row.metric == "kl" and row.text is None and row.language is None
    }
    seconds = {
        variant: result.steps[variant, step].seconds
        for variant, step in (("carried", "carry"), ("trained", "lora"))
        if (variant, step) in result.steps
    }
    cells = [
        student,
        *(_number(kl.get(name)) for name in ("base", "carried", "trained")),
    ]
    if "trained" in kl:
        gain = (kl["base"] - kl["carried"]) / (kl["base"] - kl["trained"])
        cells.append(f"{100 * gain:.0f} %")
    else:
        cells.append("")
    cells += [_number(kl.get(name)) for name in ("random", "shuffled")]
    cells.append(f"{seconds['carried']:.0f}")
    if "trained" in seconds:
        cells.append(f"{seconds['trained']:.0f}")
        cells.append(f"{100 * seconds['carried'] / seconds['trained']:.1f} %")
    else:
        cells += ["", ""]
    print("| " + " | ".join(cells) + " |", flush=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
