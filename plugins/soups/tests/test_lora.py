"""LoRA adapters are summed as products, carried through folds, and read and written as in peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._align import fold_norms
from rotdistill_soups._replay import Edit, replay_of
from rotdistill_soups.step import Soups
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.lora import Factors, Lora, read_lora, transform_lora, truncate_rank
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.linalg.maps import Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    PicoWorkspace,
    logits,
    pico_model,
    pico_samples,
    random_rotation,
    reopen,
    run_recipe,
    save_folder,
    scramble,
)

Merge = Callable[..., Any]
LAYOUT = pico_samples().layout
MODULES = [
    f"model.layers.{i}.{m}_proj"
    for i in range(2)
    for m in ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.down")
]
PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    weights: Weights,
    seed: int,
    rank: int = 4,
    modules: Sequence[str] = MODULES,
    **config: Any,
) -> Path:
    """Write a random LoRA in peft's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        out, inner = weights.entries[f"{module}.weight"].shape
        A = 0.1 * torch.randn(rank, inner, generator=generator)
        B = 0.1 * torch.randn(out, rank, generator=generator)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(modules),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def adapters(tmp_path: Path, student: Model) -> list[Path]:
    return [write_adapter(tmp_path / f"lora-{k}", student.weights, k) for k in range(3)]


def products(path: Path, scale: float = 2.0) -> dict[str, torch.Tensor]:
    T = {
        key.removeprefix(PREFIX): tensor.double()
        for key, tensor in load_file(path / "adapter_model.safetensors").items()
    }
    return {
        f"{m}.weight": scale * T[f"{m}.lora_B.weight"] @ T[f"{m}.lora_A.weight"] for m in MODULES
    }


def test_products_are_summed_and_not_their_factors(
    merge: Merge, student: Model, adapters: list[Path]
) -> None:
    weights = (0.5, 0.3, 0.2)
    merged = merge(*adapters, method="lora", weights=weights).weights
    changes = [products(path) for path in adapters]
    for name in student.weights.entries:
        zero = torch.zeros((), dtype=torch.float64)
        change = sum(w * c.get(name, zero) for w, c in zip(weights, changes, strict=True))
        wanted = student.weights[name].double() + change
        torch.testing.assert_close(merged[name].double(), wanted, rtol=0, atol=1e-6)


def test_averaged_factors_are_another_change(student: Model, adapters: list[Path]) -> None:
    loras = [read_lora(path, student.weights) for path in adapters]
    changes = [products(path) for path in adapters]
    worst = 0.0
    for name in changes[0]:
        B = sum(lora.factors[name].B for lora in loras) / 3
        A = sum(lora.factors[name].A for lora in loras) / 3
        mean = sum(change[name] for change in changes) / 3
        worst = max(worst, float((B @ A - mean).abs().max()))
    assert worst > 0.01


@pytest.mark.parametrize("method", ["uniform", "task-arithmetic"])
def test_an_adapter_is_an_ingredient_like_any_other(
    merge: Merge, adapters: list[Path], method: str
) -> None:
    summed = merge(*adapters[:2], method="lora").weights
    other = merge(*adapters[:2], method=method).weights
    for name in summed.entries:
        torch.testing.assert_close(summed[name], other[name], rtol=0, atol=1e-6)


def test_a_rank_is_reached_by_svd_and_its_error_noted(
    merge: Merge, student: Model, adapters: list[Path]
) -> None:
    merged = merge(*adapters[:2], method="lora", rank=3)
    one, two = (products(path) for path in adapters[:2])
    whole, lost = 0.0, 0.0
    for name in one:
        U, S, Vt = torch.linalg.svd((one[name] + two[name]) / 2)
        wanted = student.weights[name].double() + (U[:, :3] * S[:3]) @ Vt[:3]
        torch.testing.assert_close(merged.weights[name].double(), wanted, rtol=0, atol=1e-6)
        whole += float(S.square().sum())
        lost += float(S[3:].square().sum())
    error = merged.notes["relative error of the rank"]
    assert error["overall"] == pytest.approx((lost / whole) ** 0.5)
    assert error["overall"] <= error["worst"] < 1


def test_a_rank_that_suffices_loses_nothing() -> None:
    lora = Lora({"x": Factors(torch.randn(9, 2).double(), torch.randn(2, 7).double())})
    assert truncate_rank(lora, 2)[1].overall < 1e-12


def test_peft_reads_the_sum(tmp_path: Path, merge: Merge, student: Model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one = write_adapter(tmp_path / "one", student.weights, 0)
    two = write_adapter(tmp_path / "two", student.weights, 1, modules=MODULES[:3])
    merged = merge(one, two, method="lora").weights
    save_folder(merged, student.folder, tmp_path / "merged")
    ids = torch.tensor([text.tokens[:10] for text in LAYOUT.texts[:4]])
    base = AutoModelForCausalLM.from_pretrained(student.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        peft = PeftModel.from_pretrained(base, tmp_path / "runs/run/weights/step/adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_adapter_goes_through_a_fold_and_back(tmp_path: Path, model_type: str) -> None:
    weights = pico_model(tmp_path / "model", model_type).weights
    table = weights.adapter.expand(weights.config)
    lora = read_lora(write_adapter(tmp_path / "lora", weights, 1), weights)
    _, planted = scramble(weights, 3, invertible=True)
    folded = weights.fold(planted)
    assert folded.undo
    transformed = transform_lora(lora, folded.undo, table)

    before = logits(lora.applied_to(weights), LAYOUT)
    after = logits(transformed.applied_to(folded), LAYOUT)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    # It has an effect, and without being transformed it has another.
    for other in (folded, lora.applied_to(folded)):
        assert float((logits(other, LAYOUT) - before).abs().max()) > 0.01

    back = transform_lora(transformed, folded.undo, table, back=True)
    for name, (B, A) in lora.factors.items():
        product = back.factors[name].B @ back.factors[name].A
        torch.testing.assert_close(product, B @ A, rtol=0, atol=1e-12)
    unfolded, wanted = (
        transformed.applied_to(folded).unfold(folded.undo),
        lora.applied_to(weights),
    )
    assert max(float((unfolded[n] - wanted[n]).abs().max()) for n in wanted.entries) < 1e-6


FLOAT32 = 'student.save_dtype = "float32"'
CUT = """
[[step]]
use = "chop"
neurons = 32
"""
TURN = """
[[step]]
use = "residuals"
[[step]]
use = "random-rotation"
[[step]]
id = "turn"
use = "basis-fold"
"""
SOUP = """
[[step]]
use = "soups"
method = "lora"
ingredients = ["{adapter}"]
require_improvement = false
{more}
"""


def soup(adapter: Path, more: str = "") -> str:
    """Return the step that adds an adapter, with further options."""
    return SOUP.format(adapter=adapter, more=more)


def write_recipe(tmp_path: Path, steps: str, student: Model, **of_teacher: Any) -> Path:
    """Write a recipe of `steps`, its texts, its teacher, and the LoRA that it names."""
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    teacher = workspace.model("teacher", seed=4, **of_teacher)
    if not (tmp_path / "lora").exists():
        write_adapter(tmp_path / "lora", student.weights, 1)
    return workspace.recipe(steps, teacher=teacher, student=student.folder)


@pytest.fixture
def recipe(tmp_path: Path, student: Model) -> Callable[[str], Path]:
    """Return a function that writes a recipe which folds the student and then adds a LoRA."""

    def write(more: str) -> Path:
        return write_recipe(tmp_path, FLOAT32 + TURN + soup(tmp_path / "lora", more), student)

    return write


def assert_run_adds_the_adapter(recipe: Path, student: Model) -> None:
    merged = reopen(run_recipe(recipe).checkpoints["full"], student.weights)
    lora = read_lora(recipe.parent / "lora", student.weights)
    wanted = logits(lora.applied_to(student.weights), LAYOUT)
    torch.testing.assert_close(logits(merged, LAYOUT), wanted, rtol=0, atol=1e-4)


def test_a_recipe_carries_an_adapter_through_its_folds(
    tmp_path: Path, student: Model, recipe: Callable[[str], Path]
) -> None:
    path = recipe('replay_folds = ["turn"]')
    assert_run_adds_the_adapter(path, student)
    # The same recipe with another adapter is merged anew.
    write_adapter(tmp_path / "other", student.weights, 2)
    for file in (tmp_path / "other").iterdir():
        (tmp_path / "lora" / file.name).write_bytes(file.read_bytes())
    assert_run_adds_the_adapter(path, student)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_narrow_student_goes_through_a_widening(
    tmp_path: Path, tied: bool
) -> None:
    narrow = pico_model(tmp_path / "narrow", tie_word_embeddings=tied)
    rotation, widening = 'use = "procrustes"\ntie = "all"', 'use = "basis-fold"\nmode = "widen"'
    turn = TURN.replace('use = "random-rotation"', rotation)
    turn = turn.replace('use = "basis-fold"', widening)
    steps = FLOAT32 + turn + soup(tmp_path / "lora", 'replay_folds = ["turn"]')
    path = write_recipe(tmp_path, steps, narrow, hidden_size=48)
    wide = open_model(ModelRef(model=str(run_recipe(path).checkpoints["full"])))
    assert wide.weights.width == 48
    lora = read_lora(tmp_path / "lora", narrow.weights)
    wanted = logits(lora.applied_to(narrow.weights), LAYOUT)
    torch.testing.assert_close(logits(wide.weights, LAYOUT), wanted, rtol=0, atol=1e-4)


def test_a_cut_after_a_replayed_fold_is_refused(tmp_path: Path, student: Model) -> None:
    cut = '[[step]]\nuse = "chop"\nlayers = [0]\n'
    steps = TURN + cut + soup(tmp_path / "lora", 'replay_folds = ["turn"]')
    message = '"turn", and step "chop" after it changed the student: layers was 2 and is 1'
    with pytest.raises(RecipeError, match=message):
        run_recipe(write_recipe(tmp_path, steps, student))


def adapter_of_what(steps: str, tmp_path: Path, student: Model) -> tuple[Model, Path]:
    """Carry out steps; return the student after them, and a LoRA that names that checkpoint."""
    path = write_recipe(tmp_path, FLOAT32 + steps, student)
    made = open_model(ModelRef(model=str(run_recipe(path).checkpoints["full"])))
    base = str(made.folder)
    adapter = write_adapter(tmp_path / "late", made.weights, 3, base_model_name_or_path=base)
    return made, adapter


@pytest.mark.parametrize(
    ("trained_after", "then", "named"),
    [(CUT, TURN, '"turn"'), (TURN, "", ""), (CUT + TURN, "", "")],
    ids=["a cut, then a fold", "a fold", "a cut and a fold"],
)
def test_an_adapter_belongs_to_the_checkpoint_that_it_names(
    tmp_path: Path, student: Model, trained_after: str, then: str, named: str
) -> None:
    made, adapter = adapter_of_what(trained_after, tmp_path, student)
    steps = FLOAT32 + trained_after + then + soup(adapter, f"replay_folds = [{named}]")
    path = write_recipe(tmp_path, steps, student)
    found = open_model(ModelRef(model=str(run_recipe(path).checkpoints["full"])))
    wanted = logits(read_lora(adapter, made.weights).applied_to(made.weights), LAYOUT)
    torch.testing.assert_close(logits(found.weights, LAYOUT), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (CUT, r"of another shape .*neurons.*: 48 and 32"),
        ('[[step]]\nuse = "chop"\nlayers = [0]', r"of another shape .*layers: 2 and 1"),
        (TURN, "another model than the student, or in another basis"),
    ],
    ids=["neurons", "layers", "basis"],
)
def test_an_adapter_of_the_student_before_a_cut_or_fold_is_refused(
    tmp_path: Path, student: Model, before: str, message: str
) -> None:
    modules = ["model.layers.0.self_attn.q_proj"]
    base = str(student.folder)
    adapter = write_adapter(
        tmp_path / "old", student.weights, 1, modules=modules, base_model_name_or_path=base
    )
    steps = before + soup(adapter, "replay_folds = []")
    with pytest.raises(RecipeError, match=message):
        run_recipe(write_recipe(tmp_path, steps, student))


def test_a_copy_of_a_refitted_head_is_that_of_the_model_before_the_fold(
    tmp_path: Path, student: Model
) -> None:
    """peft writes the head beside a LoRA of it: the one that the adapter was trained on."""
    untied = student.weights.untie()
    head = untied["lm_head.weight"] + 0.3
    refitted = untied.edit({"lm_head.weight": head})
    turned = refitted.fold({"residual": Rotation(random_rotation(refitted.width))})
    adapter = write_adapter(tmp_path / "lora", refitted, 1, modules=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), f"{PREFIX}lm_head.base_layer.weight": head}, path)
    edits = [edit_to(student.weights, refitted, "head", "head"), edit_to(refitted, turned, "fold")]
    replay = replay_of(["fold"], edits, turned, student)
    lora = read_lora(adapter, replay.trained_on, replay.earlier)
    carried = transform_lora(lora, replay.folds[0], turned.adapter.expand(turned.config))
    wanted = logits(lora.applied_to(refitted), LAYOUT)
    torch.testing.assert_close(
        logits(carried.applied_to(turned), LAYOUT), wanted, rtol=0, atol=1e-9
    )


def test_blocks_that_were_turned_cannot_be_replayed(tmp_path: Path, student: Model) -> None:
    block = TURN.replace('use = "basis-fold"', 'use = "basis-fold"\nmode = "block"')
    path = write_recipe(tmp_path, block + soup(tmp_path / "lora"), student)
    with pytest.raises(
        RecipeError, match='"turn" changed the student\'s basis in a way that cannot'
    ):
        run_recipe(path)
    named = block + soup(tmp_path / "lora", 'replay_folds = ["turn"]')
    with pytest.raises(RecipeError, match=r'"turn", which is not exact \(mode = "block"\)'):
        run_recipe(write_recipe(tmp_path, named, student))


def edit_to(view: Weights, after: Weights, step: str, use: str = "basis-fold") -> Edit:
    """Return the record of an edit from one view to another."""
    is_based = after.lineage.basis is not None
    return Edit(step, use, view, after.config, after.undo, is_based)


@pytest.fixture
def two_folds(student: Model) -> tuple[Weights, list[Edit]]:
    """Return a student after two folds, and these."""
    view, edits = student.weights, []
    for step, seed in (("first", 3), ("second", 4)):
        _, planted = scramble(view, seed, invertible=True)
        folded = view.fold(planted)
        edits.append(edit_to(view, folded, step))
        view = folded
    return view, edits


@pytest.mark.parametrize("named", [["first", "second"], ["second", "first"]])
def test_folds_are_replayed_in_the_order_in_which_they_were_made(
    tmp_path: Path, student: Model, two_folds: tuple[Weights, list[Edit]], named: list[str]
) -> None:
    view, edits = two_folds
    replay = replay_of(named, edits, view, student)
    assert replay.trained_on is student.weights
    lora = read_lora(write_adapter(tmp_path / "lora", student.weights, 1), replay.trained_on)
    wanted = logits(lora.applied_to(student.weights), LAYOUT)
    for fold in replay.folds:
        lora = transform_lora(lora, fold, view.adapter.expand(view.config))
    torch.testing.assert_close(logits(lora.applied_to(view), LAYOUT), wanted, rtol=0, atol=1e-9)


def test_a_fold_after_a_replayed_one_may_not_be_left_out(
    student: Model, two_folds: tuple[Weights, list[Edit]]
) -> None:
    view, edits = two_folds
    with pytest.raises(RecipeError, match='names "first" and leaves out "second", an exact fold'):
        replay_of(["first"], edits, view, student)
    late = replay_of(["second"], edits, view, student)
    assert len(late.folds) == 1
    assert late.trained_on is edits[1].before
    none = replay_of([], edits, view, student)
    assert not none.folds
    assert none.trained_on is view


def test_norms_that_a_soup_folded_after_a_fold_of_neurons_cannot_be_replayed(
    student: Model,
) -> None:
    """It stores no way back, and readers have absorbed gains that the adapter does not know."""
    view = student.weights
    turned = view.fold({"neurons.0": Permutation(torch.randperm(48), 48)})
    normed = fold_norms(turned)
    edits = [
        edit_to(view, turned, "fold"),
        replace(edit_to(turned, normed, "soup", "soups"), undo=None),
    ]
    with pytest.raises(RecipeError, match='"soup" after it changed the student\'s basis in a way'):
        replay_of(["fold"], edits, normed, student)
    assert replay_of([], edits, normed, student).trained_on is normed


def test_a_refit_after_a_fold_leaves_an_adapter_as_it_is(student: Model) -> None:
    view = student.weights
    turned = view.fold({"neurons.0": Permutation(torch.randperm(48), 48)})
    refitted = turned.edit({"model.norm.weight": turned["model.norm.weight"] + 1})
    edits = [edit_to(view, turned, "fold"), edit_to(turned, refitted, "refit", "writer-refit")]
    assert len(replay_of(["fold"], edits, refitted, student).folds) == 1


def test_a_recipe_has_to_name_the_folds_of_an_adapter(recipe: Callable[[str], Path]) -> None:
    message = r'folded into another basis, and .*/lora is a LoRA.* replay_folds = \["turn"\]'
    with pytest.raises(RecipeError, match=message):
        run_recipe(recipe(""))
    with pytest.raises(RecipeError, match='replay_folds names "turm"'):
        run_recipe(recipe('replay_folds = ["turm"]'))


def test_a_fold_of_heads_and_neurons_alone_has_to_be_named_too(
    tmp_path: Path, student: Model
) -> None:
    """The stream keeps its basis, and the adapter's neurons are in another order."""
    turn, permute = 'use = "random-rotation"', 'use = "hungarian-permute"'
    steps = FLOAT32 + TURN.replace(turn, permute)
    steps += soup(tmp_path / "lora", 'replay_folds = ["turn"]')
    path = write_recipe(tmp_path, steps, student)
    assert_run_adds_the_adapter(path, student)
    path.write_text(path.read_text().replace('replay_folds = ["turn"]', ""), encoding="utf-8")
    with pytest.raises(RecipeError, match=r'is a LoRA.* replay_folds = \["turn"\]'):
        run_recipe(path)


def test_the_fold_is_that_of_the_same_variant(recipe: Callable[[str], Path]) -> None:
    """In a variant without the fold nothing stands before the step, whatever others have."""
    path = recipe('replay_folds = ["turn"]')
    text = path.read_text(encoding="utf-8")
    soup = 'use = "soups"'
    assert text.count(soup) == 1
    toggled = text.replace(soup, f'id = "soup"\n{soup}')
    variants = '[variants]\nturned = ["turn", "soup"]\nplain = ["soup"]\n'
    path.write_text(f"{toggled}\n{variants}", encoding="utf-8")
    with pytest.raises(RecipeError, match='replay_folds names "turn", which is no exact fold'):
        run_recipe(path)


def test_fisher_weights_of_fused_projections_are_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "phi", "phi3")
    step = Soups(ingredients=("student", "student"), method="fisher")
    with pytest.raises(RecipeError, match="models of type phi3 have fused projections"):
        step.check_models(Pair(model, model))


def test_an_adapter_for_the_head_leaves_the_embedding_alone(
    tmp_path: Path, merge: Merge, student: Model
) -> None:
    path = write_adapter(tmp_path / "lora", student.weights.untie(), 1, modules=["lm_head"])
    merged = merge(path, method="lora").weights
    assert merged.config["tie_word_embeddings"] is False
    embedding = "model.embed_tokens.weight"
    assert torch.equal(merged[embedding], student.weights[embedding])
    assert float((merged["lm_head.weight"] - student.weights.head()).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = True; only a plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(
    tmp_path: Path, merge: Merge, student: Model, config: dict[str, Any], message: str
) -> None:
    path = write_adapter(tmp_path / "lora", student.weights, 1, **config)
    with pytest.raises(SetupError, match=message):
        merge(path, method="lora")


def test_an_adapter_of_another_width_is_refused(tmp_path: Path, merge: Merge) -> None:
    wider = pico_model(tmp_path / "wider", hidden_size=48)
    path = write_adapter(tmp_path / "lora", wider.weights, 1)
    message = (
        r"down_proj.weight is \[32, 48\] in the model, "
        r"which A \[4, 48\] and B \[48, 4\] do not fit"
    )
    with pytest.raises(SetupError, match=message):
        merge(path, method="lora")


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path, merge: Merge) -> None:
    deeper = pico_model(tmp_path / "deeper", num_hidden_layers=3)
    module = "model.layers.2.mlp.up_proj"
    path = write_adapter(tmp_path / "lora", deeper.weights, 1, modules=[module])
    with pytest.raises(
        SetupError, match=r"layers\.2\.mlp\.up_proj\.lora_A\.weight belongs to no linear layer"
    ):
        merge(path, method="lora")


def test_a_whole_model_is_no_adapter(merge: Merge) -> None:
    with pytest.raises(RecipeError, match="is a whole model"):
        merge("student", method="lora")


def test_an_adapter_that_is_not_finite_is_refused(merge: Merge, adapters: list[Path]) -> None:
    file = adapters[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.0.mlp.gate_proj.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(SetupError, match=r"gate_proj\.weight hold NaN or Inf"):
        merge(adapters[0], method="lora")


def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(
    tmp_path: Path, merge: Merge, student: Model
) -> None:
    path = write_adapter(tmp_path / "lora", student.weights, 1, use_rslora=True)
    merged = merge(path, method="lora").weights
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = student.weights[name].double() + products(path, 4.0)[name]
    torch.testing.assert_close(merged[name].double(), wanted, rtol=0, atol=1e-6)
