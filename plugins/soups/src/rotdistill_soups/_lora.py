"""LoRA adapters in peft's format: read, carried through a fold and back, summed, and written.

An adapter changes `W [out, in]` by `s B A`. Sums are of products, never of A and B by themselves:
`(ΣB)(ΣA)` has cross terms that nobody trained. Through a fold a reader's `A` becomes `A diag(g) Q`,
a writer's `B` becomes `Qᵀ B`, and likewise in the spaces of heads and neurons.
(Hu et al., LoRA, arXiv:2106.09685.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Param
from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Undo, Weights, restore_undo
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.linalg.maps import Map, transform_param
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text
from rotdistill_core.store.records import WeightsRef

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PLAIN_LORA: Mapping[str, Any] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "alpha_pattern": {},
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
}
"""Keys of an adapter's config, and the value under which it is `W + s B A` and nothing else."""


class Factors(NamedTuple):
    """The change `B A` of one parameter, float64."""

    B: Tensor
    """`[out, r]`; the scale s is part of it."""
    A: Tensor
    """`[r, in]`."""


@dataclass(frozen=True)
class Lora:
    """An adapter: parameter -> its factors."""

    factors: Mapping[str, Factors]

    def applied_to(self, weights: Weights) -> Weights:
        """Return a view with the adapter added, in float64, computed when read."""
        added: dict[str, LazyTensor] = {}
        for name in self.factors:
            shape = weights.entries[name].shape
            read = partial(self.rows_on(weights, name), 0, shape[0])
            added[name] = LazyTensor(shape, torch.float64, read)
        return weights.edit(added)

    def rows_on(self, weights: Weights, name: str) -> Callable[[int, int], Tensor]:
        """Return a function that gives rows [a, b) of `W + B A` in float64."""
        W = weights.entries[name]
        B, A = self.factors[name]

        def read(a: int, b: int) -> Tensor:
            return W.read()[a:b].double() + B[a:b] @ A

        return read


def read_lora(folder: Path, weights: Weights) -> Lora:
    """Read a peft folder for a model.

    Where the adapter changes the head, that must be a tensor of its own.

    Raises:
        SetupError: not a plain LoRA, or not one for this model.
    """
    config = json.loads(read_text(folder / ADAPTER_CONFIG))
    _require_plain_lora(folder, config)
    factors: dict[str, Factors] = {}
    for name, half in _halves(folder, weights).items():
        A, B = half.get("A", torch.empty(0, 0)), half.get("B", torch.empty(0, 0))
        _require_fitting(folder, name, A, B, weights.entries[name].shape)
        rank = len(A)
        divisor = rank**0.5 if config.get("use_rslora") else rank
        factors[name] = Factors(float(config["lora_alpha"]) / divisor * B, A)
    return Lora(factors)


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    odd = [key for key, plain in PLAIN_LORA.items() if config.get(key, plain) not in (plain, None)]
    if config.get("peft_type") != "LORA" or odd:
        key = odd[0] if odd else "peft_type"
        raise SetupError(
            f"{folder}: its {ADAPTER_CONFIG} has {key} = {config.get(key)!r}; only a plain LoRA, "
            "W + s B A on linear layers, can be merged."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SetupError(
            f"{folder}: has no {ADAPTER_WEIGHTS}. Pickled adapters are not read; save it again "
            "with peft."
        )


def _halves(folder: Path, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Return parameter -> its matrices `A` and `B`, float64."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, entry in open_tensors(folder / ADAPTER_WEIGHTS).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        name = f"{match[1]}.weight" if match else key
        if match is None or name not in weights.entries:
            raise SetupError(
                f"{folder}: its tensor {key} belongs to no linear layer of this "
                f"{weights.config['model_type']} model."
            )
        halves.setdefault(name, {})[match[2]] = entry.read().double()
    return halves


def _require_fitting(folder: Path, name: str, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> None:
    out, inner = shape
    if A.shape[1:] != (inner,) or B.shape != (out, len(A)):
        raise SetupError(
            f"{folder}: {name} is {[out, inner]} in the student, which A {list(A.shape)} and B "
            f"{list(B.shape)} do not fit: the adapter has another shape."
        )
    if not bool(torch.isfinite(A.sum() + B.sum())):
        raise SetupError(
            f"{folder}: its matrices for {name} hold NaN or Inf, and would spoil the soup; leave "
            "the adapter out."
        )


def transform_lora(lora: Lora, undo: Undo, table: Mapping[str, Param], back: bool = False) -> Lora:
    """Carry an adapter through an exact fold.

    Args:
        lora: an adapter of the model before the fold, or with `back` of the model after it.
        undo: the fold's record.
        table: the parameters of the architecture, expanded.
        back: take the adapter back instead.

    Returns:
        The adapter that has the same effect on the other model. It is exact, with one exception:
        the way back gives 0 for a channel whose gain is 0, which the folded model cannot read.
    """
    transform = _transform_back if back else _transform_forth
    maps = {space: found.invert() for space, found in undo.maps.items()} if back else undo.maps
    return Lora({name: transform(f, table[name], maps, undo) for name, f in lora.factors.items()})


def _transform_forth(
    factors: Factors, param: Param, maps: Mapping[str, Map], undo: Undo
) -> Factors:
    A = factors.A * _absorbed_factor(factors.A, param, undo)
    A = transform_param(A.T, param.axes[1:], maps, param.gauge).T
    return Factors(transform_param(factors.B, param.axes[:1], maps, param.gauge), A)


def _transform_back(factors: Factors, param: Param, maps: Mapping[str, Map], undo: Undo) -> Factors:
    gain = _absorbed_factor(factors.A, param, undo)
    A = transform_param(factors.A.T, param.axes[1:], maps, param.gauge, back=True).T
    A = torch.where(gain != 0, A / torch.where(gain != 0, gain, 1.0), 0.0)
    return Factors(transform_param(factors.B, param.axes[:1], maps, param.gauge, back=True), A)


def _absorbed_factor(A: Tensor, param: Param, undo: Undo) -> Tensor:
    """Return the norm's factor that the fold put into this reader `[in]`; ones for the others."""
    if param.gain and param.gain in undo.gains:
        return undo.factor(param.gain)
    return torch.ones(A.shape[1], dtype=torch.float64)


def sum_loras(loras: Sequence[Lora], coefficients: Callable[[str], Sequence[float]]) -> Lora:
    """Return the adapter whose products are `Σ c_i B_i A_i`, exactly.

    The B are concatenated side by side, the A one below the other. `coefficients` gives those of a
    parameter; one whose coefficients are all 0 is left out.
    """
    factors: dict[str, Factors] = {}
    for name in dict.fromkeys(name for lora in loras for name in lora.factors):
        Bs, As = [], []
        for lora, c in zip(loras, coefficients(name), strict=True):
            if name in lora.factors and c != 0:
                Bs.append(c * lora.factors[name].B)
                As.append(lora.factors[name].A)
        if Bs:
            factors[name] = Factors(torch.cat(Bs, 1), torch.cat(As))
    return Lora(factors)


class RankError(NamedTuple):
    """Norm of the change that a lower rank loses, relative to the whole change."""

    overall: float
    worst: float
    """Of one parameter."""


def truncate_rank(lora: Lora, rank: int) -> tuple[Lora, RankError]:
    """Return the nearest adapter of a rank, and what it loses. (Eckart and Young, 1936.)

    With thin QRs `B = Q_B R_B` and `Aᵀ = Q_A R_A` the product is `Q_B (R_B R_Aᵀ) Q_Aᵀ`, so the SVD
    is of a matrix no larger than the present rank.
    """
    factors: dict[str, Factors] = {}
    worst = whole = lost = 0.0
    for name, (B, A) in lora.factors.items():
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        # Both factors get the root of the spectrum.
        root = S[:rank].sqrt()
        factors[name] = Factors(Q_B @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ Q_A.T)
        norm2, tail2 = float(S.square().sum()), float(S[rank:].square().sum())
        whole += norm2
        lost += tail2
        worst = max(worst, (tail2 / max(norm2, 1e-300)) ** 0.5)
    return Lora(factors), RankError((lost / max(whole, 1e-300)) ** 0.5, worst)


def write_lora(lora: Lora, out: StepOutput, base: str) -> None:
    """Commit the adapter in peft's format, float32; `base` is the reference of its model.

    peft knows one rank, so layers of a smaller one are filled up with zeros.
    """
    rank = max((len(factors.A) for factors in lora.factors.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in lora.factors.items():
        missing = rank - len(A)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        pad = torch.nn.functional.pad
        tensors[f"{key}.lora_A.weight"] = pad(A, (0, 0, 0, missing)).float()
        tensors[f"{key}.lora_B.weight"] = pad(B, (0, missing)).float()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.removesuffix(".weight") for name in lora.factors),
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    out.tensors(RunLayout.adapter(out.step, ADAPTER_WEIGHTS), tensors)
    out.json(RunLayout.adapter(out.step, ADAPTER_CONFIG), config)


def recorded_fold(step: str, out: StepOutput, weights: Weights) -> Undo:
    """Return the record of an exact step of this run.

    Raises:
        RecipeError: this run has no such step.
    """
    for record in reversed(out.ledger.steps):
        if record.id == step and isinstance(record.result, WeightsRef) and record.result.undo:
            return restore_undo(out.store.root / record.result.undo, weights)
    raise RecipeError(
        f'soups: replay_folds names "{step}", which is no exact fold that stands before this step; '
        "name the id of a basis-fold."
    )
