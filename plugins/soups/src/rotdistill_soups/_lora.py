"""LoRA adapters in peft's format: read with their products exact, carried through a change of basis and back, added up, written.

An adapter changes `W [out, in]` by `s B A`. Sums are of products, never of A and B by themselves: `(ΣB)(ΣA)` has cross terms. Through a
fold a reader's `A` becomes `A diag(gain) Q`, a writer's `B` becomes `Qᵀ B`, and likewise in the spaces of heads and neurons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Param
from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import UNDO, Undo, Weights, restore_undo
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.linalg.maps import transform_param
from rotdistill_core.store.output import StepOutput

ADAPTER = "adapter_config.json"
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "alpha_pattern": {}, "lora_bias": False,
         "trainable_token_indices": None, "layer_replication": None}  # fmt: skip
"""Keys of an adapter's config, and the value under which it is `W + s B A` and nothing else."""
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Lora:
    """An adapter: parameter -> `s B [out, r]` and `A [r, in]`, float64."""

    factors: Mapping[str, Factors]

    def rows(self, name: str, W: Tensor, a: int, b: int) -> Tensor:
        """Return rows [a, b) of `W + s B A` in float64, W being those rows `[b - a, in]`."""
        B, A = self.factors[name]
        return W.double() + B[a:b] @ A

    def on(self, weights: Weights) -> Weights:
        """Return a view with the adapter added, computed when read."""
        new = {}
        for name in self.factors:
            entry = weights.entries[name]
            new[name] = LazyTensor(
                entry.shape,
                torch.float64,
                lambda n=name, e=entry: self.rows(n, e.read(), 0, e.shape[0]),
            )  # type: ignore[misc]
        return weights.edit(new)


def read_lora(folder: Path, weights: Weights) -> Lora:
    """Read a peft folder for a model whose head is a tensor of its own where the adapter has something for it.

    Raises:
        SetupError: not a plain LoRA, or not one for this model.
    """
    about = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    odd = [key for key, plain in PLAIN.items() if about.get(key, plain) not in (plain, None)]
    if about.get("peft_type") != "LORA" or odd:
        what = f"{odd[0]} = {about[odd[0]]!r}" if odd else f"peft_type = {about.get('peft_type')!r}"
        raise SetupError(
            f"{folder}: its {ADAPTER} has {what}; only a plain LoRA, W + s B A on linear layers, can be merged."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise SetupError(
            f"{folder}: has no adapter_model.safetensors. Pickled adapters are not read; save it again with peft."
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, entry in open_tensors(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        name = f"{found[1]}.weight" if found else key
        if found is None or name not in weights.entries:
            raise SetupError(
                f"{folder}: its tensor {key} belongs to no linear layer of this {weights.config['model_type']} model."
            )
        halves.setdefault(name, {})[found[2]] = entry.read().double()
    factors: dict[str, Factors] = {}
    for name, half in halves.items():
        out, inner = weights.entries[name].shape
        A, B = half.get("A", torch.empty(0, 0)), half.get("B", torch.empty(0, 0))
        if A.shape[1:] != (inner,) or B.shape != (out, len(A)):
            shapes = f"A {list(A.shape)} and B {list(B.shape)}"
            raise SetupError(
                f"{folder}: {name} is {[out, inner]} in the student, which {shapes} do not fit: the adapter has another shape."
            )
        if not bool(torch.isfinite(A.sum() + B.sum())):
            raise SetupError(
                f"{folder}: its matrices for {name} hold NaN or Inf, and would spoil the soup; leave the adapter out."
            )
        scale = float(about["lora_alpha"]) / (len(A) ** 0.5 if about.get("use_rslora") else len(A))
        factors[name] = scale * B, A
    return Lora(factors)


def through(lora: Lora, undo: Undo, table: Mapping[str, Param], back: bool = False) -> Lora:
    """Return the adapter of the folded model that an adapter of the model before the fold is, or with `back` the reverse. Exact.

    Only where a gain is 0, so that the folded model cannot read a channel at all, does the way back give 0 for it.
    """
    maps = {space: found.invert() for space, found in undo.maps.items()} if back else undo.maps
    factors = {}
    for name, (B, A) in lora.factors.items():
        param = table[name]
        absorbed = undo.gains.get(param.gain or "")
        gain = (
            torch.ones(A.shape[1] if absorbed is None else len(absorbed), dtype=torch.float64)
            if absorbed is None
            else absorbed + undo.offset
        )
        A = A if back else A * gain
        A = transform_param(A.T, param.axes[1:], maps, param.gauge, back).T
        A = torch.where(gain != 0, A / torch.where(gain != 0, gain, 1.0), 0.0) if back else A
        factors[name] = transform_param(B, param.axes[:1], maps, param.gauge, back), A
    return Lora(factors)


def added(loras: Sequence[Lora], coefficients: Callable[[str], Sequence[float]]) -> Lora:
    """Return the adapter whose products are `Σ c_i B_i A_i`, exactly: B side by side, A on top of each other.

    `coefficients` gives those of a parameter; one whose coefficients are all 0 is left out.
    """
    factors: dict[str, Factors] = {}
    for name in dict.fromkeys(name for lora in loras for name in lora.factors):
        some = [
            (lora.factors[name], c)
            for lora, c in zip(loras, coefficients(name), strict=True)
            if name in lora.factors and c != 0
        ]
        if some:
            factors[name] = (
                torch.cat([c * B for (B, _), c in some], 1),
                torch.cat([A for (_, A), _ in some]),
            )
    return Lora(factors)


def refactored(lora: Lora, rank: int) -> tuple[Lora, dict[str, float]]:
    """Return the nearest adapter of a rank (Eckart and Young), and the share of the products' norm that it misses, over all and at worst.

    `B A = Q_B (R_B R_Aᵀ) Q_Aᵀ`, so the SVD is of a matrix as small as the rank that there is.
    """
    factors: dict[str, Factors] = {}
    missed: dict[str, float] = {}
    whole = lost = 0.0
    for name, (B, A) in lora.factors.items():
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        root = S[:rank].sqrt()
        factors[name] = Q_B @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ Q_A.T
        all2, tail2 = float(S.square().sum()), float(S[rank:].square().sum())
        whole, lost, missed[name] = whole + all2, lost + tail2, (tail2 / max(all2, 1e-300)) ** 0.5
    return Lora(factors), {
        "relative error": (lost / max(whole, 1e-300)) ** 0.5,
        "worst of a layer": max(missed.values(), default=0.0),
    }


def write_lora(lora: Lora, out: StepOutput, base: str) -> None:
    """Commit the adapter in peft's format, float32; layers of a smaller rank are filled up with zeros."""
    rank = max((len(A) for _, A in lora.factors.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in lora.factors.items():
        more, module = rank - len(A), name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(
            A, (0, 0, 0, more)
        ).float()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(
            B, (0, more)
        ).float()
    modules = sorted(name.removesuffix(".weight") for name in lora.factors)
    about: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": modules,
                             "base_model_name_or_path": base, "bias": "none", "lora_dropout": 0.0, "inference_mode": True}  # fmt: skip
    out.tensors(f"weights/{out.step}/adapter/adapter_model.safetensors", tensors)
    out.json(f"weights/{out.step}/adapter/{ADAPTER}", about)


def undo_of(step: str, out: StepOutput, weights: Weights) -> Undo:
    """Return how to take back an exact step of this run, which is also the way through it.

    Raises:
        RecipeError: this run has no such step.
    """
    for record in reversed(out.ledger.steps):
        if record.id == step:
            for file in record.files:
                if Path(file.path).name == UNDO:
                    return restore_undo(out.store.root / file.path, weights)
    raise RecipeError(
        f'soups: through names "{step}", which is no exact fold that stands before this step; name the id of a basis-fold.'
    )
