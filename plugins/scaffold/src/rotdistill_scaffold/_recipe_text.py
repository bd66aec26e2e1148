"""The text of a new recipe: every choice with a comment that gives its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from rotdistill_core.characters import visible, visible_json
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.recipe.document import SamplesRef

COMMENT_COLUMN = 30
LONGEST_LINE = 100
KEPT_DEPTH = 0.8
"""Share of the layers that a first cut keeps."""
ALIGNED_TEXTS = 48
"""Texts on which the student is captured: aligners need few."""
HEAD_TEXTS = 64
"""Texts that a head is fitted on: it has few unknowns for each token."""
USUAL_TOKENS = 512
"""Longest text to fit on, if no prompt is longer."""
USUAL_ANSWER = 64
"""Tokens of an answer, where no text has one."""
LONGEST_ANSWER = 256
ROOM = 64
"""Tokens after the longest prompt."""
ROUND_TO = 8
ENOUGH_TEXTS = 100
"""Texts from which a result is more than a trial; see docs/paths/texts.md."""
FIRST_LESSONS = 1000
"""Texts that the teacher may write where there are few; more teach a refit little."""
MOST_ANSWERS = 0.95
"""Share of the answers that are no longer than those that the teacher writes."""


class Kind(StrEnum):
    """What can be done with two models."""

    cut = "cut"
    """They are one model: the student is the teacher with fewer layers."""
    pair = "pair"
    """They have one vocabulary: the student learns the teacher's predictions."""
    streams = "streams"
    """They have two vocabularies: their streams can be aligned, and no more."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """What is known of the texts. Lengths are in tokens of the teacher."""

    samples: SamplesRef
    """The files and shares."""
    splits: dict[str, int]
    """Split -> number of its texts, without a limit."""
    answered: bool
    """Whether all texts to fit on have an answer."""
    own_prompts: bool
    """Whether texts have system prompts of their own, not all the same."""
    shared_prompt: bool
    """Whether they all have the same, so that it is that of the run."""
    longest_prompt: int
    longest_text: int
    answers: tuple[int, ...]
    """Lengths of the answers, rising."""
    limit: int | None
    """Tokens that the models were made for."""
    guard_texts: int
    """Number of texts outside the domain."""
    chose_guard: bool
    """Whether those are shipped ones, because nobody named others."""

    @property
    def count(self) -> int:
        """Number of texts of the index."""
        held = self.splits.get("heldout", 0) if self.samples.heldout is None else 0
        return self.splits.get("fit", 0) + self.splits.get("validation", 0) + held

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer of the teacher: most answers of the texts are no longer."""
        usual = USUAL_ANSWER
        if self.answers:
            usual = self.answers[min(int(MOST_ANSWERS * len(self.answers)), len(self.answers) - 1)]
        room = self.limit - self.longest_prompt if self.limit else LONGEST_ANSWER
        return max(1, min(_rounded(usual), LONGEST_ANSWER, room))

    @property
    def max_tokens(self) -> int:
        """Tokens after which texts are cut: room for all of them, if they are of usual length."""
        if not self.longest_prompt:
            return USUAL_TOKENS
        whole = max(self.longest_text, self.longest_prompt + self.answer_tokens)
        usual = min(_rounded(whole), USUAL_TOKENS)
        return max(16, usual, _rounded(self.longest_prompt + ROOM) if usual < whole else 0)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What depends on the machine."""

    limit: int | None = None
    """Use so many texts; None: all."""
    own_answers: bool = True
    """Also fit on the teacher's own answers."""
    train: bool = True
    """Train a LoRA, where that is of use."""
    moments: bool = False
    """Keep sums and not the rows of all texts."""
    narrow: bool = False
    """Compute in bfloat16 where the device does not."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a recipe is written from."""

    name: str
    kind: Kind
    pair: Pair
    facts: TextFacts
    machine: str
    """The machine, in words."""
    fast_bfloat16: bool
    """Whether the machine multiplies in bfloat16 faster than in float32."""

    @property
    def refits(self) -> bool:
        """Whether writers can be refitted: what they write goes into the stream as it is."""
        return self.kind is Kind.cut and bool(self.pair.teacher.adapter.writers)

    @property
    def trains(self) -> bool:
        """Whether a LoRA has something to add, and layers to be trained on."""
        fused = bool(self.pair.student.adapter.fused)
        return self.kind is not Kind.streams and not self.refits and not fused

    def fits_head(self, train: bool) -> bool:
        """Return whether to fit a head.

        That of a cut student is the teacher's own, and tied to the embedding. A fit of it after a
        refit or a LoRA gained nothing measurable, and unties it: a fifth more parameters.
        """
        if self.kind is Kind.cut:
            return not self.refits and not (self.trains and train)
        return self.kind is Kind.pair

    @property
    def aligns(self) -> bool:
        """Whether the student's stream can be rotated onto the teacher's: it may not be wider."""
        return self.pair.student.width <= self.pair.teacher.width

    @property
    def folds(self) -> bool:
        """Whether the student's stream can be rotated at all."""
        student = self.pair.student
        return self.aligns and not student.adapter.gains(student.config).stuck


def guard_choice(facts: TextFacts) -> str:
    """Return which texts outside the domain a recipe names, and why."""
    if not facts.samples.guard:
        return "no texts outside the domain; --guard would name some, to limit what is forgotten"
    if not facts.chose_guard:
        return "texts outside the domain, which should stay right"
    return (
        f"{facts.guard_texts} shipped texts outside the domain, since --guard named none: an edit "
        "may cost little there"
    )


def splits_in_words(facts: TextFacts, limit: int | None) -> str:
    """Return what the texts are used for.

    Args:
        facts: the texts.
        limit: number of them that a first run uses; None for all.
    """
    fit, chosen, held = (facts.splits.get(name, 0) for name in ("fit", "validation", "heldout"))
    words = f"{fit} to learn from, {chosen} to choose options on, {held} held out to score"
    if limit:
        words += f"; samples.limit takes {limit} of them at first"
    if not facts.samples.heldout:
        words += "; with --heldout FILE more are learned"
    return words


def outside_advice(samples: SamplesRef) -> str:
    """Return what to do with files outside the folder of the recipe; empty without any."""
    named = {key: getattr(samples, key) for key in ("index", "heldout", "style", "guard")}
    outside = {
        key: path
        for key, path in named.items()
        if path and (path.startswith("..") or PurePath(path).is_absolute())
    }
    if not outside:
        return ""
    return (
        f"outside the recipe's folder: {', '.join(outside.values())}. Before you move that folder, "
        f"copy them into it and name the copies: {', '.join(f'samples.{key}' for key in outside)}."
    )


def few_texts_advice(setting: Setting) -> str:
    """Return what to do where there are few texts; empty where there are enough."""
    count = setting.facts.count
    if count >= ENOUGH_TEXTS or setting.kind is Kind.streams:  # aligners need few
        return ""
    return (
        f"{count} conversations show that everything works, and are few for a result: take "
        f"{ENOUGH_TEXTS} or more. The teacher writes some: `rotdistill run {setting.name}.toml "
        f"--set lessons.count={FIRST_LESSONS} --set lessons.from=teacher`; see docs/lessons.md."
    )


def recipe_text(setting: Setting, choices: Choices) -> str:
    """Return a recipe."""
    blocks = [
        _head(setting),
        *_models(setting, choices),
        _samples(setting, choices),
        *_steps(setting, choices),
        _variants(setting, choices),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


# Lines.


def _line(key: str, value: object, comment: str = "") -> Iterator[str]:
    """Yield a key with its value, and a comment beside it or, where it is long, above."""
    line = f"{key} = {visible_json(value)}"
    beside = f"{line:<{COMMENT_COLUMN - 1}} # {comment}"
    if comment and len(beside) > LONGEST_LINE:
        yield from _comment(comment)
        yield line
    else:
        yield beside if comment else line


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        LONGEST_LINE,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _step(comment: str, use: str, step_id: str = "", **options: object) -> list[str]:
    """Return a step, with a comment beside its method."""
    lines = ["[[step]]"]
    if step_id:
        lines += _line("id", step_id)
    lines += _line("use", use, comment)
    for key, value in options.items():
        lines += _line(key, value)
    return lines


def _rounded(tokens: int) -> int:
    """Return a number of tokens rounded up."""
    return -(-tokens // ROUND_TO) * ROUND_TO


# Tables.

TITLES = {
    Kind.cut: "The student is the teacher with fewer layers, and learns to do without them.",
    Kind.pair: "A small model learns the predictions of a large one on these texts.",
    Kind.streams: (
        "Two models with different tokenizers: their streams are aligned. No step teaches a "
        "student of another vocabulary; take one with the teacher's tokenizer for that."
    ),
}


def _head(setting: Setting) -> list[str]:
    about = f"{TITLES[setting.kind]} Written by `rotdistill new recipe` for {setting.machine}."
    return [*_comment(about), *_line("name", setting.name), "seed = 0"]


def _models(setting: Setting, choices: Choices) -> Iterator[list[str]]:
    teacher, student = setting.pair.teacher, setting.pair.student
    narrow: list[str] = []
    if choices.narrow:
        narrow = list(_line("dtype", "bfloat16", "half the memory of float32, and slower on a CPU"))
    yield ["[teacher]", *_line("model", teacher.ref.model, _sizes(teacher)), *narrow]
    what = "the same model: `chop` below cuts it" if setting.kind is Kind.cut else _sizes(student)
    lines = ["[student]", *_line("model", student.ref.model, what), *narrow]
    if setting.kind is Kind.streams and setting.folds:
        lines += _line("save_dtype", "float32", "an exact step stays exact when it is saved")
    yield lines


def _sizes(model: Model) -> str:
    """Return a model's type and sizes in words."""
    kind = visible(str(model.config["model_type"]))
    shape = ModelShape(model.adapter, model.config, "float32")
    size = f"{shape.parameters() / 1e6:,.1f} million parameters"
    return f"{kind}, {model.depth} layers of width {model.width}, {size}"


def _samples(setting: Setting, choices: Choices) -> list[str]:
    facts, samples = setting.facts, setting.facts.samples
    answers = "all with answers" if facts.answered else "some without an answer"
    lines = ["[samples]"]
    lines += _comment(few_texts_advice(setting))
    lines += _line("index", samples.index, f"{facts.count} conversations, {answers}")
    if samples.style:
        others = " of texts without their own" if facts.own_prompts else ""
        lines += _line("style", samples.style, f"the system prompt{others}: edit it")
    elif facts.shared_prompt:
        lines += _comment("The system prompt is that of the conversations: all have the same.")
    elif not facts.own_prompts:
        lines += _comment('style = "system.md" would name a system prompt; there is none')
    lines += _heldout(facts)
    chosen = f"{facts.splits.get('validation', 0)} of the {facts.count} texts: options are chosen"
    lines += _line("validation", samples.validation, f"{chosen} on them")
    if samples.guard:
        lines += _line("guard", samples.guard, guard_choice(facts))
    else:
        lines += _comment('guard = "other.jsonl" would limit what is forgotten outside the domain')
    if choices.limit:
        why = f"of {facts.count}: with more a first run takes long here; remove this for all"
        lines += _line("limit", choices.limit, why)
    longest = f"the longest text has {facts.longest_text}" if facts.longest_text else ""
    if facts.longest_text > facts.max_tokens:
        longest += ", and is cut"
    lines += _line("max_tokens", facts.max_tokens, longest)
    why = "most answers of the texts are no longer" if facts.answers else "raise it if answers end"
    lines += _line("answer_tokens", facts.answer_tokens, f"of a held-out answer: {why}")
    if choices.own_answers:
        why = "also fit on the teacher's own answers" if facts.answered else "the teacher answers"
        lines += _line("own_answers", facts.answer_tokens, f"{why}, up to so many tokens")
    else:
        lines += _comment(
            f"own_answers = {facts.answer_tokens} would fit on the teacher's own answers, too; a "
            "first run takes long with them here"
        )
    return lines


def _heldout(facts: TextFacts) -> Iterator[str]:
    samples, count = facts.samples, facts.splits.get("heldout", 0)
    if samples.heldout:
        yield from _line("heldout", samples.heldout, f"{count} questions that score variants")
    else:
        why = f"{count} of the {facts.count} texts: they score variants, and do nothing else"
        yield from _line("heldout_share", samples.heldout_share, why)


def _steps(setting: Setting, choices: Choices) -> Iterator[list[str]]:
    if setting.kind is Kind.cut:
        yield _chop(setting.pair.student)
    yield _capture(setting, choices)
    if setting.kind is Kind.streams:
        yield from _alignment(setting)
    else:
        if setting.refits:
            why = "transfer: the layers make up for those that were cut, in closed form"
            yield _step(why, "writer-refit", "refit", writers=["heads", "neurons"])
        if setting.fits_head(choices.train):
            why = "transfer: the head is fitted to the teacher's predictions"
            fits = {"objective": "kl"} if setting.kind is Kind.pair else {}
            yield _step(why, "lm-head-ridge", "head", max_texts=HEAD_TEXTS, **fits)
        yield from _training(setting, choices)
    yield _step("evaluate: predictions, compared with the teacher's", "fidelity")
    yield _step("evaluate: variants answer the held-out questions", "answers")


def _chop(student: Model) -> list[str]:
    depth = student.depth
    if depth == 1:
        neurons = student.adapter.sizes(student.config)["neurons.0"]
        why = f"cut: a fifth of its {neurons} neurons, since it has one layer"
        return _step(why, "chop", neurons=max(1, round(KEPT_DEPTH * neurons)))
    layers = min(max(1, round(KEPT_DEPTH * depth)), depth - 1)
    why = f"cut: {depth - layers} of {depth} layers, those that change the stream least"
    return _step(why, "chop", layers=layers)


def _capture(setting: Setting, choices: Choices) -> list[str]:
    options: dict[str, Any] = {}
    if setting.facts.count > ALIGNED_TEXTS:
        options["student_texts"] = ALIGNED_TEXTS
    if setting.kind is Kind.streams:
        options["layer_map"] = "match"  # which layers belong together
    if choices.moments:
        options["store"] = "moments"  # rows would not fit here
    return _step("capture: what both models compute between layers", "residuals", **options)


def _alignment(setting: Setting) -> Iterator[list[str]]:
    if not setting.aligns:
        yield _comment("No aligner: the student is wider than the teacher.")
        return
    yield _step("align: one rotation for the whole stream", "procrustes", "basis")
    if setting.folds:
        why = "exact: the student in the teacher's principal frame"
        yield _step(why, "basis-fold", "fold", mode="canonical")


def _training(setting: Setting, choices: Choices) -> Iterator[list[str]]:
    if not setting.trains:
        return
    if not choices.train:
        yield _comment(
            'A step with use = "prompt-kl" would train a LoRA on the teacher\'s own answers. That '
            "takes long here."
        )
        return
    fast = {"bfloat16": True} if setting.fast_bfloat16 else {}
    why = "transfer: a LoRA, trained on the teacher's own answers and folded"
    yield _step(
        why,
        "prompt-kl",
        "style",
        prompts_from=["questions"],
        max_epochs=2,
        **fast,
    )


def _variants(setting: Setting, choices: Choices) -> list[str]:
    title = ["# Steps that a variant names run in it alone; the others run in all."]
    return [*title, "[variants]", *_named(_toggles(setting, choices))]


def _toggles(setting: Setting, choices: Choices) -> dict[str, list[str]]:
    if setting.kind is Kind.streams:
        aligned = ["basis"] if setting.aligns else []
        folded = [*aligned, "fold"] if setting.folds else aligned
        return {"base": ["answers"]} | ({"rotated": folded} if folded else {})
    edits = ["refit"] if setting.refits else []
    if setting.fits_head(choices.train):
        edits.append("head")
    if setting.trains and choices.train:
        edits.append("style")
    first = {edits[0]: edits[:1]} if len(edits) > 1 else {}
    return {"base": ["answers"], **first, "full": [*edits, "answers"]}


def _named(variants: dict[str, list[str]]) -> Iterator[str]:
    for name, steps in variants.items():
        yield from _line(name, steps)
