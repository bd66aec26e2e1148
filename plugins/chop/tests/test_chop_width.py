"""Cutting neurons, groups of heads and the stream of pico models: what does nothing is found, and folders load elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_chop import _width as width
from rotdistill_chop._keep import Size
from rotdistill_chop._width import blocks, leaving
from rotdistill_chop.step import Chop
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.testing import (
    logits,
    pico_model,
    pico_output,
    pico_samples,
    plain_transformers,
    random_rotation,
    save_folder,
)

TYPES = ("llama", "qwen2", "qwen3")
CUTS: tuple[dict[str, Any], ...] = (
    {"neurons": 40},
    {"groups": 1},
    {"width": 28},
    {"layers": 2, "neurons": 30, "groups": 1, "width": 24},
)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pico_samples(texts=60)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def chopped(
    weights: Weights, model: Model, samples: Samples, root: Path, **options: Any
) -> tuple[Weights, dict[str, Any]]:
    out = pico_output(root / "runs")
    return Chop(**options).fold(weights, Pair(model, model), samples, out, quiet), out.notes


def kl(weights: Weights, whole: Weights, samples: Samples) -> float:
    layout = samples.layout.select("heldout")
    p, q = (logits(w, layout).log_softmax(-1) for w in (whole, weights))
    return float((p.exp() * (p - q)).sum(-1).mean())


def edited(weights: Weights, part: str, change: Any) -> Weights:
    names = [n for n in weights.entries if n.endswith(f"{part}.weight")]
    return weights.edit({n: change(weights[n].double()).to(weights.dtype) for n in names})


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_dead_neurons_go_and_nothing_changes(
    llama: Model, samples: Samples, tmp_path: Path, part: str
) -> None:
    dead = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:9]
    weights = edited(
        llama.weights, part, lambda W: W.index_fill(0 if part == "up_proj" else 1, dead, 0.0)
    )
    made, notes = chopped(weights, llama, samples, tmp_path, neurons=39)
    alive = [k for k in range(48) if k not in dead.tolist()]
    assert torch.equal(
        made["model.layers.1.mlp.gate_proj.weight"],
        weights["model.layers.1.mlp.gate_proj.weight"][alive],
    )
    assert kl(made, weights, samples) < 1e-9
    assert kl(chopped(weights, llama, samples, tmp_path, neurons=38)[0], weights, samples) > 1e-6
    assert notes["neurons"] == made.config["intermediate_size"] == 39


@pytest.mark.parametrize("group", [0, 1])
def test_an_idle_group_goes_with_its_query_heads_and_nothing_changes(
    llama: Model, samples: Samples, tmp_path: Path, group: int
) -> None:
    weights = edited(
        llama.weights, "o_proj", lambda W: W.index_fill(1, torch.arange(16) + 16 * group, 0.0)
    )
    made, _ = chopped(weights, llama, samples, tmp_path, groups=1)
    assert kl(made, weights, samples) < 1e-9
    heads = {
        key: made.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    }
    assert heads == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert torch.equal(
        made["model.layers.2.self_attn.k_proj.weight"],
        weights["model.layers.2.self_attn.k_proj.weight"][8 - 8 * group :][:8],
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_a_stream_of_low_rank_is_found_and_cut_without_loss(
    samples: Samples, tmp_path: Path, model_type: str
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    B = random_rotation(32, 5)[:, :24]
    weights = edited(model.weights, "embed_tokens", lambda E: E @ B @ B.T)
    for part in ("o_proj", "down_proj"):
        weights = edited(weights, part, lambda W: B @ B.T @ W)
    made, _ = chopped(weights, model, samples, tmp_path, width=24)
    assert made.width == 24
    assert kl(made, weights, samples) < 1e-8
    assert kl(chopped(weights, model, samples, tmp_path, width=20)[0], weights, samples) > 1e-4
    basis = made.lineage.basis
    assert basis is not None
    torch.testing.assert_close(basis @ basis.T, B @ B.T, rtol=0, atol=1e-4)


def error(D: Tensor, left: Tensor, new: Tensor, C: Tensor, size: int) -> float:
    """Return `tr((D - new) C (D - new)ᵀ)`, with `new` in the columns of its blocks."""
    full = torch.zeros_like(D)
    full[:, blocks(left, size)] = new
    return float(((D - full) @ C * (D - full)).sum())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stay", [7, 4, 1])
def test_the_refit_is_the_least_squares_one_and_no_worse_than_deletion(
    size: int, stay: int
) -> None:
    maker = torch.Generator().manual_seed(stay)
    A, mix = (
        torch.randn(n, 8 * size, dtype=torch.float64, generator=maker) for n in (200, 8 * size)
    )
    D, C = torch.randn(5, 8 * size, dtype=torch.float64, generator=maker), (A @ mix).T @ (A @ mix)
    left, new = leaving(C, D, size, stay, "here")
    kept = blocks(left, size)
    wanted = D @ C[:, kept] @ torch.linalg.inv(C[kept][:, kept])
    assert error(D, left, new, C, size) <= error(D, left, D[:, kept], C, size)
    assert error(D, left, new, C, size) <= 1.05 * error(D, left, wanted, C, size) + 1e-2 * float(
        (D @ C * D).sum()
    )


@pytest.mark.parametrize("seed", range(5))
def test_one_block_goes_that_costs_least_with_the_others_refitted(seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    A = torch.randn(100, 12, dtype=torch.float64, generator=maker) @ torch.randn(
        12, 12, dtype=torch.float64, generator=maker
    )
    D, C = torch.randn(4, 12, dtype=torch.float64, generator=maker), A.T @ A
    costs = []
    for gone in range(6):
        kept = torch.tensor([k for k in range(6) if k != gone])
        columns = blocks(kept, 2)
        costs.append(
            error(D, kept, D @ C[:, columns] @ torch.linalg.inv(C[columns][:, columns]), C, 2)
        )
    left, _ = leaving(C, D, 2, 5, "here")
    cheapest = min(range(6), key=costs.__getitem__)
    assert costs[next(k for k in range(6) if k not in left.tolist())] <= 1.02 * costs[cheapest]


@pytest.mark.parametrize("options", [{"neurons": 30}, {"groups": 1}], ids=str)
def test_the_refit_beats_plain_deletion(
    llama: Model,
    samples: Samples,
    tmp_path: Path,
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refitted = kl(
        chopped(llama.weights, llama, samples, tmp_path, **options)[0], llama.weights, samples
    )
    solve = leaving

    def deleted(C: Tensor, D: Tensor, size: int, stay: int, where: str) -> tuple[Tensor, Tensor]:
        left, _ = solve(C, D, size, stay, where)
        return left, D[:, blocks(left, size)]

    monkeypatch.setattr(width, "leaving", deleted)
    assert refitted < kl(
        chopped(llama.weights, llama, samples, tmp_path, **options)[0], llama.weights, samples
    )


def test_refitted_readers_beat_a_bare_cut_of_the_stream(
    llama: Model, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refitted = kl(
        chopped(llama.weights, llama, samples, tmp_path, width=24)[0], llama.weights, samples
    )
    monkeypatch.setattr(width, "ridge", lambda xx, xy, *_: torch.zeros_like(xy))
    assert refitted < 0.9 * kl(
        chopped(llama.weights, llama, samples, tmp_path, width=24)[0], llama.weights, samples
    )


@pytest.mark.parametrize("model_type", [*TYPES, "gemma3_text"])
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_transformers_loads_what_is_left_and_computes_the_same(
    samples: Samples, tmp_path: Path, model_type: str, options: dict[str, int]
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    if model_type == "gemma3_text" and "width" in options:
        with pytest.raises(RecipeError, match="cannot be rotated"):
            chopped(model.weights, model, samples, tmp_path, **options)
        return
    made, notes = chopped(model.weights, model, samples, tmp_path, **options)
    save_folder(made, model.folder, tmp_path / "cut", torch.float64)
    layout = samples.layout.select("heldout", most=3)
    theirs = plain_transformers(made.adapter, tmp_path / "cut", layout)[1]
    torch.testing.assert_close(logits(made, layout), theirs, rtol=0, atol=1e-5)
    size = Size(len(notes["layers kept"]), notes["neurons"], notes["groups"], notes["width"])
    assert (
        sum(size.parameters(model.weights))
        == made.parameters
        < model.weights.parameters
        + made["lm_head.weight" if not made.tied else made.adapter.embedding].numel()
    )
    assert Size.of(made) == size


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"neurons": 49}, "neurons = 49, but the student has 48"),
        ({"groups": 3}, "groups = 3, but the student has 2"),
        ({"width": 33}, "width = 33, but the student has 32"),
        ({"width": 30}, "transformers refuses width = 30"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met_are_refused(
    llama: Model, samples: Samples, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        chopped(llama.weights, llama, samples, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, "say what stays"), ({"keep": 0.5, "neurons": 3}, "leave out neurons")],
    ids=str,
)
def test_a_step_that_says_nothing_or_two_things_is_refused(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Chop(**options)
