"""What carrying out a recipe gives: the state of a variant, the result of a step, the result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.store.results import StepReport


@dataclass(frozen=True)
class VariantState:
    """What the steps of a variant have made so far."""

    key: str
    weights: Weights
    maps: Maps
    activations: ActivationStore | None
    seconds: float


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    key: str
    reused: bool
    seconds: float
    notes: dict[str, Any]
    """Free notes, for people."""
    report: StepReport
    """What the step reported, with types."""


@dataclass
class RunResult:
    """A finished run."""

    folder: Path
    rows: list[MetricRow]
    steps: dict[tuple[str, str], StepResult]
    """(variant, step id) -> what happened."""
    checkpoints: dict[str, Path]
    told: list[Any]
    """What observers say at the end, to be shown below the results."""
    pair: Pair | None = None
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Variant -> which checks it breaks, in words."""
