"""A fine-tune in another model: exact where that is the same one, chosen or refused where not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_chop.step import Chop
from rotdistill_transport.step import Transport, steps
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.lora import Lora, read_lora
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError, RotdistillError, SetupError
from rotdistill_core.evaluation.acceptance import TextScores, interpolate
from rotdistill_core.evaluation.kl_scorer import EditScorer
from rotdistill_core.linalg.maps import Maps, Permutation, Rotation
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import (
    PicoWorkspace,
    logits,
    max_difference,
    parametrize_with_checks,
    pico_model,
    pico_output,
    random_rotation,
    scramble,
)

from .conftest import PREFIX, SAMPLES, saved, write_adapter

Carry = Callable[..., Any]
LAYOUT = SAMPLES.layout


@parametrize_with_checks(
    Transport,
    {"source": "teacher", "base": "student"},
    {"source": "teacher", "base": "student", "rank": 2},
)
def test_transport_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_transport_is_an_inexact_fold() -> None:
    assert steps() == [Transport]
    assert stage_of(Transport) == "fold"
    assert not Transport.exact


def fine_tuned(model: Model, size: float = 0.05) -> Weights:
    """Return a model with every parameter moved, norm gains too."""
    generator = torch.Generator().manual_seed(3)
    view = model.weights
    return view.edit(
        {
            name: view[name].double() + size * torch.randn(view[name].shape, generator=generator)
            for name in view.entries
        }
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_lora_is_exact_in_another_basis(
    tmp_path: Path, transport: Carry, model_type: str
) -> None:
    # Heads no wider than the stream: else weights leave the gauge of the values open.
    base = pico_model(tmp_path / "base", model_type, head_dim=8)
    adapter = write_adapter(tmp_path / "lora", base)
    turned, _ = scramble(base.weights, 3, invertible=True)
    student = saved(turned, base, tmp_path / "student")
    found = transport(adapter, student, base)
    assert found.notes["maps from"] == "weights"

    lora = read_lora(adapter, base.weights)
    wanted = logits(lora.applied_to(base.weights), LAYOUT)
    assert max_difference(logits(found.weights, LAYOUT), wanted) < 1e-8
    # It has an effect, and as it was it would have another.
    assert max_difference(logits(student.weights, LAYOUT), wanted) > 0.01
    unchanged = read_lora(adapter, student.weights).applied_to(student.weights)
    assert max_difference(logits(unchanged, LAYOUT), wanted) > 0.01

    # An adapter comes out, of the same rank, and it has the same effect.
    written = found.out.store.root / found.out.run_id / RunLayout.adapter("step", "")
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["r"] == 4
    again = read_lora(written, student.weights).applied_to(student.weights)
    assert max_difference(logits(again, LAYOUT), wanted) < 1e-8


def test_a_lora_is_exact_through_the_folds_of_a_run(
    tmp_path: Path, transport: Carry, base: Model
) -> None:
    """The record of the run has the basis, and the layers that were cut."""
    adapter = write_adapter(tmp_path / "lora", base)
    Q = Rotation(random_rotation(base.width))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    cut = base.weights.cut([0, 2])
    turned = cut.fold({"residual": Q, "neurons.1": Permutation(order)})
    found = transport(adapter, base, "student", weights=turned)
    assert found.notes["maps from"] == "the record of the run"
    assert found.notes["layers of the source"] == [0, 2]
    assert found.notes["left out"] == {"layers [1]": "no layer of the student stands for them"}
    wanted = read_lora(adapter, base.weights).applied_to(base.weights).cut([0, 2])
    assert max_difference(logits(found.weights, LAYOUT), logits(wanted, LAYOUT)) < 1e-8


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_fine_tune_is_exact_in_another_basis(
    tmp_path: Path, transport: Carry, tied: bool
) -> None:
    base = pico_model(tmp_path / "base", tie_word_embeddings=tied)
    tuned = saved(fine_tuned(base), base, tmp_path / "tuned")
    turned, _ = scramble(base.weights, 3, invertible=True)
    student = saved(turned, base, tmp_path / "student")
    found = transport(tuned.folder, student, base)
    wanted = logits(tuned.weights, LAYOUT)
    assert max_difference(logits(found.weights, LAYOUT), wanted) < 1e-8
    assert max_difference(logits(student.weights, LAYOUT), wanted) > 0.01


def test_biases_are_carried_too(tmp_path: Path, transport: Carry) -> None:
    base = pico_model(tmp_path / "base", "qwen2")
    tuned = saved(fine_tuned(base), base, tmp_path / "tuned")
    student = saved(scramble(base.weights, 2)[0], base, tmp_path / "student")
    found = transport(tuned.folder, student, base)
    assert max_difference(logits(found.weights, LAYOUT), logits(tuned.weights, LAYOUT)) < 1e-8


def test_a_rank_makes_a_lora_of_a_whole_fine_tune(
    tmp_path: Path, transport: Carry, base: Model
) -> None:
    tuned = saved(fine_tuned(base), base, tmp_path / "tuned")
    found = transport(tuned.folder, base, "student", rank=2)
    assert 0 < found.notes["relative error of the rank"]["overall"] < 1
    written = found.out.store.root / found.out.run_id / RunLayout.adapter("step", "")
    A = load_file(written / "adapter_model.safetensors")
    assert A[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 32)


def test_cut_layers_are_recognised_by_weights(tmp_path: Path, transport: Carry) -> None:
    base = pico_model(tmp_path / "base", num_hidden_layers=5)
    adapter = write_adapter(tmp_path / "lora", base)
    turned, _ = scramble(base.weights.cut([0, 2, 3]), 5)
    student = saved(turned, base, tmp_path / "student")
    found = transport(adapter, student, base)
    assert found.notes["layers of the source"] == [0, 2, 3]
    wanted = read_lora(adapter, base.weights).applied_to(base.weights).cut([0, 2, 3])
    assert max_difference(logits(found.weights, LAYOUT), logits(wanted, LAYOUT)) < 1e-8


def test_cut_neurons_and_heads_keep_their_changes(
    tmp_path: Path, transport: Carry, base: Model
) -> None:
    out = pico_output(tmp_path / "runs", "chop")
    pair = Pair(base, base)
    cut = Chop(neurons=40, kv_heads=1).fold(base.weights, pair, SAMPLES, out, lambda *_: None)
    adapter = write_adapter(tmp_path / "lora", base)
    found = transport(adapter, base, "student", weights=cut)
    lora = read_lora(adapter, base.weights)
    gate = "model.layers.1.mlp.gate_proj.weight"
    # Every row of the student's gate is one of the base's, and got that one's change.
    kept = torch.cdist(cut[gate].double(), base.weights[gate].double()).argmin(1)
    B, A = lora.factors[gate]
    torch.testing.assert_close(
        found.weights[gate] - cut[gate].double(), (B @ A)[kept], rtol=0, atol=1e-6
    )
    v = "model.layers.1.self_attn.v_proj.weight"
    head = int(torch.cdist(cut[v][:1].double(), base.weights[v].double()).argmin())
    B, A = lora.factors[v]
    change = (found.weights[v] - cut[v].double())[0]
    torch.testing.assert_close(change, (B @ A)[head], rtol=0, atol=1e-6)


def test_an_aligner_maps_models_that_are_not_kin(
    tmp_path: Path, transport: Carry, base: Model
) -> None:
    student = pico_model(
        tmp_path / "student",
        seed=9,
        num_hidden_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        head_dim=8,
    )
    adapter = write_adapter(tmp_path / "lora", base)
    R = Rotation(random_rotation(32)[:24], 1.2)
    maps = Maps({f"residual.{boundary}": R for boundary in range(3)})
    found = transport(adapter, student, base, teacher=base, maps=maps)
    assert found.notes["maps from"] == "the aligner"
    name = "model.layers.0.mlp.gate_proj.weight"
    change = found.weights[name] - student.weights[name].double()
    assert int(torch.linalg.matrix_rank(change)) == 4
    with pytest.raises(RecipeError, match="no aligner ran before this step"):
        transport(adapter, student, base, teacher=base)
    other = pico_model(tmp_path / "other", seed=4, hidden_size=48)
    with pytest.raises(RecipeError, match="teacher has another shape than the base"):
        transport(adapter, student, base, teacher=other, maps=maps)


def chosen(transport: Carry, base: Model, tmp_path: Path, size: float = 1.0, **options: Any) -> Any:
    """Carry a LoRA to its own base, where the teacher has a share `size` of it."""
    adapter = write_adapter(tmp_path / "lora", base, size=0.2)
    teacher = base
    if size:
        view = read_lora(adapter, base.weights).applied_to(base.weights)
        teacher = saved(interpolate(base.weights, view, size), base, tmp_path / "teacher")
    options = {"strengths": (0.25, 0.5, 0.75, 1.0, 1.25), **options}
    return transport(adapter, base, "student", teacher=teacher, require_improvement=True, **options)


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_the_strength_is_chosen_on_validation_texts(
    tmp_path: Path, transport: Carry, base: Model, size: float
) -> None:
    found = chosen(transport, base, tmp_path, size)
    assert found.notes["strength"] == size
    assert found.notes["validation KL after"] < 1e-4 < found.notes["validation KL before"]
    assert not found.out.report.refused


def test_a_change_that_the_teacher_does_not_ask_for_is_dropped(
    tmp_path: Path, transport: Carry, base: Model
) -> None:
    found = chosen(transport, base, tmp_path, 0.0)
    assert "no gain beyond chance" in found.out.report.refused
    assert found.weights is base.weights


def test_the_change_may_begin_after_the_cut(tmp_path: Path, transport: Carry, base: Model) -> None:
    """The teacher is the cut student with a half of the change, in the layers after the cut."""
    adapter = write_adapter(tmp_path / "lora", base, size=0.2)
    lora = read_lora(adapter, base.weights)
    cut = base.weights.cut([0, 2])
    for layers, part in (("02", "all layers"), ("2", "layers after the first cut")):
        names = [name for name in lora.factors if name.split(".")[2] in layers]
        some = Lora({name: lora.factors[name] for name in names})
        view = some.applied_to(base.weights).cut([0, 2])
        teacher = saved(interpolate(cut, view, 0.5), base, tmp_path / f"teacher {layers}")
        found = transport(
            adapter,
            base,
            "student",
            weights=cut,
            teacher=teacher,
            require_improvement=True,
            strengths=(0.5, 1.0),
        )
        assert found.notes["applied"] == part
        assert found.notes["strength"] == 0.5
        assert found.notes["validation KL after"] < 1e-4 < found.notes["validation KL before"]
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_controls_bring_nothing(
    tmp_path: Path, transport: Carry, base: Model, control: str
) -> None:
    real = chosen(transport, base, tmp_path / "real")
    (tmp_path / control).mkdir()
    found = chosen(transport, base, tmp_path / control, control=control)
    gains = [
        each.notes["validation KL before"] - each.notes["validation KL after"]
        if not each.out.report.refused
        else 0.0
        for each in (real, found)
    ]
    assert gains[1] < 0.1 * gains[0]
    [caveat] = Transport(source="teacher", control=control).caveats()  # type: ignore[arg-type]
    assert "control" in caveat.text
    assert not Transport(source="teacher").caveats()


def test_a_guard_limits_the_change(tmp_path: Path, transport: Carry, base: Model) -> None:
    found = chosen(transport, base, tmp_path, guard=1.0, strengths=(10.0,))
    # Ten times the change is far too much, on the guard's texts as on others; a tenth of that is
    # what the teacher has.
    before, shares = found.notes["guard KL before"], found.notes["guard KL by strength"]
    *refused, kept = shares.values()
    assert refused
    assert all(kl > before for kl in refused)
    assert kept <= before


@pytest.mark.parametrize("_", range(8))
def test_each_share_has_its_own_score_under_the_guard(
    tmp_path: Path, transport: Carry, base: Model, monkeypatch: pytest.MonkeyPatch, _: int
) -> None:
    """A view that is scored and gone may leave its address to the next one."""
    name = "model.layers.0.mlp.down_proj.weight"
    start = base.weights[name].double()

    def distance(_: EditScorer, view: Weights, split: Split) -> TextScores:
        far = float((view[name].double() - start).norm())
        kl = far if split == Split.GUARD_VALIDATION else 1 / (1 + far)
        return TextScores(torch.full((4,), kl, dtype=torch.float64), torch.ones(4).double())

    monkeypatch.setattr(EditScorer, "__call__", distance)
    found = chosen(transport, base, tmp_path, guard=1.0, strengths=(10.0,))
    by_share = list(found.notes["guard KL by strength"].values())
    assert [kl / by_share[0] for kl in by_share] == pytest.approx([1.0, 0.5, 0.25, 0.1])


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_plan_states_what_is_written(tmp_path: Path, base: Model, kind: str) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    saved(fine_tuned(base), base, tmp_path / "whole")
    write_adapter(tmp_path / "lora", base)
    unscored = "require_improvement = false, strengths = [1.0]"
    recipe = workspace.recipe(
        f'step = [{{ use = "transport", source = "{kind}", base = "student", {unscored} }}]'
        '\nvariants = { full = ["transport"] }',
        teacher="base",
        student="base",
    )
    with chdir(tmp_path):
        plan = build_plan(load_recipe(recipe), Path("runs"), this_machine(Path("runs")))
    planned = {line.id: line.disk_bytes for line in plan.lines}
    folder = workspace.run(recipe).folder
    for step, part in (("transport", "weights"), ("checkpoints", "checkpoints")):
        files = (folder / part).glob("**/*.safetensors")
        written = sum(file.stat().st_size for file in files)
        # The LoRA of the source is in float64 here, and the student's in float32.
        assert written <= 1.05 * planned[step]
        assert planned[step] <= 1.2 * written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": (1.0, 0.5)}, "must rise"),
        ({"strengths": (0.5, 1.0), "require_improvement": False}, "applies one strength"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transport(source="teacher", **options)


REFUSED: dict[str, tuple[dict[str, Any], type[RotdistillError], str]] = {
    "no base": ({}, RecipeError, "the LoRA does not say which.*name it as `base`"),
    "a base elsewhere": (
        {"base_model_name_or_path": "owner/name"},
        RecipeError,
        "the LoRA names owner/name, which is not here",
    ),
    "another rank": ({"r": 8}, SetupError, "have rank 4, and r or rank_pattern"),
    "DoRA": ({"use_dora": True}, SetupError, "use_dora = True; only a plain LoRA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, SetupError, "modules_to_save"),
    "no LoRA": ({"peft_type": "IA3"}, SetupError, "peft_type = 'IA3'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_cannot_be_carried(
    tmp_path: Path, transport: Carry, base: Model, kind: str
) -> None:
    config, error, message = REFUSED[kind]
    adapter = write_adapter(tmp_path / "lora", base, **config)
    named = None if error is RecipeError else "student"
    with pytest.raises(error, match=message) as refusal:
        transport(adapter, base, named)
    assert "\n" not in str(refusal.value)


def test_bases_that_are_not_the_fine_tunes(tmp_path: Path, transport: Carry, base: Model) -> None:
    wider = pico_model(tmp_path / "wider", hidden_size=48)
    adapter = write_adapter(tmp_path / "lora", wider)
    with pytest.raises(SetupError, match="the adapter has another shape"):
        transport(adapter, base, "student")
    with pytest.raises(RecipeError, match=r"no fine-tune of its base.*of another shape"):
        transport(wider.folder, base, "student")
    qwen = pico_model(tmp_path / "qwen", "qwen2", num_hidden_layers=3)
    with pytest.raises(RecipeError, match="it is a qwen2 model, and a llama model"):
        transport(qwen.folder, base, "student")
    with pytest.raises(RecipeError, match="a whole model does not say which"):
        transport(wider.folder, base)
    with pytest.raises(RecipeError, match="is the model that the fine-tune is carried to"):
        transport("student", base, "student")


def test_modules_of_another_architecture(tmp_path: Path, transport: Carry, base: Model) -> None:
    adapter = write_adapter(tmp_path / "lora", base, ["model.layers.0.mlp.up_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({k.replace("up_proj", "c_fc"): X for k, X in load_file(file).items()}, file)
    with pytest.raises(SetupError, match=r"mlp\.c_fc\.lora_A\.weight belongs to no linear layer"):
        transport(adapter, base, "student")


def test_a_base_that_says_where_it_is(tmp_path: Path, transport: Carry, base: Model) -> None:
    adapter = write_adapter(tmp_path / "lora", base, base_model_name_or_path=str(base.folder))
    student = saved(scramble(base.weights, 3)[0], base, tmp_path / "student")
    assert transport(adapter, student).notes["maps from"] == "weights"


def test_the_base_that_a_lora_names_is_an_input_of_the_step(tmp_path: Path, base: Model) -> None:
    named = saved(base.weights, base, tmp_path / "named")
    adapter = write_adapter(tmp_path / "lora", base, base_model_name_or_path=str(named.folder))
    step = Transport(source=str(adapter))
    before = step.inputs()
    assert before == Transport(source=str(adapter), base=str(named.folder)).inputs()
    shutil.rmtree(named.folder)
    elsewhere = Transport(source=str(adapter)).inputs()
    saved(scramble(base.weights, 3)[0], base, named.folder)
    assert len({*map(tuple, (before, elsewhere, step.inputs()))}) == 3
