"""The capture: models run layer by layer over the texts, and each boundary becomes one shard.

With `store = "moments"` these texts are a sample, and the sums of all texts follow (`_sums`).

With `student_texts` steps read of the texts beyond these, and of those outside the domain, what the
teacher predicts. So only their final states are kept, as the last rows of the last shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.plugin.source_code import package_digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.records import WeightsRef
from rotdistill_residuals._control import replace_teacher_rows
from rotdistill_residuals._cost import SAVED_LAYERS
from rotdistill_residuals._finite import require_finite_states
from rotdistill_residuals._layer_map import match_layers
from rotdistill_residuals._spans import PairedRows, pair_rows
from rotdistill_residuals._sums import Reading, SumCapture, Walker

if TYPE_CHECKING:
    from rotdistill_residuals.step import Residuals

BOUNDARY = "boundary"
STATES = "states"


def capture(
    step: Residuals,
    pair: Pair,
    weights: Weights,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> ActivationStore:
    """Capture all models of the pair, and apply the step's control and layer map.

    Args:
        step: the options.
        pair: the models; the teacher and the anchor run as they are.
        weights: the student as the steps before left it.
        samples: the texts.
        out: takes shards, tables and notes.
        progress: called once for each layer.
        ranks: the processes that share the texts; the leading one writes.

    Raises:
        RecipeError: the options do not go with these models or texts.
        RotdistillError: a state is NaN or Inf.
    """
    _check_options(step, pair, weights, out)
    texts = samples.layout.select(Split.FIT, Split.VALIDATION, limit=step.student_texts)
    if step.store == "rows":
        return _capture_rows(step, pair, weights, samples, texts, out, progress, ranks)
    sampled = samples.part(samples.layout.sample())
    activations = _capture_rows(step, pair, weights, sampled, texts.sample(), out, progress, ranks)
    summed: dict[str, tuple[str, ...]] = {
        each.side: each.capture(progress, ranks)
        for each in _sums_to_capture(step, pair, weights, samples, texts, activations, out)
    }
    return replace(activations, summed=summed)


def _capture_rows(
    step: Residuals,
    pair: Pair,
    weights: Weights,
    samples: Samples,
    student_texts: PackedTexts,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks,
) -> ActivationStore:
    """Capture the rows of all models, and apply the step's control and layer map."""
    everywhere = len(samples.layout.texts)
    if not step.keeps_all_rows:
        inner = _inner_texts(samples.layout, student_texts)
        samples = samples.part(samples.layout.with_first(inner))
        everywhere = len(inner)
    student_rows = student_texts.rows
    streams = [
        _shared_stream(
            step,
            Side.TEACHER,
            pair.teacher,
            samples.teacher,
            samples.teacher.starts[everywhere],
            out,
        ),
        Stream(
            side=Side.STUDENT,
            model=pair.student,
            weights=weights,
            layout=student_texts,
            out=out,
            dtype=_dtype(step, pair.student),
            inner_rows=student_rows,
        ),
    ]
    if pair.anchor:
        anchor = _shared_stream(step, Side.ANCHOR, pair.anchor, student_texts, student_rows, out)
        streams.append(anchor)

    shards: dict[str, tuple[str, ...]] = {}
    layouts: dict[str, PackedTexts] = {}
    total = sum(stream.depth for stream in streams)
    done = 0
    for stream in streams:
        shards[stream.side] = stream.capture(_continued(progress, done, total), ranks)
        layouts[stream.side] = stream.layout
        done += stream.depth
    if samples.theirs:
        shards[Side.SPANS] = (ranks.lead(lambda: _write_spans(pair, samples, out)),)
        layouts[Side.SPANS] = samples.layout

    activations = ActivationStore(
        root=out.store.root,
        shards=shards,
        layouts=layouts,
        depths=weights.lineage.depths,
        teacher_boundaries=tuple(pair.teacher_depth(b) for b in range(pair.student.depth + 1)),
    )

    def controlled_and_matched() -> ActivationStore:
        found = activations
        if step.control != "none":
            found = replace_teacher_rows(step.control, found, out, model=pair.teacher.ref.model)
        if step.layer_map == "match":
            found = _with_matched_layers(found, pair.student.device, out, progress)
        return found

    # The folder of runs may have another name on another machine.
    return replace(ranks.lead(controlled_and_matched), root=out.store.root, student=weights)


def _sums_to_capture(
    step: Residuals,
    pair: Pair,
    weights: Weights,
    samples: Samples,
    texts: PackedTexts,
    activations: ActivationStore,
    out: StepOutput,
) -> Iterator[SumCapture]:
    """Yield the sums of the student with the teacher, and with the anchor if there is one.

    Args:
        step: the options.
        pair: the models.
        weights: the student as the steps before left it.
        samples: all texts.
        texts: those of the student.
        activations: the rows of the sample.
        out: takes the files.
    """

    def as_teacher_reads(block: PackedTexts) -> Reading:
        if samples.theirs is None:
            return Reading(block, None)
        part = samples.part(block)
        return Reading(part.teacher, _paired_rows(pair, part).spans)

    def as_student_reads(block: PackedTexts) -> Reading:
        return Reading(block, None)

    student = Walker(model=pair.student, weights=weights, dtype=_dtype(step, pair.student))
    views = [(Side.TEACHER, pair.teacher, activations, as_teacher_reads)]
    if pair.anchor:
        views.append((Side.ANCHOR, pair.anchor, activations.for_alignment, as_student_reads))
    for side, model, view, read in views:
        yield SumCapture(
            side=side,
            student=student,
            partner=Walker(model=model, weights=model.weights, dtype=_dtype(step, model)),
            activations=view,
            layout=texts,
            read=read,
            # Models of one basis are compared as they are, without a frame.
            raw=side == Side.TEACHER and not pair.same,
            out=out,
        )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The residual stream of one model on its texts, committed boundary by boundary."""

    side: Side
    model: Model
    weights: Weights
    """The model's weights, edited or not."""
    layout: PackedTexts
    out: StepOutput
    dtype: torch.dtype
    """Dtype of the shards."""
    inner_rows: int
    """Number of leading rows that shards before the last boundary hold."""

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.weights.depth

    def capture(self, progress: Progress, ranks: Ranks = ALONE) -> tuple[str, ...]:
        """Compute and commit what is not committed yet.

        Processes share the texts, and the leading one gathers and commits the rows of a boundary.

        Returns:
            The shard of each boundary, relative to the folder of runs.

        Raises:
            RotdistillError: a state is NaN or Inf.
        """
        committed = ranks.lead(self._committed)
        if all(committed):
            ranks.lead(self._clear_saved)
            return tuple(committed)
        forward = LayerwiseForward(
            self.weights, self.layout, self.model.device, self.model.dtype, ranks=ranks
        )
        self._resume(forward, committed, ranks)
        shards = committed[: forward.boundary]
        sidecar = {
            "model": self.model.ref.model,
            "side": self.side,
            "layout": self.layout.digest(),
            "layers": self.depth,
        }

        def collected(boundary: int) -> Tensor | None:
            if committed[boundary]:
                return None
            all_inside = self.inner_rows == self.layout.rows
            if all_inside or boundary == self.depth or self._saves_states(boundary):
                return forward.collected()
            return forward.collected(torch.arange(self.inner_rows))

        def commit(boundary: int, states: Tensor | None) -> str:
            if states is None:  # it is committed, or the leading process does that
                return committed[boundary]
            require_finite_states(self.model.ref.model, boundary, states)
            kept = states if boundary == self.depth else states[: self.inner_rows]
            shard = write_shard(self.out, self.side, boundary, kept, self.dtype, sidecar)
            if self._saves_states(boundary):
                self._save_states(boundary, states)
            return shard

        # One thread hashes and writes a boundary while the next layer is computed.
        with ThreadPoolExecutor(1) as writer:
            pending = writer.submit(commit, forward.boundary, collected(forward.boundary))
            for layer in forward:
                forward.run()
                shards.append(pending.result())
                pending = writer.submit(commit, layer + 1, collected(layer + 1))
                progress(layer + 1, self.depth, f"{self.side}: {self.layout.rows} rows")
            shards.append(pending.result())
        ranks.lead(self._clear_saved)
        return tuple(ranks.lead(lambda: shards))

    @property
    def _shards_are_states(self) -> bool:
        """Whether the shard of any boundary holds all states there, as they were computed."""
        return self.inner_rows == self.layout.rows and self.dtype == self.model.dtype

    def _saves_states(self, boundary: int) -> bool:
        """Return whether the states at a boundary are saved beside its shard, to go on from."""
        inside = 0 < boundary < self.depth
        return inside and not self._shards_are_states and boundary % SAVED_LAYERS == 0

    def _save_states(self, boundary: int, states: Tensor) -> None:
        """Save the states [rows, d] at a boundary, in place of those saved before."""
        saved = {BOUNDARY: torch.tensor(boundary), STATES: states}
        self.out.aside().tensors(RunLayout.begun_states(self.side), saved)

    def _clear_saved(self) -> None:
        """Empty the saved states: they have served their purpose, and are large."""
        aside = self.out.aside()
        if not aside.names(RunLayout.begun_states(self.side)):
            return
        path = aside.find(RunLayout.begun_states(self.side))
        if path is None or int(open_tensors(path)[BOUNDARY].read()):
            self._save_states(0, torch.zeros(0, self.weights.width))

    def _committed(self) -> list[str]:
        """Return the shard of each boundary that a killed capture committed, or an empty name."""
        return [self._find(boundary) for boundary in range(self.depth + 1)]

    def _find(self, boundary: int) -> str:
        """Return the shard of a boundary if it and its sidecar are committed."""
        name = RunLayout.shard(self.side, boundary)
        path = self.out.find(f"{name}.safetensors")
        if path and self.out.find(f"{name}.json"):
            return self.out.relative(path)
        return ""

    def _resume(self, forward: LayerwiseForward, committed: list[str], ranks: Ranks) -> None:
        """Move the forward pass to the last boundary whose states are there, as computed.

        No shard before that boundary may be missing.
        """
        first_missing = committed.index("")
        if not first_missing:
            return
        if self._shards_are_states:
            boundary, path, name = first_missing - 1, committed[first_missing - 1], "rows"
        else:
            boundary, path = ranks.lead(partial(self._saved_until, first_missing))
            name = STATES
        if boundary:
            states = open_tensors(self.out.store.root / path)[name].read()
            forward.start_at(boundary, lambda rows: states[forward.rows[rows]])

    def _saved_until(self, last: int) -> tuple[int, str]:
        """Return the boundary at which states were saved and their file; (0, "") without any.

        Args:
            last: the boundary may not lie behind this one.
        """
        path = self.out.aside().find(RunLayout.begun_states(self.side))
        boundary = int(open_tensors(path)[BOUNDARY].read()) if path else 0
        if path is None or boundary > last:
            return 0, ""
        return boundary, self.out.relative(path)


def _check_options(step: Residuals, pair: Pair, weights: Weights, out: StepOutput) -> None:
    # A student that `chop` made narrower has a basis too, that of the narrow stream.
    is_folded = any(
        isinstance(record.result, WeightsRef) and record.result.undo and record.result.basis
        for record in out.earlier_steps()
    )
    is_narrower = weights.width < pair.student.width
    if weights.lineage.basis is not None and (is_folded or not is_narrower):
        raise RecipeError(
            "residuals: the student is in another basis already; put the capture before basis-fold."
        )
    if pair.same and step.layer_map == "match":
        raise RecipeError(
            "residuals: this student is the teacher, cut: its layer map is known; "
            'leave out layer_map = "match".'
        )
    if step.control == "self" and (not pair.same or step.student_texts):
        raise RecipeError(
            'residuals: control = "self" needs a student cut from its teacher, '
            "captured on all texts."
        )


def _shared_stream(
    step: Residuals,
    side: Side,
    model: Model,
    layout: PackedTexts,
    inner_rows: int,
    out: StepOutput,
) -> Stream:
    """Return the stream of an unedited model; its shards are keyed by content for all runs."""
    shared = out.shared(
        f"{side.value} residuals",
        model.sha256,
        model.table_code,
        layout.digest(),
        str(model.dtype),
        model.device.type,
        step.dtype,
        str(inner_rows),
        code=package_digest("rotdistill_residuals"),
    )
    return Stream(
        side=side,
        model=model,
        weights=model.weights,
        layout=layout,
        out=shared,
        dtype=_dtype(step, model),
        inner_rows=inner_rows,
    )


def _inner_texts(layout: PackedTexts, student_texts: PackedTexts) -> set[str]:
    """Return the ids of the texts whose rows are read at boundaries before the last, too.

    Those are the texts of the student, which its rows are compared with, the sample's, and the
    held-out ones. Texts outside the domain are judged by what a model predicts.
    """
    inside = {text.id for text in layout.sample().texts if not text.split.outside_domain}
    return inside | {text.id for text in student_texts.texts}


def _dtype(step: Residuals, model: Model) -> torch.dtype:
    """Return the dtype of a model's shards."""
    if step.dtype == "compute":
        return model.dtype
    dtype: torch.dtype = getattr(torch, step.dtype)
    return dtype


def _continued(progress: Progress, done: int, total: int) -> Progress:
    """Return a progress that counts on after `done` layers of earlier models."""

    def count_on(layers: int, _: int, text: str) -> None:
        progress(done + layers, total, text)

    return count_on


def _paired_rows(pair: Pair, samples: Samples) -> PairedRows:
    """Return the row pairs of texts that the two models read differently.

    With two tokenizers they are paired by bytes, and there is a table of the texts.
    """
    if samples.baked:
        return PairedRows(pair_tokens(samples.layout, samples.teacher), [])
    return pair_rows(samples, pair.student.tokenizer, pair.teacher.tokenizer)


def _write_spans(pair: Pair, samples: Samples, out: StepOutput) -> str:
    """Commit the row pairs, and the table of the texts if there is one; return the shard."""
    pairs = _paired_rows(pair, samples)
    if pairs.table:
        out.write(RunLayout.PAIRING_TABLE, [f"{line}\n".encode() for line in pairs.table])
    spans = pairs.spans
    paired_count = int((spans[:, 1] > spans[:, 0]).sum())
    out.notes["paired rows"] = f"{paired_count} of {len(spans)}"
    shard = out.tensors(RunLayout.ROW_PAIRS, {"rows": spans})
    return out.relative(shard)


def _with_matched_layers(
    activations: ActivationStore, device: torch.device, out: StepOutput, progress: Progress
) -> ActivationStore:
    """Return the activations with the layer map that explains most; commit the table of R²."""
    layer_map = match_layers(activations, progress, device)
    out.json(
        RunLayout.LAYER_MAP,
        {
            "student boundary -> teacher boundary": layer_map.by_original_depth,
            "R²": layer_map.r2.tolist(),
        },
    )
    out.notes |= {
        "layer map": layer_map.matched,
        "mean R² of match": layer_map.mean_r2_match,
        "mean R² of stretch": layer_map.mean_r2_stretch,
    }
    return replace(activations, teacher_boundaries=layer_map.teacher_boundaries)
