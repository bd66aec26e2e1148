"""How well a rotation per layer carries one model's stream onto another's: held-out cosines beside their nulls, layer by layer.

    python benchmarks/alignment.py TEACHER STUDENT [--limit 104] [--layer-map match] [--keep FOLDER]

Captures both models on the blurbs, solves procrustes with `tie = 1` on the fit texts, whitened in none, one or both of the two ways,
and prints a table over the student's layer boundaries: cosine on validation rows as they are, centred, and what shuffled teacher rows
give. `--keep` names a folder that keeps the capture for the next call, `--explain` adds what other maps reach.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.alignment.streams import cosine, paired_streams
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.questions import read_questions
from rotdistill_core.data.tokenization import tokenize_for_both, tokenize_texts
from rotdistill_core.forward.activations import ActivationStore, rms_normalise
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.linalg.solvers import polar, ridge
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.testing import pico_output

ROOT = Path(__file__).resolve().parents[1]
WHITENS: tuple[Literal["none", "zscore", "full"], ...] = ("none", "zscore", "full")


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def main() -> None:
    """Capture, solve, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--limit", type=int, default=104, help="blurbs")
    parser.add_argument("--ridge", type=float, default=0.0, help="of the whitened solves")
    parser.add_argument("--layer-map", choices=["stretch", "match"], default="stretch")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path)
    parser.add_argument(
        "--explain", action="store_true", help="a second table: what holds the cosines down"
    )
    options = parser.parse_args()
    pair = Pair(
        open_model(ModelRef(model=options.teacher)), open_model(ModelRef(model=options.student))
    )
    questions, style = read_questions(SamplesRef(limit=options.limit), ROOT / "recipes")
    given: tuple[Any, ...] = (
        pair.teacher.tokenizer,
        [q for q in questions if q.answer is not None],
        {},
        style,
        options.max_tokens,
    )
    samples = (
        tokenize_texts(*given)
        if pair.one_tokenizer
        else tokenize_for_both(pair.student.tokenizer, *given)
    )
    with tempfile.TemporaryDirectory() as folder:
        out = pico_output(options.keep or Path(folder), "capture")
        activations = Residuals(layer_map=options.layer_map).capture(
            pair, pair.student.weights, samples, out, quiet
        )
        diagnostics = {}
        for whiten in WHITENS:
            ridge = options.ridge if whiten != "none" else 0.0
            diagnostics[whiten] = (
                Procrustes(tie=1, whiten=whiten, ridge=ridge)
                .align(activations, Maps(), pair, quiet)
                .diagnostics
            )
    print(f"{samples.layout.rows} rows, {len(samples.layout.texts)} texts; {out.notes}\n")
    print(
        "| layer | teacher | "
        + " | ".join(f"{w}: raw | centred | null raw | null centred" for w in WHITENS)
        + " |"
    )
    print("|---" * (2 + 4 * len(WHITENS)) + "|")
    for boundary in diagnostics["none"]:
        cells = [str(boundary), str(activations.teacher_boundaries[boundary])]
        for whiten in WHITENS:
            card = diagnostics[whiten][boundary]
            cells += [
                f"{card[name]:.3f}"
                for name in ("cosine_after", "centred_after", "cosine_shuffled", "centred_shuffled")
            ]
        print("| " + " | ".join(cells) + " |")
    if options.explain:
        explain(activations, pair)


def explain(activations: ActivationStore, pair: Pair) -> None:
    """Print what holds the centred cosine down, per boundary: what other maps reach on the same validation rows.

    `any linear map` is a ridge regression: a d_s x d_t matrix, where a rotation is one of orthonormal rows. `its rank` is the teacher's
    rows projected to their d_s leading directions, a bound for every map from d_s channels. Tokens are `seen` in the fit texts or not.
    """
    boundaries = list(range(len(activations.depths)))
    tokens, fit = activations.layouts["student"].tokens, activations.layouts["student"].split("fit")
    solved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for boundary, S, T, rows in paired_streams(activations, pair, boundaries, "fit", "explain"):
        X, Y = rms_normalise(S[rows]), rms_normalise(T[rows])
        R = polar(X.T @ Y, "explain")[0]
        X, Y = X - X.mean(0), Y - Y.mean(0)
        leading = torch.linalg.eigh(Y.T @ Y).eigenvectors[:, -X.shape[1] :]
        solved[boundary] = ridge(X.T @ X, X.T @ Y, 0.1, "explain"), leading, R
    print(
        "\n| layer | rotation | any linear map | its rank | rotation, tokens seen | unseen | share unseen |"
    )
    print("|---|---|---|---|---|---|---|")
    for boundary, S, T, rows in paired_streams(
        activations, pair, boundaries, "validation", "explain"
    ):
        X, Y = (rms_normalise(A[rows]) for A in (S, T))
        X, Y = X - X.mean(0), Y - Y.mean(0)
        linear, leading, R = solved[boundary]
        new = ~torch.isin(tokens[rows], tokens[fit])
        figures = [cosine(X @ R, Y), cosine(X @ linear, Y), cosine(Y @ leading @ leading.T, Y)]
        figures += [
            cosine((X @ R)[~new], Y[~new]),
            cosine((X @ R)[new], Y[new]),
            float(new.double().mean()),
        ]
        print(
            f"| {boundary} | " + " | ".join(f"{value:.3f}" for value in figures) + " |", flush=True
        )


if __name__ == "__main__":
    main()
