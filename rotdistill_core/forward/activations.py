"""Captured activations: the residual stream of each model at every layer boundary.

Rows lie in safetensors shards, one for each side and boundary, each with a JSON sidecar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Side
from rotdistill_core.linalg.precision import sum_device
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text

MASSIVE = 8.0
"""A row of massive activations has an RMS above this multiple of the median row's."""
CHUNK_ROWS = 4096
"""Rows that are widened to float64 at a time."""


@dataclass(frozen=True)
class ActivationStore:
    """Shards by side and boundary. Their rows are the rows of the side's packed texts."""

    root: Path
    """The folder of runs; shards are named relative to it."""
    shards: Mapping[str, tuple[str, ...]]
    """Side -> shard of each boundary 0..L.

    Where the two read different tokens (two tokenizers, or a system prompt that only the teacher
    reads) there are `Side.SPANS` too: for each of the student's rows the teacher's rows
    [start, end) that it is paired with, `[rows, 2]`. The span of an unpaired row is empty.
    """
    layouts: Mapping[str, PackedTexts]
    """Side -> the texts whose rows its shards hold."""
    depths: tuple[int, ...] = ()
    """For each captured student boundary, its boundary in the original student."""
    teacher_boundaries: tuple[int, ...] = ()
    """For each boundary of the original student, the teacher's boundary matched with it."""

    def rows(self, side: str, boundary: int) -> Tensor:
        """Return one side's raw stream `[rows, d]` at a boundary (0: embeddings), memory-mapped."""
        return open_tensors(self.root / self.shards[side][boundary])["rows"].read()

    def width(self, side: str) -> int:
        """Return the width of one side's stream when it was captured, from a shard's header."""
        return open_tensors(self.root / self.shards[side][0])["rows"].shape[1]

    def teacher_states(self, layout: PackedTexts, depth: int) -> Tensor:
        """Return the teacher's raw stream at the depth matched with a boundary of the student.

        Args:
            layout: texts as the student reads them.
            depth: a boundary of the original student.

        Returns:
            A row for each row of `layout`, `[rows, d_t]`.
        """
        return self.teacher_rows(layout, self.teacher_boundaries[depth])

    def teacher_rows(self, layout: PackedTexts, boundary: int) -> Tensor:
        """Return the teacher's stream at one of its boundaries, for rows of the student's texts.

        Where the two read different tokens, a row is the mean over the span of teacher tokens
        paired with it; an unpaired row is the teacher's row 0, see `paired_mask`.
        """
        T = self.rows(Side.TEACHER, boundary)
        if Side.SPANS not in self.shards:
            return T[layout.row_indices_in(self.layouts[Side.TEACHER])]
        start, end = self._spans(layout).T
        end = torch.maximum(end, start + 1)
        spans = zip(start.tolist(), end.tolist(), strict=True)
        rows = torch.cat([torch.arange(first, last) for first, last in spans])
        return torch.segment_reduce(T[rows], "mean", lengths=end - start, axis=0)

    def paired_mask(self, layout: PackedTexts) -> Tensor:
        """Return the mask [rows] of rows with teacher rows: all rows if both read the same."""
        if Side.SPANS not in self.shards:
            return torch.ones(layout.rows, dtype=torch.bool)
        start, end = self._spans(layout).unbind(1)
        return end > start

    def paired_rows(self, layout: PackedTexts) -> tuple[Tensor, Tensor]:
        """Return rows of `layout` that have a row of the teacher, and the first such row of each.

        Returns:
            Rows of `layout` [n], and rows of the teacher's texts [n].
        """
        if Side.SPANS not in self.shards:
            return torch.arange(layout.rows), layout.row_indices_in(self.layouts[Side.TEACHER])
        rows = self.paired_mask(layout).nonzero().flatten()
        return rows, self._spans(layout)[rows, 0]

    def _spans(self, layout: PackedTexts) -> Tensor:
        return self.rows(Side.SPANS, 0)[layout.row_indices_in(self.layouts[Side.SPANS])]

    def digest(self) -> str:
        """Return the hash of all rows and of how they are paired, from the shards' sidecars."""
        hashes = {
            side: [_shard_digest(self.root / shard) for shard in shards]
            for side, shards in self.shards.items()
        }
        layouts = {side: layout.digest() for side, layout in self.layouts.items()}
        return digest(hashes, layouts, self.depths, self.teacher_boundaries)

    def sidecar(self, side: str, boundary: int) -> dict[str, Any]:
        """Return what is recorded of a shard: model, side, layout, dtype, sha256."""
        path = (self.root / self.shards[side][boundary]).with_suffix(".json")
        values: dict[str, Any] = json.loads(read_text(path))
        return values

    @property
    def for_alignment(self) -> ActivationStore:
        """The activations that aligners see: an anchor, if any, replaces the teacher."""
        if Side.ANCHOR not in self.shards:
            return self
        return ActivationStore(
            root=self.root,
            shards={
                Side.TEACHER: self.shards[Side.ANCHOR],
                Side.STUDENT: self.shards[Side.STUDENT],
            },
            layouts={
                Side.TEACHER: self.layouts[Side.ANCHOR],
                Side.STUDENT: self.layouts[Side.STUDENT],
            },
            depths=self.depths,
            teacher_boundaries=tuple(range(len(self.teacher_boundaries))),
        )

    def info(self) -> dict[str, Any]:
        """Return as JSON values everything that `restore_activations` needs."""
        return {
            "shards": {side: list(paths) for side, paths in self.shards.items()},
            "texts": {
                side: [text.id for text in layout.texts] for side, layout in self.layouts.items()
            },
            "depths": list(self.depths),
            "partners": list(self.teacher_boundaries),
        }


def restore_activations(info: Mapping[str, Any], root: Path, samples: Samples) -> ActivationStore:
    """Return the activations that `ActivationStore.info` described."""
    layouts = {}
    for side, ids in info["texts"].items():
        layout = samples.teacher if side == Side.TEACHER else samples.layout
        texts = {text.id: text for text in layout.texts}
        layouts[side] = PackedTexts(tuple(texts[name] for name in ids), layout.prefix)
    return ActivationStore(
        root=root,
        shards={side: tuple(paths) for side, paths in info["shards"].items()},
        layouts=layouts,
        depths=tuple(info["depths"]),
        teacher_boundaries=tuple(info["partners"]),
    )


def _shard_digest(shard: Path) -> str:
    """Return a shard's sha256 from its sidecar; row pairs have none and are small."""
    sidecar = shard.with_suffix(".json")
    if not sidecar.exists():
        return sha256_of(shard)
    return str(json.loads(read_text(sidecar))["sha256"])


def write_shard(
    out: StepOutput,
    side: str,
    boundary: int,
    rows: Tensor,
    dtype: torch.dtype,
    details: Mapping[str, Any],
) -> str:
    """Commit one boundary's rows and their sidecar.

    Args:
        out: where the step writes.
        side: whose rows they are.
        boundary: the layer boundary (0: embeddings).
        rows: the raw stream `[rows, d]`.
        dtype: the dtype to store.
        details: further entries of the sidecar.

    Returns:
        The shard's path relative to the folder of runs.
    """
    name = RunLayout.shard(side, boundary)
    path = out.tensors(f"{name}.safetensors", {"rows": rows.to("cpu", dtype)})
    shard = out.relative(path)
    sidecar = {
        **details,
        "site": "residual",
        "boundary": boundary,
        "tokens": rows.shape[0],
        "shape": list(rows.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": out.used[shard].sha256,
        "shard": path.name,
    }
    out.json(f"{name}.json", sidecar)
    return shard


def rms_normalise(X: Tensor) -> Tensor:
    """Divide each row by its RMS, in float64: a reader's view of the stream, without norm gains."""
    X = X.double()
    return X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True).clamp_min(1e-30))


def mean_square(X: Tensor) -> Tensor:
    """Return the mean square of each row of `X [rows, d]`, `[rows]`, float64, on the host.

    Some rows are widened at a time, where they are.
    """
    if not len(X):
        return torch.zeros(0, dtype=torch.float64)
    X = X.to(sum_device(X.device))
    chunks = (X[k : k + CHUNK_ROWS] for k in range(0, len(X), CHUNK_ROWS))
    return torch.cat([chunk.double().pow(2).mean(-1) for chunk in chunks]).cpu()


def massive_activation_mask(X: Tensor, factor: float = MASSIVE) -> Tensor:
    """Return the mask [rows] of massive activations (attention sinks), on the host.

    These are rows whose RMS exceeds `factor` times the median row's. (Sun et al., Massive
    Activations in Large Language Models, arXiv:2402.17762.)
    """
    rms = mean_square(X).sqrt()
    return rms > factor * rms.median()
