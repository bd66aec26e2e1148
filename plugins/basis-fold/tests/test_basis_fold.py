"""A basis fold keeps the logits in every mode but `block`, and refuses what cannot be folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rotdistill_basis_fold.step import BasisFold
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Permutation, Rotation
from rotdistill_core.plugin.step import check_models, stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    PicoWorkspace,
    captured_activations,
    logits,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    plain_transformers,
    random_rotation,
    rotated_twin,
    save_folder,
    scramble,
)


@parametrize_with_checks(BasisFold, {}, {"mode": "canonical"}, {"mode": "block"})
def test_basis_fold_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_every_mode_but_block_is_exact() -> None:
    assert stage_of(BasisFold) == "fold"
    exact = {mode: fold_step(mode).exact for mode in ("tied", "canonical", "widen", "block")}
    assert exact == {"tied": True, "canonical": True, "widen": True, "block": False}


def fold_step(mode: str = "tied") -> BasisFold:
    return BasisFold(mode=mode)  # type: ignore[arg-type]


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


class Aligned(NamedTuple):
    """What `basis-fold` is given: a pair with its captured streams and a rotation between them."""

    pair: Pair
    maps: Maps
    activations: ActivationStore
    out: StepOutput

    def fold(self, mode: str = "tied", maps: Maps | None = None) -> Weights:
        given = self.maps if maps is None else maps
        return fold_step(mode).fold(
            self.pair.student.weights, given, self.activations, self.pair, self.out
        )


def align(pair: Pair, samples: Samples, root: Path, tie: int | str = "all") -> Aligned:
    out = pico_output(root)
    activations = captured_activations(pair, pair.student.weights, samples, out)
    aligner: Any = Procrustes(tie=tie)  # type: ignore[arg-type]
    maps = aligner.align(activations, Maps(), pair, lambda *_: None)
    return Aligned(pair, maps, activations, out)


def assert_same_logits(one: Weights, two: Weights, samples: Samples, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        logits(one, samples.layout), logits(two, samples.layout), rtol=0, atol=atol
    )


@pytest.mark.parametrize("mode", ["tied", "canonical"])
def test_a_basis_fold_keeps_the_logits(
    pair: Pair, samples: Samples, tmp_path: Path, mode: str
) -> None:
    aligned = align(pair, samples, tmp_path / "runs")
    folded = aligned.fold(mode)
    assert_same_logits(folded, pair.student.weights, samples)
    tied = aligned.maps.tied()
    assert tied is not None
    assert folded.lineage.basis is not None
    assert torch.equal(folded.lineage.basis, tied.matrix) is (mode == "tied")


def test_a_canonical_fold_into_a_wider_teacher_keeps_the_logits(
    wide: Pair, samples: Samples, tmp_path: Path
) -> None:
    aligned = align(wide, samples, tmp_path / "runs")
    folded = aligned.fold("canonical")
    assert_same_logits(folded, wide.student.weights, samples)
    assert folded.width == 32
    assert 0 < aligned.out.notes["teacher variance in the frame"] < 1


def test_a_tied_fold_refuses_a_rectangular_rotation(
    wide: Pair, samples: Samples, tmp_path: Path
) -> None:
    aligned = align(wide, samples, tmp_path / "runs")
    with pytest.raises(RecipeError, match='32 x 48, and mode "tied" needs models of one width'):
        aligned.fold()


@pytest.mark.parametrize("mode", ["tied", "canonical"])
@pytest.mark.parametrize("tie", [None, 1], ids=["no maps", "untied maps"])
def test_a_basis_fold_needs_one_rotation(
    pair: Pair, samples: Samples, tmp_path: Path, mode: str, tie: int | None
) -> None:
    aligned = align(pair, samples, tmp_path / "runs", tie or "all")
    with pytest.raises(RecipeError, match="needs an aligner before it that found one rotation"):
        aligned.fold(mode, aligned.maps if tie else Maps())


def test_a_basis_fold_refuses_a_matrix_that_is_not_orthogonal(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    bent = Rotation(random_rotation(32) * 1.001)
    with pytest.raises(CheckFailed, match="off orthogonal"):
        align(pair, samples, tmp_path / "runs").fold(
            maps=Maps({f"residual.{b}": bent for b in range(3)})
        )


@pytest.mark.parametrize("width", [32, 48])
def test_two_canonical_students_end_in_one_basis(
    tmp_path: Path, samples: Samples, width: int
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, hidden_size=width)
    student = pico_model(tmp_path / "student", seed=1)
    twin, _ = rotated_twin(student, tmp_path / "twin", 4)
    one, two = (
        align(Pair(teacher, model), samples, tmp_path / f"runs-{name}").fold("canonical")
        for name, model in (("student", student), ("twin", twin))
    )
    for name in one.entries:
        assert float((one[name] - two[name]).norm() / one[name].norm()) < 1e-4, name


@pytest.mark.parametrize(
    "stream", [True, False], ids=["with the stream", "heads and neurons alone"]
)
def test_heads_neurons_and_gauges_are_folded_too(
    pair: Pair, samples: Samples, tmp_path: Path, stream: bool
) -> None:
    student = pair.student.weights
    _, planted = scramble(student, 3)
    inner = {space: found for space, found in planted.items() if space != "residual"}
    residual = {f"residual.{b}": planted["residual"] for b in range(3)} if stream else {}
    aligned = align(pair, samples, tmp_path / "runs")
    folded = aligned.fold(maps=Maps({**residual, **inner}))
    assert_same_logits(folded, student, samples)
    assert aligned.out.notes["folded"] == {
        "q": 2,
        "kv": 2,
        "value": 2,
        "key": 2,
        "neurons": 2,
        "up": 2,
    }
    assert folded.tied is not stream
    assert folded.undo is not None
    back = folded.unfold(folded.undo)
    changes = {n: float((back[n].double() - student[n].double()).abs().max()) for n in back.entries}
    assert changes.keys() == student.entries.keys()
    assert max(changes.values()) <= 1e-12


def test_an_assignment_that_is_no_bijection_is_not_folded(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    wider = Permutation(torch.tensor([*range(48), -1, -1]), 48)
    with pytest.raises(RecipeError, match="or maps of heads or neurons"):
        align(pair, samples, tmp_path / "runs").fold(maps=Maps({"neurons.0": wider}))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_widening_keeps_the_logits_and_can_be_undone(
    samples: Samples, tmp_path: Path, model_type: str, tied: bool
) -> None:
    pair = Pair(
        pico_model(tmp_path / "wide", seed=9, hidden_size=48),
        pico_model(tmp_path / "narrow", model_type, seed=1, tie_word_embeddings=tied),
    )
    weights = pair.student.weights
    folded = align(pair, samples, tmp_path / "runs").fold("widen")
    assert (folded.width, folded.config["head_dim"]) == (48, 8)
    assert_same_logits(folded, weights, samples)
    assert folded.undo is not None
    assert folded.lineage.basis is not None
    assert folded.lineage.basis.shape == (32, 48)
    back = folded.unfold(folded.undo)
    assert back.config == weights.config
    assert all(float((back[n] - weights[n].double()).abs().max()) < 1e-12 for n in weights.entries)
    assert {n: entry.shape for n, entry in back.entries.items()} == {
        n: entry.shape for n, entry in weights.entries.items()
    }
    save_folder(folded, pair.student.folder, tmp_path / "saved", torch.float32)
    plain = plain_transformers(weights.adapter, tmp_path / "saved", samples.layout)[1]
    torch.testing.assert_close(plain, logits(weights, samples.layout), rtol=0, atol=1e-3)


def test_widening_needs_a_wider_teacher(pair: Pair, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs a wider teacher"):
        align(pair, samples, tmp_path / "runs").fold("widen")


def test_a_model_with_norms_inside_its_heads_cannot_be_widened(
    samples: Samples, tmp_path: Path
) -> None:
    pair = Pair(
        pico_model(tmp_path / "wide", seed=9, hidden_size=48),
        pico_model(tmp_path / "qwen3", "qwen3", seed=1),
    )
    with pytest.raises(RecipeError, match=r"q_norm.weight shares its eps"):
        align(pair, samples, tmp_path / "runs").fold("widen")


@pytest.mark.parametrize("mode", ["canonical", "widen"])
def test_a_stream_that_cannot_be_rotated_is_refused_before_any_work(
    mode: Any, tmp_path: Path
) -> None:
    gemma = pico_model(tmp_path / "model", "gemma3_text", head_dim=8)
    with pytest.raises(RecipeError, match="of type gemma3_text cannot be rotated"):
        check_models(BasisFold(mode=mode), Pair(gemma, gemma))


def test_block_rotates_each_layer_between_its_norms_and_its_writers(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    weights = pair.student.weights
    aligned = align(pair, samples, tmp_path / "runs", tie=1)
    folded = aligned.fold("block")
    R = aligned.maps.rotation(1)
    assert R is not None
    q, o = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qo")
    torch.testing.assert_close(folded[q], weights[q].double() @ R.matrix)
    torch.testing.assert_close(folded[o], R.matrix.T @ weights[o].double())
    bias = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(folded[bias], weights[bias])
    assert folded.undo is None
    change = logits(folded, samples.layout) - logits(weights, samples.layout)
    assert float(change.abs().max()) > 0.1


def test_block_with_the_identity_changes_nothing(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    identity = Rotation(torch.eye(32, dtype=torch.float64))
    aligned = align(pair, samples, tmp_path / "runs")
    folded = aligned.fold("block", Maps({f"residual.{b}": identity for b in range(3)}))
    assert_same_logits(folded, pair.student.weights, samples, atol=1e-12)


def test_block_needs_a_rotation_before_every_layer(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="layer 0 has none"):
        align(pair, samples, tmp_path / "runs").fold("block", Maps())


def test_a_student_is_folded_once(pico_workspace: PicoWorkspace) -> None:
    """A second fold would turn by all maps once more, and no logit would show it."""
    steps = ["residuals", "procrustes", "basis-fold", "hungarian-permute", "basis-fold"]
    tables = [f'[[step]]\nid = "step-{k}"\nuse = "{use}"\n' for k, use in enumerate(steps)]
    recipe = pico_workspace.recipe("".join(tables))
    with pytest.raises(RecipeError, match="a step before has folded the student already"):
        pico_workspace.run(recipe)
    code, _, err = pico_workspace.command("check", str(recipe))
    assert code == 2
    assert "basis-fold: a step before has folded the student already" in " ".join(err.split())
