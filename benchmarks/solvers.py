"""Our solvers compared with SciPy's on the same numbers: the Procrustes solve, the assignment.

    python benchmarks/solvers.py [--sizes 512 896 1536 2048] [--neurons 4864 11008] [--rounds 5]

Prints ratios of times (`best / best` is the one that repeats on a shared machine) and relative
differences of the objectives. For the assignment of neurons it prints the peak of memory above the
level before the call, as a multiple of the 8 n² bytes of the similarities.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import scipy.linalg
import scipy.optimize
import torch
from bench import compare_times

from rotdistill_core.alignment.assignment import assign
from rotdistill_core.linalg.solvers import polar


def peak_memory(action: Callable[[], object]) -> int:
    """Return how many bytes of resident memory a call needed at once, sampled every 5 ms."""
    process = psutil.Process()
    before: int = process.memory_info().rss
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return peak - before


def compare_procrustes(size: int, rounds: int) -> dict[str, float]:
    """Compare with `scipy.linalg.orthogonal_procrustes` from the same rows, `XᵀY` included."""
    generator = torch.Generator().manual_seed(size)
    X = torch.randn(2 * size, size, dtype=torch.float64, generator=generator)
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    planted = torch.linalg.qr(noise)[0]
    Y = X @ planted + torch.randn(X.shape, generator=generator)

    def ours() -> torch.Tensor:
        return polar(X.T @ Y, "bench")[0]

    def scipys() -> torch.Tensor:
        return torch.from_numpy(scipy.linalg.orthogonal_procrustes(X.numpy(), Y.numpy())[0])

    M = X.T @ Y
    objective = float((ours() * M).sum())
    reference = float((scipys() * M).sum())
    difference = abs(objective - reference) / reference
    return {**compare_times(ours, scipys, rounds), "objective, relative difference": difference}


def compare_assignment(n: int, rounds: int) -> dict[str, float]:
    """Compare with `scipy.optimize.linear_sum_assignment` on permuted, noisy activations."""
    generator = torch.Generator().manual_seed(n)
    normalize = torch.nn.functional.normalize
    A = normalize(torch.randn(n, 256, generator=generator), dim=1)
    permuted = A[torch.randperm(n, generator=generator)]
    B = normalize(permuted + 2.0 * torch.randn(n, 256, generator=generator), dim=1)
    scores = (A @ B.T).double()
    array = scores.numpy()

    def ours() -> torch.Tensor:
        return assign(scores)

    def scipys() -> tuple[np.ndarray, np.ndarray]:
        return scipy.optimize.linear_sum_assignment(array, maximize=True)

    same = float(np.mean(ours().numpy() == np.argsort(scipys()[1])))
    return {
        **compare_times(ours, scipys, rounds),
        "same assignment": same,
        "memory / 8 n²": peak_memory(ours) / (8 * n * n),
    }


def main() -> None:
    """Run everything and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 896, 1536, 2048])
    parser.add_argument("--neurons", type=int, nargs="*", default=[4864, 11008])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, object] = {}
    for size in options.sizes:
        figures[f"procrustes {size}"] = compare_procrustes(size, options.rounds)
    for n in options.neurons:
        figures[f"assignment {n}"] = compare_assignment(n, options.rounds)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
