"""Our solvers beside SciPy's on the same numbers: the Procrustes solve, and the assignment of neurons.

    python benchmarks/solvers.py [--sizes 512 896 1536 2048] [--neurons 4864 11008] [--rounds 5]

Prints the ratio of times (`best / best` is what repeats on a shared machine), the relative difference of the objectives, and for the
assignment the peak of memory above what was there before over the 8 n² bytes of the similarities.
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
from bench import pairs

from rotdistill_core.alignment.assignment import assign
from rotdistill_core.linalg.solvers import polar


def peak(action: Callable[[], object]) -> int:
    """Run a call and return how many bytes of resident memory it needed at once, sampled every 5 ms."""
    me, done = psutil.Process(), threading.Event()
    before: int = me.memory_info().rss
    most = before

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, me.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return most - before


def procrustes(size: int, rounds: int) -> dict[str, float]:
    """Compare with `scipy.linalg.orthogonal_procrustes`, from the same rows, so that both also pay for `XᵀY`."""
    maker = torch.Generator().manual_seed(size)
    X = torch.randn(2 * size, size, dtype=torch.float64, generator=maker)
    Y = X @ torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=maker))[
        0
    ] + torch.randn(X.shape, generator=maker)
    M = X.T @ Y
    ours, theirs = polar(M, "bench")[0], scipy.linalg.orthogonal_procrustes(X.numpy(), Y.numpy())[0]
    one, other = float((ours * M).sum()), float((torch.from_numpy(theirs) * M).sum())
    times = pairs(
        lambda: polar(X.T @ Y, "bench"),
        lambda: scipy.linalg.orthogonal_procrustes(X.numpy(), Y.numpy()),
        rounds,
    )
    return {**times, "objective, relative difference": abs(one - other) / other}


def assignment(n: int, rounds: int) -> dict[str, float]:
    """Compare with `scipy.optimize.linear_sum_assignment` on the correlations of permuted, noisy activations."""
    maker = torch.Generator().manual_seed(n)
    A = torch.nn.functional.normalize(torch.randn(n, 256, generator=maker), dim=1)
    B = torch.nn.functional.normalize(
        A[torch.randperm(n, generator=maker)] + 2.0 * torch.randn(n, 256, generator=maker), dim=1
    )
    scores = (A @ B.T).double()
    bare = scores.numpy()
    ours, theirs = assign(scores), scipy.optimize.linear_sum_assignment(bare, maximize=True)
    same = float(np.mean(ours.numpy() == np.argsort(theirs[1])))
    times = pairs(
        lambda: assign(scores),
        lambda: scipy.optimize.linear_sum_assignment(bare, maximize=True),
        rounds,
    )
    return {
        **times,
        "same assignment": same,
        "memory / 8 n²": peak(lambda: assign(scores)) / (8 * n * n),
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
    found: dict[str, object] = {
        f"procrustes {size}": procrustes(size, options.rounds) for size in options.sizes
    }
    found |= {f"assignment {n}": assignment(n, options.rounds) for n in options.neurons}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
