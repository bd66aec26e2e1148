"""Size on disk and tokens per second of a model and of a model that was cut from it.

    python benchmarks/compress.py RUN [--variant NAME]    a run's teacher and one of its checkpoints
    python benchmarks/compress.py BEFORE AFTER            two checkpoint folders

Both are loaded in one dtype and timed in turns in one process. Ratios are after / before, one for
each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.headers import shard_files
from rotdistill_core.checkpoint.open import locate_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout

DECODE_PROMPT = 32
"""Tokens of the prompt before decoding."""


def model_folders(paths: list[Path], variant: str | None) -> tuple[Path, Path]:
    """Return the folders of the model before and after."""
    if len(paths) == 2:
        return paths[0], paths[1]
    layout = RunLayout(paths[0])
    recipe = json.loads(layout.resolved_recipe.read_text(encoding="utf-8"))
    name = variant or list(recipe["variants"])[-1]
    teacher = locate_model(ModelRef(model=recipe["teacher"]["model"]))
    return teacher, layout.checkpoints / name


def megabytes(folder: Path) -> float:
    """Return the size of a folder's weights, in 10⁶ bytes."""
    return sum(path.stat().st_size for path in shard_files(folder)) / 1e6


@torch.no_grad()
def prefill(ids: Tensor, model: Any) -> float:
    """Return tokens per second of one pass over `ids [1, n]`, with the logits of its last token."""
    started = time.perf_counter()
    model(ids, logits_to_keep=1, use_cache=True)
    return ids.shape[1] / (time.perf_counter() - started)


@torch.no_grad()
def decode(ids: Tensor, tokens: int, model: Any) -> float:
    """Return tokens per second of greedy decoding after `ids [1, n]`."""
    output = model(ids, logits_to_keep=1, use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return tokens / (time.perf_counter() - started)


def compare(measure: Callable[[Any], float], models: list[Any], rounds: int) -> dict[str, float]:
    """Measure both models in turns; return the best of each and statistics of after / before."""
    for model in models:
        measure(model)  # a first call is slower
    speeds = [[measure(model) for model in models] for _ in range(rounds)]
    ratios = [after / before for before, after in speeds]
    figures = {
        "before": max(before for before, _ in speeds),
        "after": max(after for _, after in speeds),
        "ratio, median": statistics.median(ratios),
        "ratio, min": min(ratios),
        "ratio, max": max(ratios),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    """Print the figures as one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if len(args.folders) > 2:
        parser.error("give a run's folder, or two checkpoint folders")
    folders = model_folders(args.folders, args.variant)
    models = [
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), local_files_only=True
        ).eval()
        for folder in folders
    ]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, models[0].config.vocab_size, (1, args.prompt), generator=generator)
    figures = {
        "folders": [str(folder) for folder in folders],
        "MB on disk": [round(megabytes(folder), 1) for folder in folders],
        "parameters": [model.num_parameters() for model in models],
        "prefill, tokens/s": compare(partial(prefill, ids), models, args.rounds),
        "decode, tokens/s": compare(
            partial(decode, ids[:, :DECODE_PROMPT], args.tokens), models, args.rounds
        ),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
