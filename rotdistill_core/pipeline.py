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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rotdistill_core import bank as banks
from rotdistill_core.answers import greedy
from rotdistill_core.bank import Bank
from rotdistill_core.certificate import certify
from rotdistill_core.errors import CheckFailed, PluginError, RecipeError
from rotdistill_core.ledger import Ledger, Out, Store
from rotdistill_core.maps import Maps, restore_maps, store_maps
from rotdistill_core.models import MANIFEST, Pair, open_pair, tokenizer_files
from rotdistill_core.plugins import OBSERVERS, load, manager
from rotdistill_core.recipe import Loaded, Placed, digest
from rotdistill_core.report import as_json, gates
from rotdistill_core.samples import Row, Samples, Variant, claimed, inputs, prompt_tokens, read_questions, tokenize, tokenize_both
from rotdistill_core.step import options_of
from rotdistill_core.walk import Progress
from rotdistill_core.weights import UNDO, Undo, Weights, open_folder, restore


@dataclass(frozen=True)
class State:
    """What the steps of a variant have made so far."""

    key: str
    weights: Weights
    maps: Maps
    bank: Bank | None
    seconds: float


@dataclass(frozen=True)
class Done:
    """A finished step."""

    key: str
    reused: bool
    seconds: float
    notes: dict[str, Any]


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    rows: list[Row]
    steps: dict[tuple[str, str], Done]
    """(variant, step id) -> what happened."""
    checkpoints: dict[str, Path]
    told: list[Any]
    """What observers say at the end, to be shown below the results."""
    pair: Pair | None = None
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Variant -> which checks it breaks, in words."""


class Run:
    """One recipe being carried out. The only place that keeps state."""

    def __init__(self, loaded: Loaded, root: Path, observer: Any, progress: Progress, fresh: bool = False) -> None:
        self.loaded, self.recipe, self.progress, self.fresh = loaded, loaded.recipe, progress, fresh
        self.pm = manager()
        self.pm.register(observer)
        for placed in loaded.steps:
            self.pm.register(placed.step, name=f"step.{placed.id}")
        for name in dict.fromkeys(self.recipe.observers):
            self.pm.register(load(OBSERVERS, name)[0], name=f"observer.{name}")
        self.say = observer.say
        self.pair = open_pair(self.recipe.teacher, self.recipe.student, self.recipe.anchor, self.say)
        self.questions, self.style = read_questions(self.recipe.samples, loaded.path.parent)
        self.store = Store(root.resolve(), observer.say)
        self.folder = loaded.folder(self.store.root)
        self.ledger = Ledger(self.folder)
        self.store.sweep(self.folder)
        self.steps: dict[tuple[str, str], Done] = {}

    def go(self) -> Outcome:
        """Carry out the recipe.

        Raises:
            CheckFailed: variants break a check; the others were made, and all that was made is judged and reported.
            RotdistillError: whatever else went wrong; what was committed before is found again by the next call.
        """
        out = Out(self.store, self.ledger, self.loaded.digest())
        if out.find("recipe.toml") is None:
            out.write("recipe.toml", [self.loaded.text.encode()])
            out.json("recipe.resolved.json", self.loaded.resolved())
        samples = self.samples()
        models = [model.sha256 for model in (self.pair.teacher, self.pair.student, self.pair.anchor) if model]
        base = digest(*models, samples.digest(), self.recipe.seed,
                      str(self.pair.student.dtype), self.pair.student.device.type)  # fmt: skip
        start: dict[str, Any] = {"kind": "base", "key": base, "inputs": inputs(self.recipe, self.pair, self.questions, self.style)}
        if not any(start.items() <= record.items() for record in self.ledger.records):
            self.ledger.append(**start)
        outcome = Outcome(self.folder, [], self.steps, {}, [], self.pair)
        dtype = self.save_dtype()
        for name, chain in self.loaded.chains(torch.finfo(dtype).bits < 32).items():
            state = State(base, self.pair.student.weights, Maps(), None, 0.0)
            try:
                for placed in (p for p in chain if p.stage != "evaluate"):
                    state = self._step(name, placed, state, samples)
            except CheckFailed as error:
                outcome.failed[name] = [str(error)]
                continue
            folder = outcome.checkpoints[name] = self._save(name, state, dtype)
            outcome.rows += [row for p in chain if p.stage == "evaluate" for row in self._evaluate(name, p, state, folder, samples)]
        outcome.failed |= gates(outcome.rows, self.recipe.check)
        outcome.rows += [Row(name, "failed", float(len(faults))) for name, faults in outcome.failed.items()]
        out = Out(self.store, self.ledger, "report")
        out.write("results.jsonl", [(json.dumps(item, ensure_ascii=False) + "\n").encode() for item in as_json(outcome.rows)])
        outcome.told = self._tell("run_ended", "", loaded=self.loaded, outcome=outcome, out=out)
        if faults := [f'variant "{name}" failed: {fault}' for name, found in outcome.failed.items() for fault in found]:
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
            open_ones = [q for q in self.questions if q.answer is None and (q.split == "heldout") == (who == "heldout")]
            asked = {q.id: prompt_tokens(teacher.tokenizer, self.style, q.question) for q in open_ones}
            key = digest("answers", teacher.sha256, asked, most, str(teacher.dtype), teacher.device.type)
            out = Out(self.store, self.ledger, key).keyed(key)
            path = out.find(name := f"answers/teacher-{who}.json")
            if path is None and asked:
                started = time.monotonic()
                path = out.json(name, greedy(teacher.folder, asked, most, teacher.device, teacher.dtype, self.progress))
                self.say(f"  {'teacher':<12} {f'{len(asked)} answers':<16} {time.monotonic() - started:6.1f} s")
            answers |= json.loads(path.read_text(encoding="utf-8")) if path else {}
        given = (teacher.tokenizer, self.questions, answers, self.style, settings.max_tokens)
        samples = tokenize(*given) if self.pair.one_tokenizer else tokenize_both(self.pair.student.tokenizer, *given)
        frozen = Out(self.store, self.ledger, samples.digest())
        if frozen.find("samples.tsv") is None:
            lines = ["id\tlanguage\tsplit\ttokens\tanswer_from\tsha256\n"]
            texts = samples.layout.texts
            lines += [f"{t.id}\t{t.language}\t{t.split}\t{len(t.tokens)}\t{t.answer}\t{digest(t.tokens)}\n" for t in texts]
            frozen.write("samples.tsv", [line.encode() for line in lines])
            frozen.write("system.md", [self.style.encode()])
        return samples

    def _step(self, variant: str, placed: Placed, state: State, samples: Samples) -> State:
        key = placed.key(state.key)
        record = None if self.fresh and (key not in {d.key for d in self.steps.values()}) else self.store.find(key)
        reused = record is not None
        with self._watched(placed, variant):
            record = record or self._execute(placed, state, samples, key)
        self._stand_on(record)
        seconds = float(record["seconds"])
        known = any(done.key == key for done in self.steps.values())
        self.steps[variant, placed.id] = Done(key, reused and not known, seconds, record["notes"])
        self._tell("after_step", variant, placed, seconds=seconds, reused=reused)
        info, after = record["info"], replace(state, key=key, seconds=state.seconds + seconds)
        if placed.stage == "capture":
            return replace(after, bank=banks.restore(info, self.store.root, samples))
        if placed.stage in ("align", "refine"):
            return replace(after, maps=restore_maps(info, self.store.root))
        return replace(after, weights=restore(info, self.pair.student.weights, self.store.root))

    def _stand_on(self, record: dict[str, Any]) -> None:
        """Say in this run's ledger what the run stands on, where another run made it."""
        if record not in self.ledger.records:
            self.ledger.append(**record)

    @contextmanager
    def _watched(self, placed: Placed, variant: str) -> Iterator[None]:
        """Tell observers that a step begins, and when it fails."""
        self._tell("before_step", variant, placed)
        try:
            yield
        except Exception as error:
            self._tell("step_failed", variant, placed, error=error)
            raise

    def _tell(self, hook: str, variant: str, placed: Placed | None = None, **more: Any) -> list[Any]:
        """Tell the observers, one by one: what one raises is said in a line, and stops neither the others nor the run."""
        told: list[Any] = []
        about = {"step_id": placed.id, "stage": placed.stage, "folder": self.folder} if placed else {}
        for name, plugin in self.pm.list_name_plugin():
            try:
                told += self.pm.subset_hook_caller(hook, self.pm.get_plugins() - {plugin})(variant=variant, say=self.say, **about, **more)
            except (Exception, SystemExit) as error:
                self.say(f"{name} failed in {hook}, the run goes on: {type(error).__name__}: {error}".partition("\n")[0])
        return told

    def _execute(self, placed: Placed, state: State, samples: Samples, key: str) -> dict[str, Any]:
        out, started = Out(self.store, self.ledger, key, placed.id), time.monotonic()
        result = self._call(placed, state, samples, out)
        if isinstance(result, Bank):
            info = result.info()
        elif isinstance(result, Maps):
            for space, found in result.items():
                found.verify(self.recipe.check.orthogonality, f'step "{placed.id}", {space}')
            info = store_maps(result, out)
        else:
            info = result.store(out, self.pair.student.dtype)
            if getattr(placed.step, "exact", False):
                self._certify(placed, state.weights, result, samples, out)
        return self._record(key, placed.id, time.monotonic() - started, out, info, placed, state.key)

    def _record(self, key: str, name: str, seconds: float, out: Out, info: dict[str, Any], placed: Placed | None = None,
                before: str = "") -> dict[str, Any]:  # fmt: skip
        """Append the line that commits a result, and return it."""
        about = {} if placed is None else {
            "use": placed.step.use, "options": options_of(placed.step), "plugin": f"{placed.origin.distribution} {placed.origin.version}",
        }  # fmt: skip
        files = [asdict(file) for file in out.used.values()]
        self.ledger.append(
            "step", key=key, before=before, id=name, seconds=round(seconds, 3), files=files, info=info, notes=out.notes, **about
        )
        return self.ledger.records[-1]

    def _call(self, placed: Placed, state: State, samples: Samples, out: Out) -> Any:
        """Call the one hook of one step, and hold the plugin to its contract."""
        self._takes(placed, state)
        others = {plugin for name, plugin in self.pm.list_name_plugin() if name.startswith("step.") and plugin is not placed.step}
        caller = self.pm.subset_hook_caller(placed.stage, others)
        pair, bank = self.pair, state.bank
        if placed.stage in ("align", "refine") or getattr(placed.step, "exact", False):
            pair, bank = pair.aligning, bank and bank.aligning
        given = {"weights": state.weights, "maps": state.maps, "bank": bank, "pair": pair, "samples": samples,
                 "out": out, "progress": self.progress}  # fmt: skip
        spec = caller.spec
        result = caller(**{name: given[name] for name in (spec.argnames if spec else given)})
        expected = {"capture": Bank, "align": Maps, "refine": Maps, "fold": Weights, "style": Weights}[placed.stage]
        if not isinstance(result, expected):
            where = f'step "{placed.id}" of {placed.origin.distribution}'
            raise PluginError(f"{where}: {placed.stage} must return {expected.__name__}, not {type(result).__name__}.")
        return result

    def _takes(self, placed: Placed, state: State) -> list[str]:
        """Return the arguments that a step's hook takes; where the bank is one of them there must be one."""
        names = list(inspect.signature(getattr(placed.step, placed.stage)).parameters)
        if "bank" in names and state.bank is None:
            raise RecipeError(f'step "{placed.id}": needs captured states; put a capture step (use = "residuals") before it.')
        return names

    def _certify(self, placed: Placed, before: Weights, after: Weights, samples: Samples, out: Out) -> None:
        if not isinstance(after.undo, Undo):
            raise CheckFailed(f'step "{placed.id}" says it is exact, but its weights do not come from a fold that can be undone.')
        self.progress(0, 1, "certificate: logits, and the way back")
        certificate = certify(before, after, after.unfold(after.undo), samples.layout, self.pair.student.device)
        out.notes["certificate"] = certificate.as_dict()
        out.tensors(f"weights/{placed.id}/{UNDO}", after.undo.tensors())
        certificate.enforce(self.recipe.check, f'step "{placed.id}"')

    def _save(self, name: str, state: State, dtype: torch.dtype) -> Path:
        """Write a variant as a plain Hugging Face folder, unless it is there and hashes true."""
        key = digest("checkpoint", name, state.key, str(dtype))
        record = self.store.find(key, self.ledger)
        if record is None:  # a run's checkpoints lie in its own folder, whoever else made the same
            out = Out(self.store, self.ledger, key)
            for path in tokenizer_files(self.pair.student.folder):
                if path.suffix != ".safetensors":
                    out.write(f"checkpoints/{name}/{path.name}", [path.read_bytes()])
            state.weights.save(lambda file, blocks: out.write(f"checkpoints/{name}/{file}", blocks), dtype)
            out.write(f"checkpoints/{name}/recipe.toml", [self.loaded.text.encode()])
            out.json(f"checkpoints/{name}/{MANIFEST}", {Path(f.path).name: f.sha256 for f in out.used.values()})
            record = self._record(key, f"save {name}", 0.0, out, {})
        folder = self.store.root / Path(record["files"][-1]["path"]).parent  # beside an older one, where what the recipe names has changed
        self._tell("variant_saved", name, folder=folder)
        return folder

    def _evaluate(self, name: str, placed: Placed, state: State, folder: Path, samples: Samples) -> list[Row]:
        names = self._takes(placed, state)
        behind = digest(state.key, name, str(self.save_dtype()), claimed(self.questions))
        key = placed.key(behind)
        record = None if self.fresh else self.store.find(key)
        started, reused = time.monotonic(), record is not None
        with self._watched(placed, name):
            if record is None:
                variant = Variant(name, self._saved(folder, state), state.maps, round(state.seconds, 3), folder)
                out = Out(self.store, self.ledger, key, placed.id)
                given = {"variant": variant, "pair": self.pair, "bank": state.bank, "samples": samples, "out": out,
                         "progress": self.progress}  # fmt: skip
                info = {"rows": [list(row) for row in placed.step.evaluate(**{k: given[k] for k in names})]}
                record = self._record(key, f"{placed.id} {name}", time.monotonic() - started, out, info, placed, behind)
        self._stand_on(record)
        self.steps[name, placed.id] = Done(key, reused, float(record["seconds"]), record["notes"])
        self._tell("after_step", name, placed, seconds=float(record["seconds"]), reused=reused)
        return [Row(*row) for row in record["info"]["rows"]]

    def _saved(self, folder: Path, state: State) -> Weights:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return replace(open_folder(folder, config, state.weights.adapter), lineage=state.weights.lineage)
