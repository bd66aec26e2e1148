# mypy: disable-error-code="empty-body"
"""The hooks that plugins implement.

A hook only ever gains arguments, and an implementation may take fewer than there are.

Plugin modules implement `steps`, `adapters`, `engines`, `commands` or `locate`. Engine classes
implement `connect`. Step classes implement exactly
one of the six stage hooks (`capture`, `align`, `refine`, `fold`, `style`, `evaluate`); the executor
calls it on the step of a recipe, and a result of None is an error. Observer modules implement the
hooks from `before_step` on. They are ordinary pluggy hooks, so hook wrappers work. An observer that
raises stops neither the run nor other observers; the log reports it in one line.
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
    from rotdistill_core.forward.generate import AnsweringModel
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.forward.ranks import Ranks
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_core.plugin.engine import Answering
    from rotdistill_core.recipe.resolved import ResolvedRecipe
    from rotdistill_core.store.output import StepOutput


class HookSpecs:
    """Every hook that rotdistill calls."""

    @hookspec
    def steps(self) -> Sequence[type]:
        """Return the step classes of this plugin, each decorated with `@step`.

        Called once, when a recipe names one of them.
        """

    @hookspec
    def adapters(self) -> Sequence[Adapter]:
        """Return the architecture tables of this plugin.

        Called once, when a model of that `model_type` is opened.
        """

    @hookspec
    def commands(self) -> Sequence[Callable[..., None]]:
        """Return the verbs of this plugin: functions that typer can run, each named like its verb.

        Called when one of them is used, or when help lists all.
        """

    @hookspec(firstresult=True)
    def locate(self, reference: str, log: Callable[[str], None]) -> Path:
        """Return the local Hugging Face folder of a model reference.

        Called when a recipe's model starts or ends with the name of the plugin's entry point (group
        `rotdistill.sources`), such as `hub:` or `.gguf`. `log` prints one line for the user.
        """

    @hookspec
    def engines(self) -> Sequence[type]:
        """Return the engine classes of this plugin, each decorated with `@engine`.

        Called once, when the table `[engine]` of a recipe names one of them.
        """

    @hookspec(firstresult=True)
    def connect(self, model: AnsweringModel, folder: Path, log: Callable[[str], None]) -> Answering:
        """Return the engine with a model, ready to answer.

        Called on the engine of the recipe when answers of the teacher are missing. Nothing heavy
        should happen before the first answer is asked for: weights are loaded and servers are
        asked then. `model` is the teacher as it lies here; an engine that asks elsewhere needs its
        tokenizer alone. Paths in options are relative to `folder`. `log` prints one line.
        """

    @hookspec(firstresult=True)
    def capture(
        self,
        pair: Pair,
        weights: Weights,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks,
    ) -> ActivationStore:
        """Return the activations of teacher and student that later steps need.

        Run `weights`, not `pair.student.weights`: an earlier step may have cut the student.
        `rotdistill_core.LayerwiseForward` runs a model of any size, one open layer at a time.
        `out.find` returns files that a killed run had committed. A capture that keeps the rows of
        a part of the texts has an attribute `keeps_all_rows` that is False.

        A step of any stage that takes `ranks` is called in each process of a run that `torchrun`
        starts in several (see `rotdistill_core.Ranks`), and has to give the same bits for any
        number of them. `ranks.lead` decides, writes files and fills `out`. A step without `ranks`
        is called in the leading process, while the others wait.
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
        ranks: Ranks,
    ) -> Maps:
        """Return `maps` with more maps from the student's spaces to the teacher's.

        `maps` holds the maps of earlier aligners. Do not change it: `maps.add(found, diagnostics)`
        returns a copy. The residual map at boundary l is `found["residual.l"]`; `q.i`, `kv.i` and
        `neurons.i` are permutations of layer i, and gauges of layer i apply after them.
        `diagnostics[l]` is a `LayerDiagnostics`. Give each cosine or error its null.
        """

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
        ranks: Ranks,
    ) -> Maps:
        """Return improved maps. Same contract as `align`."""

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
        ranks: Ranks,
    ) -> Weights:
        """Return edited weights.

        The step class states `exact: ClassVar[bool]`.

        - True: logits do not change. Return the result of `weights.fold(...)`. The executor
          measures a certificate: logits in float64 and float32, and the way back. A variant whose
          certificate fails is marked as failed, and the run ends with exit code 4.
        - False: the step changes behaviour. Choose options on validation texts, and let "do
          nothing" be a candidate; when it wins, set `out.report.refused` to the reason, and
          `out.report.remedies` to what may be tried next. Each is a `Remedy`: words, and the
          options that do it, as `--set` takes them.

        `weights` is a lazy view: return an edited view, never write into its tensors.
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
        ranks: Ranks,
    ) -> Weights:
        """Return weights with a final edit of head or behaviour.

        Same contract as an inexact `fold`.
        """

    @hookspec
    def evaluate(
        self,
        variant: Variant,
        pair: Pair,
        activations: ActivationStore,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks,
    ) -> list[MetricRow]:
        """Return metric rows of one saved variant; `results.jsonl` holds those of all evaluators.

        A metric that is a mean over texts should also have one row for each text, with the text's
        id as `text`, its language, and its weight in the mean as `n`. The report makes intervals of
        them, and of the change against the baseline. An evaluator that does not take `activations`
        needs no capture step.
        """

    @hookspec
    def before_step(
        self, step_id: str, variant: str, stage: str, folder: Path, log: Callable[[str], None]
    ) -> None:
        """Observe that a step starts; `folder` is the folder of the run.

        Observer hooks are called on the object that started the run (the progress display of the
        command line) and on each observer that the recipe names. `log` prints one line.
        """

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
        """Observe that the result of a step is committed, or was already (`reused`)."""

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
        """Observe that a step raised. The run ends with that error."""

    @hookspec
    def variant_saved(self, variant: str, folder: Path, log: Callable[[str], None]) -> None:
        """Observe that the checkpoint of a variant is complete; `folder` holds it."""

    @hookspec
    def run_ended(
        self,
        recipe: ResolvedRecipe,
        result: RunResult,
        out: StepOutput,
        log: Callable[[str], None],
    ) -> object:
        """Observe that all variants are saved and scored. Files that `out` writes belong to the
        run.

        Return None, or anything that rich can print: the terminal shows it below the results.
        """
