"""The step `lm-eval`: score variants with EleutherAI's LM Evaluation Harness."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.errors import SetupError
from rotdistill_core.planning.cost import Cost, CostContext, evaluation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress


@step
class LmEval:
    """Score each saved variant on tasks that files in a folder describe; nothing is downloaded.

    There is one row for each metric of each task, called `task.metric`, and one for each document
    that it is the mean of. The step needs the package `lm_eval`, which is optional.
    """

    use: Literal["lm-eval"] = "lm-eval"
    folder: Annotated[str, Field(min_length=1)]
    """Folder of the task files (YAML, in the harness's format), relative to the current folder."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks in the folder."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Number of examples before each question; without it, as the task says."""
    limit: PositiveInt | None = None
    """Number of documents of each task, from the first on; without it, all."""
    batch_size: PositiveInt = 8
    """Requests that are computed at a time."""

    def __post_init__(self) -> None:
        """Refuse the recipe while it is read, not when the other steps are done.

        Raises:
            SetupError: the harness is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise SetupError(
                "lm-eval: the package lm_eval is not installed, and it is optional. "
                'Install it: pip install "lm-eval>=0.4.9"; or leave the step out.'
            )

    def cost(self, context: CostContext) -> Cost:
        """That of the held-out texts; a plan does not know how long the tasks are."""
        return evaluation_cost(context)

    @hookimpl
    def evaluate(self, variant: Variant, pair: Pair, progress: Progress) -> list[MetricRow]:
        """See `HookSpecs.evaluate`."""
        from rotdistill_lm_eval._method import evaluate

        return evaluate(self, variant, pair, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [LmEval]
