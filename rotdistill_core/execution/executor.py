"""A recipe carried out: variants in order, steps in file order, and reuse of what is there.

A key that any ledger holds, with files that still hash true, is reused. That one rule resumes a run
after a crash, shares steps between variants, and lets another aligner cost one alignment.

Several processes (`rotdistill_core.forward.ranks`) carry out the same code in step. The leading one
decides what is found or made, and writes; `lead` returns its results in all of them. A step that
takes `ranks` runs in all processes, any other step in the leading one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError

from rotdistill_core.checkpoint.devices import resolve_device
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_pair, require_in_current_folder
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.conversations import facts_digest
from rotdistill_core.data.lessons import checked_lesson_texts
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.errors import CheckFailed, RotdistillError, SetupError, shortened
from rotdistill_core.evaluation.gates import broken_gates
from rotdistill_core.evaluation.rows import MetricRow, Variant, failure_row, rows_as_json
from rotdistill_core.execution.artifacts import restore_result, store_result
from rotdistill_core.execution.call import call_step, check_hook, prove_exact
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.keys import (
    KeyedStep,
    checkpoint_key,
    keyed_chain,
    run_inputs,
    start_key,
)
from rotdistill_core.execution.observers import Listener, Observers
from rotdistill_core.execution.outcome import RunFailed, RunResult, StepResult, VariantState
from rotdistill_core.execution.parity import (
    compare_checkpoint,
    compare_cut,
    compare_models,
    has_other_shape,
)
from rotdistill_core.execution.remedies import complete, more_lessons
from rotdistill_core.execution.run_folder import remove_if_nothing_was_made
from rotdistill_core.execution.samples import lost_texts_notes, prepare_samples, run_chats
from rotdistill_core.execution.save import dtype_name, open_saved, save_variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.certificate import enforce_certificate
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.linalg.precision import full_float32_products
from rotdistill_core.planning.chats import date_of_run, ending_notes
from rotdistill_core.planning.requirements import hook_arguments
from rotdistill_core.planning.reuse import newest_starts
from rotdistill_core.plugin.step import check_models, is_exact, options_of
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.files import json_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.presence import REMOVING, RUNNING, at_work, others_at_work
from rotdistill_core.store.records import (
    FailureRecord,
    MapsRef,
    RowsRef,
    StartRecord,
    StepRecord,
    StepResultRef,
    WeightsRef,
)
from rotdistill_core.store.results import Parity

Work = Callable[[StepOutput, Ranks], StepResultRef]
"""The work of one step in some processes: it commits files through the output, and refers to the
result."""


class Executor:
    """One recipe being carried out: the only place that keeps state during a run.

    Args:
        loaded: the recipe.
        root: the folder of all runs.
        observer: takes the lines of the run, and implements any observer hook.
        progress: called with how far a step is.
        fresh: reuse nothing that an earlier run made.
        ranks: the processes that carry it out. Those that do not lead report nothing.

    Raises:
        RotdistillError: a model or text is missing or does not fit, or a plugin is broken.
    """

    def __init__(
        self,
        loaded: ResolvedRecipe,
        root: Path,
        observer: Listener,
        progress: Progress,
        fresh: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.loaded = loaded
        self.fresh = fresh
        self.ranks = ranks
        self.steps: dict[tuple[str, str], StepResult] = {}
        """(variant, step id) -> the finished step."""
        recipe, log = loaded.recipe, observer.log
        store = ArtifactStore(root.resolve(), log, fresh)
        folder = loaded.folder(store.root)
        for recipe_step in loaded.steps:
            check_hook(recipe_step)
        loaded.engine.check()
        watching = recipe.observers if ranks.leads else []
        self.observers = Observers(observer, watching, folder)
        for ref in filter(None, (recipe.teacher, recipe.student, recipe.anchor)):
            require_in_current_folder(ref.model, loaded.path.parent)
            resolve_device(ref.device)  # a missing one is an error now, not after a download
        pair = open_pair(recipe.teacher, recipe.student, recipe.anchor, log)
        for recipe_step in loaded.steps:
            check_models(recipe_step.step, pair)
        conversations, style = read_conversations(recipe.samples, loaded.path.parent, log)
        lesson_texts = checked_lesson_texts(recipe, loaded.path.parent, conversations)
        engine = loaded.engine.key()
        inputs = run_inputs(recipe, pair, conversations, style, engine, lesson_texts=lesson_texts)
        starts = newest_starts(store.ledgers(), folder.name)
        date = ranks.lead(partial(date_of_run, recipe.samples, inputs, starts, fresh))
        settings = recipe.samples
        chats = run_chats(pair, conversations, style, date, settings.thinking, settings.bake_prompt)
        self.context = RunContext(
            loaded=loaded,
            pair=pair,
            conversations=conversations,
            style=style,
            chats=chats,
            store=store,
            ledger=Ledger(folder),
            log=log,
            progress=progress,
            lesson_texts=lesson_texts,
        )
        for note in (
            *chats.notes(),
            *ending_notes(chats, pair.teacher),
            *lost_texts_notes(pair, conversations, style),
        ):
            log(note)
        if ranks.leads:
            store.sweep(folder)

    @cached_property
    def _lessons(self) -> tuple[str, ...]:
        """The overrides that give this recipe more lessons."""
        run = self.context
        return more_lessons(run.recipe, self.loaded.path.parent, run.conversations)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.context.ledger.folder

    @property
    def pair(self) -> Pair:
        """The models of the run."""
        return self.context.pair

    @property
    def store(self) -> ArtifactStore:
        """All runs in the folder of runs."""
        return self.context.store

    @property
    def ledger(self) -> Ledger:
        """The ledger of the run."""
        return self.context.ledger

    def samples(self) -> Samples:
        """Return the texts of the run, tokenised; see `prepare_samples`."""
        return self.ranks.lead(partial(prepare_samples, self.context))

    def go(self) -> RunResult:
        """Carry out the recipe.

        Raises:
            RunFailed: variants break a check. The others are made; everything is evaluated and
                reported.
            SetupError: another process removes the run at this moment.
            RotdistillError: anything else went wrong. The next call finds what was committed; if
                that is nothing, the run leaves no folder.
        """
        try:
            with at_work(self.folder, RUNNING), full_float32_products():
                self.ranks.lead(self._begin)
                return self._carry_out()
        except RotdistillError:
            if self.ranks.leads:
                remove_if_nothing_was_made(self.folder)
            raise

    def _begin(self) -> None:
        """Take the run's folder.

        Raises:
            SetupError: another process removes the run at this moment.
        """
        removers = others_at_work(self.folder, REMOVING)
        if removers:
            raise SetupError(
                f"{self.folder}: is being removed by {', '.join(removers)}. Run the recipe "
                "again when that has ended."
            )
        if self.ranks.launch:
            self.ledger.begin_generation(self.ranks.launch)
        self._mend_ledger()
        self._write_recipe()

    def _carry_out(self) -> RunResult:
        """Carry out the recipe; see `go`."""
        lead = self.ranks.lead
        parity = lead(partial(compare_models, self.context, self.fresh))
        samples = self.samples()
        start = self._start(samples)
        outcome = RunResult(
            folder=self.folder,
            rows=[],
            steps=self.steps,
            checkpoints={},
            summaries=[],
            pair=self.pair,
            model_parity=parity,
            more_lessons=self._lessons,
        )
        dtype = self._save_dtype
        facts = facts_digest(self.context.conversations)
        for variant, chain in self.loaded.chains(torch.finfo(dtype).bits < 32).items():
            steps = list(keyed_chain(variant, chain, start.key, dtype_name(dtype), facts))
            edits = [keyed for keyed in steps if keyed.recipe_step.stage != "evaluate"]
            state = start
            try:
                for keyed in edits:
                    state = self._apply(keyed, state, samples)
                folder = self._save(variant, state, dtype)
                outcome.parity[variant] = lead(
                    partial(self._compare_saved, variant, state, folder, samples)
                )
            except CheckFailed as error:
                outcome.failed[variant] = [str(error)]
                continue
            self.observers.variant_saved(variant, folder)
            outcome.checkpoints[variant] = folder
            for keyed in steps[len(edits) :]:
                outcome.rows += self._evaluate(keyed, state, folder, samples)
        lead(partial(self._finish, outcome))
        return outcome

    def _save(self, variant: str, state: VariantState, dtype: torch.dtype) -> Path:
        """Return the folder of a saved variant; see `save_variant`."""

        def save() -> str:
            folder = save_variant(self.context, variant, state, dtype)
            return folder.relative_to(self.store.root).as_posix()

        return self.store.root / self.ranks.lead(save)

    @property
    def _save_dtype(self) -> torch.dtype:
        """The dtype of the checkpoints."""
        name = self.loaded.recipe.student.save_dtype
        return self.pair.student.weights.dtype if name == "auto" else getattr(torch, name)

    def _mend_ledger(self) -> None:
        """Tell in one line what is damaged in the ledger; what it recorded is made anew."""
        faults = self.ledger.faults
        if faults != self.ledger.torn:
            told = "; ".join(map(str, faults))
            self.context.log(
                f"{self.ledger.path}: {told}. What is lost with that is found or made again."
            )
            self.ledger.mend()

    def _write_recipe(self) -> None:
        """Commit the recipe, as written and resolved."""
        out = self.context.output(self.loaded.digest())
        out.document(RunLayout.RECIPE, [self.loaded.text.encode()])
        # Variants keep their order.
        resolved = json_blocks(self.loaded.document(), sort_keys=False)
        out.document(RunLayout.RESOLVED_RECIPE, resolved)

    def _start(self, samples: Samples) -> VariantState:
        """Record what the run starts from; return the state before the first step."""
        run, recipe = self.context, self.loaded.recipe
        start = StartRecord(
            key=start_key(run.pair, samples.digest(), recipe.seed),
            inputs=run_inputs(
                recipe,
                run.pair,
                run.conversations,
                run.style,
                self.loaded.engine.key(),
                run.chats.date,
                run.lesson_texts,
            ),
            models={role: model.sha256 for role, model in run.pair.by_role.items()},
            recipe=os.path.relpath(self.loaded.path, run.store.root),
        )
        if self.ranks.leads and run.ledger.starts[-1:] != [start]:
            run.ledger.append(start)
        return VariantState(
            key=start.key,
            weights=run.pair.student.weights,
            maps=Maps(),
            activations=None,
            seconds=0.0,
        )

    def _apply(self, keyed: KeyedStep, state: VariantState, samples: Samples) -> VariantState:
        """Return the state of a variant after one more step.

        Raises:
            CheckFailed: a certificate does not hold, or a map is not what it claims to be.
        """
        work = partial(self._edit, keyed.recipe_step, state, samples)
        record = self._find_or_make(keyed, work)
        if not self.ranks.lead(partial(self._describes_files, record, keyed, state, samples)):
            with self._at_work(keyed):
                record = self._make(keyed, work)
            self._note(keyed, record, reused=False)
        after = self._restored(record, keyed, state, samples)
        if self.steps[keyed.variant, record.id].reused:
            self._hold_to_checks(record, after)
        return after

    def _hold_to_checks(self, record: StepRecord, after: VariantState) -> None:
        """Hold a result that was found to the tolerances of this recipe: they may be stricter.

        Raises:
            CheckFailed: a certificate does not hold, or a map is not what it claims to be.
        """
        check, where = self.loaded.recipe.check, f'step "{record.id}"'
        if record.report.certificate is not None:
            enforce_certificate(record.report.certificate, check, where)
        if isinstance(record.result, MapsRef):
            for space, found in after.maps.items():
                found.verify(check.orthogonality, f"{where}, {space}")

    def _describes_files(
        self, record: StepRecord, keyed: KeyedStep, state: VariantState, samples: Samples
    ) -> bool:
        """Return whether the state after a step can be read; if not, log why the step is made anew.

        Raises:
            RotdistillError: it cannot, and the step was made just now.
        """
        try:
            self._restored(record, keyed, state, samples)
        except (KeyError, TypeError, ValueError, SafetensorError, RotdistillError) as error:
            if not self.steps[keyed.variant, record.id].reused:
                raise
            self.context.log(
                f'{self.ledger.path}: the record of step "{record.id}" does not describe its '
                f"files ({type(error).__name__}: {error}); it is made again."
            )
            return False
        return True

    def _restored(
        self, record: StepRecord, keyed: KeyedStep, state: VariantState, samples: Samples
    ) -> VariantState:
        """Return the state after a step whose record is in the ledger."""
        after = replace(state, key=keyed.key, seconds=state.seconds + record.seconds)
        return restore_result(self.context, record.result, after, samples)

    def _compare_saved(
        self, variant: str, state: VariantState, folder: Path, samples: Samples
    ) -> Parity:
        """Compare a saved variant with what transformers makes of its folder.

        Raises:
            CheckFailed: they differ.
        """
        key = checkpoint_key(variant, state.key, dtype_name(self._save_dtype))

        def saved() -> Weights:
            # By the config that the steps worked with: the folder's must mean the same.
            return replace(open_saved(folder, state), config=state.weights.config)

        return compare_checkpoint(self.context, variant, key, folder, saved, samples)

    def _evaluate(
        self, keyed: KeyedStep, state: VariantState, folder: Path, samples: Samples
    ) -> list[MetricRow]:
        """Return the rows of one evaluator for a saved variant."""
        record = self._find_or_make(keyed, partial(self._score, keyed, state, folder, samples))
        return [MetricRow(*row) for row in cast("RowsRef", record.result).rows]

    def _find_or_make(self, keyed: KeyedStep, work: Work) -> StepRecord:
        """Return the record of a step: found by its key, or made now."""
        recipe_step, variant, key = keyed.recipe_step, keyed.variant, keyed.key
        made_here = key in {done.key for done in self.steps.values() if not done.reused}
        record = self.ranks.lead(partial(self._find, keyed, made_here))
        reused = record is not None
        with self._at_work(keyed):
            if record is None:
                record = self._make(keyed, work)
        # Another run may have made it, and this run depends on it; or it has failed here since, or
        # been made otherwise, and inputs or code are again what they were.
        ledger = self.ledger
        is_news = record not in ledger or ledger.failed_last(key)
        is_old = ledger.has_later(record) or ledger.failed_since(record, variant)
        if self.ranks.leads and (is_news or is_old):
            ledger.append(record)
        self._note(keyed, record, reused and not made_here)
        self.observers.after_step(recipe_step, variant, record.seconds, reused)
        if not (reused and made_here):
            if record.report.refused:
                kept = f"{recipe_step.id} keeps the student as it was"
                self.observers.log(f"{variant}: {kept}: {record.report.refusal}")
            for caution in record.report.cautions:
                self.observers.log(f"{variant}: {recipe_step.id}: {caution.text}")
        return record

    @contextmanager
    def _at_work(self, keyed: KeyedStep) -> Iterator[None]:
        """Tell observers that a step begins, and them and the ledger if it raises."""
        with self.observers.step(keyed.recipe_step, keyed.variant):
            try:
                yield
            except Exception as error:
                if self.ranks.leads:
                    self._record_failure(keyed, error)
                raise

    def _record_failure(self, keyed: KeyedStep, error: Exception) -> None:
        """Append what a step raised. Where the disk refuses, that error is the one to be told."""
        record = FailureRecord(
            key=keyed.key,
            id=keyed.recipe_step.id,
            variant=keyed.variant,
            plugin=keyed.recipe_step.origin.release,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            error=type(error).__name__,
            message=shortened(str(error)),
        )
        with suppress(SetupError):
            self.ledger.append(record)

    def _find(self, keyed: KeyedStep, made_here: bool) -> StepRecord | None:
        """Return the record of a finished step with its key, if all its files hold."""
        record = None if self.fresh and not made_here else self.store.find_step(keyed.key)
        if record and (record.id, record.before) != (keyed.recipe_step.id, keyed.before):
            return None  # the key is right, and the record is not
        return record if record and self._files_hold(keyed.key) else None

    def _note(self, keyed: KeyedStep, record: StepRecord, reused: bool) -> None:
        """Keep the result of a step for observers."""
        self.steps[keyed.variant, keyed.recipe_step.id] = StepResult(
            key=keyed.key,
            reused=reused,
            seconds=record.seconds,
            notes=record.notes,
            report=record.report,
        )

    def _files_hold(self, key: str) -> bool:
        """Return whether every file that this run committed under a key still hashes true.

        Those that only save work count, too. For a damaged one the step is carried out again; it
        finds the others.
        """
        newest = {record.path: record.file for record in self.ledger.files if record.key == key}
        return all(self.store.verify(file) for file in newest.values())

    def _make(self, keyed: KeyedStep, work: Work) -> StepRecord:
        """Do the work of a step, and append the line that commits its result."""
        if "ranks" in hook_arguments(keyed.recipe_step):
            return self._make_in(self.ranks, keyed, work)
        return self.ranks.lead(partial(self._make_in, ALONE, keyed, work))

    def _make_in(self, ranks: Ranks, keyed: KeyedStep, work: Work) -> StepRecord:
        """Do the work of a step in some processes, and commit it in the leading one."""
        started = time.monotonic()
        out = self.context.output(keyed.key, keyed.recipe_step.id, keyed.before)
        result = work(out, ranks)
        return ranks.lead(partial(self._commit, keyed, out, result, started))

    def _commit(
        self, keyed: KeyedStep, out: StepOutput, result: StepResultRef, started: float
    ) -> StepRecord:
        step = keyed.recipe_step.step
        record = StepRecord(
            key=keyed.key,
            before=keyed.before,
            id=keyed.recipe_step.id,
            variant=keyed.variant if keyed.recipe_step.stage == "evaluate" else "",
            use=step.use,
            options=options_of(step),
            plugin=keyed.recipe_step.origin.release,
            seconds=round(time.monotonic() - started, 3),
            files=tuple(out.used.values()),
            result=result,
            notes=out.notes,
            report=complete(out.report, keyed.recipe_step.id, self._lessons),
        )
        return self.ledger.append(record)

    def _edit(
        self,
        recipe_step: RecipeStep,
        state: VariantState,
        samples: Samples,
        out: StepOutput,
        ranks: Ranks,
    ) -> StepResultRef:
        """Call a step that changes the state of a variant; verify and commit what it returns."""
        run = self.context
        pair, activations = run.pair, state.activations
        if recipe_step.stage in ("align", "refine") or is_exact(recipe_step.step):
            # With an anchor, aligners and exact folds see the anchor in the teacher's place.
            pair = pair.for_alignment
            activations = activations.for_alignment if activations else None
        available = {
            "weights": state.weights,
            "maps": state.maps,
            "activations": activations,
            "pair": pair,
            "samples": samples,
            "out": out,
            "progress": run.progress,
            "ranks": ranks,
        }
        result: ActivationStore | Maps | Weights = call_step(recipe_step, available)
        return ranks.lead(partial(self._keep, result, recipe_step, state, samples, out))

    def _keep(
        self,
        result: ActivationStore | Maps | Weights,
        recipe_step: RecipeStep,
        state: VariantState,
        samples: Samples,
        out: StepOutput,
    ) -> StepResultRef:
        """Verify and commit what a step returned."""
        run = self.context
        if isinstance(result, Maps):
            for space, found in result.items():
                where = f'step "{recipe_step.id}", {space}'
                found.verify(run.recipe.check.orthogonality, where)
        reference = store_result(result, samples, out, run.pair.student.dtype)
        if isinstance(result, Weights) and has_other_shape(result, state.weights):
            stored = restore_result(run, reference, state, samples).weights
            out.report.parity = compare_cut(run, recipe_step, stored, samples)
        if isinstance(result, Weights) and is_exact(recipe_step.step):
            undo = prove_exact(run, recipe_step, state.weights, result, samples, out)
            return replace(cast("WeightsRef", reference), undo=undo)
        return reference

    def _score(
        self,
        keyed: KeyedStep,
        state: VariantState,
        folder: Path,
        samples: Samples,
        out: StepOutput,
        ranks: Ranks,
    ) -> RowsRef:
        """Call an evaluator on a saved variant."""
        saved = Variant(
            name=keyed.variant,
            weights=open_saved(folder, state),
            maps=state.maps,
            seconds=round(state.seconds, 3),
            folder=folder,
        )
        available = {
            "variant": saved,
            "pair": self.pair,
            "activations": state.activations,
            "samples": samples,
            "out": out,
            "progress": self.context.progress,
            "ranks": ranks,
        }
        rows: list[MetricRow] = call_step(keyed.recipe_step, available)
        return ranks.lead(lambda: RowsRef(rows=tuple(tuple(row) for row in rows)))

    def _finish(self, outcome: RunResult) -> None:
        """Hold the variants to the recipe's checks, commit all rows, and let observers report.

        Raises:
            RunFailed: variants break a check.
        """
        outcome.failed |= broken_gates(outcome.rows, self.loaded.recipe.check, self.loaded.baseline)
        for variant, faults in outcome.failed.items():
            outcome.rows.append(failure_row(variant, faults))
        out = self.context.output("report")
        rows = rows_as_json(outcome.rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        out.write(RunLayout.RESULTS, [line.encode() for line in lines])
        outcome.summaries = self.observers.run_ended(self.loaded, outcome, out)
        if outcome.failed:
            raise RunFailed(outcome)
