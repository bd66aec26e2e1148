"""What answers in a run: the engine of the recipe, in the teacher's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rotdistill_core.forward.answers import KeptAnswers, kept_answers, shared_output
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.plugin.registry import connected_engine

if TYPE_CHECKING:
    from rotdistill_core.execution.context import RunContext
    from rotdistill_core.plugin.engine import Answering, Asked


def teacher_answers(run: RunContext, asked: Mapping[str, Asked], series: str) -> KeptAnswers:
    """Return the teacher's answers, by the engine of the recipe.

    Every run in the same folder finds them again.

    Args:
        run: the run.
        asked: the prompts by name, in tokens of the teacher; at least one.
        series: names the files; see `RunLayout.answers`.

    Raises:
        RotdistillError: see `kept_answers`.
    """
    teacher, engine = run.pair.teacher, run.loaded.engine

    def connect(model: AnsweringModel, log: Callable[[str], None]) -> Answering:
        return connected_engine(engine, model, log)

    out = shared_output(teacher, asked, run.output("answers"), engine.key())
    model = AnsweringModel.of(teacher)
    return kept_answers(connect, model, asked, out, series, run.progress)
