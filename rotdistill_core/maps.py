"""Maps between spaces, and the one function that carries a parameter through them.

Rows are activations, so a map acts as `X' = X Q`. A reader `W [out, in]` of that space becomes `W Q`, a writer `Qᵀ W`, a bias
`b Q`: for an orthogonal Q all three contract the parameter's axis with Q, which is why one function folds any architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rotdistill_core.errors import CheckFailed
from rotdistill_core.ledger import Out


@dataclass(frozen=True)
class Rotation:
    """`X' = X R` with `R [d, e]`, d <= e and `R Rᵀ = I`; square ones can be folded exactly.

    `scale` is the least-squares factor `tr S / ‖X‖²`; it belongs to targets and diagnostics, a fold never applies it.
    """

    matrix: Tensor
    scale: float = 1.0

    @property
    def square(self) -> bool:
        """Whether it is a change of basis of one space."""
        return self.matrix.shape[0] == self.matrix.shape[1]

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """Contract one axis of `tensor` with the matrix."""
        return torch.movedim(torch.tensordot(tensor, self.matrix.to(tensor), dims=([axis], [0])), -1, axis)

    def invert(self) -> Rotation:
        """Return the map back (on the image, when rectangular)."""
        return Rotation(self.matrix.T, 1.0 / self.scale)

    def then(self, other: Rotation) -> Rotation:
        """Return this map followed by `other`."""
        return Rotation(self.matrix @ other.matrix, self.scale * other.scale)

    def error(self) -> float:
        """Return `max |R Rᵀ - I|`."""
        R = self.matrix.double()
        return float((R @ R.T - torch.eye(len(R), dtype=R.dtype)).abs().max())

    def verify(self, tolerance: float, where: str) -> None:
        """Raise CheckFailed unless `R Rᵀ = I` (and, when rectangular, `RᵀR` is a projector of rank d) within tolerance."""
        worst = self.error()
        if not self.square:
            P = (R := self.matrix.double()).T @ R
            worst = max(worst, float((P @ P - P).abs().max()), abs(float(P.trace()) - len(R)) / len(R))
        if not worst <= tolerance:
            raise CheckFailed(f"{where}: the rotation is off orthogonal by {worst:.2e}, more than {tolerance:.0e}.")


@dataclass(frozen=True)
class Permutation:
    """`X' = X[:, index]`: the new coordinate j is the old coordinate `index[j]`."""

    index: Tensor

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """Reorder one axis of `tensor`."""
        return tensor.index_select(axis, self.index)

    def invert(self) -> Permutation:
        """Return the permutation back."""
        return Permutation(torch.argsort(self.index))

    def then(self, other: Permutation) -> Permutation:
        """Return this map followed by `other`."""
        return Permutation(self.index[other.index])

    def verify(self, tolerance: float, where: str) -> None:
        """Raise CheckFailed unless the index is a bijection. (`tolerance` is there for the common interface.)"""
        if not torch.equal(torch.sort(self.index).values, torch.arange(len(self.index))):
            raise CheckFailed(f"{where}: the permutation is not a bijection (tolerance {tolerance}).")


Map = Rotation | Permutation


@dataclass(frozen=True)
class Maps(Mapping[str, Map]):
    """What alignment found: space -> map. Residual maps carry the student's stream at boundary l onto the teacher's (`residual.l`)."""

    found: Mapping[str, Map] = field(default_factory=dict)
    cards: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Per boundary: spectrum, stage, cosines before and after with their nulls, orthogonality."""

    def __getitem__(self, space: str) -> Map:
        return self.found[space]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def rotation(self, boundary: int) -> Rotation | None:
        """Return the residual map at a layer boundary, if there is one."""
        found = self.found.get(f"residual.{boundary}")
        return found if isinstance(found, Rotation) else None

    def tied(self) -> Rotation | None:
        """Return the one residual map that all boundaries share, or None."""
        maps = [m for space, m in self.found.items() if space.startswith("residual.") and isinstance(m, Rotation)]
        same = maps and all(m.matrix is maps[0].matrix or torch.equal(m.matrix, maps[0].matrix) for m in maps)
        return maps[0] if same else None

    def add(self, found: Mapping[str, Map], cards: Mapping[int, Mapping[str, Any]]) -> Maps:
        """Return these maps and more."""
        merged = {i: {**self.cards.get(i, {}), **cards.get(i, {})} for i in {*self.cards, *cards}}
        return Maps({**self.found, **found}, merged)


def carry(tensor: Tensor, axes: tuple[str, ...], maps: Mapping[str, Map]) -> Tensor:
    """Carry one parameter into the new bases of the spaces that its axes live in (float64 in, float64 out)."""
    for axis, space in enumerate(axes):
        if space in maps:
            tensor = maps[space].along(tensor, axis)
    return tensor


def store_maps(maps: Maps, out: Out) -> dict[str, Any]:
    """Commit maps: one JSON card and one safetensors file per boundary under `rotations/<run>/`, a tied matrix only once."""
    spaces: dict[str, Any] = {}
    first: dict[int, str] = {}
    for space, found in maps.items():
        matrix = found.matrix if isinstance(found, Rotation) else found.index
        if id(matrix) not in first:
            name = f"layer_{space.rpartition('.')[2]}" if space.startswith("residual.") else space.replace(".", "_")
            path = out.tensors(f"rotations/{out.run_id}/{name}.safetensors", {"map": matrix})
            first[id(matrix)] = path.relative_to(out.store.root).as_posix()
        scale = found.scale if isinstance(found, Rotation) else None
        spaces[space] = {"file": first[id(matrix)], "kind": type(found).__name__, "scale": scale}
    cards = {}
    for layer, card in maps.cards.items():
        path = out.json(f"rotations/{out.run_id}/layer_{layer}.json", {**card, "map": spaces.get(f"residual.{layer}")})
        cards[str(layer)] = path.relative_to(out.store.root).as_posix()
    return {"spaces": spaces, "cards": cards}


def restore_maps(info: Mapping[str, Any], root: Path) -> Maps:
    """Return the maps that `store_maps` described."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, Map] = {}
    for space, about in info["spaces"].items():
        if about["file"] not in tensors:
            with safe_open(root / about["file"], "pt") as handle:
                tensors[about["file"]] = handle.get_tensor("map").clone()
        tensor = tensors[about["file"]]
        found[space] = Rotation(tensor, about["scale"]) if about["kind"] == "Rotation" else Permutation(tensor)
    cards = {int(k): json.loads((root / path).read_text(encoding="utf-8")) for k, path in info["cards"].items()}
    return Maps(found, cards)
