"""The certificate of an exact step: which edits pass, and which must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import CheckFailed
from rotdistill_core.forward.certificate import (
    CERTIFICATE_TEXTS,
    certify,
    enforce_certificate,
)
from rotdistill_core.linalg.maps import Map, Permutation, Rotation, transform_param
from rotdistill_core.recipe.document import Check
from rotdistill_core.store.results import Certificate
from rotdistill_core.testing import pico_model, pico_samples, random_rotation

CPU = torch.device("cpu")
MAPS: dict[str, Map] = {
    "residual": Rotation(random_rotation(32, 5)),
    "neurons.0": Permutation(torch.arange(48).flip(0)),
}
PERFECT = Certificate(
    logits_float64=0.0, logits_float32=0.0, kl_float32=0.0, unfold=0.0, texts=CERTIFICATE_TEXTS
)


@pytest.fixture
def layout() -> PackedTexts:
    return pico_samples(texts=20).layout


@pytest.fixture(params=["llama", "qwen2"])
def before(tmp_path: Path, request: pytest.FixtureRequest) -> Weights:
    return pico_model(tmp_path / "model", request.param).weights


def unfolded(folded: Weights) -> Weights:
    assert folded.undo is not None
    return folded.unfold(folded.undo)


def enforce(certificate: Certificate) -> None:
    """Hold a certificate to the default tolerances."""
    enforce_certificate(certificate, Check(), "step")


def fold_that_forgets_gains(weights: Weights) -> Weights:
    """Return the rotated weights with all gains 1, though no reader absorbed them."""
    table = weights.adapter.expand(weights.config)
    untied = weights.untie()
    folded = {}
    for name in untied.entries:
        tensor = untied[name].double()
        if table[name].is_gain:
            folded[name] = torch.ones_like(tensor)
        else:
            folded[name] = transform_param(tensor, table[name].axes, MAPS)
    return untied.edit(folded)


def test_right_fold_passes(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    certificate = certify(before, after, unfolded(after), layout, CPU)
    enforce(certificate)
    assert 0 <= certificate.logits_float64 <= 1e-9
    assert certificate.logits_float64 < certificate.logits_float32 <= 1e-3
    assert abs(certificate.kl_float32) < 1e-6
    assert certificate.unfold <= 1e-12
    assert certificate.texts == CERTIFICATE_TEXTS


def test_fold_that_forgets_the_gains_fails(before: Weights, layout: PackedTexts) -> None:
    after = fold_that_forgets_gains(before)
    certificate = certify(before, after, unfolded(before.fold(MAPS)), layout, CPU)
    assert certificate.logits_float64 > 1e-2
    with pytest.raises(CheckFailed, match=r"step: .*logits_float64 is .*, more than 1e-09"):
        enforce(certificate)


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.k_proj", "input_layernorm"])
def test_tampered_weight_fails(before: Weights, layout: PackedTexts, part: str) -> None:
    folded = before.fold(MAPS)
    name = f"model.layers.1.{part}.weight"
    touched = folded[name].clone()
    touched[(3,) * touched.ndim] += 1e-3
    certificate = certify(before, folded.edit({name: touched}), unfolded(folded), layout, CPU)
    with pytest.raises(CheckFailed, match="logits_float64"):
        enforce(certificate)


def test_way_back_to_other_weights_fails(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    back = unfolded(after)
    name = "model.layers.0.mlp.up_proj.weight"
    other = back.edit({name: back[name] + 1e-9})
    certificate = certify(before, after, other, layout, CPU)
    assert certificate.unfold == pytest.approx(1e-9, rel=1e-3)
    with pytest.raises(CheckFailed, match=r"unfold is 1\.00e-09, more than 1e-12"):
        enforce(certificate)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_way_back_to_other_tensors_fails(before: Weights, layout: PackedTexts, change: str) -> None:
    after = before.fold(MAPS)
    back = unfolded(after)
    if change == "missing":
        certificate = certify(before.untie(), after, back, layout, CPU)
    else:
        certificate = certify(before, after, back.untie(), layout, CPU)
    assert certificate.unfold == float("inf")
    with pytest.raises(CheckFailed, match="unfold is inf"):
        enforce(certificate)


@pytest.mark.parametrize("name", ["logits_float64", "logits_float32", "unfold"])
def test_figure_that_is_not_a_number_fails(name: str) -> None:
    enforce(PERFECT)
    figures: dict[str, float] = {name: float("nan")}
    with pytest.raises(CheckFailed, match=f"{name} is nan"):
        enforce(replace(PERFECT, **figures))  # type: ignore[arg-type]


def test_weights_that_give_nan_fail(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = after.edit({name: torch.full((32, 48), torch.nan, dtype=torch.float64)})
    with pytest.raises(CheckFailed, match=f"{name}: 1536 of its 1536 numbers are NaN"):
        enforce(certify(before, broken, unfolded(after), layout, CPU))


def test_way_back_to_nan_fails(before: Weights, layout: PackedTexts) -> None:
    after = before.fold(MAPS)
    name = "model.layers.0.mlp.down_proj.weight"
    nan = torch.full((32, 48), torch.nan, dtype=torch.float64)
    broken = unfolded(after).edit({name: nan})
    with pytest.raises(CheckFailed, match="unfold is nan"):
        enforce(certify(before, after, broken, layout, CPU))


def test_logits_of_a_certificate_are_capped_where_the_model_caps_them(
    tmp_path: Path, layout: PackedTexts
) -> None:
    changes = {"head_dim": 8, "final_logit_softcapping": 0.5}
    capped = pico_model(tmp_path / "model", "gemma3_text", **changes).weights
    name = capped.adapter.norm
    # The gain is 1 + w, so every logit changes its sign.
    turned = capped.edit({name: -2.0 - capped[name]})
    assert 0.9 < certify(capped, turned, turned, layout, CPU).logits_float64 <= 1.0
