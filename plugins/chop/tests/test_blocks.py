"""Cutting neurons and key/value heads: idle ones are found, and the refit is least squares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rotdistill_chop import _blocks
from rotdistill_chop._blocks import PrunedWriter, block_columns, prune_blocks
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights

Cut = Callable[..., Weights]
Score = Callable[[Weights, Weights], float]


def edited(weights: Weights, part: str, change: Callable[[Tensor], Tensor]) -> Weights:
    """Return a view with one matrix of every layer changed."""
    names = [name for name in weights.entries if name.endswith(f"{part}.weight")]
    return weights.edit({name: change(weights[name]) for name in names})


@pytest.mark.parametrize(("part", "axis"), [("up_proj", 0), ("down_proj", 1)])
def test_dead_neurons_are_cut_and_nothing_changes(
    llama: Model, chop: Cut, heldout_kl: Score, part: str, axis: int
) -> None:
    dead = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:9]
    weights = edited(llama.weights, part, lambda W: W.index_fill(axis, dead, 0.0))
    cut = chop(llama, weights, neurons=39)
    alive = [k for k in range(48) if k not in dead.tolist()]
    gate = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(cut[gate], weights[gate][alive])
    assert cut.config["intermediate_size"] == 39
    assert heldout_kl(cut, weights) < 1e-9
    fewer = chop(llama, weights, neurons=38)
    assert heldout_kl(fewer, weights) > 1e-6


@pytest.mark.parametrize("idle", [0, 1])
def test_idle_key_value_head_is_cut_with_its_query_heads_and_nothing_changes(
    llama: Model, chop: Cut, heldout_kl: Score, idle: int
) -> None:
    columns = torch.arange(16) + 16 * idle
    weights = edited(llama.weights, "o_proj", lambda W: W.index_fill(1, columns, 0.0))
    cut = chop(llama, weights, kv_heads=1)
    assert heldout_kl(cut, weights) < 1e-9
    assert cut.config["num_attention_heads"] == 2
    assert cut.config["num_key_value_heads"] == 1
    assert cut.config["head_dim"] == 8
    k = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(cut[k], weights[k][8 - 8 * idle :][:8])


def error(D: Tensor, pruned: PrunedWriter, C: Tensor, size: int) -> float:
    """Return `tr((D - D') C (D - D')ᵀ)` of a pruned writer D'."""
    full = torch.zeros_like(D)
    full[:, block_columns(pruned.blocks, size)] = pruned.writer
    return float(((D - full) @ C * (D - full)).sum())


def least_squares(D: Tensor, blocks: Tensor, C: Tensor, size: int) -> PrunedWriter:
    """Return the best writer that has only these blocks."""
    columns = block_columns(blocks, size)
    writer = D @ C[:, columns] @ torch.linalg.inv(C[columns][:, columns])
    return PrunedWriter(blocks, writer)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("keep", [7, 4, 1])
def test_refit_is_least_squares_and_no_worse_than_deletion(size: int, keep: int) -> None:
    maker = torch.Generator().manual_seed(keep)
    n = 8 * size
    A = torch.randn(200, n, dtype=torch.float64, generator=maker)
    mix = torch.randn(n, n, dtype=torch.float64, generator=maker)
    D = torch.randn(5, n, dtype=torch.float64, generator=maker)
    C = (A @ mix).T @ (A @ mix)
    pruned = prune_blocks(C, D, size, keep, "here")
    deleted = PrunedWriter(pruned.blocks, D[:, block_columns(pruned.blocks, size)])
    best = least_squares(D, pruned.blocks, C, size)
    assert len(pruned.blocks) == keep
    assert error(D, pruned, C, size) <= error(D, deleted, C, size)
    total = float((D @ C * D).sum())
    assert error(D, pruned, C, size) <= 1.05 * error(D, best, C, size) + 1e-2 * total


@pytest.mark.parametrize("seed", range(5))
def test_block_that_is_cut_costs_least_with_the_others_refitted(seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    A = torch.randn(100, 12, dtype=torch.float64, generator=maker)
    A = A @ torch.randn(12, 12, dtype=torch.float64, generator=maker)
    D = torch.randn(4, 12, dtype=torch.float64, generator=maker)
    C = A.T @ A
    costs = []
    for block in range(6):
        others = torch.tensor([k for k in range(6) if k != block])
        costs.append(error(D, least_squares(D, others, C, 2), C, 2))
    kept = prune_blocks(C, D, 2, 5, "here").blocks.tolist()
    cut = next(k for k in range(6) if k not in kept)
    assert costs[cut] <= 1.02 * min(costs)


@pytest.mark.parametrize("options", [{"neurons": 30}, {"kv_heads": 1}], ids=str)
def test_refit_beats_plain_deletion(
    llama: Model,
    chop: Cut,
    heldout_kl: Score,
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refitted = chop(llama, **options)

    def delete(C: Tensor, D: Tensor, size: int, keep: int, where: str) -> PrunedWriter:
        blocks = prune_blocks(C, D, size, keep, where).blocks
        return PrunedWriter(blocks, D[:, block_columns(blocks, size)])

    monkeypatch.setattr(_blocks, "prune_blocks", delete)
    deleted = chop(llama, **options)
    assert heldout_kl(refitted, llama.weights) < heldout_kl(deleted, llama.weights)
