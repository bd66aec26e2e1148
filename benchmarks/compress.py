"""Size on disk and tokens per second of a model and of what was cut from it.

    python benchmarks/compress.py RUN [--variant NAME]        RUN: a run's folder; its teacher beside one of its checkpoints
    python benchmarks/compress.py BEFORE AFTER                two checkpoint folders

Both are loaded in one dtype and timed in turns in one process; ratios are after / before, of the two calls of each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.headers import shard_files
from rotdistill_core.checkpoint.open import locate_model
from rotdistill_core.recipe.document import ModelRef


def folders(paths: list[Path], variant: str | None) -> tuple[Path, Path]:
    """Return the folders of the model before and after."""
    if len(paths) == 2:
        return paths[0], paths[1]
    resolved = json.loads((paths[0] / "recipe.resolved.json").read_text(encoding="utf-8"))
    name = variant or list(resolved["variants"])[-1]
    return locate_model(ModelRef(model=resolved["teacher"]["model"])), paths[
        0
    ] / "checkpoints" / name


def megabytes(folder: Path) -> float:
    """Return the size of a folder's weights, in 10⁶ bytes."""
    return sum(path.stat().st_size for path in shard_files(folder)) / 1e6


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Return tokens per second of one pass over `ids [1, n]`, the logits of the last token alone."""
    started = time.perf_counter()
    model(ids, logits_to_keep=1, use_cache=True)
    return ids.shape[1] / (time.perf_counter() - started)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Return tokens per second of greedy decoding behind `ids [1, n]`."""
    made = model(ids, logits_to_keep=1, use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        made = model(
            made.logits[:, -1:].argmax(-1), past_key_values=made.past_key_values, use_cache=True
        )
    return tokens / (time.perf_counter() - started)


def paired(action: Callable[[Any], float], models: list[Any], rounds: int) -> dict[str, float]:
    """Call `action` on both models in turns; return the best of each, and the median and the extremes of the ratio after / before."""
    for model in models:
        action(model)
    seen = [[action(model) for model in models] for _ in range(rounds)]
    ratios = [after / before for before, after in seen]
    best = {name: max(row[k] for row in seen) for k, name in enumerate(("before", "after"))}
    found = {
        **best,
        "ratio, median": statistics.median(ratios),
        "ratio, min": min(ratios),
        "ratio, max": max(ratios),
    }
    return {name: round(value, 3) for name, value in found.items()}


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
    two = folders(args.folders, args.variant)
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, args.dtype), local_files_only=True
        ).eval()
        for path in two
    ]
    ids = torch.randint(
        5, models[0].config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0)
    )
    print(
        json.dumps(
            {
                "folders": [str(path) for path in two],
                "MB on disk": [round(megabytes(path), 1) for path in two],
                "parameters": [model.num_parameters() for model in models],
                "prefill, tokens/s": paired(lambda model: prefill(model, ids), models, args.rounds),
                "decode, tokens/s": paired(
                    lambda model: decode(model, ids[:, :32], args.tokens), models, args.rounds
                ),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
