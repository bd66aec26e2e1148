"""Ingredients of another config are refused by key; of the same one, a soup of one is that one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups.barrier import InterpolationBarrier
from rotdistill_soups.step import Soups
from transformers import AutoModelForCausalLM, GenerationConfig

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model, open_pair
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import PicoWorkspace, pico_model, pico_tokenizer, save_folder

FineTune = Callable[..., str]
Merge = Callable[..., Any]
IDS = torch.tensor([[3, 9, 17, 25, 33, 41, 50, 58, 7, 12, 20, 30]])


@torch.no_grad()
def plain_logits(folder: str | Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def reconfigure(folder: str | Path, **changes: Any) -> str:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


OTHER: dict[str, dict[str, Any]] = {
    "rope_parameters.rope_theta": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "rope_parameters.factor": {
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    },
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "hidden_act": {"hidden_act": "gelu"},
    "a_key_of_tomorrow": {"a_key_of_tomorrow": 2},
}


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("method", ["uniform", "slerp", "task-arithmetic"])
def test_another_config_is_refused_by_key(
    merge: Merge, fine_tune: FineTune, key: str, method: str
) -> None:
    other = reconfigure(fine_tune("other", 1), **OTHER[key])
    changed = OTHER[key].get("rope_parameters", OTHER[key])[key.split(".")[-1]]
    with pytest.raises(RecipeError, match=rf"{key} is {changed!r}, and .* in the student") as info:
        merge(other, "student", method=method)
    assert other in str(info.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gemma3_text", "olmo2"])
def test_a_soup_of_one_ingredient_is_that_ingredient(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, model_type: str
) -> None:
    student = pico_model(tmp_path / "other student", model_type)
    path = fine_tune("tuned", 1, model=student)
    harmless = {"max_position_embeddings": 256, "use_cache": False, "dtype": "bfloat16"}
    reconfigure(path, **harmless)
    merged = merge(path, into=student).weights
    save_folder(merged, student.folder, tmp_path / "merged")
    wanted = plain_logits(path)
    assert float((wanted - plain_logits(student.folder)).abs().max()) > 1e-3
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), wanted, rtol=0, atol=1e-6)


def test_an_anchor_of_another_config_is_refused(student: Model, fine_tune: FineTune) -> None:
    anchor = fine_tune("anchor", 1)
    refs = [ModelRef(model=str(student.folder)), student.ref, ModelRef(model=anchor)]
    assert open_pair(*refs).anchor
    reconfigure(anchor, rms_norm_eps=0.1)
    with pytest.raises(SetupError, match=r"rms_norm_eps is 0\.1, and 1e-06 in the student"):
        open_pair(*refs)


def without_tokenizer(folder: str, *kept: str) -> str:
    for path in Path(folder).iterdir():
        if path.name not in ("config.json", "model.safetensors", *kept):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    "others",
    [
        (),
        ("generation_config.json",),
        ("generation_config.json", "chat_template.jinja"),
        ("tokenizer_config.json", "chat_template.jinja"),
    ],
)
def test_a_fine_tune_without_its_tokenizer_has_the_tokens_of_the_student(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, others: tuple[str, ...]
) -> None:
    path = fine_tune("tuned", 1)
    GenerationConfig(max_new_tokens=4).save_pretrained(path)
    (Path(path) / "chat_template.jinja").write_text("{{ messages }}")
    merged = merge(without_tokenizer(path, *others)).weights
    tuned = open_model(ModelRef(model=path)).weights
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned.entries)


def test_another_number_of_rows_without_a_tokenizer_is_refused(
    tmp_path: Path, merge: Merge
) -> None:
    larger = pico_model(tmp_path / "larger", vocab_size=80).folder
    with pytest.raises(SetupError, match="has 80 rows for tokens, the student 64, and no tokeni"):
        merge(without_tokenizer(str(larger)), same_basis="ignore")


STEPS = """
step = [{{ use = "residuals" }}, {{ use = "soups", ingredients = ["{folder}"] }}]
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("config", "rms_norm_eps is 0.1, and 1e-06 in the student"),
        ("tokens", "it has another tokenizer"),
        ("adapter", "peft_type = 'IA3'"),
        ("architecture", "is a qwen2 model and the student llama"),
        ("nothing", "is neither a folder here nor"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_the_teacher_answers(
    tmp_path: Path, kind: str, message: str
) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("model")
    folder = tmp_path / kind
    if kind == "config":
        reconfigure(workspace.model(kind), rms_norm_eps=0.1)
    elif kind == "tokens":
        pico_tokenizer(8).save_pretrained(workspace.model(kind))
    elif kind == "adapter":
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    elif kind == "architecture":
        workspace.model(kind, "qwen2")
    recipe = workspace.recipe(STEPS.format(folder=folder))
    for words in (("plan", str(recipe)), ("run", str(recipe), "--no-plan")):
        code, _, told = workspace.command(*words)
        assert code in (2, 3)
        assert message in " ".join(told.split())
    assert not list(workspace.runs.glob("*/answers/**/*.json"))


def test_the_ends_of_a_line_are_checked_too(student: Model, fine_tune: FineTune) -> None:
    other = reconfigure(fine_tune("other", 1), rms_norm_eps=0.1)
    pair = Pair(student, student)
    InterpolationBarrier(between=("variant", fine_tune("good", 2))).check_models(pair)
    with pytest.raises(RecipeError, match="rms_norm_eps"):
        InterpolationBarrier(between=("variant", other)).check_models(pair)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "task-arithmetic", "scaling": 1e300},
        {"method": "lora", "scaling": -1e7},
        {"method": "ties", "weights": (1e200,)},
        {"method": "lora", "tensors": {"*": (1e308,)}},
        {"method": "uniform", "ingredients": ("a", "b"), "weights": (1e308, 1e308)},
        {"method": "uniform", "ingredients": ("a", "b"), "weights": (1.0, -1.0000001)},
    ],
)
def test_factors_that_overflow_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"parameters would be multiplied by .*, of which sums"):
        Soups(**{"ingredients": ("a",), **options})


def test_large_shares_of_a_mean_are_no_overflow() -> None:
    assert Soups(ingredients=("a", "b"), weights=(1e12, 3e12))
