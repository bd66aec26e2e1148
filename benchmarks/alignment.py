"""How well a rotation per layer maps one model's stream onto another's, layer by layer.

    python benchmarks/alignment.py TEACHER STUDENT [--limit 104] [--layer-map match] [--keep FOLDER]

Captures both models on the blurbs and solves procrustes with `tie = 1` on the fit texts, not
whitened and whitened in either way. Prints a table over the student's layer boundaries: the cosine
on validation rows as they are and centred, and the same for shuffled teacher rows. `--keep` names a
folder that keeps the capture for the next call. `--explain` adds how far other maps get.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.alignment.streams import PairedStreams, cosine, paired_streams
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import tokenize_for_both, tokenize_texts
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.row_rms import rms_normalise
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.linalg.solvers import polar, ridge
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.testing import pico_output

ROOT = Path(__file__).resolve().parents[1]
WhitenMode = Literal["none", "zscore", "full"]
WHITEN_MODES: tuple[WhitenMode, ...] = ("none", "zscore", "full")


def quiet(*_: object) -> None:
    """Ignore progress."""


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--limit", type=int, default=104, help="number of blurbs")
    parser.add_argument("--ridge", type=float, default=0.0, help="of the whitened solves")
    parser.add_argument("--layer-map", choices=["stretch", "match"], default="stretch")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--explain", action="store_true", help="a second table: other maps")
    return parser.parse_args()


def read_samples(pair: Pair, limit: int, max_tokens: int) -> Samples:
    """Return the blurbs, tokenised for both models."""
    questions, style = read_conversations(SamplesRef(limit=limit), ROOT / "recipes")
    answered = [question for question in questions if question.answer is not None]
    arguments: tuple[Any, ...] = (pair.teacher.tokenizer, answered, {}, style, max_tokens)
    if pair.one_tokenizer:
        return tokenize_texts(*arguments)
    return tokenize_for_both(pair.student.tokenizer, *arguments)


def main() -> None:
    """Capture, solve, print."""
    options = parse_options()
    pair = Pair(
        teacher=open_model(ModelRef(model=options.teacher)),
        student=open_model(ModelRef(model=options.student)),
    )
    samples = read_samples(pair, options.limit, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        out = pico_output(options.keep or Path(folder), "capture")
        capture = Residuals(layer_map=options.layer_map)
        activations = capture.capture(pair, pair.student.weights, samples, out, quiet)
        diagnostics: dict[WhitenMode, dict[int, LayerDiagnostics]] = {}
        for whiten in WHITEN_MODES:
            step = Procrustes(
                tie=1, whiten=whiten, ridge=options.ridge if whiten != "none" else 0.0
            )
            maps = step.align(activations, Maps(), pair, quiet)
            diagnostics[whiten] = dict(maps.diagnostics)
        print(f"{samples.layout.rows} rows, {len(samples.layout.texts)} texts; {out.notes}\n")
        print_cosines(diagnostics, activations)
        if options.explain:
            print_explanation(activations, pair)


def print_cosines(
    diagnostics: dict[WhitenMode, dict[int, LayerDiagnostics]], activations: ActivationStore
) -> None:
    """Print the cosines of every boundary, with their nulls."""
    columns = [f"{whiten}: raw | centred | null raw | null centred" for whiten in WHITEN_MODES]
    print(f"| layer | teacher | {' | '.join(columns)} |")
    print("|---" * (2 + 4 * len(WHITEN_MODES)) + "|")
    for boundary in diagnostics["none"]:
        cells = [str(boundary), str(activations.teacher_boundaries[boundary])]
        for whiten in WHITEN_MODES:
            figures = diagnostics[whiten][boundary]
            cells += [
                f"{figures.cosine_after:.3f}",
                f"{figures.centred_after:.3f}",
                f"{figures.cosine_shuffled:.3f}",
                f"{figures.centred_shuffled:.3f}",
            ]
        print(f"| {' | '.join(cells)} |")


class FittedMaps(NamedTuple):
    """The maps of one boundary, fitted on fit rows."""

    rotation: Tensor
    """`[d_s, d_t]`."""
    linear: Tensor
    """Ridge regression `[d_s, d_t]` of centred rows."""
    leading: Tensor
    """The teacher's d_s leading principal directions `[d_t, d_s]`."""


def fit_maps(streams: PairedStreams) -> FittedMaps:
    """Return the maps of one boundary."""
    X = rms_normalise(streams.S[streams.taken])
    Y = rms_normalise(streams.T[streams.taken])
    R = polar(X.T @ Y, "explain")[0]
    X, Y = X - X.mean(0), Y - Y.mean(0)
    leading = torch.linalg.eigh(Y.T @ Y).eigenvectors[:, -X.shape[1] :]
    return FittedMaps(R, ridge(X.T @ X, X.T @ Y, 0.1, "explain"), leading)


def print_explanation(activations: ActivationStore, pair: Pair) -> None:
    """Print why the centred cosine is not higher: what other maps reach on the same rows.

    `any linear map` is a ridge regression: any d_s x d_t matrix instead of one with orthonormal
    rows. `its rank` is the teacher's rows projected to their d_s leading directions, a bound for
    every map from d_s channels. Tokens are `seen` if they occur in the fit texts.
    """
    boundaries = list(range(len(activations.depths)))
    layout = activations.sample
    fit_tokens = layout.tokens[layout.split(Split.FIT)]
    fit = paired_streams(activations, pair, boundaries, Split.FIT, "explain")
    fitted = {streams.boundary: fit_maps(streams) for streams in fit}
    print("\n| layer | rotation | any linear map | its rank |", end="")
    print(" rotation, tokens seen | unseen | share unseen |")
    print("|---|---|---|---|---|---|---|")
    validation = paired_streams(activations, pair, boundaries, Split.VALIDATION, "explain")
    for boundary, S, T, taken in validation:
        R, linear, leading = fitted[boundary]
        X, Y = rms_normalise(S[taken]), rms_normalise(T[taken])
        X, Y = X - X.mean(0), Y - Y.mean(0)
        unseen = ~torch.isin(layout.tokens[taken], fit_tokens)
        figures = [
            cosine(X @ R, Y),
            cosine(X @ linear, Y),
            cosine(Y @ leading @ leading.T, Y),
            cosine((X @ R)[~unseen], Y[~unseen]),
            cosine((X @ R)[unseen], Y[unseen]),
            float(unseen.double().mean()),
        ]
        cells = " | ".join(f"{value:.3f}" for value in figures)
        print(f"| {boundary} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
