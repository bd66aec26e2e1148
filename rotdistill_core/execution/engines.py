"""What answers in a run: the engine of the recipe, in the teacher's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rotdistill_core.forward.answers import Connect, KeptAnswers, kept_answers, shared_output
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.plugin.registry import connected_engine

if TYPE_CHECKING:
    from rotdistill_core.execution.context import RunContext
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.plugin.engine import Answering, Asked


def connected_once(run: RunContext) -> Connect:
    """Return how the engine of the recipe is connected: once, for several series.

    A model that answers here is then loaded once. Each series begins with as many prompts at once
    as the first, so that its answers do not depend on the series before it.
    """
    engine = run.loaded.engine
    connected: list[tuple[Answering, int]] = []

    def connect(model: AnsweringModel, log: Callable[[str], None]) -> Answering:
        if not connected:
            answering = connected_engine(engine, model, log)
            connected.append((answering, answering.at_once))
        answering, at_once = connected[0]
        answering.at_once = at_once
        return answering

    return connect


def teacher_answers(
    run: RunContext,
    asked: Mapping[str, Asked],
    series: str,
    connect: Connect | None = None,
    progress: Progress | None = None,
) -> KeptAnswers:
    """Return the teacher's answers, by the engine of the recipe.

    Every run in the same folder finds them again.

    Args:
        run: the run.
        asked: the prompts by name, in tokens of the teacher; at least one.
        series: names the files; see `RunLayout.answers`.
        connect: gives the engine; see `connected_once`. By default it is connected anew.
        progress: called with the number of answers so far; by default that of the run.

    Raises:
        RotdistillError: see `kept_answers`.
    """
    teacher, engine = run.pair.teacher, run.loaded.engine
    out = shared_output(teacher, asked, run.output("answers"), engine.key())
    model = AnsweringModel.of(teacher)
    told = progress or run.progress
    return kept_answers(connect or connected_once(run), model, asked, out, series, told)
