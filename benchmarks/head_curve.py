"""Held-out KL of a closed-form head over the number of texts and λ, in nats.

    python benchmarks/head_curve.py RECIPE [--set ID.FIELD=VALUE ...] [--runs DIR] [--texts N ...]

Texts are blurbs and the teacher's own answers to their questions, counted as the recipe does.
Each head is the ridge head of `lm-head-ridge`. Its blend is chosen on validation rows; λ is not,
the whole curve is printed. Captures of the teacher by this script under DIR are reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import torch
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.data.conversations import OWN_ANSWER
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import MAX_SCORED_ROWS, scored_rows
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
"""Values of λ for the largest number of texts, as multiples of the mean diagonal of `C_ss`."""
FEW_STRENGTHS = (0.1, 0.3, 1.0)
"""Values of λ for fewer texts."""
BLENDS = (0.25, 0.5, 1.0)


class PrintedLog:
    """What a run reports to: it prints the lines."""

    def log(self, line: str) -> None:
        """Print a line."""
        print(line)


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


class HeadCurve:
    """Teacher and student on all texts, and the ridge heads fitted to some of them."""

    def __init__(self, run: Executor) -> None:
        pair = run.pair
        self.pair = pair
        self.samples = run.samples()
        out = StepOutput(run.store, run.ledger, "head curve", "residuals")
        student = pair.student
        capture = Residuals(student_texts=1)
        activations = capture.capture(pair, student.weights, self.samples, out, quiet)
        self.layout = self.samples.layout.select(Split.FIT, Split.VALIDATION, Split.HELDOUT)
        forward = LayerwiseForward(student.weights, self.layout, student.device, student.dtype)
        for _ in forward:
            forward.run()
        self.student_states = forward.states
        self.teacher_states = activations.teacher_states(self.layout, student.depth).to(
            forward.states
        )
        self.X = final_norm(student.weights, self.student_states)
        self.T = final_norm(pair.teacher.weights, self.teacher_states)
        self.vocabulary = shared_vocabulary(pair)
        self.H_s = student.weights.head().to(self.X)
        self.H_t = pair.teacher.weights.head().to(self.X)

    def kl(self, split: Split, head: Tensor) -> float:
        """Return the mean KL of a head `[V, d_s]` on a split, nats."""
        limit = MAX_SCORED_ROWS if split == Split.VALIDATION else None
        rows, targets, _ = scored_rows(self.layout, self.samples, split, limit)
        compared = compare_logits(
            teacher=self.pair.teacher.weights,
            T=self.teacher_states[rows],
            student=self.pair.student.weights,
            S=self.student_states[rows],
            targets=targets,
            tokens=self.vocabulary,
            head=head,
        )
        return float(compared.kl.mean())

    def fitted(self, blurbs: set[str], strength: float) -> Tensor:
        """Return the ridge head `[V, d_s]` of some blurbs' fit texts and the shared prompt."""
        starts = self.layout.starts
        parts = [torch.arange(self.layout.prefix)]
        parts += [
            torch.arange(starts[k], starts[k + 1])
            for k, text in enumerate(self.layout.texts)
            if text.split == Split.FIT and text.id.removesuffix(OWN_ANSWER) in blurbs
        ]
        rows = torch.cat(parts)
        moments = Moments(self.X.shape[1], self.T.shape[1])
        moments.add(self.X[rows], self.T[rows])
        eye = torch.eye(self.X.shape[1], dtype=torch.float64) * float(moments.xx.diagonal().mean())
        A, B = (
            ridge(moments.xx, right, strength, "head").to(self.X)
            for right in (moments.xy, strength * eye)
        )
        n = self.vocabulary
        head = self.H_s.clone()
        head[:n] = self.H_t[:n] @ A.T + self.H_s[:n] @ B.T
        return head


def asked(doc: str | None, option: str, numbers: list[Number]) -> tuple[Executor, list[Number]]:
    """Read the command line of a benchmark over a recipe.

    Returns its run, and the numbers that follow `option` (`numbers` without it).
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(option, type=type(numbers[0]), nargs="+", default=numbers, dest="numbers")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.sets)
    return Executor(recipe, arguments.runs, PrintedLog(), quiet), arguments.numbers


def main() -> None:
    """Print the curves."""
    run, counts = asked(__doc__, "--texts", [25, 50, 100, 200])
    curve = HeadCurve(run)
    blurbs = [text for text in curve.layout.texts if not text.id.endswith(OWN_ANSWER)]
    fit = [text.id for text in blurbs if text.split == Split.FIT]
    in_recipe = {text.id for text in blurbs if text.split != Split.HELDOUT}
    fit_share = len(fit) / len(in_recipe)
    validation, heldout = (curve.kl(s, curve.H_s) for s in (Split.VALIDATION, Split.HELDOUT))
    print(f"base: validation {validation:.4f}, held-out {heldout:.4f}")
    print("| texts (of which fit) | λ | blend | validation | held-out |")
    print(f"|{'---|' * 5}", flush=True)
    for count in counts:
        chosen = set(fit[: round(fit_share * count)])
        for strength in STRENGTHS if count == max(counts) else FEW_STRENGTHS:
            head = curve.fitted(chosen, strength)
            blended = {blend: curve.H_s + blend * (head - curve.H_s) for blend in BLENDS}
            scores = {blend: curve.kl(Split.VALIDATION, h) for blend, h in blended.items()}
            best = min(scores, key=scores.__getitem__)
            heldout = curve.kl(Split.HELDOUT, blended[best])
            cells = f"{strength:g} | {best:g} | {scores[best]:.4f} | {heldout:.4f}"
            print(f"| {count} ({len(chosen)}) | {cells} |", flush=True)


if __name__ == "__main__":
    main()
