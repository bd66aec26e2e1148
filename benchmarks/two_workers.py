"""How much faster two processes capture and refit than one, each with one thread.

    python benchmarks/two_workers.py [recipes/depth_cut.toml] [--limit 60] [--pairs 3]

Each pair is two runs under torchrun in empty folders: one process, then two. Their checkpoints must
have the same sha256; the exit code is 1 where they do not. Before each pair a product of matrices
runs in one process and in two at once: what this machine has to give. Two threads of one core share
its units, so there it is well below 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import torch

STEPS = ("residuals", "refit")
KERNEL_SECONDS = 5.0


class Seconds(NamedTuple):
    """Wall time of the steps of one run, and what it wrote."""

    steps: dict[str, float]
    """Step -> seconds."""
    sha256: str
    """Of the tensors of all checkpoints."""


def main() -> None:
    """Time the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/depth_cut.toml"))
    parser.add_argument("--limit", type=int, default=60, help="blurbs; 0 for all")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = ["samples.own_answers=0", *options.set]
    if options.limit:
        settings.append(f"samples.limit={options.limit}")

    print("| pair | kernel | " + " | ".join(STEPS) + " | both |", flush=True)
    print("|---" * (len(STEPS) + 3) + "|", flush=True)
    rows: list[list[float]] = []
    same = True
    for pair in range(options.pairs):
        kernel = kernel_rate(2) / kernel_rate(1)
        alone, both = (timed(options.recipe, settings, n) for n in (1, 2))
        same &= alone.sha256 == both.sha256
        ratios = [alone.steps[name] / both.steps[name] for name in STEPS]
        total = sum(alone.steps.values()) / sum(both.steps.values())
        rows.append([kernel, *ratios, total])
        print_row(str(pair + 1), rows[-1])
    print_row("median", [statistics.median(column) for column in zip(*rows, strict=True)])
    print("The checkpoints are the same." if same else "THE CHECKPOINTS DIFFER.")
    sys.exit(0 if same else 1)


def print_row(name: str, values: Sequence[float]) -> None:
    """Print a row of the table: each value is the time of one process over that of two."""
    print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |", flush=True)


def kernel_rate(processes: int) -> float:
    """Return how many products of matrices a second some processes take, all together."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=products, args=(together, rates)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(rates.get() for _ in workers)
    for worker in workers:
        worker.join()
    return float(total)


def products(together: Barrier, rates: Queue[float]) -> None:
    """Put how many products a second this process takes, while all take them."""
    torch.set_num_threads(1)
    A, B = torch.randn(1024, 576), torch.randn(576, 1536)
    together.wait()
    started = time.monotonic()
    count = 0
    while time.monotonic() - started < KERNEL_SECONDS:
        A @ B
        count += 1
    rates.put(count / (time.monotonic() - started))


def timed(recipe: Path, settings: Sequence[str], processes: int) -> Seconds:
    """Carry out a recipe in an empty folder of runs, with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "rotdistill_core"]
        command += ["run", str(recipe.resolve())]
        command += [part for each in settings for part in ("--set", each)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if finished.returncode:
            raise SystemExit(finished.stderr)
        (run,) = Path(folder).glob("runs/*/ledger.jsonl")
        return Seconds(seconds_of_steps(run), digest(run.parent / "checkpoints"))


def seconds_of_steps(ledger: Path) -> dict[str, float]:
    """Return the wall time of each timed step, as the ledger has it."""
    found: dict[str, float] = {}
    for line in ledger.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "step" and record["id"] in STEPS:
            found[record["id"]] = float(record["seconds"])
    return found


def digest(folder: Path) -> str:
    """Return the sha256 of the tensors of all checkpoints in a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
