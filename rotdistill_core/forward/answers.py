"""Greedy answers that survive a kill: each chunk of prompts is committed as a file of its own.

A run that goes on loads the model once and generates only the chunks that are missing. Each chunk
states how many prompts were answered at once at its end, and the next one starts with that number,
so a resumed run generates in batches of the same shape.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_core.data.batching import ANSWERS_AT_ONCE
from rotdistill_core.forward.generate import AnswerWriter, Decoding, Prompts, chunks_of
from rotdistill_core.plugin.source_code import core_digest
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_text

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


class KeptAnswers(NamedTuple):
    """Greedy answers, every one of them committed."""

    tokens: dict[str, list[int]]
    """Name of the prompt -> tokens up to and with the first end-of-turn token."""
    made: int
    """How many of them were generated now; the others were found."""


def model_answers(
    model: Model,
    prompts: Prompts,
    max_tokens: int,
    out: StepOutput,
    series: str,
    progress: Progress,
) -> KeptAnswers:
    """Return the greedy answers of an opened model; every run in the same folder finds them again.

    Args:
        model: the model, unedited.
        prompts: token ids by name; at least one prompt.
        max_tokens: most tokens of an answer.
        out: where to commit.
        series: names the files; see `RunLayout.answers`.
        progress: called before each batch.

    Raises:
        SetupError: see `kept_answers`.
    """
    shared = out.shared(
        "answers",
        model.sha256,
        digest(list(prompts.items())),  # their order decides which of equal length go together
        str(max_tokens),
        str(model.dtype),
        model.device.type,
        code=core_digest("forward.answers"),
    )
    decoding = Decoding.of(model, max_tokens)
    return kept_answers(decoding, prompts, shared, series, progress)


def kept_answers(
    decoding: Decoding, prompts: Prompts, out: StepOutput, series: str, progress: Progress
) -> KeptAnswers:
    """Return the greedy answers to prompts: those that are committed, and the rest made now.

    If memory ran out, the notes of the step say how many prompts were answered at once.

    Args:
        decoding: the model and the length of its answers.
        prompts: token ids by name; at least one prompt.
        out: where to commit. Its key covers model, prompts, length, dtype and device.
        series: names the files; see `RunLayout.answers`.
        progress: called before each batch.

    Raises:
        SetupError: the device has no memory for the model or a single prompt, or the disk refuses.
    """
    writer = AnswerWriter(decoding, prompts, progress, out.store.warn)
    tokens: dict[str, list[int]] = {}
    made = 0
    at_once = ANSWERS_AT_ONCE
    for number, names in enumerate(chunks_of(prompts)):
        name = RunLayout.answers(series, number)
        path = out.find(name)
        if path is None:
            chunk = writer.write(names, at_once, done=len(tokens))
            path = out.json(name, chunk._asdict())
            made += len(names)
        # Read back whether found or made, so that a resumed run goes on from the same values.
        content = json.loads(read_text(path))
        tokens |= content["answers"]
        at_once = content["at_once"]
    if at_once < ANSWERS_AT_ONCE:
        out.notes["answers at once, for want of memory"] = at_once
    return KeptAnswers(tokens, made)
