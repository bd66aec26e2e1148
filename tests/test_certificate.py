"""The certificate of an exact step: what passes, and what must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import CheckFailed
from rotdistill_core.forward.certificate import TEXTS, Certificate, certify
from rotdistill_core.linalg.maps import Permutation, Rotation, transform_param
from rotdistill_core.recipe.document import Check
from rotdistill_core.testing import pico_model, pico_samples, random_rotation

CPU = torch.device("cpu")
MAPS = {
    "residual": Rotation(random_rotation(32, 5)),
    "neurons.0": Permutation(torch.arange(48).flip(0)),
}


@pytest.fixture
def layout() -> PackedTexts:
    return pico_samples(texts=20).layout


@pytest.fixture(params=["llama", "qwen2"])
def before(tmp_path: Path, request: pytest.FixtureRequest) -> Weights:
    return pico_model(tmp_path / "model", request.param).weights


def back_of(folded: Weights) -> Weights:
    assert folded.undo is not None
    return folded.unfold(folded.undo)


def fold_that_forgets_gains(weights: Weights) -> Weights:
    table = weights.adapter.expand(weights.config)
    whole = weights.untie()
    return whole.edit({
        name: torch.ones(32, dtype=torch.float64) if table[name].is_gain else transform_param(whole[name].double(), table[name].axes, MAPS)
        for name in whole.entries
    })  # fmt: skip


def test_a_right_fold_passes(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    certificate = certify(before, after, back_of(after), layout, CPU)
    certificate.enforce(Check(), "step")
    assert 0 <= certificate.logits_float64 <= 1e-9
    assert certificate.logits_float64 < certificate.logits_float32 <= 1e-3
    assert abs(certificate.kl_float32) < 1e-6
    assert certificate.unfold <= 1e-12
    assert certificate.texts == TEXTS
    assert Certificate(**json.loads(json.dumps(certificate.as_dict()))) == certificate


def test_a_fold_that_forgets_the_gains_fails(before: Weights, layout: PackedTexts) -> None:
    after = fold_that_forgets_gains(before)
    certificate = certify(before, after, back_of(before.fold(MAPS)), layout, CPU)
    assert certificate.logits_float64 > 1e-2
    with pytest.raises(
        CheckFailed, match=r"step: the certificate fails: logits_float64 is .*, more than 1e-09"
    ):
        certificate.enforce(Check(), "step")


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.k_proj", "input_layernorm"])
def test_a_tampered_weight_fails(before: Weights, layout: PackedTexts, part: str) -> None:
    folded = before.fold(MAPS)
    name = f"model.layers.1.{part}.weight"
    touched = folded[name].clone()
    touched[(3,) * touched.ndim] += 1e-3
    certificate = certify(before, folded.edit({name: touched}), back_of(folded), layout, CPU)
    with pytest.raises(CheckFailed, match="logits_float64"):
        certificate.enforce(Check(), "step")


def test_a_way_back_to_other_weights_fails(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    back = back_of(after)
    name = "model.layers.0.mlp.up_proj.weight"
    certificate = certify(before, after, back.edit({name: back[name] + 1e-9}), layout, CPU)
    assert certificate.unfold == pytest.approx(1e-9, rel=1e-3)
    with pytest.raises(CheckFailed, match=r"unfold is 1\.00e-09, more than 1e-12"):
        certificate.enforce(Check(), "step")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_way_back_to_other_tensors_fails(
    before: Weights, layout: PackedTexts, change: str
) -> None:
    after = before.fold(MAPS)
    whole = back_of(after)
    loose = whole.untie()
    one, other = (loose, whole) if change == "missing" else (whole, loose)
    certificate = certify(
        before if change == "extra" else before.untie(), after, other, layout, CPU
    )
    assert set(one.entries) != set(other.entries)
    assert certificate.unfold == float("inf")
    with pytest.raises(CheckFailed, match="unfold is inf"):
        certificate.enforce(Check(), "step")


@pytest.mark.parametrize("name", ["logits_float64", "logits_float32", "unfold"])
def test_a_figure_that_is_not_a_number_fails(name: str) -> None:
    figures = {
        "logits_float64": 0.0,
        "logits_float32": 0.0,
        "kl_float32": 0.0,
        "unfold": 0.0,
        "texts": 4,
    }
    Certificate(**figures).enforce(Check(), "step")  # type: ignore[arg-type]
    with pytest.raises(CheckFailed, match=f"{name} is nan"):
        Certificate(**{**figures, name: float("nan")}).enforce(Check(), "step")  # type: ignore[arg-type]


def test_weights_that_give_nan_fail(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = after.edit({name: torch.full((32, 48), torch.nan, dtype=torch.float64)})
    with pytest.raises(CheckFailed):
        certify(before, broken, back_of(after), layout, CPU).enforce(Check(), "step")


def test_a_way_back_to_nan_fails(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    back = back_of(after)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = back.edit({name: torch.full((32, 48), torch.nan, dtype=torch.float64)})
    with pytest.raises(CheckFailed):
        certify(before, after, broken, layout, CPU).enforce(Check(), "step")


def test_the_logits_of_a_certificate_are_capped_where_the_model_caps_them(
    tmp_path: Path, layout: PackedTexts
) -> None:
    capped = pico_model(
        tmp_path / "model", "gemma3_text", head_dim=8, final_logit_softcapping=0.5
    ).weights
    name = capped.adapter.norm
    turned = capped.edit(
        {name: -2.0 - capped[name]}
    )  # the gain is 1 + w, so every logit changes its sign
    assert 0.9 < certify(capped, turned, turned, layout, CPU).logits_float64 <= 1.0
