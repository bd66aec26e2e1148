"""What a run would do here: every result in order, what it needs, whether it is there, and what does not suffice."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import psutil
from rotdistill_plan_models import WIDTH, Known, known
from rotdistill_plan_needs import Need, Pairing, after, around, checkpoint, needs, shards, teacher_answers
from rotdistill_plan_reuse import UNKNOWN, Fate, Past, fates, saved
from rotdistill_plan_texts import Texts, count, counter

from rotdistill_core.errors import RecipeError
from rotdistill_core.ledger import Store
from rotdistill_core.models import Pair
from rotdistill_core.recipe import Loaded
from rotdistill_core.samples import claimed, inputs, read_questions
from rotdistill_core.step import options_of

SPEED = {"cpu": 6e10, "gpu": 5e13}
"""Operations in a second, of one core or one GPU: rough, and good enough for a class of time."""
CLASSES = {60: "seconds", 3600: "minutes", 86400: "hours", float("inf"): "days"}


@dataclass(frozen=True)
class Line:
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
class Machine:
    """What there is to be had, in bytes."""

    ram: int
    gpu: int
    """0 where there is none."""
    disk: int
    cores: int

    @property
    def speed(self) -> float:
        """Operations in a second."""
        return SPEED["gpu"] if self.gpu else SPEED["cpu"] * self.cores


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    folder: Path
    lines: list[Line]
    models: dict[str, Known]
    texts: Texts
    machine: Machine
    around: int
    """Memory that is there in every step, bytes."""
    shortfalls: list[str] = field(default_factory=list)

    @property
    def todo(self) -> list[Line]:
        """What has to be made."""
        return [line for line in self.lines if not line.reused]

    @property
    def peak(self) -> dict[str, int]:
        """Memory at its worst and disk in all, of what has to be made."""
        ram = max((line.ram_bytes for line in self.todo), default=0) + self.around
        gpu = max((line.gpu_bytes for line in self.todo), default=0)
        return {"ram_bytes": ram, "gpu_bytes": gpu, "disk_bytes": sum(line.disk_bytes for line in self.todo)}


def machine(root: Path) -> Machine:
    """Return what this machine has to give now."""
    there = next(folder for folder in (root.resolve(), *root.resolve().parents) if folder.exists())
    gpu = 0
    if shutil.which("nvidia-smi"):
        import subprocess

        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        gpu = int(lines[0]) << 20 if lines and lines[0].isdigit() else 0
    return Machine(psutil.virtual_memory().available, gpu, shutil.disk_usage(there).free, os.cpu_count() or 1)


def foresee(loaded: Loaded, root: Path, here: Machine, fresh: bool = False, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Return what `run` would do here.

    Raises:
        RotdistillError: the recipe's models or texts are not there or do not fit.
    """
    r, base = loaded.recipe, loaded.path.parent
    texts = (base / r.samples.index).parent
    questions, style = read_questions(r.samples, base)
    models = {role: known(ref, texts, say) for role in ("teacher", "student", "anchor") if (ref := getattr(r, role))}
    t, s = models["teacher"], models["student"]
    rows = count(questions, style, r.samples, counter(s.folder, s.shape.vocab))
    on_gpu = [ref.device.startswith("cuda") or (ref.device == "auto" and bool(here.gpu)) for ref in (r.teacher, r.student)]
    numbers = [WIDTH[ref.dtype if ref.dtype != "auto" else m.shape.stored if gpu else "float32"]
               for ref, m, gpu in zip((r.teacher, r.student), (t, s), on_gpu, strict=True)]  # fmt: skip
    start = Pairing(t.shape, s.shape, rows, (numbers[0], numbers[1]), r.teacher.model == r.student.model)
    told = None
    if all(m.model for m in models.values()):
        told = inputs(r, Pair(*(m.model for m in models.values() if m.model)), questions, style)
    dtype = s.shape.stored if r.student.save_dtype == "auto" else r.student.save_dtype
    folder = loaded.folder(root)
    past = Past(Store(root).ledgers(), folder.name)
    found = list(fates(loaded, past, told, dtype, claimed(questions), fresh))
    lines = list(_lines(r.variants, found, past, start, here, on_gpu[1], folder.name, dtype))
    made = Plan(folder, lines, models, rows, here, round(around(start)))
    return replace(made, shortfalls=list(_shortfalls(made)))


def _lines(
    variants: Iterable[str], found: list[Fate], past: Past, start: Pairing, here: Machine, gpu: bool, run: str, dtype: str
) -> Iterator[Line]:
    def line(name: str, use: str, need: Need, reused: bool, why: str, about: dict[str, Any], seconds: float | None = None) -> Line:
        ram, device = (need.ram, need.device) if gpu else (need.ram + need.device, 0)
        took = need.work / here.speed if seconds is None else seconds
        sizes = (0, 0, 0, 0.0) if reused else (round(ram), round(device), round(need.disk), round(took, 1))
        named = dict(zip(("ram_bytes", "gpu_bytes", "disk_bytes", "seconds"), sizes, strict=True))
        rest: dict[str, Any] = {"stage": "", "plugin": "", "needs": [], "variants": [], **about, **named}
        return Line(id=name, use=use, reused=reused, why=why, **rest)

    if start.texts.asked:
        had = past.start != UNKNOWN
        why = "the same models and texts were run before" if had else "not made before from these models and texts"
        yield line("teacher's answers", "", teacher_answers(start), had, why, {})
    captures = dict.fromkeys(fate.placed.id for fate in found if fate.placed.stage == "capture")
    ends = dict.fromkeys(variants, start)
    caught: set[tuple[str, str]] = set()  # states that an earlier capture keeps
    for fate in found:
        at = reduce(lambda pair, placed: after(placed, pair), fate.behind, start)
        placed, origin = fate.placed, fate.placed.origin
        about = {
            "stage": placed.stage,
            "plugin": f"{origin.distribution} {origin.version}",
            "variants": fate.variants,
            "needs": _takes(fate, captures),
        }
        seconds = float(fate.last["seconds"]) if fate.last and fate.last["options"] == options_of(placed.step) else None
        ends |= dict.fromkeys(fate.variants, at if placed.stage == "evaluate" else after(placed, at))
        need = needs(placed, at)
        if placed.stage == "capture":
            kept = shards(placed, at, fate.key)
            need = replace(need, disk=sum(size for key, size in kept.items() if key not in caught))
            caught |= kept.keys()
        yield line(placed.id, placed.step.use, need, fate.record is not None, fate.why, about, seconds)
    for variant, at in ends.items():
        there = saved(past, run, variant, found, dtype)
        why = "in the run's folder" if there else "not saved before behind these steps"
        yield line("checkpoints", "", checkpoint(at, WIDTH[dtype]), there, why, {"variants": [variant]})


def _takes(fate: Fate, captures: Iterable[str]) -> list[str]:
    """Return what a step stands on, by the arguments of its hook; `captures` are the recipe's capture steps.

    Raises:
        RecipeError: it wants captured states, and nothing before it captures any.
    """
    placed = fate.placed
    names = inspect.signature(getattr(placed.step, placed.stage)).parameters
    if "bank" in names and not any(before.stage == "capture" for before in fate.behind):
        there, here = (" and ".join(f'"{name}"' for name in names) for names in (captures, fate.variants))
        todo = 'put a capture step (use = "residuals") before it'
        if there:
            todo = f"nothing before it in {here} captures any. There is {there}: let it come before, and name it in {here} or in no variant"
        raise RecipeError(f'step "{placed.id}": needs captured states; {todo}.')
    return [what for name, what in (("bank", "captured states"), ("maps", "maps")) if name in names]


def _shortfalls(planned: Plan) -> Iterator[str]:
    """Say what does not suffice, and for what."""
    here, need = planned.machine, planned.peak
    for what, size, free in (("memory", "ram_bytes", here.ram), ("GPU memory", "gpu_bytes", here.gpu)):
        worst = max(planned.todo, key=lambda line: getattr(line, size), default=None)
        if worst and need[size] > free:
            yield f'"{worst.id}" needs about {gb(need[size])} of {what}; {gb(free)} are free'
    if need["disk_bytes"] > here.disk:
        worst = max(planned.todo, key=lambda line: line.disk_bytes)
        yield f'the run writes about {gb(need["disk_bytes"])}, most of it for "{worst.id}"; {gb(here.disk)} are free on the disk'


def gb(size: float) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def time_class(seconds: float) -> str:
    """Return whether something takes seconds, minutes, hours or days."""
    return next(name for most, name in CLASSES.items() if seconds < most)
