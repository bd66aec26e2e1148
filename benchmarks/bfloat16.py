"""The held-out KL of a finished run's variants, computed in float32 and in bfloat16.

Both columns are about the same answers. Whole runs in two dtypes are not: the teacher writes its
held-out answers anew in each, and greedy answers part after a few tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.execution.executor import Executor
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.precision import full_float32_products
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RUNS_FOLDER, RunLayout
from rotdistill_core.testing import SilentObserver

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    """Print a row for each variant of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe that has been run from this folder")
    parser.add_argument("--set", action="append", default=[], help="as for rotdistill run")
    parser.add_argument(
        "--checkpoints", type=Path, help="score the variants of another run of the same models"
    )
    options = parser.parse_args()
    executor = Executor(
        load_recipe(options.recipe, options.set), RUNS_FOLDER, SilentObserver(), lambda *_: None
    )
    folder = options.checkpoints or RunLayout(executor.folder).checkpoints
    pair = executor.pair
    layout = executor.samples().layout.select(Split.HELDOUT)
    rows, targets, _ = layout.prediction_rows(Split.HELDOUT)

    def final_states(weights: Weights, dtype: torch.dtype) -> Tensor:
        forward = LayerwiseForward(weights, layout, pair.student.device, dtype)
        for _ in forward:
            forward.run()
        return forward.states_of(rows)

    with full_float32_products():
        teacher = {dtype: final_states(pair.teacher.weights, dtype) for dtype in DTYPES}
        print(f"{len(rows)} tokens\n")
        print("| variant | float32 | bfloat16 | difference |\n|---|---|---|---|")
        for path in sorted(folder.iterdir()):
            weights = open_model(ModelRef(model=str(path))).weights
            single, half = (
                compare_logits(
                    pair.teacher.weights,
                    teacher[dtype],
                    weights,
                    final_states(weights, dtype),
                    targets,
                    shared_vocabulary(pair),
                ).kl.mean()
                for dtype in DTYPES
            )
            print(f"| {path.name} | {single:.4f} | {half:.4f} | {half - single:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
