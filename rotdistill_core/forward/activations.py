"""Captured activations: the residual stream of each model at every layer boundary.

Rows lie in safetensors shards, one for each side and boundary, each with a JSON sidecar. A capture
keeps the rows of all texts, or, with `store = "moments"`, the rows of a sample of them
(`PackedTexts.sample`) and the sums over all rows to fit on. With `student_texts` it keeps the
teacher's rows of other texts to fit on and for validation at the last boundary only. What a step
needs decides what it can do with:

- Sums of fit rows: aligners and refiners of the stream (`procrustes`, `cca`, `householder`), the
  frames of `fidelity`.
- Rows of the sample, from either store: thresholds of massive activations, the layer map,
  diagnostics, the teacher's principal frame of `basis-fold`.
- Rows of held-out texts, which are always kept: `fidelity`.
- The teacher's final states of the guard, which are always kept: `fidelity`, `lm-head-ridge`,
  `prompt-kl`, `writer-refit`. At other boundaries there may be no rows of the guard.
- The teacher's final states of texts to fit on, which are computed where they were not captured:
  `lm-head-ridge`, which keeps sums and a few rows of them, and `prompt-kl`.
- No rows of texts to fit on: `writer-refit`, beside whose student the teacher walks once more.
- Rows of all texts: the controls of the capture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Side
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.boundary_sums import (
    BoundarySums,
    Kinds,
    Thresholds,
    read_sums,
    rows_of_blocks,
)
from rotdistill_core.linalg.paired_sums import RowSums
from rotdistill_core.linalg.precision import CPU, float64_device
from rotdistill_core.linalg.solvers import require_finite
from rotdistill_core.store.hashing import digest, sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.plain import read_text

ROWS_REMEDY = (
    'Set store = "rows" in the capture step and leave out student_texts; then it keeps the rows of '
    "all texts."
)
"""What to do where rows are missing."""


@dataclass(frozen=True)
class ActivationStore:
    """Shards by side and boundary. Their rows are those of the side's packed texts; see `rows`."""

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
    summed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Side that the student is paired with -> the file of the sums of each captured student
    boundary. Empty where rows are kept, from which sums are made when asked."""
    replaced: bool = False
    """Whether a control has put other rows in the place of the teacher's, which no pass of the
    teacher gives."""
    student: Weights | None = field(default=None, compare=False, repr=False)
    """The student that was captured. A run fills it in."""

    @property
    def sample(self) -> PackedTexts:
        """The student's texts whose rows every capture keeps."""
        return self.layouts[Side.STUDENT].sample()

    def rows(self, side: str, boundary: int) -> Tensor:
        """Return one side's raw stream `[rows, d]` at a boundary (0: embeddings), memory-mapped.

        The rows are those of `layouts[side]`, which with `store = "moments"` is a sample. Of the
        teacher's, boundaries other than the last may have only the first ones: with `student_texts`
        those of texts to fit on and for validation that it leaves out, and of the guard, come last.
        """
        return open_tensors(self.root / self.shards[side][boundary])["rows"].read()

    def paired(self, layout: PackedTexts, boundary: int) -> tuple[Tensor, Tensor]:
        """Return both raw streams at a boundary of the student, for rows of captured texts.

        Returns:
            The student's rows `[rows, d_s]`, and the teacher's row of each `[rows, d_t]`; see
            `paired_mask` for rows that have none.
        """
        own = self.layouts[Side.STUDENT]
        S = self.rows(Side.STUDENT, boundary)
        S = S if layout == own else self._taken(S, self._places(layout, Side.STUDENT), boundary)
        return S, self.teacher_states(layout, self.depths[boundary])

    def thresholds(self, boundary: int) -> Thresholds:
        """Return the RMS above which paired rows are massive activations, from the sample's rows.

        Rows of all texts are held to the same, whatever the capture keeps of them.
        """
        sample = self.sample
        S, T = self.paired(sample, boundary)
        paired = self.paired_mask(sample)
        return Thresholds.of(S[paired], T[paired])

    def sums(
        self,
        boundary: int,
        *,
        squares: bool,
        device: torch.device = CPU,
        names: tuple[str, str] = ("student", "teacher"),
    ) -> RowSums:
        """Return the sums over the fit rows of a boundary, each row divided by its RMS.

        Massive activations, position 0 and unpaired rows are left out. The sums are the same from
        either store: `BoundarySums` adds the same blocks when the rows are captured, or here.

        Args:
            boundary: a captured boundary of the student.
            squares: whether C_ss and C_tt are asked for.
            device: the student's; sums are made there where its float64 is fast.
            names: names both streams in errors.

        Raises:
            RotdistillError: a stream is not finite.
        """
        kinds = Kinds(squares=squares)
        return self._sums(boundary, "unit", kinds, device, names)

    def raw_sums(self, boundary: int, device: torch.device = CPU) -> RowSums:
        """Return the sums over the same rows as they are; C_ss, C_tt and the null are zero.

        Raises:
            RotdistillError: a stream is not finite.
        """
        kinds = Kinds(unit=False, raw=True)
        return self._sums(boundary, "raw", kinds, device, ("student", "teacher"))

    def _sums(
        self, boundary: int, kind: str, kinds: Kinds, device: torch.device, names: tuple[str, str]
    ) -> RowSums:
        if self.summed:
            path = self.root / self.summed[Side.TEACHER][boundary]
            return read_sums(open_tensors(path), kind, squares=kinds.squares)
        thresholds = self.thresholds(boundary)
        layout = self.layouts[Side.STUDENT]
        S, T = self.paired(layout, boundary)
        numbers = (boundary, self.teacher_boundaries[self.depths[boundary]])
        for X, name, number in zip((S, T), names, numbers, strict=True):
            require_finite(X, f"{name}, layer boundary {number}, site residual")
        paired = self.paired_mask(layout)
        where = f"boundary {boundary}"
        sums = BoundarySums(S.shape[1], T.shape[1], layout.rows, thresholds, kinds, where)
        for _, block in rows_of_blocks(layout):
            rows = block.in_layout
            sums.add(S, T, rows[paired[rows]], float64_device(device))
        return sums.value(kind)

    def _places(self, layout: PackedTexts, side: str) -> Tensor:
        """Return the row among one side's of each row of `layout` `[rows]`.

        Raises:
            RecipeError: the rows of a text were not kept.
        """
        kept = self.layouts[side]
        missing = [text.id for text in layout.texts if text.id not in kept.numbers]
        if missing:
            raise RecipeError(
                f"rows of {len(missing)} texts are asked for that the capture has not kept, the "
                f'first is "{missing[0]}". {ROWS_REMEDY}'
            )
        return layout.row_indices_in(kept)

    def holds(self, side: str, layout: PackedTexts) -> bool:
        """Return whether one side's rows of all these texts were kept."""
        return all(text.id in self.layouts[side].numbers for text in layout.texts)

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
            return self._taken(T, self._places(layout, Side.TEACHER), boundary)
        spans = self._spans(layout)
        self._require_kept(T, spans, boundary)
        return span_means(T, spans)

    def _taken(self, X: Tensor, places: Tensor, boundary: int) -> Tensor:
        """Return rows of a shard at some places `[n, d]`.

        Raises:
            RecipeError: the shard ends before one of them.
        """
        self._require_kept(X, places, boundary)
        return X[places]

    def _require_kept(self, X: Tensor, places: Tensor, boundary: int) -> None:
        if places.numel() and int(places.max()) > len(X) - (places.dim() == 1):
            raise RecipeError(
                f"rows of texts are asked for at boundary {boundary} that the capture has kept at "
                f"the last boundary only. {ROWS_REMEDY}"
            )

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
            return torch.arange(layout.rows), self._places(layout, Side.TEACHER)
        rows = self.paired_mask(layout).nonzero().flatten()
        return rows, self._spans(layout)[rows, 0]

    def teacher_spans(self, layout: PackedTexts) -> Tensor:
        """Return for each row of the student's texts the teacher's rows [start, end) `[rows, 2]`.

        They are rows of the teacher's layout. The span of an unpaired row is empty.
        """
        if Side.SPANS in self.shards:
            return self._spans(layout)
        start = self._places(layout, Side.TEACHER)
        return torch.stack([start, start + 1], 1)

    def captured_student(self) -> Weights:
        """Return the student that was captured.

        Raises:
            RecipeError: these activations do not say which one that was.
        """
        if self.student is None:
            raise RecipeError(
                "the captured activations do not say which student they are of; give "
                "ActivationStore its weights (student=weights), as a run does."
            )
        return self.student

    def _spans(self, layout: PackedTexts) -> Tensor:
        return self.rows(Side.SPANS, 0)[self._places(layout, Side.SPANS)]

    def digest(self) -> str:
        """Return the hash of all rows and of how they are paired, from the shards' sidecars."""
        hashes = {
            side: [_shard_digest(self.root / shard) for shard in shards]
            for side, shards in self.shards.items()
        }
        layouts = {side: layout.digest() for side, layout in self.layouts.items()}
        sums = {
            side: [sha256_of(self.root / path) for path in paths]
            for side, paths in self.summed.items()
        }
        return digest(hashes, layouts, self.depths, self.teacher_boundaries, sums)

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
            summed={Side.TEACHER: self.summed[Side.ANCHOR]} if self.summed else {},
            student=self.student,
        )

    def info(self, samples: Samples) -> dict[str, Any]:
        """Return as JSON values everything that `restore_activations` needs.

        Args:
            samples: the texts of the run.
        """
        return {
            "shards": {side: list(paths) for side, paths in self.shards.items()},
            "texts": {
                side: _runs_of(layout, _texts_of(side, samples))
                for side, layout in self.layouts.items()
            },
            "depths": list(self.depths),
            "partners": list(self.teacher_boundaries),
            "sums": {side: list(paths) for side, paths in self.summed.items()},
            "replaced": self.replaced,
        }


def restore_activations(
    info: Mapping[str, Any], root: Path, samples: Samples, student: Weights | None = None
) -> ActivationStore:
    """Return the activations that `ActivationStore.info` described.

    Args:
        info: the description.
        root: the folder of runs.
        samples: the texts of the run.
        student: the student that was captured.

    Raises:
        ValueError: the run has not so many texts.
    """
    layouts = {}
    for side, runs in info["texts"].items():
        layout = _texts_of(side, samples)
        if any(end > len(layout.texts) for _, end in runs):
            raise ValueError(f"{side}: the run has {len(layout.texts)} texts, and not {runs}")
        texts = (text for first, end in runs for text in layout.texts[first:end])
        layouts[side] = PackedTexts(tuple(texts), layout.prefix)
    return ActivationStore(
        root=root,
        shards={side: tuple(paths) for side, paths in info["shards"].items()},
        layouts=layouts,
        depths=tuple(info["depths"]),
        teacher_boundaries=tuple(info["partners"]),
        summed={side: tuple(paths) for side, paths in info["sums"].items()},
        replaced=info["replaced"],
        student=student,
    )


def _texts_of(side: str, samples: Samples) -> PackedTexts:
    """Return all texts of a run as a side reads them."""
    return samples.teacher if side == Side.TEACHER else samples.layout


def _runs_of(layout: PackedTexts, whole: PackedTexts) -> list[list[int]]:
    """Return the runs [first, end) of numbers in `whole` that the texts of a layout have."""
    runs: list[list[int]] = []
    for text in layout.texts:
        number = whole.numbers[text.id]
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def span_means(T: Tensor, spans: Tensor) -> Tensor:
    """Return the mean of the rows of `T [m, d]` in each span `[start, end)` of `spans [n, 2]`.

    That of an empty span is the row at its start. Returns `[n, d]`.
    """
    start, end = spans.T
    end = torch.maximum(end, start + 1)
    pairs = zip(start.tolist(), end.tolist(), strict=True)
    rows = torch.cat([torch.arange(first, last) for first, last in pairs])
    return torch.segment_reduce(T[rows], "mean", lengths=end - start, axis=0)


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
