"""What a fine-tune brings that is carried into another model, beside one that is trained there.

    python benchmarks/transport.py
    python benchmarks/transport.py --lessons 1000 --students bare neurons --layers 28 26 \\
        --neurons 1408 1280 --set lora.max_epochs=1

Runs recipes/transport_source.toml and recipes/transport_students.toml, or finds their runs in
`runs` of the current folder, and then recipes/transport.toml for each student. Prints held-out KL
to the teacher, the share of the trained LoRA's gain that the carried one has, and the wall time of
both steps.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from rotdistill_core import run
from rotdistill_core.execution.outcome import RunResult

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
STUDENTS = RECIPES / "transport_students.toml"
SIZES = {"bare": "layers", "layers": "layers", "neurons": "neurons"}
"""Variant of that recipe -> the option of its first step that says how large it is."""
CARRIED_BY = ("carry", "by-chance", "out-of-order")
"""Steps of recipes/transport.toml that carry the fine-tune."""
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
    variants: dict[str, list[str]] = tomllib.loads(STUDENTS.read_text("utf-8"))["variants"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--students", nargs="+", choices=variants, default=list(variants))
    sizes = "instead of the recipe's"
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[], help=f"of `bare` and `layers`, {sizes}"
    )
    parser.add_argument("--neurons", nargs="+", type=int, default=[], help=f"of `neurons`, {sizes}")
    parser.add_argument(
        "--lessons",
        type=int,
        default=0,
        help="lessons to learn from, beside the recipe's own texts",
    )
    parser.add_argument("--no-train", action="store_true", help="leave out the trained LoRA")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="overrides with TOML values, of the source, and of what is carried and trained",
    )
    options = parser.parse_args()
    pairs = (each.partition("=") for each in options.set)
    settings: dict[str, object] = tomllib.loads(
        "\n".join(f'"{key}" = {value}' for key, _, value in pairs)
    )
    if options.lessons:
        settings["lessons.count"] = options.lessons
        settings["lessons.tokens"] = 24  # as long as the answers that are scored
        settings["lessons.forms"] = str(ROOT / "samples" / "forms.tsv")
    source = run(RECIPES / "transport_source.toml", set=settings, observer=Progress())
    adapter = str(source.folder / "weights" / "lora" / "adapter")
    print("| " + " | ".join(COLUMNS) + " |", flush=True)
    print("|---" * len(COLUMNS) + "|", flush=True)
    for label, folder in students(options, variants):
        model: dict[str, object] = {"student.model": str(folder)}
        model |= {f"{step}.source": adapter for step in CARRIED_BY}
        if options.no_train:
            model["variants"] = UNTRAINED
        result = run(RECIPES / "transport.toml", set=settings | model, observer=Progress())
        print_row(label, result)


def students(
    options: argparse.Namespace, variants: dict[str, list[str]]
) -> Iterator[tuple[str, Path]]:
    """Make the students that are asked for; yield the name and the folder of each.

    Those of the recipe's sizes are of one run, in which transport_parts.py finds them.
    """
    for name in options.students:
        steps = variants[name]
        sizes = getattr(options, SIZES[name]) if name in SIZES else []
        for size in sizes or [None]:
            settings: dict[str, object] = {}
            if size:
                settings = {"variants": {name: steps}, "baseline": name}
                settings[f"{steps[0]}.{SIZES[name]}"] = size
            result = run(STUDENTS, set=settings, observer=Progress())
            yield (f"{name}, {size}" if size else name), result.checkpoints[name].resolve()


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
