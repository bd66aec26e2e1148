"""Measures the rates of this machine and prints them as JSON: `python -m` with this module.

Each kernel that costs a run time is called a few times, on matrices of the sizes of small models.
On a CPU the time is that of this thread on its processor: what other programs take of it does not
count. A parallel kernel keeps this thread busy to its end, so where they take the processor of
another thread, the rates come out too low; `Profile.in_use` says so.
"""

from __future__ import annotations

import time

LOADED_FROM = time.thread_time()

import gc  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from rotdistill_core.data.batching import BATCH_TOKENS  # noqa: E402
from rotdistill_core.linalg.exact import ExactSum  # noqa: E402
from rotdistill_core.linalg.precision import full_float32_products  # noqa: E402
from rotdistill_core.linalg.solvers import ridge, svd  # noqa: E402
from rotdistill_core.planning.cost import SVD_OPERATIONS  # noqa: E402
from rotdistill_core.planning.machine import processors_in_use  # noqa: E402
from rotdistill_core.planning.rates import ASSUMED_GPU, Profile, Rates  # noqa: E402
from rotdistill_core.store.files import write_file  # noqa: E402
from rotdistill_core.store.hashing import sha256_of  # noqa: E402
from rotdistill_core.store.layout import user_cache  # noqa: E402

ENOUGH = 0.25
"""Seconds of a kernel, all calls together."""
PATIENCE = 3.0
"""Seconds of waiting after which no further call is made: other programs take the processor."""
SIDE = 1024
"""Rows and columns of the matrices of products."""
SVD_SIDE = 384
UNKNOWNS = 1024
"""Of a regression."""
STREAMED = (8192, 4096)
"""Shape of a matrix that fits no cache, 128 MiB in float32."""
WIDTH, NEURONS, HEADS, TEXTS = 576, 1536, 9, 8
"""Of a layer as small models have it, and how many texts go through it at once."""
TINY = 64
"""Width of a layer whose products take no time."""
FILE_BYTES = 1 << 25
LOOK = 0.5
"""Seconds for which the work of other programs is looked at before."""
HOST = torch.device("cpu")


def seconds_of_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the mean time of a call, after a first one that does not count.

    The first one counts if it is so slow that another would not fit.
    """
    now = time.thread_time if device == HOST else time.monotonic

    def timed() -> float:
        start = now()
        call()
        if device != HOST:
            torch.cuda.synchronize(device)
        return now() - start

    began = time.monotonic()
    first = timed()
    if first > ENOUGH:
        return first
    total, calls = 0.0, 0
    while calls == 0 or (total < ENOUGH and time.monotonic() - began < PATIENCE):
        total += timed()
        calls += 1
    return max(total / calls, 1e-7)


def rates_of(device: torch.device) -> Rates:
    """Return the rates of a device."""

    def rate(amount: float, call: Callable[[], object]) -> float:
        seconds = amount / seconds_of_call(call, device)
        gc.collect()
        return seconds

    def products(dtype: torch.dtype) -> float:
        A, B = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
        return rate(2.0 * SIDE**3, lambda: A @ B)

    float32 = products(torch.float32)
    X = torch.randn(2 * UNKNOWNS, UNKNOWNS, dtype=torch.float64)
    xx, xy = X.T @ X, X.T @ X[:, : UNKNOWNS // 2]
    solved = UNKNOWNS**3 / 3 + 2.0 * UNKNOWNS**2 * xy.shape[1]
    M = torch.randn(SVD_SIDE, SVD_SIDE, dtype=torch.float64)
    # One token for each of a few answers.
    W, x = torch.randn(STREAMED, device=device), torch.randn(2, STREAMED[1], device=device)
    term = torch.randn(SIDE, SIDE, device=device)
    total = ExactSum(term.shape, bound=2.0**40)
    return Rates(
        float32=float32,
        bfloat16=products(torch.bfloat16),
        float64=products(torch.float64),
        solves=rate(solved, lambda: ridge(xx, xy, 0.01, "calibration", device)),
        decompositions=rate(SVD_OPERATIONS * SVD_SIDE**3, lambda: svd(M, "calibration", device)),
        activations=_activations(device, float32),
        streamed_bytes=rate(W.numel() * W.itemsize, lambda: x @ W.T),
        exact_terms=rate(term.numel(), lambda: total.add(term)),
        layer_call=seconds_of_call(_layer(TINY, TINY, 1, 1, 1, device), device),
    )


def _layer(
    width: int, neurons: int, heads: int, texts: int, length: int, device: torch.device
) -> Callable[[], object]:
    """Return the call of a layer of random weights on texts of one length."""
    config: Any = LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(device).eval()
    states = torch.randn(texts, length, width, device=device)
    positions = torch.arange(length, device=device)[None]
    tables = LlamaRotaryEmbedding(config).to(device)(states, positions)

    @torch.no_grad()
    def call() -> Tensor:
        found: Tensor = layer(states, position_embeddings=tables, position_ids=positions)
        return found

    return call


def _activations(device: torch.device, float32: float) -> float:
    """Return the numbers in a second beside the products of a layer.

    A layer's time without its products, at the rate of products in float32; at least a tenth of
    its time, where their rates differ.
    """
    seconds = seconds_of_call(
        _layer(WIDTH, NEURONS, HEADS, TEXTS, BATCH_TOKENS // TEXTS, device), device
    )
    operations = 2.0 * BATCH_TOKENS * (4 * WIDTH**2 + 3 * WIDTH * NEURONS)
    beside = max(seconds - operations / float32, seconds / 10)
    # As `training_activations` counts them.
    return BATCH_TOKENS * (14 * WIDTH + 6 * NEURONS) / beside


def _disk() -> tuple[float, float]:
    """Return the bytes in a second that are hashed, written and synced, and that are read."""
    block = torch.randint(256, (FILE_BYTES,), dtype=torch.uint8).numpy().tobytes()
    with tempfile.TemporaryDirectory(dir=_cache_or_none()) as folder:
        path = Path(folder) / "file"
        written = seconds_of_call(lambda: write_file(path, [block]), HOST)
        # The disk makes a thread wait without its processor: by the clock, the best of three.
        synced = min(_sync_seconds(path, block) for _ in range(3))
        read = seconds_of_call(lambda: sha256_of(path), HOST)
    return FILE_BYTES / (written + synced), FILE_BYTES / read


def _sync_seconds(path: Path, block: bytes) -> float:
    """Return how long a file that was just written takes until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(block)
        stream.flush()
        start = time.monotonic()
        os.fsync(stream.fileno())
        return time.monotonic() - start


def _cache_or_none() -> Path | None:
    """Return the user's cache: a folder for temporary files may lie in memory. None without it."""
    return user_cache() if os.access(user_cache(), os.W_OK) else None


def _copied(device: torch.device) -> float:
    """Return the bytes in a second from the host to a GPU."""
    block = torch.zeros(FILE_BYTES, dtype=torch.uint8)
    return FILE_BYTES / seconds_of_call(lambda: block.to(device), device)


@full_float32_products()
def profile() -> Profile:
    """Return the rates of this machine, and of its first GPU if it has one."""
    loading = time.thread_time() - LOADED_FROM
    in_use = processors_in_use(LOOK)
    written, read = _disk()
    gpu, gpu_measured, copied = ASSUMED_GPU, False, 1e10
    if torch.cuda.is_available():
        device = torch.device("cuda:0")
        gpu, gpu_measured, copied = rates_of(device), True, _copied(device)
    return Profile(
        host=rates_of(HOST),
        gpu=gpu,
        gpu_measured=gpu_measured,
        written_bytes=written,
        read_bytes=read,
        copied_bytes=copied,
        loading=loading,
        in_use=in_use,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    print(TypeAdapter(Profile).dump_json(profile()).decode())
