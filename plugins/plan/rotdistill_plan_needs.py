"""What each step needs: memory, disk and time, from sizes alone.

Counted are the tensors that a step holds at once at its worst. Libraries and tokenizers are counted once, in the peak (`around`). Pages of
weight files that are mapped come on top as far as there is room, and go again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rotdistill_plan_models import WIDTH, Shape
from rotdistill_plan_texts import Texts

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe import Placed

LIBRARIES = 0.3e9
"""Memory of torch, transformers and scipy once they are loaded, bytes."""
TOKEN = 600
"""Memory of a tokenizer for each of its tokens, bytes."""
BATCH = 1536
"""Tokens that go through a layer at once; see `Walk`."""
ANSWERS = 64
"""Answers that are generated at once; see `greedy`."""
BLOCK = 256
"""Rows whose logits are compared at once."""
F64 = 8
Note = str


@dataclass(frozen=True)
class Need:
    """What a step needs, in bytes and operations."""

    ram: float = 0.0
    device: float = 0.0
    """Memory where models compute: the GPU's, or `ram` as well where there is none."""
    disk: float = 0.0
    work: float = 0.0
    """Floating-point operations."""


@dataclass(frozen=True)
class Pairing:
    """The two models at some point of a chain, and the texts."""

    teacher: Shape
    student: Shape
    texts: Texts
    compute: tuple[int, int]
    """Bytes of a number while teacher and student compute."""
    same: bool

    @property
    def wide(self) -> int:
        """Bytes of a number of the student."""
        return self.compute[1]


def around(at: Pairing) -> float:
    """Return the memory that is there in every step."""
    return LIBRARIES + TOKEN * (at.teacher.vocab + at.student.vocab)


def copied(shape: Shape, number: int) -> int:
    """Return the bytes that a parameter takes when it is read: none of its own where the file has it as it is computed with."""
    return 0 if WIDTH[shape.stored] == number else number


def compared(at: Pairing, rows: float) -> float:
    """Return the memory in which predictions are compared: both heads, and a block of rows of logits."""
    s, t = at.student, at.teacher
    heads = s.vocab * (s.width * copied(s, at.wide) + t.width * copied(t, at.wide))
    return heads + 7 * min(BLOCK, rows) * s.vocab * at.wide


def answering(at: Pairing, split: str) -> float:
    """Return how many rows of a split predict answers: its share of what the teacher says itself, or half of its rows."""
    said = at.texts.texts.get(split, 0) * at.texts.said / max(at.texts.asked, 1)
    return said if split == "heldout" else at.texts.rows.get(split, 0) / 2


def walked(shape: Shape, rows: int, number: int) -> Need:
    """Return what it takes to send rows through a model, layer by layer: two layers and one being read, all states, one batch."""
    batch = min(rows, BATCH) * (3 * shape.neurons + 2 * shape.queries + 4 * shape.width)
    return Need(rows * shape.width * number, (2.5 * shape.layer + batch) * number, 0, 2 * shape.parameters(inside=True) * rows)


def generated(shape: Shape, texts: Texts, asked: int, said: int, number: int) -> Need:
    """Return what it takes to let a whole model answer: its weights, keys and values of a batch, and logits."""
    longest = texts.prefix + (texts.total - texts.prefix) / max(sum(texts.texts.values()), 1) + said / max(asked, 1)
    cache = min(asked, ANSWERS) * longest * shape.depth * 2 * shape.keys * number
    whole = shape.parameters() * number
    return Need(0, whole + cache + min(asked, ANSWERS) * shape.vocab * 4, 0, 2 * shape.parameters() * said * 4)


def teacher_answers(at: Pairing) -> Need:
    """Return what the teacher's own answers need, ahead of all steps."""
    return generated(at.teacher, at.texts, at.texts.asked, at.texts.said, at.compute[0]) if at.texts.asked else Need()


def needs(placed: Placed, at: Pairing) -> Need:
    """Return what a step needs; one that is not known here is taken for a plain one of its stage."""
    use = placed.step.use
    return (KNOWN.get(use) or BY_STAGE[placed.stage])(placed.step, at)


def checkpoint(at: Pairing, number: int) -> Need:
    """Return what a saved variant needs."""
    largest = at.student.vocab * at.student.width
    return Need(largest * (at.wide + number), 0, at.student.parameters() * number)


def after(placed: Placed, at: Pairing) -> Pairing:
    """Return the pair behind a step: cut, widened, its head untied.

    Raises:
        RecipeError: a cut leaves more than there is.
    """
    step, student = placed.step, at.student
    if placed.step.use == "chop":
        a = student.adapter
        keys = {"layers": a.depth_key, "neurons": a.neurons_key, "groups": a.groups_key, "width": a.width_key}
        asked = {what: len(left) if isinstance(left, list) else left for what in keys if (left := getattr(step, what))}
        for what, left in asked.items():
            if left > (there := student.config.get(keys[what], left)):
                raise RecipeError(f'step "{placed.id}": {what} = {left}, but the student has {there}.')
        cut = {keys[what]: left for what, left in asked.items()}
        if step.groups:
            heads = a.heads(student.config)
            cut |= {a.query_key: step.groups * (heads.query // heads.groups), "head_dim": heads.width}
        return replace(at, student=student.changed(step.keep or 1.0, **cut, **({"tie_word_embeddings": False} if step.width else {})))
    untied: dict[str, Any] = {}
    if placed.step.use in ("basis-fold", "lm-head-ridge"):  # the final norm's gain is absorbed, or the head fitted: it is tied no more
        untied["tie_word_embeddings"] = False
    if getattr(step, "mode", None) == "widen":
        heads = student.adapter.heads(student.config)
        untied |= {student.adapter.width_key: at.teacher.width, "head_dim": heads.width}
    if placed.stage in ("fold", "style"):  # what a step changed is kept in the dtype that the student computes in
        student = replace(student, stored=next(name for name, width in WIDTH.items() if width == at.wide))
    return replace(at, student=student.changed(**untied))


def _capture(step: Any, at: Pairing) -> Need:
    rows = at.texts.of("fit", "validation", most=getattr(step, "student_texts", None))
    one, two = walked(at.teacher, at.texts.total, at.compute[0]), walked(at.student, rows, at.compute[1])
    return Need(2 * max(one.ram, two.ram), max(one.device, two.device), 0, one.work + two.work)


def shards(placed: Placed, at: Pairing, key: str) -> dict[tuple[str, str], float]:
    """Return the bytes of each set of states that the capture of a key keeps, by what it is: all share the teacher's, and nothing else."""
    step, t, s = placed.step, at.teacher, at.student
    store, most = getattr(step, "store", "compute"), getattr(step, "student_texts", None)
    numbers = [WIDTH.get(store, number) for number in at.compute]
    theirs = (t.depth + 1) * at.texts.total * t.width * numbers[0]
    ours = (s.depth + 1) * at.texts.of("fit", "validation", most=most) * s.width * numbers[1]
    kept: dict[tuple[str, str], float] = {("teacher", store): theirs, ("student", key): ours}
    if getattr(step, "control", "none") != "none":
        kept["control", key] = theirs
    return kept


def _align(_: Any, at: Pairing) -> Need:
    s, t, rows = at.student, at.teacher, at.texts.of("fit")
    chunks = min(rows, 4096) * (s.width + 2 * t.width) * F64
    matrices = (6 * t.width**2 + 4 * s.width * t.width) * F64
    work = 2.0 * rows * s.width * t.width * (s.depth + 1) + 30.0 * t.width**3
    return Need(rows * (s.width + t.width) * at.wide + chunks + matrices, 0, s.width * t.width * F64, work)


def _assign(_: Any, at: Pairing) -> Need:
    s, t = at.student, at.teacher
    layers = 2 * (s.layer + t.layer) * F64
    work = s.depth * (2.0 * 3 * s.neurons * t.neurons * s.width + 1e-1 * min(s.neurons, t.neurons) ** 3)
    return Need(layers + 3 * s.neurons * t.neurons * F64, 0, s.depth * (s.neurons + s.queries + s.keys) * F64, work)


def _fold(_: Any, at: Pairing) -> Need:
    s = at.student
    head = s.vocab * s.width * F64
    work = 4.0 * s.parameters() * s.width + 8.0 * s.parameters(inside=True) * 2 * at.texts.prefix
    untied = s.changed(tie_word_embeddings=False)
    logits = 8 * min(BLOCK, at.texts.of("validation", most=2)) * s.vocab * F64  # the certificate compares both models' in blocks of rows
    return Need(3.5 * head + logits, 2.5 * s.layer * F64, untied.parameters() * at.wide + s.width**2 * F64, work)


def _refit(step: Any, at: Pairing) -> Need:
    s, rows = at.student, at.texts.of("fit", "validation")
    walk, writers = walked(s, rows, at.wide), getattr(step, "writers", ("neurons",))
    sizes = [{"neurons": s.neurons, "heads": s.queries}[w] for w in writers]
    f = max(sizes)
    made = s.depth * sum(sizes) * s.width * at.wide
    goals = rows * s.width * (F64 + 2 * at.wide)
    moments = (7 * f**2 + 6 * f * s.width) * F64
    work = walk.work * (1 + len(sizes)) + s.depth * sum(2.0 * rows * n * (n + s.width) + 5 * n**3 for n in sizes)
    judged = compared(at, answering(at, "validation"))
    return Need(walk.ram + max(goals + moments, judged) + made, walk.device, 2 * made, work)


def _head(step: Any, at: Pairing) -> Need:
    s, t = at.student, at.teacher
    rows = at.texts.of("fit", most=getattr(step, "texts", None)) + at.texts.of("validation")
    walk, head = walked(s, rows, at.wide), s.vocab * s.width * at.wide
    states = rows * (2 * s.width + 2 * t.width) * at.wide
    lessons = getattr(step, "rows", 0) * getattr(step, "tokens", 0) * at.wide * 2 if getattr(step, "objective", "ridge") != "ridge" else 0
    blocks = 3 * min(128, rows) * s.vocab * at.wide
    held = 3 * head + s.vocab * (s.width * copied(s, at.wide) + t.width * copied(t, at.wide))
    return Need(walk.ram + states + held + blocks + lessons, walk.device, head, walk.work + 10.0 * 1024 * s.vocab * (s.width + t.width))


def _train(step: Any, at: Pairing) -> Need:
    s, t, texts = at.student, at.teacher, at.texts
    rows, many = texts.of("fit", "validation"), max(texts.texts.get("fit", 0) + texts.texts.get("validation", 0), 1)
    length = (rows - texts.prefix) / many + texts.prefix
    asked = {"places": min(getattr(step, "prompts", 200), many / 2), "questions": many / 2}  # half of the texts are answers of its own
    batch = getattr(step, "batch", 4) * length * at.wide
    grown = batch * (s.depth * (14 * s.width + 6 * s.neurons) + 4 * s.vocab)
    told = sum(asked[what] for what in getattr(step, "ask", ("places",))) * length * getattr(step, "epochs", 3)
    work = 6.0 * s.parameters() * told / (4 if getattr(step, "bfloat16", False) else 1)
    made, heads = s.parameters(inside=True) * at.wide, s.vocab * (s.width + t.width) * at.wide
    states = rows * t.width * at.wide
    return Need(states + made + heads, s.parameters() * at.wide + grown, states + made, work + walked(t, rows, at.compute[0]).work)


def _cut(step: Any, at: Pairing) -> Need:
    s = at.student
    rows = min(at.texts.of("fit", most=step.texts), getattr(step, "fitted", 1 << 60))
    walk, wide = walked(s, rows, at.wide), step.keep or step.neurons or step.groups or step.width
    more = min(at.texts.of("fit"), step.fitted) * s.width * at.wide * 3 + 8 * s.neurons**2 * F64 if wide else 0
    return Need(2 * walk.ram + more, walk.device, s.parameters() * at.wide if wide else 0, walk.work * (20 if wide else 1))


def _judge(_: Any, at: Pairing) -> Need:
    s, t = at.student, at.teacher
    rows = at.texts.of("heldout", "guard")
    walk = walked(s, rows, at.wide)
    heads = compared(at, max(answering(at, "heldout"), at.texts.rows.get("guard", 0)))
    frames = 0 if at.same else at.texts.of("fit") * (s.width + t.width) * F64
    return Need(walk.ram + heads + frames, walk.device, 0, walk.work + 2.0 * rows * s.vocab * (s.width + t.width))


def _answers(_: Any, at: Pairing) -> Need:
    asked = at.texts.texts.get("heldout", 0)
    return generated(at.student, at.texts, asked, round(at.texts.said * asked / max(at.texts.asked, 1)), at.wide)


def _edit(_: Any, at: Pairing) -> Need:
    return Need(at.student.parameters() * at.wide, 0, at.student.parameters() * at.wide, 2.0 * at.student.parameters() * at.texts.total)


Estimate = Callable[[Any, Pairing], Need]
BY_STAGE: dict[str, Estimate] = {
    "capture": _capture, "align": _align, "refine": _align, "fold": _edit, "style": _edit, "evaluate": _judge,
}  # fmt: skip
KNOWN: dict[str, Estimate] = {
    "basis-fold": _fold, "chop": _cut, "writer-refit": _refit, "lm-head-ridge": _head, "prompt-kl": _train, "answers": _answers,
    "hungarian-permute": _assign, "head-gauge": _assign, "weight-matching": _assign,
}  # fmt: skip
