"""The call of the LM Evaluation Harness; imported only where the package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.rows import Variant
from rotdistill_core.forward.layerwise import Progress

if TYPE_CHECKING:
    from rotdistill_lm_eval.step import LmEval


def run_tasks(step: LmEval, variant: Variant, pair: Pair, progress: Progress) -> Mapping[str, Any]:
    """Run the tasks on a saved variant; return the results as the harness gives them.

    Raises:
        RecipeError: the folder has no task of such a name.
    """
    folder = Path(step.folder).resolve()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    missing = [name for name in step.tasks if name not in manager.all_tasks]
    if missing:
        present = ", ".join(manager.all_tasks) or "none"
        raise RecipeError(
            f"lm-eval: {folder} has no task called {', '.join(missing)}; it has: {present}."
        )
    progress(0, len(step.tasks), f"{variant.name}: {', '.join(step.tasks)}")
    model = HFLM(
        pretrained=str(variant.folder),
        device=str(pair.student.device),
        dtype=str(pair.student.dtype).removeprefix("torch."),
        batch_size=step.batch_size,
    )
    results: Mapping[str, Any] = simple_evaluate(
        model,
        tasks=list(step.tasks),
        task_manager=manager,
        num_fewshot=step.shots,
        limit=step.limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    return results
