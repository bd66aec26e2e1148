"""Answers that survive a kill: each chunk of them is committed as a file of its own.

A series is looked for under its key in all runs of a folder, and only what is missing is asked
for. An engine that divides prompts into chunks itself makes a missing chunk anew, with as many
prompts at once as the chunk before ended with, so a resumed run makes the same answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rotdistill_core.data.batching import ANSWERS_AT_ONCE, ANSWERS_PER_CHUNK
from rotdistill_core.errors import PluginError
from rotdistill_core.forward.generate import AnsweringModel, AnswerWriter
from rotdistill_core.plugin.engine import Answer, Answering, Asked
from rotdistill_core.plugin.source_code import core_digest
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_text

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput

CHUNK_SECONDS = 60.0
"""Answers that stand for themselves are committed when the oldest of them has waited so long."""


Connect = Callable[[AnsweringModel, Callable[[str], None]], Answering]
"""Returns an engine with a model, ready to answer; takes what shows the user one line."""


@dataclass(frozen=True)
class KeptAnswers:
    """Answers, every one of them committed."""

    answers: dict[str, Answer]
    """Name of the prompt -> its answer, in the order of the prompts."""
    made: int
    """How many of them were made now; the others were found."""

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Name of the prompt -> tokens up to and with the first one that ends the answer."""
        return {name: list(answer.tokens) for name, answer in self.answers.items()}


def asked_greedily(prompts: Mapping[str, Sequence[int]], max_tokens: int) -> dict[str, Asked]:
    """Return prompts as they are asked for greedy answers.

    Args:
        prompts: token ids by name.
        max_tokens: most tokens of an answer.
    """
    return {name: Asked(tuple(prompt), max_tokens) for name, prompt in prompts.items()}


def model_answers(
    model: Model,
    prompts: Mapping[str, Sequence[int]],
    max_tokens: int,
    out: StepOutput,
    series: str,
    progress: Progress,
) -> KeptAnswers:
    """Return the greedy answers of an opened model itself, whatever engine a recipe names.

    Every run in the same folder finds them again.

    Args:
        model: the model, unedited.
        prompts: token ids by name; at least one prompt.
        max_tokens: most tokens of an answer.
        out: where to commit.
        series: names the files; see `RunLayout.answers`.
        progress: called with the number of answers so far.

    Raises:
        SetupError: see `kept_answers`.
    """
    asked = asked_greedily(prompts, max_tokens)
    shared = shared_output(model, asked, out, "transformers")
    return kept_answers(AnswerWriter, AnsweringModel.of(model), asked, shared, series, progress)


def shared_output(
    model: Model, asked: Mapping[str, Asked], out: StepOutput, engine: str
) -> StepOutput:
    """Return where answers in the name of a model lie that all runs share.

    Args:
        model: the model.
        asked: the prompts.
        out: that of the step or run.
        engine: the key of what answers.
    """
    return out.shared(
        "answers",
        model.sha256,
        # Their order decides which of equal length go together.
        digest([[name, each.content()] for name, each in asked.items()]),
        str(model.dtype),
        model.device.type,
        engine,
        code=core_digest("forward.answers"),
    )


def kept_answers(
    connect: Connect,
    model: AnsweringModel,
    asked: Mapping[str, Asked],
    out: StepOutput,
    series: str,
    progress: Progress,
) -> KeptAnswers:
    """Return the answers to prompts: those that are committed, and the rest made now.

    If memory ran out, the notes of the step say how many prompts were answered at once.

    Args:
        connect: gives the engine, ready to answer; called if an answer is missing.
        model: the model whose tokens the prompts are.
        asked: the prompts by name; at least one.
        out: where to commit. Its key covers engine, model and prompts.
        series: names the files; see `RunLayout.answers`.
        progress: called with the number of answers so far.

    Raises:
        SetupError: a prompt has tokens that the model does not know, the engine cannot answer one,
            or the disk refuses.
        PluginError: the engine answers what was not asked, or leaves a prompt out.
    """
    kept = _Series(asked, out, series, progress)
    kept.find()
    missing = kept.missing()
    if missing:
        for name, each in missing.items():
            model.require_known_tokens(each.prompt, f"the text {name!r}")
        kept.make(connect(model, out.store.warn))
    least = min(kept.at_once.values())
    if 0 < least < ANSWERS_AT_ONCE:
        out.notes["answers at once, for want of memory"] = least
    return KeptAnswers({name: kept.answers[name] for name in asked}, len(missing))


def answered_once(engine: Answering, wanted: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
    """Yield what an engine answers, each prompt exactly once.

    Raises:
        SetupError: the engine cannot answer a prompt.
        PluginError: it answers what was not asked, twice, with too many tokens or none, or leaves
            a prompt out.
    """
    waiting = dict(wanted)
    for name, answer in engine.answers(wanted):
        asked = waiting.pop(name, None)
        if asked is None or not 0 < len(answer.tokens) <= asked.max_tokens:
            raise _wrong(engine, f"does not answer {name!r} once with 1 to max_tokens tokens")
        yield name, answer
    if waiting:
        raise _wrong(engine, f"leaves out {len(waiting)} prompts: {next(iter(waiting))!r}")


@dataclass
class _Series:
    """The answers of a series while they are collected."""

    asked: Mapping[str, Asked]
    out: StepOutput
    series: str
    progress: Progress
    answers: dict[str, Answer] = field(default_factory=dict)
    at_once: dict[int, int] = field(default_factory=dict)
    """Number of a chunk -> most prompts that were answered at once, at its end."""
    chunks: int = 0
    """Numbers that are taken; a new chunk gets the next one."""

    def find(self) -> None:
        """Take in the chunks that are committed."""
        beginning = RunLayout.answer_chunks(self.series)
        for name in self.out.names(beginning):
            number = int(name.removeprefix(beginning).partition(".")[0])
            self.chunks = max(self.chunks, number + 1)
            if path := self.out.find(name):
                self._take(number, path)

    def missing(self) -> dict[str, Asked]:
        """Return the prompts without an answer."""
        return {name: each for name, each in self.asked.items() if name not in self.answers}

    def make(self, engine: Answering) -> None:
        """Make and commit what is missing.

        Raises:
            RotdistillError: see `kept_answers`.
        """
        self._tell_progress()
        divided = engine.chunks(self.asked)
        if divided is None:
            self._make_as_they_come(engine)
            return
        for number, names in enumerate(divided):
            if number - 1 in self.at_once:
                engine.at_once = self.at_once[number - 1]
            if all(name in self.answers for name in names):
                continue
            wanted = {name: self.asked[name] for name in names}
            for name in wanted:
                self.answers.pop(name, None)
            made = {}
            for name, answer in answered_once(engine, wanted):
                made[name] = answer
                self._tell_progress(len(made))
            self._commit(number, engine, made)

    def _make_as_they_come(self, engine: Answering) -> None:
        """Commit answers when they are many, or when the oldest of them has waited for long.

        When the engine fails, what it has answered is committed first.
        """
        made: dict[str, Answer] = {}
        oldest = 0.0
        try:
            for name, answer in answered_once(engine, self.missing()):
                oldest = oldest if made else time.monotonic()
                made[name] = answer
                self._tell_progress(len(made))
                waited = time.monotonic() - oldest
                if len(made) >= ANSWERS_PER_CHUNK or waited >= CHUNK_SECONDS:
                    self._commit(self.chunks, engine, made)
                    made = {}
        finally:
            if made:
                self._commit(self.chunks, engine, made)

    def _commit(self, number: int, engine: Answering, made: Mapping[str, Answer]) -> None:
        content = {
            "engine": engine.about,
            "at_once": engine.at_once,
            "answers": {
                name: {"tokens": list(answer.tokens), "finish": answer.finish}
                for name, answer in made.items()
            },
        }
        path = self.out.json(RunLayout.answers(self.series, number), content)
        # Read back as if it had been found, so that a resumed run has the same values.
        self._take(number, path)
        self.chunks = max(self.chunks, number + 1)

    def _take(self, number: int, path: Path) -> None:
        content = json.loads(read_text(path))
        self.at_once[number] = content["at_once"]
        for name, answer in content["answers"].items():
            self.answers[name] = Answer(answer["tokens"], answer["finish"])

    def _tell_progress(self, more: int = 0) -> None:
        self.progress(len(self.answers) + more, len(self.asked), "questions are answered")


def _wrong(engine: Answering, what: str) -> PluginError:
    return PluginError(f"the engine {engine.about} {what}.")
