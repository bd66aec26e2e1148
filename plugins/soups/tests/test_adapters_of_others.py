"""Adapters as peft saves them: base copies, fused layers, ranks and targets, and other bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rotdistill_soups.step import Soups
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.lora import read_lora, transform_lora
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, RotdistillError, SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    logits,
    pico_model,
    pico_output,
    pico_samples,
    save_folder,
    scramble,
)

pytestmark = pytest.mark.usefixtures("quiet_peft")
Merge = Callable[..., Any]
LAYOUT = pico_samples().layout
IDS = torch.tensor([text.tokens[:10] for text in LAYOUT.texts[:4]])
TENSORS = "adapter_model.safetensors"
HEAD_COPY = "base_model.model.lm_head.base_layer.weight"


@torch.no_grad()
def save_adapter(model: Model, folder: Path, seed: int = 1, **options: Any) -> Path:
    """Save a random adapter of a model with peft."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of_peft(model: Model, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    found: torch.Tensor = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    return found


@torch.no_grad()
def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def edit(
    adapter: Path,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    **config: Any,
) -> Path:
    """Change the tensors and the config of an adapter."""
    tensors = load_file(adapter / TENSORS)
    change(tensors)
    save_file(tensors, adapter / TENSORS)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return adapter


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_base_are_left_out(
    tmp_path: Path, merge: Merge, tied: bool, dtype: torch.dtype
) -> None:
    model = pico_model(tmp_path / "model", tie_word_embeddings=tied)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    assert HEAD_COPY in load_file(adapter / TENSORS)
    edit(adapter, lambda T: T.update({HEAD_COPY: T[HEAD_COPY].to(dtype)}))
    merged = merge(adapter, into=model, method="lora").weights
    save_folder(merged, model.folder, tmp_path / "merged")
    found, wanted = plain_logits(tmp_path / "merged"), logits_of_peft(model, adapter)
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert "lm_head.weight" in merged.entries


@pytest.mark.parametrize("name", ["lm_head.base_layer", "model.embed_tokens", "model.norm"])
def test_a_copy_that_is_not_the_base_is_refused_by_name(
    tmp_path: Path, merge: Merge, student: Model, name: str
) -> None:
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    weights = student.weights.untie()
    copy = weights[f"{name.replace('.base_layer', '')}.weight"].clone()
    key = f"base_model.model.{name}.weight"
    merge(edit(adapter, lambda T: T.update({key: copy})), method="lora")
    copy[(3,) * copy.ndim] += 1
    edit(adapter, lambda T: T.update({key: copy}))
    with pytest.raises(SetupError, match=rf"its tensor {key} is not the model's"):
        merge(adapter, method="lora", runs="other")


@pytest.mark.parametrize("targets", ["qkv_proj", "gate_up_proj"])
@pytest.mark.parametrize("rank", [None, 6])
def test_a_sum_for_fused_layers_is_read_by_peft(
    tmp_path: Path, merge: Merge, targets: str, rank: int | None
) -> None:
    model = pico_model(tmp_path / "model", "phi3")
    adapters = [
        save_adapter(model, tmp_path / f"{k}", k, target_modules=[targets, "o_proj"])
        for k in range(2)
    ]
    merged = merge(*adapters, into=model, method="lora", rank=rank).weights
    save_folder(merged, model.folder, tmp_path / "merged")
    found = logits_of_peft(model, tmp_path / "runs/run/weights/step/adapter")
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), found, rtol=0, atol=1e-5)
    assert float((found - plain_logits(model.folder)).abs().max()) > 0.01
    # Ours reads it as peft does.
    again = merge(
        tmp_path / "runs/run/weights/step/adapter", into=model, method="lora", runs="again"
    ).weights
    for name in merged.entries:
        torch.testing.assert_close(again[name], merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_sum_for_embedding_and_head_is_read_by_peft(
    tmp_path: Path, merge: Merge, targets: list[str]
) -> None:
    model = pico_model(tmp_path / "model", tie_word_embeddings=False)
    adapters = [save_adapter(model, tmp_path / f"{k}", k, target_modules=targets) for k in range(2)]
    merged = merge(*adapters, into=model, method="lora").weights
    save_folder(merged, model.folder, tmp_path / "merged")
    found = logits_of_peft(model, tmp_path / "runs/run/weights/step/adapter")
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", ["embed_tokens", "lm_head"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("llama", "all-linear"),
    ],
)
def test_such_adapters_go_through_a_fold(
    tmp_path: Path, model_type: str, targets: list[str] | str
) -> None:
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=False)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=targets)
    weights = model.weights
    lora = read_lora(adapter, weights)
    _, planted = scramble(weights, 3, invertible=True)
    folded = weights.fold(planted)
    assert folded.undo
    moved = transform_lora(lora, folded.undo, weights.adapter.expand(weights.config))
    before = logits(lora.applied_to(weights), LAYOUT)
    torch.testing.assert_close(logits(moved.applied_to(folded), LAYOUT), before, rtol=0, atol=1e-9)
    assert float((logits(folded, LAYOUT) - before).abs().max()) > 0.01


Q = "base_model.model.model.layers.1.self_attn.q_proj"
DAMAGE: Mapping[str, tuple[Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "one half is lost": (
        lambda T: T.pop(f"{Q}.lora_B.weight"),
        {},
        r"q_proj\.weight is \[32, 32\] in the model, which A \[4, 32\] and B \[0, 0\]",
    ),
    "both halves are lost": (
        lambda T: [T.pop(f"{Q}.lora_{half}.weight") for half in "AB"],
        {},
        r"names model\.layers\.1\.self_attn\.q_proj among its targets, and .* not whole",
    ),
    "another rank": (lambda _: None, {"r": 8}, "have rank 4, and r or rank_pattern .* say 8"),
    "another rank of one": (
        lambda _: None,
        {"rank_pattern": {"q_proj": 2}},
        "have rank 4, and r or rank_pattern .* say 2",
    ),
    "not a target": (
        lambda _: None,
        {"target_modules": ["o_proj"]},
        r"has matrices for model\.layers\.0\.self_attn\.q_proj, which target_modules",
    ),
    "not in its layers": (
        lambda _: None,
        {"layers_to_transform": [0]},
        r"has matrices for model\.layers\.1\.self_attn\.q_proj, which target_modules",
    ),
    "excluded": (
        lambda _: None,
        {"exclude_modules": ["q_proj"]},
        "which target_modules, exclude_modules or layers_to_transform",
    ),
    "a norm": (
        lambda T: T.update({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 32)}),
        {},
        r"its tensor base_model\.model\.model\.norm\.lora_A\.weight belongs to no linear layer",
    ),
    "a magnitude": (
        lambda T: T.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}),
        {},
        "lora_magnitude_vector belongs to no linear layer",
    ),
    "a bias": (
        lambda T: T.update({f"{Q}.lora_B.bias": torch.ones(32)}),
        {},
        r"lora_B\.bias belongs to no linear layer",
    ),
    "the same twice": (
        lambda T: T.update(
            {f"{Q.removeprefix('base_model.model.')}.lora_A.weight": torch.ones(4, 32)}
        ),
        {},
        r"lora_A\.weight does not begin with base_model\.model\., so peft would leave it out",
    ),
    "a linear layer as embedding": (
        lambda T: T.update({f"{Q}.lora_embedding_A": torch.ones(4, 32)}),
        {},
        "lora_embedding_A belongs to no embedding",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_not_what_its_config_says_is_refused(
    tmp_path: Path, merge: Merge, student: Model, kind: str
) -> None:
    change, config, message = DAMAGE[kind]
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(SetupError, match=message):
        merge(edit(adapter, change, **config), method="lora")


def test_a_torn_file_is_refused(tmp_path: Path, merge: Merge, student: Model) -> None:
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / TENSORS
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(SetupError, match="not a valid safetensors file"):
        merge(adapter, method="lora")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": 5}, "which is another model than the student, or in another basis"),
        ({"rms_norm_eps": 0.1}, r"another model: rms_norm_eps is 0\.1, and 1e-06 in the student"),
        ({"model_type": "qwen2"}, "a qwen2 model, and the student llama"),
        ({"intermediate_size": 80}, "of another shape than the student"),
        ({"num_hidden_layers": 3}, r"of another shape than the student .*layers: 3 and 2"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "uniform"])
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path,
    merge: Merge,
    student: Model,
    config: dict[str, Any],
    message: str,
    method: str,
) -> None:
    other = pico_model(tmp_path / "other", **config)
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, base_model_name_or_path=str(other.folder))
    with pytest.raises(RotdistillError, match=message):
        merge(adapter, method=method)


def test_another_base_may_be_accepted_knowingly(
    tmp_path: Path, merge: Merge, student: Model
) -> None:
    other = pico_model(tmp_path / "other", seed=5)
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, base_model_name_or_path=str(other.folder))
    notes = merge(adapter, method="lora", same_basis="ignore").notes
    assert "at distances" in notes["bases of adapters"][str(adapter)]


def test_a_base_that_is_not_here_or_is_kin_is_noted(
    tmp_path: Path, merge: Merge, student: Model, fine_tune: Callable[..., str]
) -> None:
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    assert "bases of adapters" not in merge(adapter, method="lora", runs="own").notes
    for name, words in (
        ("owner/name", "trained on owner/name, which is not here"),
        (fine_tune("kin", 1), "at distances"),
    ):
        edit(adapter, base_model_name_or_path=name)
        notes = merge(adapter, method="lora", runs=f"runs of {Path(name).name}").notes
        assert words in notes["bases of adapters"][str(adapter)]


@pytest.mark.parametrize("edited", [False, True])
def test_an_edited_student_is_no_base_of_the_sum(
    tmp_path: Path, student: Model, edited: bool
) -> None:
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    weights = student.weights
    if edited:
        weights = weights.edit({"model.norm.weight": weights["model.norm.weight"] + 1})
    step = Soups(ingredients=(str(adapter),), method="lora", require_improvement=False)
    out = pico_output(tmp_path / "runs")
    step.fold(weights, Pair(student, student), pico_samples(), out, lambda *_: None)
    path = tmp_path / "runs/run/weights/step/adapter/adapter_config.json"
    base = json.loads(path.read_text())["base_model_name_or_path"]
    assert base == ("" if edited else student.ref.model)


def test_an_adapter_of_the_student_before_a_rotation_is_refused(
    tmp_path: Path, merge: Merge, student: Model
) -> None:
    _, planted = scramble(student.weights, 3)
    save_folder(student.weights.fold(planted), student.folder, tmp_path / "turned")
    adapter = save_adapter(student, tmp_path / "adapter", target_modules=["q_proj"])
    turned = open_model(ModelRef(model=str(tmp_path / "turned")))
    with pytest.raises(RecipeError, match="or in another basis"):
        merge(adapter, into=turned, method="lora")
