"""rotdistill: surgery on language models with linear algebra.

Everything that a notebook needs, and the types and markers of a plugin, are importable from here. A
name is imported from its module when it is first used, so `import rotdistill_core` loads no torch.
docs/python.md lists the modules that methods compute with.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rotdistill_core.plugin.markers import hookimpl, hookspec
from rotdistill_core.plugin.step import step

if TYPE_CHECKING:
    from rotdistill_core.api import plan, run
    from rotdistill_core.architecture.table import Adapter
    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.data.splits import Side, Split
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.execution.outcome import RunFailed, RunResult
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
    from rotdistill_core.forward.ranks import Ranks
    from rotdistill_core.linalg.diagnostics import LayerDiagnostics
    from rotdistill_core.linalg.maps import Gauge, Map, Maps, Permutation, Rotation
    from rotdistill_core.linalg.moments import Moments
    from rotdistill_core.linalg.paired_sums import RowSums
    from rotdistill_core.planning.cost import Cost, CostContext
    from rotdistill_core.recipe.load import load_recipe
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput

_HOME = {
    "ActivationStore": "forward.activations",
    "Adapter": "architecture.table",
    "Cost": "planning.cost",
    "CostContext": "planning.cost",
    "Gauge": "linalg.maps",
    "LayerDiagnostics": "linalg.diagnostics",
    "LayerwiseForward": "forward.layerwise",
    "Map": "linalg.maps",
    "Maps": "linalg.maps",
    "MetricRow": "evaluation.rows",
    "Model": "checkpoint.models",
    "Moments": "linalg.moments",
    "PackedTexts": "data.packed",
    "Pair": "checkpoint.models",
    "Permutation": "linalg.maps",
    "Progress": "forward.layerwise",
    "Ranks": "forward.ranks",
    "ResolvedRecipe": "recipe.resolved",
    "Rotation": "linalg.maps",
    "RowSums": "linalg.paired_sums",
    "RunFailed": "execution.outcome",
    "RunResult": "execution.outcome",
    "Samples": "data.packed",
    "Side": "data.splits",
    "Split": "data.splits",
    "StepOutput": "store.output",
    "Variant": "evaluation.rows",
    "Weights": "checkpoint.weights",
    "load_recipe": "recipe.load",
    "plan": "api",
    "run": "api",
}
"""Public name -> the module of this package that defines it."""

__all__ = [
    "ActivationStore",
    "Adapter",
    "Cost",
    "CostContext",
    "Gauge",
    "LayerDiagnostics",
    "LayerwiseForward",
    "Map",
    "Maps",
    "MetricRow",
    "Model",
    "Moments",
    "PackedTexts",
    "Pair",
    "Permutation",
    "Progress",
    "Ranks",
    "ResolvedRecipe",
    "Rotation",
    "RowSums",
    "RunFailed",
    "RunResult",
    "Samples",
    "Side",
    "Split",
    "StepOutput",
    "Variant",
    "Weights",
    "hookimpl",
    "hookspec",
    "load_recipe",
    "plan",
    "run",
    "step",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
