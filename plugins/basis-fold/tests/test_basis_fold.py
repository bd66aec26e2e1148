"""Folding what aligners found: the logits stay, whatever is folded, and what cannot be folded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_basis_fold.step import BasisFold, steps
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Permutation, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    logits,
    pico_model,
    pico_output,
    pico_samples,
    plain_transformers,
    random_rotation,
    rotated_twin,
    save_folder,
    scramble,
)


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3),
        pico_model(tmp_path / "student", "qwen2", seed=1),
    )


@pytest.fixture
def wide(tmp_path: Path) -> Pair:
    return Pair(
        pico_model(tmp_path / "wide", seed=9, hidden_size=48),
        pico_model(tmp_path / "narrow", seed=1),
    )


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def test_it_is_an_exact_fold() -> None:
    assert steps() == [BasisFold]
    assert stage_of(BasisFold) == "fold"
    assert [BasisFold(mode=mode).exact for mode in ("tied", "canonical", "widen", "block")] == [
        True,
        True,
        True,
        False,
    ]  # type: ignore[arg-type]


def aligned(
    pair: Pair, samples: Samples, root: Path, tie: int | str = "all"
) -> tuple[Maps, ActivationStore, StepOutput]:
    out = pico_output(root)
    activations = captured_activations(pair, pair.student.weights, samples, out)
    return Procrustes(tie=tie).align(activations, Maps(), pair, quiet), activations, out  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["tied", "canonical"])
def test_a_basis_fold_keeps_the_logits(
    pair: Pair, samples: Samples, tmp_path: Path, mode: str
) -> None:
    maps, activations, out = aligned(pair, samples, tmp_path / "runs")
    folded = BasisFold(mode=mode).fold(pair.student.weights, maps, activations, pair, out)  # type: ignore[arg-type]
    torch.testing.assert_close(
        logits(folded, samples.layout),
        logits(pair.student.weights, samples.layout),
        rtol=0,
        atol=1e-9,
    )
    tied = maps.tied()
    assert tied is not None
    assert folded.lineage.basis is not None
    assert torch.equal(folded.lineage.basis, tied.matrix) is (mode == "tied")


def test_a_canonical_fold_into_a_wider_teacher_keeps_the_logits(
    wide: Pair, samples: Samples, tmp_path: Path
) -> None:
    maps, activations, out = aligned(wide, samples, tmp_path / "runs")
    folded = BasisFold(mode="canonical").fold(wide.student.weights, maps, activations, wide, out)
    torch.testing.assert_close(
        logits(folded, samples.layout),
        logits(wide.student.weights, samples.layout),
        rtol=0,
        atol=1e-9,
    )
    assert folded.width == 32
    assert 0 < out.notes["teacher variance in the frame"] < 1


def test_a_tied_fold_refuses_a_rectangular_rotation(
    wide: Pair, samples: Samples, tmp_path: Path
) -> None:
    maps, activations, out = aligned(wide, samples, tmp_path / "runs")
    with pytest.raises(RecipeError, match='32 x 48, and mode "tied" needs models of one width'):
        BasisFold().fold(wide.student.weights, maps, activations, wide, out)


@pytest.mark.parametrize("mode", ["tied", "canonical"])
@pytest.mark.parametrize("tie", [None, 1], ids=["no maps", "untied maps"])
def test_a_basis_fold_needs_one_rotation(
    pair: Pair, samples: Samples, tmp_path: Path, mode: str, tie: int | None
) -> None:
    maps, activations, out = aligned(pair, samples, tmp_path / "runs", tie or "all")
    with pytest.raises(RecipeError, match="needs an aligner before it that found one rotation"):
        BasisFold(mode=mode).fold(
            pair.student.weights, maps if tie else Maps(), activations, pair, out
        )  # type: ignore[arg-type]


def test_a_basis_fold_refuses_a_matrix_that_is_not_orthogonal(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    _, activations, out = aligned(pair, samples, tmp_path / "runs")
    bent = Rotation(random_rotation(32) * 1.001)
    with pytest.raises(CheckFailed, match="off orthogonal"):
        BasisFold().fold(
            pair.student.weights,
            Maps({f"residual.{b}": bent for b in range(3)}),
            activations,
            pair,
            out,
        )


@pytest.mark.parametrize("width", [32, 48])
def test_two_canonical_students_end_in_one_basis(
    tmp_path: Path, samples: Samples, width: int
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, hidden_size=width)
    student = pico_model(tmp_path / "student", seed=1)
    twin, _ = rotated_twin(student, tmp_path / "twin", 4)
    made: list[Weights] = []
    for k, one in enumerate((student, twin)):
        pair = Pair(teacher, one)
        maps, activations, out = aligned(pair, samples, tmp_path / f"runs{k}")
        made.append(BasisFold(mode="canonical").fold(one.weights, maps, activations, pair, out))
    for name in made[0].entries:
        one_, other = made[0][name], made[1][name]
        assert float((one_ - other).norm() / one_.norm()) < 1e-4, name


@pytest.mark.parametrize(
    "stream", [True, False], ids=["with the stream", "heads and neurons alone"]
)
def test_heads_neurons_and_gauges_are_folded_too(
    pair: Pair, samples: Samples, tmp_path: Path, stream: bool
) -> None:
    _, planted = scramble(pair.student.weights, 3)
    inner = {space: found for space, found in planted.items() if space != "residual"}
    residual = {f"residual.{b}": planted["residual"] for b in range(3)} if stream else {}
    out = pico_output(tmp_path / "runs")
    activations = captured_activations(pair, pair.student.weights, samples, out)
    folded = BasisFold().fold(
        pair.student.weights, Maps({**residual, **inner}), activations, pair, out
    )
    torch.testing.assert_close(
        logits(folded, samples.layout),
        logits(pair.student.weights, samples.layout),
        rtol=0,
        atol=1e-9,
    )
    assert out.notes["folded"] == {"q": 2, "kv": 2, "value": 2, "key": 2, "neurons": 2, "up": 2}
    assert folded.tied is not stream
    assert folded.undo is not None
    back = folded.unfold(folded.undo)
    assert (
        max(
            float((back[n].double() - pair.student.weights[n].double()).abs().max())
            for n in pair.student.weights.entries
        )
        <= 1e-12
    )


def test_an_assignment_that_is_no_bijection_is_not_folded(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    out = pico_output(tmp_path / "runs")
    activations = captured_activations(pair, pair.student.weights, samples, out)
    wider = Permutation(torch.tensor([*range(48), -1, -1]), 48)
    with pytest.raises(RecipeError, match="or maps of heads or neurons"):
        BasisFold().fold(pair.student.weights, Maps({"neurons.0": wider}), activations, pair, out)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_widening_keeps_the_logits_and_is_taken_back(
    samples: Samples, tmp_path: Path, model_type: str, tied: bool
) -> None:
    teacher = pico_model(tmp_path / "wide", seed=9, hidden_size=48)
    pair = Pair(
        teacher, pico_model(tmp_path / "narrow", model_type, seed=1, tie_word_embeddings=tied)
    )
    weights = pair.student.weights
    maps, activations, out = aligned(pair, samples, tmp_path / "runs")
    folded = BasisFold(mode="widen").fold(weights, maps, activations, pair, out)
    assert (folded.width, folded.config["head_dim"]) == (48, 8)
    torch.testing.assert_close(
        logits(folded, samples.layout), logits(weights, samples.layout), rtol=0, atol=1e-9
    )
    assert folded.undo is not None
    assert folded.lineage.basis is not None
    assert folded.lineage.basis.shape == (32, 48)
    back = folded.unfold(folded.undo)
    assert back.config == weights.config
    assert all(float((back[n] - weights[n].double()).abs().max()) < 1e-12 for n in weights.entries)
    assert {n: e.shape for n, e in back.entries.items()} == {
        n: e.shape for n, e in weights.entries.items()
    }
    save_folder(folded, pair.student.folder, tmp_path / "saved", torch.float32)
    seen = plain_transformers(weights.adapter, tmp_path / "saved", samples.layout)[1]
    torch.testing.assert_close(seen, logits(weights, samples.layout), rtol=0, atol=1e-3)


def test_widening_wants_a_wider_teacher_and_norms_of_the_stream_only(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    maps, activations, out = aligned(pair, samples, tmp_path / "runs")
    with pytest.raises(RecipeError, match="needs a wider teacher"):
        BasisFold(mode="widen").fold(pair.student.weights, maps, activations, pair, out)
    normed = Pair(
        pico_model(tmp_path / "big", seed=9, hidden_size=48),
        pico_model(tmp_path / "qwen3", "qwen3", seed=1),
    )
    maps, activations, out = aligned(normed, samples, tmp_path / "more")
    with pytest.raises(RecipeError, match=r"q_norm.weight shares its eps"):
        BasisFold(mode="widen").fold(normed.student.weights, maps, activations, normed, out)


def test_a_rotation_per_block_is_not_exact_and_nothing_with_the_identity(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    weights = pair.student.weights
    maps, activations, out = aligned(pair, samples, tmp_path / "runs", tie=1)
    folded = BasisFold(mode="block").fold(weights, maps, activations, pair, out)
    assert (
        float((logits(folded, samples.layout) - logits(weights, samples.layout)).abs().max()) > 0.1
    )
    R, name = maps.rotation(1), "model.layers.1.self_attn.{}.{}"
    assert R is not None
    torch.testing.assert_close(
        folded[name.format("q_proj", "weight")],
        weights[name.format("q_proj", "weight")].double() @ R.matrix,
    )
    torch.testing.assert_close(
        folded[name.format("o_proj", "weight")],
        R.matrix.T @ weights[name.format("o_proj", "weight")].double(),
    )
    assert torch.equal(
        folded[name.format("q_proj", "bias")], weights[name.format("q_proj", "bias")]
    )
    assert folded.undo is None
    still = Maps({f"residual.{b}": Rotation(torch.eye(32, dtype=torch.float64)) for b in range(3)})
    same = BasisFold(mode="block").fold(weights, still, activations, pair, out)
    torch.testing.assert_close(
        logits(same, samples.layout), logits(weights, samples.layout), rtol=0, atol=1e-12
    )
    with pytest.raises(RecipeError, match="layer 0 has none"):
        BasisFold(mode="block").fold(weights, Maps(), activations, pair, out)
