"""LoRA adapters in peft's format: read, carried through a fold and back, summed, and written.

An adapter changes `W [out, in]` by `s B A`. Sums are of products, never of A and B by themselves:
`(ΣB)(ΣA)` has cross terms that nobody trained. Through a fold a reader's `A` becomes `A diag(g) Q`,
a writer's `B` becomes `Qᵀ B`, and likewise in the spaces of heads and neurons.
(Hu et al., LoRA, arXiv:2106.09685.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Param
from rotdistill_core.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    ALL_LINEAR,
    AdapterConfig,
    read_adapter_config,
)
from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Undo, Weights
from rotdistill_core.errors import SetupError
from rotdistill_core.linalg.maps import Map, transform_param
from rotdistill_core.store.casts import cast_that_fits, is_finite
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of modules."""
MATRICES = re.compile(r"(?P<module>.+)\.lora_(?:(?P<half>[AB])\.weight|embedding_(?P<of>[AB]))")
"""Name of a matrix: `lora_A.weight` of a linear layer, `lora_embedding_A` of an embedding."""


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


@dataclass(frozen=True)
class _Module:
    """A module that a LoRA may change."""

    shape: tuple[int, int]
    """Of its weight `[out, in]`, or `[vocab, d]`."""
    parts: Mapping[str, tuple[int, int]]
    """Parameter of the table -> its rows [a, b) of the weight."""
    is_embedding: bool = False
    is_part: bool = False
    """transformers has it as rows of a fused module only."""


def read_lora(folder: Path, weights: Weights, originals: Sequence[Weights] = ()) -> Lora:
    """Read a peft folder for a model.

    Where the adapter changes the head or the embedding, the head must be a tensor of its own.
    Copies of base weights, which peft writes beside a LoRA of the head or the embedding, are
    compared with the model's and left out.

    Args:
        folder: of the adapter.
        weights: the model.
        originals: earlier states of the model, of which the copies may be as well.

    Raises:
        SetupError: not a plain LoRA, or not one for this model.
    """
    config = read_adapter_config(folder)
    modules = _modules(weights)
    halves = _halves(folder, weights, modules, originals)
    _require_targets(config, modules, halves)
    factors: dict[str, Factors] = {}
    for name, half in halves.items():
        module = modules[name]
        A, B = half.get("A", torch.empty(0, 0)), half.get("B", torch.empty(0, 0))
        if module.is_embedding:
            # peft's are `[r, vocab]` and `[d, r]`: the rows of the first belong to tokens.
            A, B = B.T, A.T
        _require_fitting(config, name, A, B, module.shape)
        B = config.scale_of(name) * B
        factors |= {part: Factors(B[a:b], A) for part, (a, b) in module.parts.items()}
    return Lora(factors)


def _modules(weights: Weights) -> dict[str, _Module]:
    """Return the linear layers and the embedding of a model, fused ones whole and in parts."""
    matrices = {name: e.shape for name, e in weights.entries.items() if len(e.shape) == 2}
    modules = {
        name: _Module(shape, {name: (0, shape[0])}, name == weights.adapter.embedding)
        for name, shape in matrices.items()
    }
    for whole, names in weights.adapter.parts(weights.config).items():
        if all(name in matrices for name in names):
            ends = list(accumulate(matrices[name][0] for name in names))
            rows = dict(zip(names, pairwise([0, *ends]), strict=True))
            modules[whole] = _Module((ends[-1], matrices[names[0]][1]), rows)
            modules |= {name: replace(modules[name], is_part=True) for name in names}
    return {name.removesuffix(".weight"): module for name, module in modules.items()}


def _halves(
    folder: Path,
    weights: Weights,
    modules: Mapping[str, _Module],
    originals: Sequence[Weights],
) -> dict[str, dict[str, Tensor]]:
    """Return module -> its matrices `A` and `B`, float64."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SetupError(
            f"{folder}: has no {ADAPTER_WEIGHTS}. Pickled adapters are not read; save it again "
            "with peft."
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, entry in open_tensors(folder / ADAPTER_WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise SetupError(
                f"{folder}: its tensor {key} does not begin with {PREFIX}, so peft would leave it "
                "out. Save the adapter with peft, or rename its tensors."
            )
        match = MATRICES.fullmatch(name)
        if match is None:
            _require_copy_of_base(folder, key, entry, [weights, *originals])
            continue
        module, half = match["module"], match["half"] or match["of"]
        found = halves.setdefault(module, {})
        known = module in modules and modules[module].is_embedding == bool(match["of"])
        if not known or half in found:
            what = "embedding" if match["of"] else "linear layer"
            raise SetupError(
                f"{folder}: its tensor {key} belongs to no {what} of this "
                f"{weights.config['model_type']} model."
            )
        found[half] = entry.read().double()
    return halves


def _require_copy_of_base(
    folder: Path, key: str, copy: LazyTensor, bases: Sequence[Weights]
) -> None:
    """Refuse a tensor that is neither a LoRA's nor equal to the model's own."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    own = [found for found in (_own_tensor(base, name) for base in bases) if found is not None]
    if not own:
        raise SetupError(
            f"{folder}: its tensor {key} belongs to no linear layer of this "
            f"{bases[0].config['model_type']} model."
        )
    if not any(_equal_when_rounded(copy.read(), base) for base in own):
        raise SetupError(
            f"{folder}: its tensor {key} is not the model's {name}: the adapter was trained on "
            "another model, or with another vocabulary, or that tensor was trained too. Merge it "
            "with peft into its own base, and name the merged model in its place."
        )


def _own_tensor(base: Weights, name: str) -> Tensor | None:
    if name == base.adapter.head:
        return base.head()
    return base[name] if name in base.entries else None


def _equal_when_rounded(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are equal in the narrower of their dtypes."""
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    return one.shape == two.shape and torch.equal(one.to(narrow), two.to(narrow))


def _require_targets(
    config: AdapterConfig, modules: Mapping[str, _Module], halves: Mapping[str, object]
) -> None:
    """Compare the modules that the config names with those that have matrices."""
    for name in halves:
        if not config.is_target(name):
            raise SetupError(
                f"{config.folder}: has matrices for {name}, which target_modules, exclude_modules "
                f"or layers_to_transform of its {ADAPTER_CONFIG} leave out, so peft would not use "
                "them. Correct the config, or save the adapter again."
            )
    if config.targets in (None, ALL_LINEAR):
        return
    for name, module in modules.items():
        if not module.is_part and config.is_target(name) and name not in halves:
            raise SetupError(
                f"{config.folder}: its {ADAPTER_CONFIG} names {name} among its targets, and "
                f"{ADAPTER_WEIGHTS} has no matrices for it: the file is not whole, or the adapter "
                "belongs to a smaller model."
            )


def _require_fitting(
    config: AdapterConfig, name: str, A: Tensor, B: Tensor, shape: tuple[int, int]
) -> None:
    out, inner = shape
    if A.shape[1:] != (inner,) or B.shape != (out, len(A)):
        raise SetupError(
            f"{config.folder}: {name}.weight is {[out, inner]} in the model, which A "
            f"{list(A.shape)} and B {list(B.shape)} do not fit: the adapter has another shape."
        )
    if len(A) != config.rank_of(name):
        raise SetupError(
            f"{config.folder}: its matrices for {name} have rank {len(A)}, and r or rank_pattern "
            f"of its {ADAPTER_CONFIG} say {config.rank_of(name)}: the scale alpha / r is not "
            "known. Correct the config."
        )
    if not (is_finite(A) and is_finite(B)):
        raise SetupError(
            f"{config.folder}: its matrices for {name}.weight hold NaN or Inf, and would spoil the "
            "weights; leave the adapter out."
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


def write_lora(
    lora: Lora,
    out: StepOutput,
    weights: Weights,
    base: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Commit the adapter in peft's format for the modules that transformers has.

    peft knows one rank, so layers of a smaller one are filled up with zeros.

    Args:
        lora: the adapter.
        out: the step's output.
        weights: the model that it belongs to.
        base: reference of that model; empty where it is no model of its own.
        dtype: dtype of the matrices.

    Raises:
        CheckFailed: a number does not fit the dtype.
    """
    whole = _with_fused_modules(lora.factors, weights)
    rank = max((len(factors.A) for factors in whole.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in whole.items():
        missing = rank - len(A)
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        pad = torch.nn.functional.pad
        A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
        halves = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        if name == weights.adapter.embedding:
            halves = {f"{module}.lora_embedding_A": B.T, f"{module}.lora_embedding_B": A.T}
        tensors |= {key: cast_that_fits(X, dtype, key) for key, X in halves.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.removesuffix(".weight") for name in whole),
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    out.tensors(RunLayout.adapter(out.step, ADAPTER_WEIGHTS), tensors)
    out.json(RunLayout.adapter(out.step, ADAPTER_CONFIG), config)


def _with_fused_modules(factors: Mapping[str, Factors], weights: Weights) -> dict[str, Factors]:
    """Return the factors with those of the parts of a fused tensor put together.

    Parts of one A have their B one below the other. Otherwise the B stand block-diagonally above
    each other and the A one below the other, with the sum of the ranks.
    """
    whole = dict(factors)
    for name, parts in weights.adapter.parts(weights.config).items():
        found = {part: whole.pop(part) for part in parts if part in whole}
        if not found:
            continue
        first = next(iter(found.values()))
        rows = {part: weights.entries[part].shape[0] for part in parts}
        if all(torch.equal(each.A, first.A) for each in found.values()):
            none = {part: first.B.new_zeros(rows[part], len(first.A)) for part in parts}
            B = torch.cat([found[part].B if part in found else none[part] for part in parts])
            whole[name] = Factors(B, first.A)
        else:
            blocks = [
                found[part].B if part in found else first.B.new_zeros(rows[part], 0)
                for part in parts
            ]
            A = torch.cat([found[part].A for part in parts if part in found])
            whole[name] = Factors(_block_diagonal(blocks), A)
    return whole


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Return blocks `[n_i, r_i]` one below the other, each in columns of its own."""
    width = sum(block.shape[1] for block in blocks)
    rows, start = [], 0
    for block in blocks:
        rows.append(torch.nn.functional.pad(block, (start, width - start - block.shape[1])))
        start += block.shape[1]
    return torch.cat(rows)
