"""What a run would do here: every result in order, what it needs, whether it is there, and what does not suffice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.questions import facts_digest, read_questions
from rotdistill_core.errors import RecipeError
from rotdistill_core.execution.keys import run_inputs
from rotdistill_core.planning.cost import (
    Cost,
    CostContext,
    baseline_memory,
    checkpoint_cost,
    context_after,
    step_cost,
    teacher_answers_cost,
)
from rotdistill_core.planning.machine import Machine
from rotdistill_core.planning.models import ModelInfo, model_info
from rotdistill_core.planning.reuse import (
    UNKNOWN,
    ReuseIndex,
    StepStatus,
    has_checkpoint,
    step_statuses,
)
from rotdistill_core.planning.shape import DTYPE_BYTES
from rotdistill_core.planning.text_counts import TextCounts, count_texts, token_counter
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.ledger import ArtifactStore

CLASSES = {60: "seconds", 3600: "minutes", 86400: "hours", float("inf"): "days"}


@dataclass(frozen=True)
class PlanLine:
    """One thing that a run does."""

    id: str
    use: str
    stage: str
    plugin: str
    needs: list[str]
    """What has to be made before it: captured states, maps."""
    variants: list[str]
    reused: bool
    why: str
    """Where its result lies, or why it has to be made."""
    ram_bytes: int
    gpu_bytes: int
    disk_bytes: int
    seconds: float
    """As measured before, or estimated."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    folder: Path
    lines: list[PlanLine]
    models: dict[str, ModelInfo]
    texts: TextCounts
    machine: Machine
    around: int
    """Memory that is there in every step, bytes."""
    shortfalls: list[str] = field(default_factory=list)

    @property
    def todo(self) -> list[PlanLine]:
        """What has to be made."""
        return [line for line in self.lines if not line.reused]

    @property
    def peak(self) -> dict[str, int]:
        """Memory at its worst and disk in all, of what has to be made."""
        ram = max((line.ram_bytes for line in self.todo), default=0) + self.around
        gpu = max((line.gpu_bytes for line in self.todo), default=0)
        return {
            "ram_bytes": ram,
            "gpu_bytes": gpu,
            "disk_bytes": sum(line.disk_bytes for line in self.todo),
        }


def build_plan(
    loaded: ResolvedRecipe,
    root: Path,
    here: Machine,
    fresh: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return what `run` would do here.

    Raises:
        RotdistillError: the recipe's models or texts are not there or do not fit.
    """
    r, base = loaded.recipe, loaded.path.parent
    texts = (base / r.samples.index).parent
    questions, style = read_questions(r.samples, base)
    models = {
        role: model_info(ref, texts, log)
        for role in ("teacher", "student", "anchor")
        if (ref := getattr(r, role))
    }
    t, s = models["teacher"], models["student"]
    rows = count_texts(questions, style, r.samples, token_counter(s.folder, s.shape.vocab))
    on_gpu = [
        ref.device.startswith("cuda") or (ref.device == "auto" and bool(here.gpu))
        for ref in (r.teacher, r.student)
    ]
    numbers = [DTYPE_BYTES[ref.dtype if ref.dtype != "auto" else m.shape.stored if gpu else "float32"]
               for ref, m, gpu in zip((r.teacher, r.student), (t, s), on_gpu, strict=True)]  # fmt: skip
    start = CostContext(
        teacher=t.shape,
        student=s.shape,
        texts=rows,
        teacher_bytes=numbers[0],
        student_bytes=numbers[1],
        same=r.teacher.model == r.student.model,
    )
    told = None
    if all(m.model for m in models.values()):
        told = run_inputs(r, Pair(*(m.model for m in models.values() if m.model)), questions, style)
    dtype = s.shape.stored if r.student.save_dtype == "auto" else r.student.save_dtype
    folder = loaded.folder(root)
    past = ReuseIndex(ArtifactStore(root).ledgers(), folder.name)
    found = list(step_statuses(loaded, past, told, dtype, facts_digest(questions), fresh))
    lines = list(_lines(r.variants, found, past, start, here, on_gpu[1], folder.name, dtype))
    made = Plan(folder, lines, models, rows, here, round(baseline_memory(start)))
    return replace(made, shortfalls=list(_shortfalls(made)))


def _lines(
    variants: Iterable[str],
    found: list[StepStatus],
    past: ReuseIndex,
    start: CostContext,
    here: Machine,
    gpu: bool,
    run: str,
    dtype: str,
) -> Iterator[PlanLine]:
    def line(
        name: str,
        use: str,
        need: Cost,
        reused: bool,
        why: str,
        about: dict[str, Any],
        seconds: float | None = None,
    ) -> PlanLine:
        ram, device = need.host_bytes, need.device_bytes
        if not gpu:
            ram, device = ram + device, 0
        took = need.operations / here.speed if seconds is None else seconds
        sizes = (
            (0, 0, 0, 0.0)
            if reused
            else (round(ram), round(device), round(need.disk_bytes), round(took, 1))
        )
        named = dict(zip(("ram_bytes", "gpu_bytes", "disk_bytes", "seconds"), sizes, strict=True))
        rest: dict[str, Any] = {
            "stage": "",
            "plugin": "",
            "needs": [],
            "variants": [],
            **about,
            **named,
        }
        return PlanLine(id=name, use=use, reused=reused, why=why, **rest)

    if start.texts.questions_asked:
        had = past.start != UNKNOWN
        why = (
            "the same models and texts were run before"
            if had
            else "not made before from these models and texts"
        )
        yield line("teacher's answers", "", teacher_answers_cost(start), had, why, {})
    captures = dict.fromkeys(
        fate.recipe_step.id for fate in found if fate.recipe_step.stage == "capture"
    )
    ends = dict.fromkeys(variants, start)
    counted: set[Hashable] = set()  # files that an earlier step shares
    for fate in found:
        at = reduce(_after, fate.behind, start)
        recipe_step, origin = fate.recipe_step, fate.recipe_step.origin
        about = {
            "stage": recipe_step.stage,
            "plugin": f"{origin.distribution} {origin.version}",
            "variants": fate.variants,
            "needs": _takes(fate, captures),
        }
        seconds = (
            fate.last.seconds
            if fate.last and fate.last.options == options_of(recipe_step.step)
            else None
        )
        ends |= dict.fromkeys(
            fate.variants, at if recipe_step.stage == "evaluate" else _after(at, recipe_step)
        )
        need = step_cost(recipe_step.step, at)
        shared = sum(size for key, size in need.shared_files.items() if key not in counted)
        counted |= need.shared_files.keys()
        need = replace(need, disk_bytes=need.disk_bytes + shared)
        yield line(
            recipe_step.id,
            recipe_step.step.use,
            need,
            fate.record is not None,
            fate.why,
            about,
            seconds,
        )
    for variant, at in ends.items():
        there = has_checkpoint(past, run, variant, found, dtype)
        why = "in the run's folder" if there else "not saved before behind these steps"
        yield line(
            "checkpoints",
            "",
            checkpoint_cost(at, DTYPE_BYTES[dtype]),
            there,
            why,
            {"variants": [variant]},
        )


def _after(context: CostContext, recipe_step: RecipeStep) -> CostContext:
    """Return the context after a step; what it refuses is said with its id."""
    try:
        return context_after(recipe_step.step, context)
    except RecipeError as error:
        raise RecipeError(
            *(f'step "{recipe_step.id}": {problem}' for problem in error.problems)
        ) from error


def _takes(fate: StepStatus, captures: Iterable[str]) -> list[str]:
    """Return what a step stands on, by the arguments of its hook; `captures` are the recipe's capture steps.

    Raises:
        RecipeError: it wants captured states, and nothing before it captures any.
    """
    recipe_step = fate.recipe_step
    names = inspect.signature(getattr(recipe_step.step, recipe_step.stage)).parameters
    if "activations" in names and not any(before.stage == "capture" for before in fate.behind):
        there, here = (
            " and ".join(f'"{name}"' for name in names) for names in (captures, fate.variants)
        )
        todo = 'put a capture step (use = "residuals") before it'
        if there:
            todo = f"nothing before it in {here} captures any. There is {there}: let it come before, and name it in {here} or in no variant"
        raise RecipeError(f'step "{recipe_step.id}": needs captured states; {todo}.')
    return [
        what
        for name, what in (("activations", "captured states"), ("maps", "maps"))
        if name in names
    ]


def _shortfalls(planned: Plan) -> Iterator[str]:
    """Say what does not suffice, and for what."""
    here, need = planned.machine, planned.peak
    for what, size, free in (
        ("memory", "ram_bytes", here.ram),
        ("GPU memory", "gpu_bytes", here.gpu),
    ):
        worst = max(planned.todo, key=lambda line: getattr(line, size), default=None)
        if worst and need[size] > free:
            yield f'"{worst.id}" needs about {format_bytes(need[size])} of {what}; {format_bytes(free)} are free'
    if need["disk_bytes"] > here.disk:
        worst = max(planned.todo, key=lambda line: line.disk_bytes)
        yield f'the run writes about {format_bytes(need["disk_bytes"])}, most of it for "{worst.id}"; {format_bytes(here.disk)} are free on the disk'


def format_bytes(size: float) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def time_class(seconds: float) -> str:
    """Return whether something takes seconds, minutes, hours or days."""
    return next(name for most, name in CLASSES.items() if seconds < most)
