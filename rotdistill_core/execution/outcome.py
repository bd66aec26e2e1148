"""What carrying out a recipe gives: a variant's state, the result of a step, of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.store.results import Parity, StepReport

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.linalg.maps import Maps


@dataclass(frozen=True)
class VariantState:
    """What the steps of a variant have made so far."""

    key: str
    """Key of the last step, or of the start."""
    weights: Weights
    maps: Maps
    activations: ActivationStore | None
    seconds: float
    """Time of all steps, reused ones included."""


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    key: str
    reused: bool
    """Whether an earlier run had made it."""
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
    """Every metric of every variant, as in results.jsonl."""
    steps: dict[tuple[str, str], StepResult]
    """(variant, step id) -> the finished step."""
    checkpoints: dict[str, Path]
    """Variant -> its Hugging Face folder."""
    summaries: list[object]
    """What observers return at the end; the terminal shows it below the results."""
    pair: Pair | None = None
    model_parity: dict[str, Parity] = field(default_factory=dict)
    """Role of an opened model -> how it compares with transformers."""
    parity: dict[str, Parity] = field(default_factory=dict)
    """The same for each saved variant."""
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Variant -> the checks that it breaks, in words."""
    more_lessons: tuple[str, ...] = ("lessons.count=500", "lessons.from=teacher")
    """Overrides of the recipe that give it more lessons."""

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame, one column for each field of `MetricRow`.

        Raises:
            SetupError: pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415  an optional package, for notebooks
        except ImportError as error:
            raise SetupError(
                "RunResult.to_pandas needs pandas. Install it with: pip install pandas."
            ) from error
        return pandas.DataFrame(self.rows, columns=list(MetricRow._fields))


class RunFailed(CheckFailed):
    """A run that finished, with variants that break a check (exit code 4).

    Nothing is lost: the other variants are made, and everything is evaluated and reported.
    """

    def __init__(self, outcome: RunResult) -> None:
        self.outcome = outcome
        lines = [
            f'variant "{variant}" failed: {fault}'
            for variant, faults in outcome.failed.items()
            for fault in faults
        ]
        super().__init__("\n".join([*lines, f"Everything is kept in {outcome.folder}."]))
