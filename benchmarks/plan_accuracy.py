"""The estimates of `plan`, compared with what a run takes: memory, bytes written, and time.

    python benchmarks/plan_accuracy.py RECIPE [KEY=VALUE ...]
    python benchmarks/plan_accuracy.py --small

`--small` makes random models with the vocabulary of real ones, and three recipes for them, in a
folder of its own. Pages of memory-mapped weight files do not count, because the operating system
can evict them. Memory is peak anonymous memory.

Times are those of each result, by the clock and by the processor. A plan states the time on an idle
machine, so where other programs compute, too, the processor's time is the one to compare. It counts
all threads, so call this with OMP_NUM_THREADS=1. What happens between two results (they are found,
read back, reported) has a row of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.execution.executor import Executor
from rotdistill_core.planning.calibration import calibrated
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import CHECKPOINTS, Plan, build_plan
from rotdistill_core.plugin.markers import hookimpl
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder, pico_texts, save_folder

TEXTS = {"index": "index.tsv", "style": "style.md", "heldout": "heldout.tsv", "guard": "guard.tsv"}
MEMORY_INTERVAL = 0.02
"""Seconds between two readings of the memory."""

CUT_MODEL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "vocab_size": 49152,
}
WIDE_MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 65536,
}
NARROW_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 65536,
}

CAPTURE = 'use = "residuals"'
HEAD = 'id = "head"\nuse = "lm-head-ridge"'
FIDELITY = 'use = "fidelity"'
SHORT_CHAIN = (CAPTURE, HEAD, FIDELITY)
CUT_CHAIN = (
    'use = "chop"\nlayers = 4',
    CAPTURE,
    'id = "basis"\nuse = "procrustes"',
    'id = "fold"\nuse = "basis-fold"\nmode = "canonical"',
    'id = "refit"\nuse = "writer-refit"',
    HEAD,
    FIDELITY,
    'use = "answers"',
)


class SmallRecipe(NamedTuple):
    """A recipe for two random models."""

    name: str
    teacher: str
    student: str
    steps: tuple[str, ...]
    """Bodies of the [[step]] tables."""
    full: tuple[str, ...]
    """Ids of the steps that only the variant `full` runs."""


CUT_TOGGLES = ("basis", "fold", "refit", "head", "answers")
SMALL_RECIPES = (
    SmallRecipe("cut", "cut-model", "cut-model", CUT_CHAIN, CUT_TOGGLES),
    SmallRecipe("cut-bfloat16", "half-model", "half-model", CUT_CHAIN, CUT_TOGGLES),
    SmallRecipe("two-widths", "wide-model", "narrow-model", SHORT_CHAIN, ("head",)),
)


BEFORE = "before the first step"
"""Phase in which models are compared, and the teacher answers."""
BETWEEN = "between results"


class Time(NamedTuple):
    """Seconds of a phase."""

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: object) -> Time:
        """Return the sum of both."""
        assert isinstance(other, Time)
        return Time(self.wall + other.wall, self.processor + other.processor)

    def since(self, start: Time) -> Time:
        """Return the seconds from `start` to this."""
        return Time(self.wall - start.wall, self.processor - start.processor)

    @classmethod
    def now(cls) -> Time:
        """Return the clocks."""
        return cls(time.monotonic(), time.process_time())


class PhaseObserver(SilentObserver):
    """Reads memory and clocks of this process while a run goes on, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = BEFORE
        self.peaks = dict[str, int]()
        """Step and variant -> peak anonymous memory, bytes."""
        self.times = dict[str, Time]()
        """Phase -> its time."""
        self._event = Time.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            info = process.memory_info()
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), info.rss - info.shared)
            time.sleep(MEMORY_INTERVAL)

    def ends(self, phase: str) -> None:
        """Count the time since the last event for a phase."""
        now = Time.now()
        self.times[phase] = self.times.get(phase, Time()) + now.since(self._event)
        self._event = now

    @hookimpl
    def before_step(self, step_id: str, variant: str) -> None:
        """See `HookSpecs.before_step`."""
        self.ends(BEFORE if self.phase == BEFORE else BETWEEN)
        self.phase = f"{step_id} {variant}"

    @hookimpl
    def after_step(self, step_id: str, variant: str) -> None:
        """See `HookSpecs.after_step`."""
        self.ends(self.phase)
        self.phase = f"after {step_id} {variant}"

    @hookimpl
    def variant_saved(self, variant: str) -> None:
        """See `HookSpecs.variant_saved`."""
        self.ends(f"{CHECKPOINTS} {variant}")


def folder_bytes(folder: Path) -> int:
    """Return the size of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_small_recipes(folder: Path) -> list[Path]:
    """Write random models, texts, and the recipes of `SMALL_RECIPES` for them."""
    pico_texts(folder / "texts", blurbs=40, questions=6)
    pico_folder(folder / "cut-model", "llama", 0, **CUT_MODEL)
    pico_folder(folder / "wide-model", "llama", 0, **WIDE_MODEL)
    pico_folder(folder / "narrow-model", "llama", 0, **NARROW_MODEL)
    model = open_model(ModelRef(model=str(folder / "cut-model")))
    save_folder(model.weights, model.folder, folder / "half-model", torch.bfloat16)
    return [write_recipe(recipe, folder) for recipe in SMALL_RECIPES]


def write_recipe(recipe: SmallRecipe, folder: Path) -> Path:
    """Write one recipe and return its path."""
    lines = [
        f'name = "{recipe.name}"',
        "observers = []",
        "[teacher]",
        f'model = "{folder / recipe.teacher}"',
        "[student]",
        f'model = "{folder / recipe.student}"',
        "[samples]",
        "answer_tokens = 8",
        *(f'{key} = "texts/{file}"' for key, file in TEXTS.items()),
        *(f"[[step]]\n{step}" for step in recipe.steps),
        "[variants]",
        "base = []",
        f"full = {list(recipe.full)}",
    ]
    path = folder / f"{recipe.name}.toml"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def compare_estimates(path: Path, sets: list[str], root: Path) -> None:
    """Plan a recipe, run it in a folder of runs, and print estimates and measurements."""
    loaded = load_recipe(path, sets)
    profile = calibrated(lambda line: print(line, file=sys.stderr))
    planned = build_plan(loaded, root, replace(this_machine(root), profile=profile))
    bytes_before = folder_bytes(root)
    observer = PhaseObserver()
    Executor(loaded, root, observer, lambda *_: None).go()
    observer.ends(BETWEEN)
    lines = {f"{line.id} {' '.join(line.variants[:1])}".strip(): line for line in planned.todo}
    print(f"{path.stem:<28} {'estimated, GB':>13} {'measured, GB':>13}")
    for phase, peak in observer.peaks.items():
        if phase in lines:
            estimate = lines[phase].ram_bytes + planned.baseline_memory
            print(f"{phase:<28} {estimate / 1e9:13.2f} {peak / 1e9:13.2f}")
    totals = planned.totals
    print_ratio("peak memory", totals.ram_bytes, max(observer.peaks.values()))
    print_ratio("disk", totals.disk_bytes, folder_bytes(root) - bytes_before)
    print_times(planned, observer.times)


def print_times(planned: Plan, times: Mapping[str, Time]) -> None:
    """Print planned and measured seconds of each result, and of all of them."""
    plans: dict[str, float] = {}
    for line in planned.todo:
        # Variants share a result; the first of them makes it.
        phase = f"{line.id} {line.variants[0]}" if line.variants else BEFORE
        plans[phase] = plans.get(phase, 0.0) + (line.seconds or 0.0)
    print("| result | planned, s | processor, s | planned / processor | clock, s |")
    print("|---|---|---|---|---|")
    made = [phase for phase in times if phase in plans]
    rest = [phase for phase in times if phase not in plans]
    for phase in made:
        print_time(phase, plans[phase], times[phase])
    print_time("all of these", sum(plans[p] for p in made), sum((times[p] for p in made), Time()))
    print_time(BETWEEN, 0.0, sum((times[p] for p in rest), Time()))
    sys.stdout.flush()


def print_time(phase: str, planned: float, took: Time) -> None:
    """Print a row of the table of times."""
    ratio = f"{planned / took.processor:.2f}" if planned and took.processor else ""
    print(f"| {phase} | {planned:.1f} | {took.processor:.1f} | {ratio} | {took.wall:.1f} |")


def print_ratio(resource: str, estimate: int, measured: int) -> None:
    """Print an estimate, its measurement, and how far it is off."""
    error = f"{estimate / measured - 1:+.0%}"
    print(f"{resource:<28} {estimate / 1e9:13.2f} {measured / 1e9:13.2f}   {error}", flush=True)


def main() -> None:
    """Compare for one recipe, or for the three small ones.

    Each small recipe runs in a process of its own, because a process keeps memory that it had.
    """
    if sys.argv[1:] != ["--small"]:
        compare_estimates(Path(sys.argv[1]), sys.argv[2:], Path("runs"))
        return
    this = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as folder:
        for path in write_small_recipes(Path(folder)):
            subprocess.run([sys.executable, this, str(path)], cwd=folder, check=True)


if __name__ == "__main__":
    main()
