"""From recipe to checkpoints and results: order, keys, reuse, variants.

A step's key is the sha256 of its options, its plugin (distribution, version, code), everything before it, models, texts and seed. A
key that a ledger holds with files that still hash true is reused: that is resume, sharing between variants, and the reason
why trying another aligner costs one alignment.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rotdistill_core.checkpoint.models import MANIFEST, tokenizer_files
from rotdistill_core.checkpoint.open import open_pair
from rotdistill_core.checkpoint.weights import UNDO, Undo, Weights, open_folder, restore_weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.questions import facts_digest, read_questions
from rotdistill_core.data.tokenization import prompt_tokens, tokenize_for_both, tokenize_texts
from rotdistill_core.errors import CheckFailed, PluginError, RecipeError
from rotdistill_core.evaluation.gates import broken_gates
from rotdistill_core.evaluation.rows import MetricRow, Variant, rows_as_json
from rotdistill_core.execution.keys import run_inputs
from rotdistill_core.execution.outcome import RunResult, StepResult, VariantState
from rotdistill_core.forward.activations import ActivationStore, restore_activations
from rotdistill_core.forward.certificate import certify, enforce_certificate
from rotdistill_core.forward.generate import greedy_answers
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.linalg.maps import Maps, restore_maps, store_maps
from rotdistill_core.plugin.registry import OBSERVERS, load_plugin, plugin_manager
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import StepReport


class Executor:
    """One recipe being carried out. The only place that keeps state."""

    def __init__(
        self,
        loaded: ResolvedRecipe,
        root: Path,
        observer: Any,
        progress: Progress,
        fresh: bool = False,
    ) -> None:
        self.loaded, self.recipe, self.progress, self.fresh = loaded, loaded.recipe, progress, fresh
        self.pm = plugin_manager()
        self.pm.register(observer)
        for recipe_step in loaded.steps:
            self.pm.register(recipe_step.step, name=f"step.{recipe_step.id}")
        for name in dict.fromkeys(self.recipe.observers):
            self.pm.register(load_plugin(OBSERVERS, name)[0], name=f"observer.{name}")
        self.log = observer.log
        self.pair = open_pair(
            self.recipe.teacher, self.recipe.student, self.recipe.anchor, self.log
        )
        self.questions, self.style = read_questions(self.recipe.samples, loaded.path.parent)
        self.store = ArtifactStore(root.resolve(), observer.log)
        self.folder = loaded.folder(self.store.root)
        self.ledger = Ledger(self.folder)
        self.store.sweep(self.folder)
        self.steps: dict[tuple[str, str], StepResult] = {}

    def go(self) -> RunResult:
        """Carry out the recipe.

        Raises:
            CheckFailed: variants break a check; the others were made, and all that was made is judged and reported.
            RotdistillError: whatever else went wrong; what was committed before is found again by the next call.
        """
        out = StepOutput(self.store, self.ledger, self.loaded.digest())
        if out.find("recipe.toml") is None:
            out.write("recipe.toml", [self.loaded.text.encode()])
            out.json("recipe.resolved.json", self.loaded.resolved())
        samples = self.samples()
        models = [
            model.sha256
            for model in (self.pair.teacher, self.pair.student, self.pair.anchor)
            if model
        ]
        base = digest(*models, samples.digest(), self.recipe.seed,
                      str(self.pair.student.dtype), self.pair.student.device.type)  # fmt: skip
        start: dict[str, Any] = {
            "kind": "base",
            "key": base,
            "inputs": run_inputs(self.recipe, self.pair, self.questions, self.style),
        }
        if not any(start.items() <= record.items() for record in self.ledger.records):
            self.ledger.append(**start)
        outcome = RunResult(self.folder, [], self.steps, {}, [], self.pair)
        dtype = self.save_dtype()
        for name, chain in self.loaded.chains(torch.finfo(dtype).bits < 32).items():
            state = VariantState(base, self.pair.student.weights, Maps(), None, 0.0)
            try:
                for recipe_step in (p for p in chain if p.stage != "evaluate"):
                    state = self._step(name, recipe_step, state, samples)
            except CheckFailed as error:
                outcome.failed[name] = [str(error)]
                continue
            folder = outcome.checkpoints[name] = self._save(name, state, dtype)
            outcome.rows += [
                row
                for p in chain
                if p.stage == "evaluate"
                for row in self._evaluate(name, p, state, folder, samples)
            ]
        outcome.failed |= broken_gates(outcome.rows, self.recipe.check)
        outcome.rows += [
            MetricRow(name, "failed", float(len(faults))) for name, faults in outcome.failed.items()
        ]
        out = StepOutput(self.store, self.ledger, "report")
        out.write(
            "results.jsonl",
            [
                (json.dumps(item, ensure_ascii=False) + "\n").encode()
                for item in rows_as_json(outcome.rows)
            ],
        )
        outcome.told = self._tell("run_ended", "", loaded=self.loaded, outcome=outcome, out=out)
        if faults := [
            f'variant "{name}" failed: {fault}'
            for name, found in outcome.failed.items()
            for fault in found
        ]:
            failure = CheckFailed("\n".join([*faults, f"Everything is kept in {self.folder}."]))
            failure.outcome = outcome
            raise failure
        return outcome

    def save_dtype(self) -> torch.dtype:
        """Return the dtype of the checkpoints."""
        name = self.recipe.student.save_dtype
        return self.pair.student.weights.dtype if name == "auto" else getattr(torch, name)

    def samples(self) -> Samples:
        """Tokenise the texts, with the teacher's own answers to the held-out questions, and freeze them in the run."""
        teacher, settings = self.pair.teacher, self.recipe.samples
        answers: dict[str, list[int]] = {}
        for who, most in (("heldout", settings.answer_tokens), ("own", settings.own_answers)):
            open_ones = [
                q
                for q in self.questions
                if q.answer is None and (q.split == "heldout") == (who == "heldout")
            ]
            asked = {
                q.id: prompt_tokens(teacher.tokenizer, self.style, q.question) for q in open_ones
            }
            key = digest(
                "answers", teacher.sha256, asked, most, str(teacher.dtype), teacher.device.type
            )
            out = StepOutput(self.store, self.ledger, key).shared(key)
            path = out.find(name := f"answers/teacher-{who}.json")
            if path is None and asked:
                started = time.monotonic()
                path = out.json(
                    name,
                    greedy_answers(
                        teacher.folder, asked, most, teacher.device, teacher.dtype, self.progress
                    ),
                )
                self.log(
                    f"  {'teacher':<12} {f'{len(asked)} answers':<16} {time.monotonic() - started:6.1f} s"
                )
            answers |= json.loads(path.read_text(encoding="utf-8")) if path else {}
        given = (teacher.tokenizer, self.questions, answers, self.style, settings.max_tokens)
        samples = (
            tokenize_texts(*given)
            if self.pair.one_tokenizer
            else tokenize_for_both(self.pair.student.tokenizer, *given)
        )
        frozen = StepOutput(self.store, self.ledger, samples.digest())
        if frozen.find("samples.tsv") is None:
            lines = ["id\tlanguage\tsplit\ttokens\tanswer_from\tsha256\n"]
            texts = samples.layout.texts
            lines += [
                f"{t.id}\t{t.language}\t{t.split}\t{len(t.tokens)}\t{t.answer}\t{digest(t.tokens)}\n"
                for t in texts
            ]
            frozen.write("samples.tsv", [line.encode() for line in lines])
            frozen.write("system.md", [self.style.encode()])
        return samples

    def _step(
        self, variant: str, recipe_step: RecipeStep, state: VariantState, samples: Samples
    ) -> VariantState:
        key = recipe_step.key(state.key)
        record = (
            None
            if self.fresh and (key not in {d.key for d in self.steps.values()})
            else self.store.find(key)
        )
        reused = record is not None
        with self._watched(recipe_step, variant):
            record = record or self._execute(recipe_step, state, samples, key)
        self._stand_on(record)
        seconds = float(record["seconds"])
        known = any(done.key == key for done in self.steps.values())
        self.steps[variant, recipe_step.id] = StepResult(
            key=key,
            reused=reused and not known,
            seconds=seconds,
            notes=record["notes"],
            report=StepReport.from_dict(record["report"]),
        )
        self._tell("after_step", variant, recipe_step, seconds=seconds, reused=reused)
        info, after = record["info"], replace(state, key=key, seconds=state.seconds + seconds)
        if recipe_step.stage == "capture":
            return replace(after, activations=restore_activations(info, self.store.root, samples))
        if recipe_step.stage in ("align", "refine"):
            return replace(after, maps=restore_maps(info, self.store.root))
        return replace(
            after, weights=restore_weights(info, self.pair.student.weights, self.store.root)
        )

    def _stand_on(self, record: dict[str, Any]) -> None:
        """Say in this run's ledger what the run stands on, where another run made it."""
        if record not in self.ledger.records:
            self.ledger.append(**record)

    @contextmanager
    def _watched(self, recipe_step: RecipeStep, variant: str) -> Iterator[None]:
        """Tell observers that a step begins, and when it fails."""
        self._tell("before_step", variant, recipe_step)
        try:
            yield
        except Exception as error:
            self._tell("step_failed", variant, recipe_step, error=error)
            raise

    def _tell(
        self, hook: str, variant: str, recipe_step: RecipeStep | None = None, **more: Any
    ) -> list[Any]:
        """Tell the observers, one by one: what one raises is said in a line, and stops neither the others nor the run."""
        told: list[Any] = []
        about = (
            {"step_id": recipe_step.id, "stage": recipe_step.stage, "folder": self.folder}
            if recipe_step
            else {}
        )
        for name, plugin in self.pm.list_name_plugin():
            try:
                told += self.pm.subset_hook_caller(hook, self.pm.get_plugins() - {plugin})(
                    variant=variant, log=self.log, **about, **more
                )
            except (Exception, SystemExit) as error:
                self.log(
                    f"{name} failed in {hook}, the run goes on: {type(error).__name__}: {error}".partition(
                        "\n"
                    )[0]
                )
        return told

    def _execute(
        self, recipe_step: RecipeStep, state: VariantState, samples: Samples, key: str
    ) -> dict[str, Any]:
        out, started = StepOutput(self.store, self.ledger, key, recipe_step.id), time.monotonic()
        result = self._call(recipe_step, state, samples, out)
        if isinstance(result, ActivationStore):
            info = result.info()
        elif isinstance(result, Maps):
            for space, found in result.items():
                found.verify(self.recipe.check.orthogonality, f'step "{recipe_step.id}", {space}')
            info = store_maps(result, out)
        else:
            info = result.store(out, self.pair.student.dtype)
            if getattr(recipe_step.step, "exact", False):
                self._certify(recipe_step, state.weights, result, samples, out)
        return self._record(
            key, recipe_step.id, time.monotonic() - started, out, info, recipe_step, state.key
        )

    def _record(self, key: str, name: str, seconds: float, out: StepOutput, info: dict[str, Any], recipe_step: RecipeStep | None = None,
                before: str = "") -> dict[str, Any]:  # fmt: skip
        """Append the line that commits a result, and return it."""
        about = {} if recipe_step is None else {
            "use": recipe_step.step.use, "options": options_of(recipe_step.step), "plugin": f"{recipe_step.origin.distribution} {recipe_step.origin.version}",
        }  # fmt: skip
        files = [asdict(file) for file in out.used.values()]
        self.ledger.append(
            "step",
            key=key,
            before=before,
            id=name,
            seconds=round(seconds, 3),
            files=files,
            info=info,
            notes=out.notes,
            report=out.report.as_dict(),
            **about,
        )
        return self.ledger.records[-1]

    def _call(
        self, recipe_step: RecipeStep, state: VariantState, samples: Samples, out: StepOutput
    ) -> Any:
        """Call the one hook of one step, and hold the plugin to its contract."""
        self._takes(recipe_step, state)
        others = {
            plugin
            for name, plugin in self.pm.list_name_plugin()
            if name.startswith("step.") and plugin is not recipe_step.step
        }
        caller = self.pm.subset_hook_caller(recipe_step.stage, others)
        pair, activations = self.pair, state.activations
        if recipe_step.stage in ("align", "refine") or getattr(recipe_step.step, "exact", False):
            pair, activations = pair.for_alignment, activations and activations.for_alignment
        given = {"weights": state.weights, "maps": state.maps, "activations": activations, "pair": pair, "samples": samples,
                 "out": out, "progress": self.progress}  # fmt: skip
        spec = caller.spec
        result = caller(**{name: given[name] for name in (spec.argnames if spec else given)})
        expected = {
            "capture": ActivationStore,
            "align": Maps,
            "refine": Maps,
            "fold": Weights,
            "style": Weights,
        }[recipe_step.stage]
        if not isinstance(result, expected):
            where = f'step "{recipe_step.id}" of {recipe_step.origin.distribution}'
            raise PluginError(
                f"{where}: {recipe_step.stage} must return {expected.__name__}, not {type(result).__name__}."
            )
        return result

    def _takes(self, recipe_step: RecipeStep, state: VariantState) -> list[str]:
        """Return the arguments that a step's hook takes; where the bank is one of them there must be one."""
        names = list(inspect.signature(getattr(recipe_step.step, recipe_step.stage)).parameters)
        if "activations" in names and state.activations is None:
            raise RecipeError(
                f'step "{recipe_step.id}": needs captured states; put a capture step (use = "residuals") before it.'
            )
        return names

    def _certify(
        self,
        recipe_step: RecipeStep,
        before: Weights,
        after: Weights,
        samples: Samples,
        out: StepOutput,
    ) -> None:
        if not isinstance(after.undo, Undo):
            raise CheckFailed(
                f'step "{recipe_step.id}" says it is exact, but its weights do not come from a fold that can be undone.'
            )
        self.progress(0, 1, "certificate: logits, and the way back")
        certificate = certify(
            before, after, after.unfold(after.undo), samples.layout, self.pair.student.device
        )
        out.report.certificate = certificate
        out.tensors(f"weights/{recipe_step.id}/{UNDO}", after.undo.tensors())
        enforce_certificate(certificate, self.recipe.check, f'step "{recipe_step.id}"')

    def _save(self, name: str, state: VariantState, dtype: torch.dtype) -> Path:
        """Write a variant as a plain Hugging Face folder, unless it is there and hashes true."""
        key = digest("checkpoint", name, state.key, str(dtype))
        record = self.store.find(key, self.ledger)
        if record is None:  # a run's checkpoints lie in its own folder, whoever else made the same
            out = StepOutput(self.store, self.ledger, key)
            for path in tokenizer_files(self.pair.student.folder):
                if path.suffix != ".safetensors":
                    out.write(f"checkpoints/{name}/{path.name}", [path.read_bytes()])
            state.weights.save(
                lambda file, blocks: out.write(f"checkpoints/{name}/{file}", blocks), dtype
            )
            out.write(f"checkpoints/{name}/recipe.toml", [self.loaded.text.encode()])
            out.json(
                f"checkpoints/{name}/{MANIFEST}",
                {Path(f.path).name: f.sha256 for f in out.used.values()},
            )
            record = self._record(key, f"save {name}", 0.0, out, {})
        folder = (
            self.store.root / Path(record["files"][-1]["path"]).parent
        )  # beside an older one, where what the recipe names has changed
        self._tell("variant_saved", name, folder=folder)
        return folder

    def _evaluate(
        self,
        name: str,
        recipe_step: RecipeStep,
        state: VariantState,
        folder: Path,
        samples: Samples,
    ) -> list[MetricRow]:
        names = self._takes(recipe_step, state)
        behind = digest(state.key, name, str(self.save_dtype()), facts_digest(self.questions))
        key = recipe_step.key(behind)
        record = None if self.fresh else self.store.find(key)
        started, reused = time.monotonic(), record is not None
        with self._watched(recipe_step, name):
            if record is None:
                variant = Variant(
                    name, self._saved(folder, state), state.maps, round(state.seconds, 3), folder
                )
                out = StepOutput(self.store, self.ledger, key, recipe_step.id)
                given = {"variant": variant, "pair": self.pair, "activations": state.activations, "samples": samples, "out": out,
                         "progress": self.progress}  # fmt: skip
                info = {
                    "rows": [
                        list(row)
                        for row in recipe_step.step.evaluate(**{k: given[k] for k in names})
                    ]
                }
                record = self._record(
                    key,
                    f"{recipe_step.id} {name}",
                    time.monotonic() - started,
                    out,
                    info,
                    recipe_step,
                    behind,
                )
        self._stand_on(record)
        self.steps[name, recipe_step.id] = StepResult(
            key=key,
            reused=reused,
            seconds=float(record["seconds"]),
            notes=record["notes"],
            report=StepReport.from_dict(record["report"]),
        )
        self._tell("after_step", name, recipe_step, seconds=float(record["seconds"]), reused=reused)
        return [MetricRow(*row) for row in record["info"]["rows"]]

    def _saved(self, folder: Path, state: VariantState) -> Weights:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return replace(
            open_folder(folder, config, state.weights.adapter), lineage=state.weights.lineage
        )
