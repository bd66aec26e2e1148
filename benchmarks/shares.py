"""Where the wall time of a run goes: forward passes, products, solves, hashing, fsync, the rest.

    python benchmarks/shares.py [RECIPE] [--limit N] [--set ID.FIELD=VALUE ...]

Carries out a recipe (default: the tour guide) in this process and in an empty folder of runs, with
the functions of `WRAPPED` timed from outside. A moment counts for the innermost of them, so the
column of seconds adds up to the wall time. Threads that work beside the main one (shards are
written, layers are read) have a column of their own.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from rotdistill_core import hookimpl, load_recipe, run
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store import files

ROOT = Path(__file__).resolve().parents[1]
REST = "the rest"
HASHING = "hashing"
LAPACK = {
    "scipy.linalg": ("svd", "eigh", "qr", "solve", "cho_factor", "cho_solve"),
    "torch.linalg": ("svd", "eigh", "qr", "solve", "inv", "inv_ex", "cholesky"),
}
"""Module -> its functions that solve something."""
WRAPPED: Mapping[str, tuple[str, ...]] = {
    "forward passes, layer by layer": (
        "rotdistill_core.forward.layerwise:LayerwiseForward.__init__",
        "rotdistill_core.forward.layerwise:LayerwiseForward.run",
    ),
    "answers, token by token": (
        "rotdistill_core.forward.growth:Growth._logits",
        "transformers:GenerationMixin.generate",
    ),
    "logits and KL": (
        "rotdistill_core.forward.head:head_logits",
        "rotdistill_core.forward.head:log_probs",
        "rotdistill_core.evaluation.divergence:compare_logits",
    ),
    "products (moments)": (
        "rotdistill_core.linalg.moments:Moments.add",
        "rotdistill_core.alignment.streams:sum_fit_rows",
    ),
    "solves": (
        "rotdistill_core.linalg.solvers:ridge",
        "rotdistill_core.linalg.solvers:svd",
        "rotdistill_core.linalg.solvers:eigh",
        "rotdistill_core.linalg.solvers:polar",
        "rotdistill_core.alignment.assignment:assign",
        *(f"{module}:{name}" for module, names in LAPACK.items() for name in names),
    ),
    "loading whole models": ("rotdistill_core.forward.generate:whole_model",),
    HASHING: ("rotdistill_core.store.hashing:sha256_of",),
    "fsync": ("os:fsync",),
}
"""Kind of work -> the functions that do it, as `module:name` or `module:class.method`."""


class Time(NamedTuple):
    """Time that one kind of work took."""

    seconds: float = 0.0
    """On the thread that carries out the run."""
    beside: float = 0.0
    """On all other threads."""
    calls: int = 0


class Stopwatch:
    """Time by kind of work; nested work counts for the inner kind.

    Args:
        now: returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.times: dict[str, Time] = {}
        self._main = threading.get_ident()
        self._local = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the time inside for a kind."""
        stack: list[str] = self._local.__dict__.setdefault("stack", [])
        self._count(stack)
        stack.append(kind)
        try:
            yield
        finally:
            self._count(stack)
            stack.pop()
            self._add(kind, Time(calls=1))

    def _count(self, stack: list[str]) -> None:
        """Give the time since the last change to the kind that is at work on this thread."""
        now = self.now()
        since = now - self._local.__dict__.get("since", now)
        self._local.since = now
        if stack:
            is_main = threading.get_ident() == self._main
            self._add(stack[-1], Time(since) if is_main else Time(beside=since))

    def _add(self, kind: str, more: Time) -> None:
        with self._lock:
            old = self.times.get(kind, Time())
            self.times[kind] = Time(
                seconds=old.seconds + more.seconds,
                beside=old.beside + more.beside,
                calls=old.calls + more.calls,
            )

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            with self.timed(kind):
                return function(*args, **options)

        return timed


def install(watch: Stopwatch) -> None:
    """Time the functions of `WRAPPED`, wherever a module has them, and the hashes of writes.

    Raises:
        AttributeError: one of them is gone; name the function that does its work now.
    """
    for kind, names in WRAPPED.items():
        for name in names:
            module, _, path = name.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            _replace(owner, last, watch, kind)

    class Sha256:
        """Hashes as `hashlib.sha256` does, and is timed."""

        def __init__(self) -> None:
            self._inner = hashlib.sha256()
            self.update = watch.wrap(HASHING, self._inner.update)
            self.hexdigest = self._inner.hexdigest

    mock.patch.object(files, "hashlib", SimpleNamespace(sha256=Sha256)).start()


def _replace(owner: Any, name: str, watch: Stopwatch, kind: str) -> None:
    """Time a function of a module or class; modules that have imported it get the timed one."""
    function = getattr(owner, name)
    if not isinstance(owner, ModuleType):
        is_bound = isinstance(vars(owner)[name], classmethod)
        inner = function.__func__ if is_bound else function
        timed = watch.wrap(kind, inner)
        setattr(owner, name, classmethod(timed) if is_bound else timed)
        return
    timed = watch.wrap(kind, function)
    setattr(owner, name, timed)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("rotdistill"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, timed)


def table(times: Mapping[str, Time], wall: float) -> str:
    """Return the shares of the wall time as a Markdown table."""
    rest = Time(wall - sum(each.seconds for each in times.values()))
    rows = [(kind, times.get(kind, Time())) for kind in WRAPPED]
    lines = ["| work | seconds | share | calls | beside it, seconds |", "|---|---|---|---|---|"]
    for kind, each in [*rows, (REST, rest)]:
        share = f"{each.seconds / wall:.1%}".replace("%", " %")
        calls = f"{each.calls:,} " if each.calls else ""
        beside = f"{each.beside:.1f} " if each.beside else ""
        lines.append(f"| {kind} | {each.seconds:.1f} | {share} | {calls}| {beside}|")
    lines.append(f"| the run | {wall:.1f} | 100 % | | |")
    return "\n".join(lines)


class PrintedLog:
    """What a run reports to: it prints lines and finished steps on stderr."""

    def log(self, line: str) -> None:
        """Print a line."""
        print(line, file=sys.stderr)

    @hookimpl
    def after_step(self, step_id: str, variant: str, seconds: float) -> None:
        """See `HookSpecs.after_step`."""
        self.log(f"  {variant:<12} {step_id:<16} {seconds:6.1f} s")

    def progress(self, done: int, total: int, note: str) -> None:
        """Show nothing."""


def measure(recipe: ResolvedRecipe) -> tuple[dict[str, Time], float]:
    """Carry out a recipe; return the time by kind of work, and the wall time."""
    watch = Stopwatch()
    install(watch)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run(recipe, runs=Path(folder), observer=PrintedLog())
        return watch.times, time.perf_counter() - started


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tour_guide = ROOT / "recipes" / "tour_guide.toml"
    parser.add_argument("recipe", nargs="?", type=Path, default=tour_guide)
    parser.add_argument("--limit", type=int, help="texts; all if not given")
    parser.add_argument("--set", action="append", default=[], help="as for `rotdistill run`")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the table."""
    options = arguments()
    sets = [*options.set, *([f"samples.limit={options.limit}"] if options.limit else [])]
    times, wall = measure(load_recipe(options.recipe, sets))
    print(f"{options.recipe.name}, {torch.get_num_threads()} threads\n\n{table(times, wall)}")


if __name__ == "__main__":
    main()
