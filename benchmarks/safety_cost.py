"""What safety costs: hashing, fsync and lines of the ledger, as a share of a run's wall time.

    python benchmarks/safety_cost.py [RECIPE] [--limit N] [--runs FOLDER] [--set ID.FIELD=VALUE ...]

Without a recipe: a run on pico models, made on the spot. It carries out the recipe twice in an
empty folder, so the second run reads and verifies all that the first has written. The folder of
runs decides what fsync costs: name one on the disk that is meant. The exit code is 1 if the first
run spends more than `MOST` on safety.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

import torch
from shares import HASHING, PrintedLog, Stopwatch, Time, install

from rotdistill_core import load_recipe, run
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import PicoWorkspace

MOST = 0.05
"""Largest share of a run that safety may take."""
FSYNC = "fsync"
LEDGER = "ledger lines"
SAFETY = (HASHING, FSYNC, LEDGER)
"""Kinds of work that a run without safety would not do."""
PICO_STEPS = """
variants = { base = [], full = ["basis", "fold", "refit", "head"] }
check.logits_float32 = 1e-2
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit" },
    { id = "head", use = "lm-head-ridge" },
    { use = "fidelity" },
]
"""


def measure(recipe: ResolvedRecipe, runs: Path) -> tuple[Mapping[str, Time], float]:
    """Carry out a recipe; return the time by kind of work, and the wall time."""
    watch = Stopwatch()
    install(watch)
    # Opening and reading the ledger count too, apart from the hash and the fsync in it.
    plain_read, plain_append = Ledger.__init__, Ledger.append
    Ledger.__init__ = watch.wrap(LEDGER, plain_read)  # type: ignore[method-assign]
    Ledger.append = watch.wrap(LEDGER, plain_append)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        run(recipe, runs=runs, observer=PrintedLog())
        return watch.times, time.perf_counter() - started
    finally:
        Ledger.__init__ = plain_read  # type: ignore[method-assign]
        Ledger.append = plain_append  # type: ignore[method-assign]


def share(times: Mapping[str, Time], wall: float) -> float:
    """Return the share of safety in a run, on the thread that carries it out."""
    return sum(times.get(kind, Time()).seconds for kind in SAFETY) / wall


def line(title: str, times: Mapping[str, Time], wall: float) -> str:
    """Return the line of a run in the table."""
    cells = [f"{times.get(kind, Time()).seconds / wall:.1%}".replace("%", " %") for kind in SAFETY]
    beside = sum(times.get(kind, Time()).beside for kind in SAFETY)
    whole = f"{share(times, wall):.1%}".replace("%", " %")
    return f"| {title} | {wall:.1f} | {' | '.join(cells)} | {whole} | {beside:.1f} |"


def pico_recipe(folder: Path) -> Path:
    """Write pico models, texts and a recipe; return the recipe."""
    workspace = PicoWorkspace(folder)
    workspace.texts()
    workspace.model(num_hidden_layers=3)
    return workspace.recipe(PICO_STEPS)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="pico models if not given")
    parser.add_argument("--limit", type=int, help="texts; all if not given")
    parser.add_argument("--runs", type=Path, help="where runs are written; a folder that goes away")
    parser.add_argument("--set", action="append", default=[], help="as for `rotdistill run`")
    return parser.parse_args()


def main() -> int:
    """Measure, and print the table; return the exit code."""
    options = arguments()
    sets = [*options.set, *([f"samples.limit={options.limit}"] if options.limit else [])]
    heads = ("run", "seconds", *SAFETY, "together", "beside it, seconds")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    with tempfile.TemporaryDirectory(dir=options.runs) as name:
        folder = Path(name)
        path = options.recipe.resolve() if options.recipe else pico_recipe(folder)
        with chdir(folder if options.recipe is None else Path.cwd()):
            recipe = load_recipe(path, sets)
            if options.recipe is None:  # what is imported on the way is no part of a run
                measure(recipe, folder / "warm-up")
            times, wall = measure(recipe, folder / "runs")
            again = measure(recipe, folder / "runs")
    lines += [line("first", times, wall), line("again, all reused", *again)]
    print(f"{path.name}, {torch.get_num_threads()} threads\n")
    print("\n".join(lines))
    return int(options.recipe is not None and share(times, wall) > MOST)


if __name__ == "__main__":
    sys.exit(main())
