"""Maps between spaces, and the one function that carries a parameter through them.

Rows are activations, so a map acts as `X' = X Q`. A reader `W [out, in]` of that space becomes `W Q`, a writer `Qᵀ W`, a bias
`b Q`: for an orthogonal Q all three contract the parameter's axis with Q, which is why one function folds any architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rotdistill_core.errors import CheckFailed
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.store.output import StepOutput


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

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Contract one axis of `tensor` with the matrix."""
        return torch.movedim(
            torch.tensordot(tensor, self.matrix.to(tensor), dims=([axis], [0])), -1, axis
        )

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
            worst = max(
                worst, float((P @ P - P).abs().max()), abs(float(P.trace()) - len(R)) / len(R)
            )
        if not worst <= tolerance:
            raise CheckFailed(
                f"{where}: the rotation is off orthogonal by {worst:.2e}, more than {tolerance:.0e}."
            )


@dataclass(frozen=True)
class Permutation:
    """`X' = X[:, index]`: the new coordinate j is the old coordinate `index[j]`, or zero where that is -1.

    Bijections can be folded. An assignment between spaces of different sizes is a record for blending.
    """

    index: Tensor
    size: int | None = None
    """Coordinates of the old space, for an assignment that is no bijection."""

    @property
    def square(self) -> bool:
        """Whether it is a change of basis of one space."""
        return self.size is None

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Reorder one axis of `tensor`."""
        moved = tensor.index_select(axis, self.index.clamp_min(0))
        return (
            moved
            if self.square
            else moved.index_fill(axis, (self.index < 0).nonzero().flatten(), 0)
        )

    def invert(self) -> Permutation:
        """Return the permutation back."""
        back = self.index.new_full((self.size or len(self.index),), -1)
        taken = self.index >= 0
        back[self.index[taken]] = taken.nonzero().flatten()
        return Permutation(back, None if self.square else len(self.index))

    def then(self, other: Permutation) -> Permutation:
        """Return this map followed by `other`."""
        size = None if self.square and other.square else self.size or len(self.index)
        return Permutation(torch.where(other.index < 0, -1, self.index[other.index]), size)

    def blocks(self, width: int) -> Permutation:
        """Return the same on blocks of `width` coordinates, as whole heads move."""
        index = self.index[:, None] * width + torch.arange(width)
        return Permutation(
            torch.where(self.index[:, None] < 0, -1, index).flatten(),
            self.size and self.size * width,
        )

    def verify(self, tolerance: float, where: str) -> None:
        """Raise CheckFailed unless no coordinate is taken twice and all are there. (`tolerance` is there for the common interface.)"""
        taken = [k for k in self.index.tolist() if self.square or k >= 0]
        if len(set(taken)) < len(taken) or not set(taken) <= set(range(self.size or len(taken))):
            raise CheckFailed(
                f"{where}: the permutation is not a bijection (tolerance {tolerance})."
            )


@dataclass(frozen=True)
class Gauge:
    """`X' = X G` with `blocks [n, k, k]` on the diagonal of G, one per head or neuron: any invertible matrices.

    What produces the space contracts with G and what consumes it with the dual `G^-T`, so that their product stays. An axis that
    is longer than `n k` holds each block several times in a row, as the query heads of one key/value head do.
    """

    blocks: Tensor
    square = True

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Contract one axis of `tensor` with the blocks."""
        n, k, _ = self.blocks.shape
        last = tensor.movedim(axis, -1)
        split = last.reshape(*last.shape[:-1], n, -1, k)
        return (
            torch.einsum("...nrk,nkl->...nrl", split, self.blocks.to(tensor))
            .flatten(-3)
            .movedim(-1, axis)
        )

    def dual(self) -> Gauge:
        """Return the map of what consumes the space."""
        return Gauge(torch.linalg.inv(self.blocks.double()).mT)

    def invert(self) -> Gauge:
        """Return the map back."""
        return Gauge(self.dual().blocks.mT)

    def then(self, other: Gauge) -> Gauge:
        """Return this map followed by `other`."""
        return Gauge(self.blocks @ other.blocks)

    def verify(self, tolerance: float, where: str) -> None:
        """Raise CheckFailed unless every block has an inverse, within tolerance."""
        G = self.blocks.double()
        inverse, _ = torch.linalg.inv_ex(G) if bool(G.isfinite().all()) else (G, None)
        worst = float((G @ inverse - torch.eye(G.shape[-1], dtype=G.dtype)).abs().max())
        if not worst <= tolerance:
            raise CheckFailed(
                f"{where}: a block of the gauge has no inverse (off by {worst:.2e}, more than {tolerance:.0e})."
            )


Map = Rotation | Permutation | Gauge
MAP_KINDS: Mapping[str, type[Map]] = {
    kind.__name__: kind for kind in (Rotation, Permutation, Gauge)
}


@dataclass(frozen=True)
class Maps(Mapping[str, Map]):
    """What alignment found: space -> map. Residual maps carry the student's stream at boundary l onto the teacher's (`residual.l`)."""

    found: Mapping[str, Map] = field(default_factory=dict)
    diagnostics: Mapping[int, LayerDiagnostics] = field(default_factory=dict)
    """Layer boundary -> what aligners measured there."""

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
        maps = [
            m
            for space, m in self.found.items()
            if space.startswith("residual.") and isinstance(m, Rotation)
        ]
        same = maps and all(
            m.matrix is maps[0].matrix or torch.equal(m.matrix, maps[0].matrix) for m in maps
        )
        return maps[0] if same else None

    def add(self, found: Mapping[str, Map], diagnostics: Mapping[int, LayerDiagnostics]) -> Maps:
        """Return these maps and more."""
        merged = dict(self.diagnostics)
        for layer, measured in diagnostics.items():
            merged[layer] = merged[layer].merge(measured) if layer in merged else measured
        return Maps({**self.found, **found}, merged)


def transform_param(
    tensor: Tensor,
    axes: tuple[str, ...],
    maps: Mapping[str, Map],
    gauge: str = "",
    back: bool = False,
) -> Tensor:
    """Carry one parameter into the new bases of the spaces that its axes live in (float64 in, float64 out).

    `gauge` follows the space that is not the residual stream, its dual where the name ends in `*`; `back` takes inverses in reverse.
    """
    for axis, space in enumerate(axes):
        chain = [space, gauge if space != "residual" else ""]
        for name in reversed(chain) if back else chain:
            found = maps.get(name.removesuffix("*"))
            if found is not None:
                tensor = (
                    found.dual() if isinstance(found, Gauge) and name.endswith("*") else found
                ).apply(tensor, axis)
    return tensor


def tensor_of(found: Map) -> Tensor:
    """Return the tensor that is the map."""
    tensor: Tensor = getattr(found, fields(found)[0].name)
    return tensor


def map_of(tensor: Tensor) -> Map:
    """Return the foldable map that `tensor` is: an index, a matrix, or blocks."""
    return (Permutation, Rotation, Gauge)[tensor.ndim - 1](tensor)


def store_maps(maps: Maps, out: StepOutput) -> dict[str, Any]:
    """Commit maps: one JSON card and one safetensors file per boundary under `rotations/<run>/`, a tied matrix only once."""
    spaces: dict[str, Any] = {}
    first: dict[int, str] = {}
    for space, found in maps.items():
        tensor = tensor_of(found)
        if id(tensor) not in first:
            name = (
                f"layer_{space.rpartition('.')[2]}"
                if space.startswith("residual.")
                else space.replace(".", "_")
            )
            path = out.tensors(f"rotations/{out.run_id}/{name}.safetensors", {"map": tensor})
            first[id(tensor)] = path.relative_to(out.store.root).as_posix()
        rest = {f.name: getattr(found, f.name) for f in fields(found)[1:]}
        spaces[space] = {"file": first[id(tensor)], "kind": type(found).__name__, **rest}
    diagnostics = {}
    for layer, card in maps.diagnostics.items():
        path = out.json(
            f"rotations/{out.run_id}/layer_{layer}.json",
            {**card.as_dict(), "map": spaces.get(f"residual.{layer}")},
        )
        diagnostics[str(layer)] = path.relative_to(out.store.root).as_posix()
    return {"spaces": spaces, "cards": diagnostics}


def restore_maps(info: Mapping[str, Any], root: Path) -> Maps:
    """Return the maps that `store_maps` described."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, Map] = {}
    for space, about in info["spaces"].items():
        if about["file"] not in tensors:
            with safe_open(root / about["file"], "pt") as handle:
                tensors[about["file"]] = handle.get_tensor("map").clone()
        rest = {key: value for key, value in about.items() if key not in ("file", "kind")}
        found[space] = MAP_KINDS[about["kind"]](tensors[about["file"]], **rest)
    diagnostics = {
        int(k): LayerDiagnostics.from_dict(json.loads((root / path).read_text(encoding="utf-8")))
        for k, path in info["cards"].items()
    }
    return Maps(found, diagnostics)
