"""What a head fitted in closed form gains with more texts and other λ: held-out KL, in nats.

    python benchmarks/head_curve.py RECIPE [--set ID.FIELD=VALUE ...] [--runs DIR] [--texts 25 50 100 200]

Texts are blurbs and the teacher's own answers to their questions, counted as the recipe does. Each head is the ridge of `lm-head-ridge`;
its blend is chosen on validation rows, λ is not: the whole curve is printed. What a run under DIR has captured of the teacher is reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import torch
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.evaluation.acceptance import scored_rows
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.execution.executor import Executor
from rotdistill_core.forward.head import final_norm
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import ridge
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.output import StepOutput

Number = TypeVar("Number", int, float)
STRENGTHS = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 10.0, 100.0)
BLENDS = (0.25, 0.5, 1.0)


class Said:
    """Watches a run and prints what it is told."""

    def log(self, line: str) -> None:
        """Print a line."""
        print(line)


class Heads:
    """Teacher and student on all texts, and the heads fitted to some of them."""

    def __init__(self, run: Executor) -> None:
        quiet, pair = lambda *_: None, run.pair
        self.samples, self.pair = run.samples(), pair
        out = StepOutput(run.store, run.ledger, "head curve", "residuals")
        activations = Residuals(student_texts=1).capture(
            pair, pair.student.weights, self.samples, out, quiet
        )
        self.layout = self.samples.layout.select("fit", "validation", "heldout")
        walk = LayerwiseForward(
            pair.student.weights, self.layout, pair.student.device, pair.student.dtype
        )
        for _ in walk:
            walk.run()
        self.raw, self.theirs = (
            walk.states,
            activations.teacher(self.layout, pair.student.depth).to(walk.states),
        )
        self.X, self.T = (
            final_norm(walk.weights, self.raw),
            final_norm(pair.teacher.weights, self.theirs),
        )
        self.tokens = shared_vocabulary(pair)
        self.H_s, self.H_t = (
            model.weights.head().to(self.X) for model in (pair.student, pair.teacher)
        )

    def kl(self, split: str, head: Tensor) -> float:
        """Return the mean KL of a head on a split."""
        rows, targets, _ = scored_rows(
            self.layout, self.samples, split, 1024 if split == "validation" else None
        )
        weights = self.pair.student.weights
        return float(
            compare_logits(
                self.pair.teacher.weights,
                self.theirs[rows],
                weights,
                self.raw[rows],
                targets,
                self.tokens,
                head,
            ).kl.mean()
        )

    def fitted(self, names: set[str], strength: float) -> Tensor:
        """Return the ridge head of fit texts of these names (and the shared prompt)."""
        some = [
            k
            for k, text in enumerate(self.layout.texts)
            if text.split == "fit" and text.id.removesuffix(".own") in names
        ]
        starts = self.layout.starts
        rows = torch.cat(
            [
                torch.arange(self.layout.prefix),
                *(torch.arange(starts[k], starts[k + 1]) for k in some),
            ]
        )
        moments = Moments(self.X.shape[1], self.T.shape[1])
        moments.add(self.X[rows], self.T[rows])
        eye = torch.eye(self.X.shape[1], dtype=torch.float64) * float(moments.xx.diagonal().mean())
        A, B = (
            ridge(moments.xx, right, strength, "head").to(self.X)
            for right in (moments.xy, strength * eye)
        )
        made = self.H_s.clone()
        made[: self.tokens] = self.H_t[: self.tokens] @ A.T + self.H_s[: self.tokens] @ B.T
        return made


def asked(doc: str | None, option: str, numbers: list[Number]) -> tuple[Executor, list[Number]]:
    """Read the command line of a benchmark over a recipe; return its run and the numbers behind `option` (else `numbers`)."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(option, type=type(numbers[0]), nargs="+", default=numbers, dest="numbers")
    given = parser.parse_args()
    return Executor(
        load_recipe(given.recipe, given.sets), given.runs, Said(), lambda *_: None
    ), given.numbers


def main() -> None:
    """Print the curves."""
    run, counts = asked(__doc__, "--texts", [25, 50, 100, 200])
    heads = Heads(run)
    names = [t.id for t in heads.layout.texts if t.split == "fit" and not t.id.endswith(".own")]
    share = len(names) / len(
        {t.id for t in heads.layout.texts if t.split != "heldout" and not t.id.endswith(".own")}
    )
    print(
        f"base: validation {heads.kl('validation', heads.H_s):.4f}, held-out {heads.kl('heldout', heads.H_s):.4f}"
    )
    print(
        f"| texts (of which fit) | λ | blend | validation | held-out |\n|{'---|' * 5}", flush=True
    )
    for count in counts:
        few = set(names[: round(share * count)])
        for strength in STRENGTHS if count == max(counts) else (0.1, 0.3, 1.0):
            made = heads.fitted(few, strength)
            blended = {b: heads.H_s + b * (made - heads.H_s) for b in BLENDS}
            scores = {b: heads.kl("validation", head) for b, head in blended.items()}
            best = min(scores, key=scores.__getitem__)
            told = f"{scores[best]:.4f} | {heads.kl('heldout', blended[best]):.4f}"
            print(f"| {count} ({len(few)}) | {strength:g} | {best:g} | {told} |", flush=True)


if __name__ == "__main__":
    main()
