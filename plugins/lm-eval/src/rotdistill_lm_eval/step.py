"""Score every variant on local task files with EleutherAI's LM Evaluation Harness (`lm_eval`), where that is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from unittest import mock

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.planning.cost import Cost, CostContext, evaluation_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.forward.layerwise import Progress


HINT = 'lm-eval: the package lm_eval is not installed, and it is optional. Install it: pip install "lm-eval>=0.4.9"; or leave the step out.'


@step
class LmEval:
    """Score each saved variant on tasks that are described by files in a folder, with the LM Evaluation Harness. Nothing is fetched.

    One row for each metric of each task, called `task.metric`, and one for each document that it is the mean of.
    The harness has to be installed for it.
    """

    use: Literal["lm-eval"] = "lm-eval"
    folder: Annotated[str, Field(min_length=1)]
    """Folder of the task files (YAML, as the harness reads them), relative to the current folder."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks in it."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples in front of each question; without it, what the task says."""
    limit: PositiveInt | None = None
    """Only the first documents of each task."""
    batch: PositiveInt = 8
    """Requests at a time."""

    def __post_init__(self) -> None:
        """Say while the recipe is read what is missing, and not when everything else is done.

        Raises:
            SetupError: the harness is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise SetupError(HINT)

    def cost(self, context: CostContext) -> Cost:
        """The variant on held-out texts, and both heads."""
        return evaluation_cost(context)

    @hookimpl
    def evaluate(self, variant: Variant, pair: Pair, progress: Progress) -> list[MetricRow]:
        """See `Specs.evaluate`."""
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            folder = Path(self.folder).resolve()
            known = TaskManager(include_path=str(folder), include_defaults=False)
            if lost := [name for name in self.tasks if name not in known.all_tasks]:
                there = ", ".join(known.all_tasks) or "none"
                raise RecipeError(
                    f"lm-eval: {folder} has no task called {', '.join(lost)}; it has: {there}."
                )
            progress(0, len(self.tasks), f"{variant.name}: {', '.join(self.tasks)}")
            device, dtype = str(pair.student.device), str(pair.student.dtype).removeprefix("torch.")
            model = HFLM(
                pretrained=str(variant.folder), device=device, dtype=dtype, batch_size=self.batch
            )
            found = simple_evaluate(
                model,
                tasks=list(self.tasks),
                task_manager=known,
                num_fewshot=self.shots,
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        return list(rows_of(variant.name, found))


def rows_of(variant: str, found: Mapping[str, Any]) -> Iterator[MetricRow]:
    """Yield the rows of what the harness returns: figures of each task, and those of its documents where they are their mean."""
    from rotdistill_core.evaluation.rows import MetricRow

    for task, figures in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        for key, value in figures.items():
            metric, _, where = key.partition(",")
            if not where or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}.{metric}" if where == "none" else f"{task}.{metric}.{where}"
            own = [
                s
                for s in samples
                if s.get("filter", "none") == where and isinstance(s.get(metric), int | float)
            ]
            yield MetricRow(variant, name, float(value), "lm-eval", None, None, len(own) or None)
            for sample in own:
                yield MetricRow(
                    variant,
                    name,
                    float(sample[metric]),
                    "lm-eval",
                    None,
                    None,
                    1,
                    f"{task}.{sample['doc_id']}",
                )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [LmEval]
