"""What was captured: the residual stream of teacher and student at every layer boundary, in safetensors shards with sidecars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.store.output import StepOutput


@dataclass(frozen=True)
class ActivationStore:
    """Shards by side and boundary. Rows are those of the side's layout."""

    root: Path
    shards: Mapping[str, tuple[str, ...]]
    """Side (`teacher`, `student`) -> shard of each boundary 0..L, relative to the folder of runs. With two tokenizers there are
    `spans` too: for each row of the student's texts the teacher's rows [start, end) beside it `[rows, 2]`, (0, 1) where there are none."""
    layouts: Mapping[str, PackedTexts]
    depths: tuple[int, ...] = ()
    """For each captured student boundary, its boundary in the original student."""
    teacher_boundaries: tuple[int, ...] = ()
    """For each boundary of the original student, the teacher's boundary that it is compared with."""

    def rows(self, side: str, boundary: int) -> Tensor:
        """Return the raw stream `[rows, d]` of one side at a layer boundary (0: embeddings), memory-mapped."""
        return open_tensors(self.root / self.shards[side][boundary])["rows"].read()

    def width(self, side: str) -> int:
        """Return how wide the stream of one side was when it was captured, from the header alone."""
        return open_tensors(self.root / self.shards[side][0])["rows"].shape[1]

    def teacher(self, layout: PackedTexts, depth: int) -> Tensor:
        """Return the teacher's raw stream beside a boundary of the original student, a row for each row of `layout` `[rows, d_t]`."""
        return self.teacher_rows(layout, self.teacher_boundaries[depth])

    def teacher_rows(self, layout: PackedTexts, boundary: int) -> Tensor:
        """Return the teacher's stream at its own boundary for rows of the student's `layout`: means over spans of its tokens."""
        T = self.rows("teacher", boundary)
        if "spans" not in self.shards:
            return T[layout.row_indices_in(self.layouts["teacher"])]
        start, end = self._spans(layout).T
        rows = torch.cat(
            [torch.arange(a, b) for a, b in zip(start.tolist(), end.tolist(), strict=True)]
        )
        return torch.segment_reduce(T[rows], "mean", lengths=end - start, axis=0)

    def paired(self, layout: PackedTexts) -> Tensor:
        """Return the mask [rows] of rows that have teacher rows beside them: all, unless the two have different tokenizers."""
        return (
            self._spans(layout)[:, 0] > 0
            if "spans" in self.shards
            else torch.ones(layout.rows, dtype=torch.bool)
        )

    def _spans(self, layout: PackedTexts) -> Tensor:
        return self.rows("spans", 0)[layout.row_indices_in(self.layouts["spans"])]

    @property
    def for_alignment(self) -> ActivationStore:
        """The bank that aligners see: with an anchor, that stands in the teacher's place."""
        if "anchor" not in self.shards:
            return self
        shards = {"teacher": self.shards["anchor"], "student": self.shards["student"]}
        layouts = {"teacher": self.layouts["anchor"], "student": self.layouts["student"]}
        return ActivationStore(
            self.root, shards, layouts, self.depths, tuple(range(len(self.teacher_boundaries)))
        )

    def info(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values."""
        texts = {side: [t.id for t in layout.texts] for side, layout in self.layouts.items()}
        return {
            "shards": {k: list(v) for k, v in self.shards.items()},
            "texts": texts,
            "depths": list(self.depths),
            "partners": list(self.teacher_boundaries),
        }


def restore_activations(info: Mapping[str, Any], root: Path, samples: Samples) -> ActivationStore:
    """Return the bank that `Bank.info` described."""
    layouts = {}
    for side, ids in info["texts"].items():
        layout = samples.teacher if side == "teacher" else samples.layout
        texts = {t.id: t for t in layout.texts}
        layouts[side] = PackedTexts(tuple(texts[i] for i in ids), layout.prefix)
    return ActivationStore(
        root,
        {k: tuple(v) for k, v in info["shards"].items()},
        layouts,
        tuple(info["depths"]),
        tuple(info["partners"]),
    )


def write_shard(
    out: StepOutput,
    side: str,
    boundary: int,
    rows: Tensor,
    dtype: torch.dtype,
    about: Mapping[str, Any],
) -> str:
    """Commit one boundary's rows and their sidecar; return the shard's path relative to the folder of runs."""
    name = f"shards/{side}/residual/{boundary:05d}"
    path = out.tensors(f"{name}.safetensors", {"rows": rows.to("cpu", dtype)})
    shard = path.relative_to(out.store.root).as_posix()
    sidecar = {
        **about, "site": "residual", "boundary": boundary, "tokens": rows.shape[0], "shape": list(rows.shape),
        "dtype": str(dtype).removeprefix("torch."), "sha256": out.used[shard].sha256, "shard": path.name,
    }  # fmt: skip
    out.json(f"{name}.json", sidecar)
    return shard


def rms_normalise(X: Tensor) -> Tensor:
    """Divide each row by its RMS, in float64: what a reader of the stream sees of it, gains apart."""
    X = X.double()
    return X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True).clamp_min(1e-30))


def massive_activation_mask(X: Tensor, factor: float = 8.0) -> Tensor:
    """Return the mask [rows] of massive-activation rows (attention sinks): RMS above `factor` times the median's.

    (Sun et al., Massive Activations in Large Language Models, arXiv:2402.17762.)
    """
    rms = X.double().pow(2).mean(-1).sqrt()
    return rms > factor * rms.median()
