# mypy: disable-error-code="empty-body"
"""The hooks that plugins implement. A hook only ever gains arguments; an implementation may take fewer.

`steps`, `adapters`, `commands` and `locate` are answered by plugin modules. The stage hooks are answered by step instances, one at a
time, in recipe order; each step class answers exactly one, and answering None is an error. Observers are told what happens; `say`
tells the user one line. What an observer raises is said in a line too, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rotdistill_core.plugin.markers import hookspec

if TYPE_CHECKING:
    from rotdistill_core.architecture.table import Adapter
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.evaluation.rows import MetricRow, Variant
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput


class HookSpecs:
    """Every hook that rotdistill calls."""

    @hookspec
    def steps(self) -> Sequence[type]:
        """Return the step classes of this plugin, each decorated with `@step`. Called once, when the plugin is loaded."""

    @hookspec
    def adapters(self) -> Sequence[Adapter]:
        """Return the architecture tables of this plugin. Called once, when a model of that `model_type` is opened."""

    @hookspec
    def commands(self) -> Sequence[Callable[..., None]]:
        """Return the verbs of this plugin: functions, called like the verb, that typer can run. Called when one of them is asked for."""

    @hookspec(firstresult=True)
    def locate(self, reference: str, log: Callable[[str], None]) -> Path:
        """Return the local Hugging Face folder behind a model reference of this plugin's kind; `say` tells the user one line.

        Called when a recipe's model ends or starts with the entry point's name (group `rotdistill.sources`).
        """

    @hookspec(firstresult=True)
    def capture(
        self, pair: Pair, weights: Weights, samples: Samples, out: StepOutput, progress: Progress
    ) -> ActivationStore:
        """Run teacher and student over the samples and store what later steps need.

        `weights` is the student as the earlier steps left it; what a killed run committed is found again with `out.find`.
        """

    @hookspec(firstresult=True)
    def align(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """Add maps from the student's spaces to the teacher's. `maps` holds what earlier aligners found; do not change it."""

    @hookspec(firstresult=True)
    def refine(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """Improve maps that an earlier step found. Same contract as `align`."""

    @hookspec(firstresult=True)
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Weights:
        """Turn what was computed into weights.

        The step class has an attribute `exact`: True when logits must not change (the pipeline then measures a certificate; a variant
        for which it does not hold fails, and the run ends with exit code 4), False for transfer, which is judged on held-out texts.
        `weights` is a lazy view: return an edited view, do not write into tensors.
        """

    @hookspec(firstresult=True)
    def style(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> Weights:
        """Edit weights from prompt or head statistics. Same contract as an inexact `fold`."""

    @hookspec
    def evaluate(
        self,
        variant: Variant,
        pair: Pair,
        activations: ActivationStore,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
    ) -> list[MetricRow]:
        """Return result rows for one saved variant. Rows of all evaluators are put together."""

    @hookspec
    def before_step(
        self, step_id: str, variant: str, stage: str, folder: Path, log: Callable[[str], None]
    ) -> None:
        """Observe that a step is about to run; `folder` is the run's."""

    @hookspec
    def after_step(
        self,
        step_id: str,
        variant: str,
        seconds: float,
        reused: bool,
        stage: str,
        folder: Path,
        log: Callable[[str], None],
    ) -> None:
        """Observe that a step's result is committed (`reused`: it already was)."""

    @hookspec
    def step_failed(
        self,
        step_id: str,
        variant: str,
        error: Exception,
        stage: str,
        folder: Path,
        log: Callable[[str], None],
    ) -> None:
        """Observe that a step raised; the run ends with that error."""

    @hookspec
    def variant_saved(self, variant: str, folder: Path, log: Callable[[str], None]) -> None:
        """Observe that a variant's checkpoint, `folder`, is complete."""

    @hookspec
    def run_ended(
        self,
        loaded: ResolvedRecipe,
        outcome: RunResult,
        out: StepOutput,
        log: Callable[[str], None],
    ) -> object:
        """Observe that all variants are made and judged. What `out` writes is committed in the run's folder.

        Return None, or what the terminal shows below the results: text, or anything that rich prints.
        """
