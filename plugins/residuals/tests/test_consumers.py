"""What later steps make of a store of sums: the same as of the rows, to 1e-12 in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rotdistill_basis_fold.step import BasisFold
from rotdistill_fidelity.step import Fidelity
from rotdistill_householder.step import Householder
from rotdistill_lm_head_ridge.step import LmHeadRidge
from rotdistill_procrustes.cca import Cca
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data import packed
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.evaluation.rows import Variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, tensor_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_baked, pico_model, pico_output, pico_samples

ALIGNERS = [
    Procrustes(),
    Procrustes(tie=1),
    Procrustes(shrink=0.5),
    Procrustes(whiten="zscore", ridge=0.1),
    Procrustes(whiten="full", ridge=0.1),
    Cca(),
]


class Stores(NamedTuple):
    """One capture in both forms."""

    pair: Pair
    samples: Samples
    rows: ActivationStore
    sums: ActivationStore
    few: ActivationStore
    """Rows of the student on some texts, and of all others the teacher's final states alone."""
    out: StepOutput


def in_float64(folder: Path, **changes: Any) -> Model:
    pico_model(folder, **changes)
    return open_model(ModelRef(model=str(folder), dtype="float64"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    teacher = in_float64(
        folder / "teacher", seed=9, num_hidden_layers=3, hidden_size=48, num_attention_heads=6
    )
    return Pair(teacher, in_float64(folder / "student", seed=1))


@pytest.fixture(params=["a shared prompt", "a baked prompt"])
def stores(
    request: pytest.FixtureRequest, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stores:
    monkeypatch.setattr(packed, "BLOCK_TEXTS", 16)
    monkeypatch.setattr(packed, "SAMPLE_TEXTS", {Split.FIT: 8, Split.VALIDATION: 8})
    samples = pico_samples(texts=100, guard=4)
    if request.param == "a baked prompt":
        samples = pico_baked(samples)

    def captured(step: Residuals, folder: str) -> ActivationStore:
        out = pico_output(tmp_path / folder)
        return step.capture(pair, pair.student.weights, samples, out, quiet)

    rows = captured(Residuals(layer_map="match"), "rows")
    sums = captured(Residuals(layer_map="match", store="moments"), "sums")
    few = captured(Residuals(layer_map="match", student_texts=20), "few")
    return Stores(pair, samples, rows, sums, few, pico_output(tmp_path / "runs"))


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


def near(one: Tensor, two: Tensor) -> bool:
    return float((one - two).norm()) <= 1e-12 * float(two.norm())


def assert_same_maps(one: Maps, two: Maps) -> None:
    assert set(one) == set(two)
    for space, found in one.items():
        assert near(tensor_of(found), tensor_of(two[space])), space
    for boundary, figures in one.diagnostics.items():
        assert_same_figures(asdict(figures), asdict(two.diagnostics[boundary]))


def assert_same_figures(one: Any, two: Any) -> None:
    if isinstance(one, Mapping):
        assert one.keys() == two.keys()
        one, two = list(one.values()), list(two.values())
    if isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            assert_same_figures(a, b)
        return
    assert one == (pytest.approx(two, rel=1e-12, abs=1e-12) if isinstance(two, float) else two)


@pytest.mark.parametrize("step", ALIGNERS, ids=lambda step: str(asdict(step)))
def test_aligners(stores: Stores, step: Procrustes | Cca) -> None:
    of_rows, of_sums = (
        step.align(store, Maps(), stores.pair, quiet) for store in (stores.rows, stores.sums)
    )
    assert_same_maps(of_sums, of_rows)


def test_refiners_and_folds(stores: Stores) -> None:
    pair = stores.pair
    maps = Procrustes(whiten="full", ridge=0.1).align(stores.rows, Maps(), pair, quiet)
    refined = [
        Householder(target=1.0).refine(store, maps, pair, stores.out, quiet)
        for store in (stores.rows, stores.sums)
    ]
    assert_same_maps(refined[1], refined[0])
    fold = BasisFold(mode="canonical")
    bases = [
        fold.fold(pair.student.weights, maps, store, pair, stores.out).lineage.basis
        for store in (stores.rows, stores.sums)
    ]
    assert bases[0] is not None
    assert bases[1] is not None
    assert near(bases[1], bases[0])


def test_the_head_and_the_scores(stores: Stores) -> None:
    pair, samples, out = stores.pair, stores.samples, stores.out
    heads, scores = [], []
    assert stores.few.holds(Side.TEACHER, samples.teacher)
    for store in (stores.rows, stores.sums, stores.few):
        weights = LmHeadRidge().style(pair.student.weights, store, pair, samples, out, quiet)
        heads.append(weights["lm_head.weight"])
        variant = Variant("base", pair.student.weights, Maps(), 0.0, pair.student.folder)
        scores.append(Fidelity().evaluate(variant, pair, store, samples, out, quiet))
    assert not torch.equal(heads[0], pair.student.weights.head())
    assert near(heads[1], heads[0])
    assert near(heads[2], heads[0])
    assert_same_figures([tuple(row) for row in scores[1]], [tuple(row) for row in scores[0]])
    outside = Split.GUARD
    of_few, of_rows = ([row for row in each if row.split == outside] for each in scores[::2])
    assert_same_figures([tuple(row) for row in of_few], [tuple(row) for row in of_rows])
