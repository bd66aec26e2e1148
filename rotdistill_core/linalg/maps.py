"""Maps between spaces, and the one function that takes a parameter through them.

Rows are activations, so a map acts as `X' = X Q`. A reader `W [out, in]` of that space becomes
`W Q`, a writer becomes `Qᵀ W`, a bias becomes `b Q`. For an orthogonal Q all three contract the
parameter's axis with Q. That is why one function folds any architecture.
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

from rotdistill_core.architecture.spaces import (
    RESIDUAL,
    is_dual,
    is_residual,
    layer_of,
    primal,
    residual,
)
from rotdistill_core.errors import CheckFailed
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text


@dataclass(frozen=True)
class Rotation:
    """`X' = X R` with `R [d, e]`, d <= e and `R Rᵀ = I`; square ones can be folded exactly.

    `scale` is the least-squares factor `tr(Rᵀ M) / ‖X‖²`. Targets and diagnostics use it; a fold
    never applies it.
    """

    matrix: Tensor
    scale: float = 1.0

    @property
    def square(self) -> bool:
        """Whether it is a change of basis of one space."""
        return self.matrix.shape[0] == self.matrix.shape[1]

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Contract one axis of `tensor` with the matrix."""
        contracted = torch.tensordot(tensor, self.matrix.to(tensor), dims=([axis], [0]))
        return torch.movedim(contracted, -1, axis)

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
        """Check that `R Rᵀ = I` and, when rectangular, that `Rᵀ R` is a projector of rank d.

        Raises:
            CheckFailed: it is off by more than `tolerance`; the message starts with `where`.
        """
        worst = self.error()
        if not self.square:
            R = self.matrix.double()
            P = R.T @ R
            off_projector = float((P @ P - P).abs().max())
            off_rank = abs(float(P.trace()) - len(R)) / len(R)
            worst = max(worst, off_projector, off_rank)
        # A worst of NaN must fail too, so the comparison is not turned round.
        if not worst <= tolerance:
            raise CheckFailed(
                f"{where}: the rotation is off orthogonal by {worst:.2e}, "
                f"more than {tolerance:.0e}."
            )


@dataclass(frozen=True)
class Permutation:
    """`X' = X[:, index]`: the new coordinate j is the old `index[j]`, or zero where that is -1.

    Bijections can be folded. An assignment between spaces of different sizes serves blending only.
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
        if self.square:
            return moved
        gaps = (self.index < 0).nonzero().flatten()
        return moved.index_fill(axis, gaps, 0)

    def invert(self) -> Permutation:
        """Return the permutation back."""
        back = self.index.new_full((self.size or len(self.index),), -1)
        assigned = self.index >= 0
        back[self.index[assigned]] = assigned.nonzero().flatten()
        return Permutation(back, None if self.square else len(self.index))

    def then(self, other: Permutation) -> Permutation:
        """Return this map followed by `other`."""
        size = None if self.square and other.square else self.size or len(self.index)
        return Permutation(torch.where(other.index < 0, -1, self.index[other.index]), size)

    def blocks(self, width: int) -> Permutation:
        """Return the same on blocks of `width` coordinates, as whole heads move."""
        index = self.index[:, None] * width + torch.arange(width)
        index = torch.where(self.index[:, None] < 0, -1, index)
        return Permutation(index.flatten(), self.size and self.size * width)

    def verify(self, tolerance: float, where: str) -> None:
        """Check that no coordinate is taken twice and, in a bijection, that none is missing.

        Args:
            tolerance: part of the interface that all maps share; an index is right or wrong.
            where: names the place in errors.

        Raises:
            CheckFailed: it is no bijection.
        """
        taken = [k for k in self.index.tolist() if self.square or k >= 0]
        if len(set(taken)) < len(taken) or not set(taken) <= set(range(self.size or len(taken))):
            raise CheckFailed(
                f"{where}: the permutation is not a bijection (tolerance {tolerance})."
            )


@dataclass(frozen=True)
class Gauge:
    """`X' = X G` with `blocks [n, k, k]` on the diagonal of G: any invertible matrices.

    There is one block per head or neuron. The parameter that produces the space contracts with G,
    the one that consumes it with the dual `G^-T`, so their product stays. An axis longer than `n k`
    holds each block several times in a row, as the query heads of one key/value head do.
    """

    blocks: Tensor
    square = True

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Contract one axis of `tensor` with the blocks."""
        n, k, _ = self.blocks.shape
        last = tensor.movedim(axis, -1)
        split = last.reshape(*last.shape[:-1], n, -1, k)
        contracted = torch.einsum("...nrk,nkl->...nrl", split, self.blocks.to(tensor))
        return contracted.flatten(-3).movedim(-1, axis)

    def dual(self) -> Gauge:
        """Return `G^-T`, the map of the parameter that consumes the space."""
        return Gauge(torch.linalg.inv(self.blocks.double()).mT)

    def invert(self) -> Gauge:
        """Return the map back."""
        return Gauge(self.dual().blocks.mT)

    def then(self, other: Gauge) -> Gauge:
        """Return this map followed by `other`."""
        return Gauge(self.blocks @ other.blocks)

    def verify(self, tolerance: float, where: str) -> None:
        """Check that every block has an inverse.

        Raises:
            CheckFailed: a block times its inverse is off the identity by more than `tolerance`.
        """
        G = self.blocks.double()
        # LAPACK must not see Inf or NaN. With G in its place such a gauge fails the comparison.
        inverse = torch.linalg.inv_ex(G)[0] if bool(G.isfinite().all()) else G
        worst = float((G @ inverse - torch.eye(G.shape[-1], dtype=G.dtype)).abs().max())
        if not worst <= tolerance:
            raise CheckFailed(
                f"{where}: a block of the gauge has no inverse "
                f"(off by {worst:.2e}, more than {tolerance:.0e})."
            )


Map = Rotation | Permutation | Gauge
MAP_KINDS: Mapping[str, type[Map]] = {
    kind.__name__: kind for kind in (Rotation, Permutation, Gauge)
}


@dataclass(frozen=True)
class Maps(Mapping[str, Map]):
    """The result of alignment: space -> map, with diagnostics.

    `residual.l` maps the student's stream at layer boundary l onto the teacher's.
    """

    by_space: Mapping[str, Map] = field(default_factory=dict)
    diagnostics: Mapping[int, LayerDiagnostics] = field(default_factory=dict)
    """Layer boundary -> the figures that aligners measured there."""

    def __getitem__(self, space: str) -> Map:
        return self.by_space[space]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_space)

    def __len__(self) -> int:
        return len(self.by_space)

    def rotation(self, boundary: int) -> Rotation | None:
        """Return the residual map at a layer boundary, if there is one."""
        rotation = self.by_space.get(residual(boundary))
        return rotation if isinstance(rotation, Rotation) else None

    def tied(self) -> Rotation | None:
        """Return the one residual map that all boundaries share, or None."""
        rotations = [
            space_map
            for space, space_map in self.by_space.items()
            if is_residual(space) and isinstance(space_map, Rotation)
        ]
        if not rotations:
            return None
        first = rotations[0]
        shared = all(
            R.matrix is first.matrix or torch.equal(R.matrix, first.matrix) for R in rotations
        )
        return first if shared else None

    def inside_layers(self) -> dict[str, Map]:
        """Return the maps of heads, neurons and gauges: all but those of the residual stream."""
        return {space: self.by_space[space] for space in self if not is_residual(space)}

    def add(self, maps: Mapping[str, Map], diagnostics: Mapping[int, LayerDiagnostics]) -> Maps:
        """Return these maps and more. New diagnostics of a layer override its old ones by field."""
        merged = dict(self.diagnostics)
        for layer, measured in diagnostics.items():
            merged[layer] = merged[layer].merge(measured) if layer in merged else measured
        return Maps({**self.by_space, **maps}, merged)


def transform_param(
    tensor: Tensor,
    axes: tuple[str, ...],
    maps: Mapping[str, Map],
    gauge: str = "",
    back: bool = False,
) -> Tensor:
    """Take one parameter into the new bases of the spaces that its axes live in.

    A query projection `W [q, d]` with axes `("q.0", "residual")` becomes `P W Q`: rows reordered by
    the map of `q.0`, columns contracted with that of `residual`.

    Args:
        tensor: the parameter, float64.
        axes: the space of each axis.
        maps: space or gauge -> map. Spaces without a map stay.
        gauge: applied after the map of the axis outside the stream; its dual if marked with `*`.
        back: `maps` are inverses; apply the gauge before the map of its space.

    Returns:
        The parameter in the new bases, float64.
    """
    for axis, space in enumerate(axes):
        chain = [space, "" if space == RESIDUAL else gauge]
        for name in reversed(chain) if back else chain:
            space_map = maps.get(primal(name))
            if space_map is None:
                continue
            if isinstance(space_map, Gauge) and is_dual(name):
                space_map = space_map.dual()
            tensor = space_map.apply(tensor, axis)
    return tensor


def tensor_of(space_map: Map) -> Tensor:
    """Return the tensor that is the map: matrix, index or blocks."""
    tensor: Tensor = getattr(space_map, fields(space_map)[0].name)
    return tensor


def map_of(tensor: Tensor) -> Map:
    """Return the foldable map that a tensor is: an index `[d]`, a matrix or blocks `[n, k, k]`."""
    return (Permutation, Rotation, Gauge)[tensor.ndim - 1](tensor)


def store_maps(maps: Maps, out: StepOutput) -> dict[str, Any]:
    """Commit maps and diagnostics, and return what `restore_maps` needs, as JSON values.

    Each boundary gets a safetensors file with its map and a JSON document with its figures, under
    `rotations/<run>/`. A tensor that several spaces share is stored once.
    """
    spaces: dict[str, Any] = {}
    path_of_tensor: dict[int, str] = {}
    for space, space_map in maps.items():
        tensor = tensor_of(space_map)
        if id(tensor) not in path_of_tensor:
            file = RunLayout.rotation(out.run_id, _file_name(space))
            path = out.tensors(file, {"map": tensor})
            path_of_tensor[id(tensor)] = out.relative(path)
        other_fields = {f.name: getattr(space_map, f.name) for f in fields(space_map)[1:]}
        spaces[space] = {
            "file": path_of_tensor[id(tensor)],
            "kind": type(space_map).__name__,
            **other_fields,
        }
    documents: dict[str, str] = {}
    for layer, figures in maps.diagnostics.items():
        file = RunLayout.diagnostics(out.run_id, layer)
        path = out.json(file, {**figures.as_dict(), "map": spaces.get(residual(layer))})
        documents[str(layer)] = out.relative(path)
    return {"spaces": spaces, "cards": documents}


def _file_name(space: str) -> str:
    """Return the name of a map's file, without its ending: `layer_3`, `neurons_3`."""
    return f"layer_{layer_of(space)}" if is_residual(space) else space.replace(".", "_")


def restore_maps(info: Mapping[str, Any], root: Path) -> Maps:
    """Return the maps that `store_maps` described; `root` is the folder of runs."""
    tensors: dict[str, Tensor] = {}
    by_space: dict[str, Map] = {}
    for space, record in info["spaces"].items():
        file = record["file"]
        if file not in tensors:
            with safe_open(root / file, "pt") as handle:
                tensors[file] = handle.get_tensor("map").clone()
        other_fields = {k: value for k, value in record.items() if k not in ("file", "kind")}
        by_space[space] = MAP_KINDS[record["kind"]](tensors[file], **other_fields)
    diagnostics: dict[int, LayerDiagnostics] = {}
    for layer, file in info["cards"].items():
        document = json.loads(read_text(root / file))
        document.pop("map", None)  # repeated there for readers of the file; `spaces` has it
        diagnostics[int(layer)] = LayerDiagnostics.from_dict(document)
    return Maps(by_space, diagnostics)
