"""The length of rows of the residual stream: unit rows, and which rows are massive activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotdistill_core.linalg.precision import sum_device

MASSIVE = 8.0
"""A row of massive activations has an RMS above this multiple of the median row's."""
CHUNK_ROWS = 4096
"""Rows that are widened to float64 at a time."""
BINS_PER_OCTAVE = 32
"""Bins of the histogram of RMS; a bin is 2 % wide."""
OCTAVES = 64
"""The histogram goes from `2^-64` to `2^64`. What is smaller or larger is in its end bins."""


def rms_normalise(X: Tensor) -> Tensor:
    """Divide each row by its RMS, in float64: a reader's view of the stream, without norm gains."""
    X = X.double()
    return X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True).clamp_min(1e-30))


def mean_square(X: Tensor) -> Tensor:
    """Return the mean square of each row of `X [rows, d]`, `[rows]`, float64, on the host.

    Some rows are widened at a time, where they are.
    """
    if not len(X):
        return torch.zeros(0, dtype=torch.float64)
    X = X.to(sum_device(X.device))
    chunks = (X[k : k + CHUNK_ROWS] for k in range(0, len(X), CHUNK_ROWS))
    return torch.cat([chunk.double().pow(2).mean(-1) for chunk in chunks]).cpu()


def rms_histogram(X: Tensor) -> Tensor:
    """Return how many rows of `X [rows, d]` have an RMS in each bin, int64; rows add up.

    Bins are equal in the logarithm. A row that is NaN is in the last one.
    """
    return _histogram(mean_square(X))


def _histogram(squares: Tensor) -> Tensor:
    """Return the `rms_histogram` of rows by their mean squares [rows]."""
    octaves = squares.log2() / 2
    last = 2 * OCTAVES * BINS_PER_OCTAVE - 1
    bins = ((octaves + OCTAVES) * BINS_PER_OCTAVE).floor().nan_to_num(nan=last)
    return torch.bincount(bins.clamp(0, last).long(), minlength=last + 1)


def massive_threshold(histogram: Tensor) -> float:
    """Return the RMS above which rows are massive activations, from the `rms_histogram` of rows.

    That is `MASSIVE` times the upper edge of the bin of the median row: integers decide on it, so
    it is the same wherever and in whatever order the rows were counted. Without rows it is Inf.
    """
    ends = histogram.cumsum(0)
    rows = int(ends[-1])
    if not rows:
        return math.inf
    # The lower of two medians, as torch has it.
    median_bin = int(torch.searchsorted(ends, (rows + 1) // 2))
    return float(MASSIVE * 2.0 ** ((median_bin + 1) / BINS_PER_OCTAVE - OCTAVES))


def massive_activation_mask(X: Tensor, threshold: float | None = None) -> Tensor:
    """Return the mask [rows] of massive activations (attention sinks), on the host.

    These are rows whose RMS exceeds `threshold`; without one, that of all rows of X. (Sun et al.,
    Massive Activations in Large Language Models, arXiv:2402.17762.)
    """
    return massive_rows(mean_square(X), threshold)


def massive_rows(squares: Tensor, threshold: float | None = None) -> Tensor:
    """Return the mask of `massive_activation_mask` by the mean square of each row [rows]."""
    if threshold is None:
        threshold = massive_threshold(_histogram(squares))
    return squares.sqrt() > threshold
