"""LoRA adapters: products are summed exactly, carried through a fold and back, and read and written as peft does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._lora import Lora, read_lora, refactored, through
from rotdistill_soups.step import Soups
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.testing import (
    logits,
    pico_folder,
    pico_head,
    pico_model,
    pico_output,
    pico_samples,
    pico_texts,
    reopen,
    run_recipe,
    save_folder,
    scramble,
)

SAMPLES = pico_samples()
MODULES = [
    f"model.layers.{i}.{m}_proj"
    for i in range(2)
    for m in ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.down")
]


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def adapter(
    folder: Path,
    weights: Weights,
    seed: int,
    rank: int = 4,
    modules: list[str] = MODULES,
    **about: Any,
) -> Path:
    """Write a random LoRA in peft's format."""
    maker = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        out, inner = weights.entries[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(
            rank, inner, generator=maker
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(
            out, rank, generator=maker
        )
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": modules,
        **about,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "student")


def soup(
    student: Model, ingredients: tuple[Path | str, ...], root: Path, **options: Any
) -> tuple[Weights, dict[str, Any]]:
    step, out = (
        Soups(ingredients=tuple(map(str, ingredients)), **{"only_better": False, **options}),
        pico_output(root / "runs"),
    )
    return step.fold(student.weights, Pair(student, student), SAMPLES, out, quiet), out.notes


def products(path: Path, scale: float = 2.0) -> dict[str, torch.Tensor]:
    T = {
        k.removeprefix("base_model.model."): t.double()
        for k, t in load_file(path / "adapter_model.safetensors").items()
    }
    return {
        f"{m}.weight": scale * T[f"{m}.lora_B.weight"] @ T[f"{m}.lora_A.weight"] for m in MODULES
    }


def test_products_are_summed_and_not_their_factors(tmp_path: Path, student: Model) -> None:
    paths = [adapter(tmp_path / str(k), student.weights, k) for k in range(3)]
    made, _ = soup(student, tuple(paths), tmp_path, method="lora", weights=(0.5, 0.3, 0.2))
    loras = [read_lora(path, student.weights) for path in paths]
    for name in student.weights.entries:
        wanted = student.weights[name].double() + sum(
            w * products(path).get(name, torch.zeros(()))
            for w, path in zip((0.5, 0.3, 0.2), paths, strict=True)
        )
        torch.testing.assert_close(made[name].double(), wanted, rtol=0, atol=1e-6)
    apart = 0.0
    for name in products(paths[0]):
        B, A = (sum(lora.factors[name][k] for lora in loras) / 3 for k in (0, 1))
        apart = max(
            apart, float((B @ A - sum(products(path)[name] for path in paths) / 3).abs().max())
        )
    assert apart > 0.01  # what averaging A and B by themselves would be off by


def test_an_adapter_is_an_ingredient_like_any_other(tmp_path: Path, student: Model) -> None:
    paths = [adapter(tmp_path / str(k), student.weights, k) for k in range(2)]
    added, _ = soup(student, tuple(paths), tmp_path, method="lora")
    mean, _ = soup(student, tuple(paths), tmp_path, method="uniform")
    arithmetic, _ = soup(student, tuple(paths), tmp_path, method="task-arithmetic")
    for other in (mean, arithmetic):
        for name in added.entries:
            torch.testing.assert_close(added[name], other[name], rtol=0, atol=1e-6)


def test_a_rank_is_reached_by_svd_and_its_loss_told(tmp_path: Path, student: Model) -> None:
    paths = [adapter(tmp_path / str(k), student.weights, k) for k in range(2)]
    made, notes = soup(student, tuple(paths), tmp_path, method="lora", rank=3)
    whole, lost = 0.0, 0.0
    for name in products(paths[0]):
        delta = sum(products(path)[name] for path in paths) / 2
        U, S, Vt = torch.linalg.svd(delta)
        torch.testing.assert_close(
            made[name].double(),
            student.weights[name].double() + (U[:, :3] * S[:3]) @ Vt[:3],
            rtol=0,
            atol=1e-6,
        )
        whole, lost = whole + float(S.square().sum()), lost + float(S[3:].square().sum())
    assert notes["what the rank loses"]["relative error"] == pytest.approx((lost / whole) ** 0.5)
    assert (
        refactored(Lora({"x": (torch.randn(9, 2).double(), torch.randn(2, 7).double())}), 2)[1][
            "relative error"
        ]
        < 1e-12
    )


def test_peft_reads_the_sum(tmp_path: Path, student: Model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    paths = [
        adapter(tmp_path / "0", student.weights, 0),
        adapter(tmp_path / "1", student.weights, 1, modules=MODULES[:3]),
    ]
    made, _ = soup(student, tuple(paths), tmp_path, method="lora")
    save_folder(made, student.folder, tmp_path / "made")
    ids = torch.tensor([text.tokens[:10] for text in SAMPLES.layout.texts[:4]])
    base = AutoModelForCausalLM.from_pretrained(student.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks for an attribute that transformers has renamed
        peft = PeftModel.from_pretrained(base, tmp_path / "runs/run/weights/step/adapter")
    with torch.no_grad():
        one, other = (
            peft(ids).logits,
            AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)(
                ids
            ).logits,
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_adapter_goes_through_a_fold_and_back(tmp_path: Path, model_type: str) -> None:
    weights = pico_model(tmp_path / "model", model_type).weights
    lora = read_lora(adapter(tmp_path / "lora", weights, 1), weights)
    _, planted = scramble(weights, 3, invertible=True)
    folded = weights.fold(planted)
    assert folded.undo
    table = weights.adapter.expand(weights.config)
    there = through(lora, folded.undo, table)
    before, after = (
        logits(lora.on(weights), SAMPLES.layout),
        logits(there.on(folded), SAMPLES.layout),
    )
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    assert float((after - logits(folded, SAMPLES.layout)).abs().max()) > 0.01
    wrong = logits(lora.on(folded), SAMPLES.layout)
    assert float((wrong - before).abs().max()) > 0.01
    back = through(there, folded.undo, table, back=True)
    for name, (B, A) in lora.factors.items():
        torch.testing.assert_close(
            back.factors[name][0] @ back.factors[name][1], B @ A, rtol=0, atol=1e-12
        )
    unfolded, wanted = there.on(folded).unfold(folded.undo), lora.on(weights)
    assert max(float((unfolded[n] - wanted[n]).abs().max()) for n in wanted.entries) < 1e-6


RECIPE = (
    pico_head("merged", "{root}/teacher", "{root}/student")
    + """
student.save_dtype = "float32"
[[step]]
use = "residuals"
[[step]]
use = "random-rotation"
[[step]]
id = "turn"
use = "basis-fold"
[[step]]
use = "soups"
method = "lora"
ingredients = ["{root}/lora"]
only_better = false
{more}
"""
)


def test_a_recipe_carries_an_adapter_through_its_folds(tmp_path: Path) -> None:
    pico_texts(tmp_path / "texts")
    pico_folder(tmp_path / "teacher", seed=4)
    student = pico_model(tmp_path / "student")
    lora = adapter(tmp_path / "lora", student.weights, 1)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(root=tmp_path, more=""))
    with pytest.raises(
        RecipeError,
        match=r'folded into another basis, and .*/lora is a LoRA.* through = \["fold"\]',
    ):
        run_recipe(path)
    path.write_text(RECIPE.format(root=tmp_path, more='through = ["turm"]'))
    with pytest.raises(RecipeError, match='through names "turm"'):
        run_recipe(path)
    path.write_text(RECIPE.format(root=tmp_path, more='through = ["turn"]'))
    made = reopen(run_recipe(path).checkpoints["full"], student.weights)
    wanted = read_lora(lora, student.weights).on(student.weights)
    torch.testing.assert_close(
        logits(made, SAMPLES.layout), logits(wanted, SAMPLES.layout), rtol=0, atol=1e-4
    )
    adapter(tmp_path / "other", student.weights, 2)
    for file in (tmp_path / "other").iterdir():
        (lora / file.name).write_bytes(file.read_bytes())
    again = reopen(
        run_recipe(path).checkpoints["full"], student.weights
    )  # the same recipe, another adapter: made anew
    wanted = read_lora(lora, student.weights).on(student.weights)
    torch.testing.assert_close(
        logits(again, SAMPLES.layout), logits(wanted, SAMPLES.layout), rtol=0, atol=1e-4
    )


def test_an_adapter_for_the_head_leaves_the_embedding_alone(tmp_path: Path, student: Model) -> None:
    path = adapter(tmp_path / "lora", student.weights.untie(), 1, modules=["lm_head"])
    made, _ = soup(student, (path,), tmp_path, method="lora")
    assert made.config["tie_word_embeddings"] is False
    assert torch.equal(
        made["model.embed_tokens.weight"], student.weights["model.embed_tokens.weight"]
    )
    assert float((made["lm_head.weight"] - student.weights.head()).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"use_dora": True}, "use_dora = True; only a plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    tmp_path: Path, student: Model, about: dict[str, Any], told: str
) -> None:
    with pytest.raises(SetupError, match=told):
        soup(
            student,
            (adapter(tmp_path / "lora", student.weights, 1, **about),),
            tmp_path,
            method="lora",
        )


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, student: Model) -> None:
    wider = pico_model(tmp_path / "wider", hidden_size=48)
    with pytest.raises(
        SetupError,
        match=r"down_proj.weight is \[32, 48\] in the student, which A \[4, 48\] and B \[48, 4\] do not fit",
    ):
        soup(student, (adapter(tmp_path / "one", wider.weights, 1),), tmp_path, method="lora")
    deeper = pico_model(tmp_path / "deeper", num_hidden_layers=3)
    path = adapter(tmp_path / "two", deeper.weights, 1, modules=["model.layers.2.mlp.up_proj"])
    with pytest.raises(
        SetupError, match=r"layers\.2\.mlp\.up_proj\.lora_A\.weight belongs to no linear layer"
    ):
        soup(student, (path,), tmp_path, method="lora")


def test_a_whole_model_is_no_adapter(tmp_path: Path, student: Model) -> None:
    with pytest.raises(RecipeError, match="is a whole model"):
        soup(student, ("student",), tmp_path, method="lora")


def test_a_spoilt_adapter_is_refused(tmp_path: Path, student: Model) -> None:
    path = adapter(tmp_path / "lora", student.weights, 1)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(SetupError, match=r"gate_proj\.weight hold NaN or Inf"):
        soup(student, (path,), tmp_path, method="lora")


def test_rank_stabilised_adapters_have_their_own_scale(tmp_path: Path, student: Model) -> None:
    path = adapter(tmp_path / "lora", student.weights, 1, use_rslora=True)
    made, _ = soup(student, (path,), tmp_path, method="lora")
    name = "model.layers.0.mlp.gate_proj.weight"
    torch.testing.assert_close(
        made[name].double(),
        student.weights[name].double() + products(path, 4.0)[name],
        rtol=0,
        atol=1e-6,
    )
