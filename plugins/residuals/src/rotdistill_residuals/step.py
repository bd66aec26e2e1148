"""Capture the residual stream of teacher and student at every layer boundary."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, capture_cost
from rotdistill_core.planning.shape import DTYPE_BYTES
from rotdistill_residuals._control import controlled
from rotdistill_residuals._layer_map import explained, monotone, spread
from rotdistill_residuals._spans import pair_rows

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


@step
class Residuals:
    """Run teacher and student once over all texts and keep the raw residual stream at every layer boundary.

    The teacher's shards are shared by every run under the same folder, whatever happens to the student. Put a `chop` before it,
    everything else behind it.
    """

    use: Literal["residuals"] = "residuals"
    store: Literal["float32", "bfloat16", "compute"] = "compute"
    """Dtype of the shards. `compute` keeps what was computed, so that a killed capture goes on at the layer where it was."""
    student_texts: Annotated[int, Field(ge=1)] | None = None
    """Capture the student on this many fit and validation texts only (alignment needs few); without it, on all of them."""
    layer_map: Literal["stretch", "match"] = "stretch"
    """Which teacher boundary each of the student's is beside. `"stretch"`: the one at its relative depth. `"match"`: the monotone map under
    which the student's rows explain most of the teacher's (table of R² in `layer_map.json`)."""
    control: Literal["none", "shuffled", "reversed", "self"] = "none"
    """For fit and validation texts other teacher rows: `"shuffled"`, the right ones in another order; `"reversed"`, those of the layers in
    reverse; `"self"`, the student's own. What is fitted to these and still helps on held-out texts owes it to something else (see
    `recipes/controls.toml`)."""

    def cost(self, context: CostContext) -> Cost:
        """Both models on their texts. The teacher's shards are shared by every run under one folder."""
        student, teacher, texts = context.student, context.teacher, context.texts
        rows = texts.rows_of("fit", "validation", limit=self.student_texts)
        student_number = DTYPE_BYTES.get(self.store, context.student_bytes)
        teacher_number = DTYPE_BYTES.get(self.store, context.teacher_bytes)
        teacher_shards = (teacher.depth + 1) * texts.total * teacher.width * teacher_number
        student_shards = (student.depth + 1) * rows * student.width * student_number
        control = teacher_shards if self.control != "none" else 0
        return replace(
            capture_cost(context, student_rows=rows),
            disk_bytes=student_shards + control,
            shared_files={("teacher states", self.store): teacher_shards},
        )

    @hookimpl
    def capture(
        self, pair: Pair, weights: Weights, samples: Samples, out: StepOutput, progress: Progress
    ) -> ActivationStore:
        """See `Specs.capture`."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.forward.activations import ActivationStore

        if (
            weights.lineage.basis is not None and weights.width == pair.student.width
        ):  # a stream cut by `chop` has a basis too
            raise RecipeError(
                "residuals: the student is in another basis already; put the capture before basis-fold."
            )
        if pair.same and self.layer_map == "match":
            raise RecipeError(
                'residuals: this student is the teacher, cut: its layer map is known; leave out layer_map = "match".'
            )
        if self.control == "self" and (not pair.same or self.student_texts):
            raise RecipeError(
                'residuals: control = "self" needs a student cut from its teacher, captured on all texts.'
            )
        full, some = (
            samples.teacher,
            samples.layout.select("fit", "validation", most=self.student_texts),
        )
        teacher = pair.teacher
        shared = out.shared(
            "teacher residuals",
            teacher.sha256,
            full.digest(),
            str(teacher.dtype),
            teacher.device.type,
            self.store,
        )
        total = teacher.depth + weights.depth
        shards = {
            "teacher": self._states(
                "teacher",
                teacher,
                teacher.weights,
                full,
                shared,
                lambda i, _, n: progress(i, total, n),
            ),
            "student": self._states(
                "student",
                pair.student,
                weights,
                some,
                out,
                lambda i, _, n: progress(teacher.depth + i, total, n),
            ),
        }
        depths, teacher_boundaries = (
            weights.lineage.depths,
            tuple(pair.teacher_depth(b) for b in range(pair.student.depth + 1)),
        )
        layouts = {"teacher": full, "student": some}
        if pair.anchor:
            anchor, about = (
                pair.anchor,
                (
                    "anchor residuals",
                    pair.anchor.sha256,
                    some.digest(),
                    str(pair.anchor.dtype),
                    self.store,
                ),
            )
            layouts["anchor"] = some
            shards["anchor"] = self._states(
                "anchor", anchor, anchor.weights, some, out.shared(*about), progress
            )
        if samples.theirs:
            layouts["spans"], shards["spans"] = samples.layout, (self._spans(pair, samples, out),)
        activations = ActivationStore(out.store.root, shards, layouts, depths, teacher_boundaries)
        if self.control != "none":
            activations = controlled(self.control, activations, out, {"model": teacher.ref.model})
        if self.layer_map == "stretch":
            return activations
        table = explained(activations, progress)
        found = monotone(table)
        out.json(
            "layer_map.json",
            {
                "student boundary -> teacher boundary": dict(zip(depths, found, strict=True)),
                "R²": table.tolist(),
            },
        )
        sums = [
            float(table[range(len(depths)), [*to]].mean())
            for to in ((teacher_boundaries[b] for b in depths), found)
        ]
        out.notes |= {
            "layer map": found,
            "mean R² of match": sums[1],
            "mean R² of stretch": sums[0],
        }
        return replace(
            activations, teacher_boundaries=spread(depths, found, len(teacher_boundaries))
        )

    def _spans(self, pair: Pair, samples: Samples, out: StepOutput) -> str:
        """Commit which rows of the teacher stand beside each of the student's, and a table of texts; return the shard."""
        spans, lines = pair_rows(samples, (pair.student.tokenizer, pair.teacher.tokenizer))
        out.write("alignment.tsv", [f"{line}\n".encode() for line in lines])
        out.notes["paired rows"] = f"{int((spans[:, 0] > 0).sum())} of {len(spans)}"
        return (
            out.tensors("shards/spans.safetensors", {"rows": spans})
            .relative_to(out.store.root)
            .as_posix()
        )

    def _states(
        self,
        side: str,
        model: Model,
        weights: Weights,
        layout: PackedTexts,
        out: StepOutput,
        tell: Progress,
    ) -> tuple[str, ...]:
        import torch

        from rotdistill_core.checkpoint.lazy import open_tensors
        from rotdistill_core.errors import RotdistillError
        from rotdistill_core.forward.activations import write_shard
        from rotdistill_core.forward.layerwise import LayerwiseForward

        dtype = model.dtype if self.store == "compute" else getattr(torch, self.store)
        names = [f"shards/{side}/residual/{b:05d}" for b in range(weights.depth + 1)]
        found = [
            path if (path := out.find(f"{n}.safetensors")) and out.find(f"{n}.json") else None
            for n in names
        ]
        if all(found):
            return tuple(path.relative_to(out.store.root).as_posix() for path in found if path)
        about = {
            "model": model.ref.model,
            "side": side,
            "layout": layout.digest(),
            "layers": weights.depth,
        }
        walk = LayerwiseForward(weights, layout, model.device, model.dtype)

        def keep(boundary: int, states: Tensor) -> str:
            bad = (
                []
                if torch.isfinite(states.sum())
                else (~torch.isfinite(states)).any(-1).nonzero().flatten().tolist()
            )
            if bad:
                where = f"layer {boundary - 1}" if boundary else "the embeddings"
                raise RotdistillError(
                    f"{model.ref.model}: {where}: {len(bad)} rows are NaN or Inf, the first is row {bad[0]}."
                )
            if path := found[boundary]:
                return str(path.relative_to(out.store.root).as_posix())
            return write_shard(out, side, boundary, states, dtype, about)

        whole = next((b for b, path in enumerate(found) if path is None), 0) - 1
        if whole >= 0 and dtype == model.dtype and (last := found[whole]):
            walk.states, walk.boundary = open_tensors(last)["rows"].read().clone(), whole
        made = [
            path.relative_to(out.store.root).as_posix() for path in found[: walk.boundary] if path
        ]
        with ThreadPoolExecutor(
            1
        ) as writer:  # one layer's rows are hashed and written while the next is computed
            ahead = writer.submit(keep, walk.boundary, walk.states.clone())
            for i in walk:
                walk.run()
                made.append(ahead.result())
                ahead = writer.submit(keep, i + 1, walk.states.clone())
                tell(i + 1, weights.depth, f"{side}: {layout.rows} rows")
            made.append(ahead.result())
        return tuple(made)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Residuals]
