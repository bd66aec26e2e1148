"""Run the harness offline, and turn its results into metric rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any
from unittest import mock

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.evaluation.rows import MetricRow, Variant
from rotdistill_core.forward.layerwise import Progress

if TYPE_CHECKING:
    from rotdistill_lm_eval.step import LmEval

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SPLIT = "lm-eval"
"""The split in the metric rows: the documents are those of the tasks."""


def evaluate(step: LmEval, variant: Variant, pair: Pair, progress: Progress) -> list[MetricRow]:
    """Score a saved variant on the tasks of a step.

    Raises:
        RecipeError: the folder has no task of such a name.
    """
    with mock.patch.dict(os.environ, OFFLINE):
        # The libraries of the harness read the environment when they are imported.
        from rotdistill_lm_eval._harness import run_tasks  # noqa: PLC0415

        results = run_tasks(step, variant, pair, progress)
    return list(rows_of(variant.name, results))


def rows_of(variant: str, results: Mapping[str, Any]) -> Iterator[MetricRow]:
    """Yield the rows of a variant from the results of `lm_eval.simple_evaluate`.

    A row of a task comes first, then one for each document, if the figure is the documents' mean.
    Standard errors are left out, because the report computes intervals itself.
    """
    for task, figures in results["results"].items():
        documents = results.get("samples", {}).get(task, [])
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            is_figure = filter_name and isinstance(value, int | float)
            if not is_figure or metric.endswith("_stderr"):
                continue
            name = f"{task}.{metric}"
            if filter_name != "none":
                name += f".{filter_name}"
            scored = [
                document
                for document in documents
                if document.get("filter", "none") == filter_name
                and isinstance(document.get(metric), int | float)
            ]
            yield MetricRow(variant, name, float(value), split=SPLIT, n=len(scored) or None)
            scores = [float(document[metric]) for document in scored]
            # A perplexity is none: its documents have logarithms.
            if not scores or not math.isclose(fmean(scores), value, rel_tol=1e-6, abs_tol=1e-9):
                continue
            for document, score in zip(scored, scores, strict=True):
                text = f"{task}.{document['doc_id']}"
                yield MetricRow(variant, name, score, split=SPLIT, n=1, text=text)
