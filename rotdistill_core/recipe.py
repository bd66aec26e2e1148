"""Recipes: one TOML document, validated whole before anything is opened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from rotdistill_core.errors import PluginError, RecipeError, explain, nearest
from rotdistill_core.plugins import OBSERVERS, STEPS, Origin, code_of, installed, step_class
from rotdistill_core.plugins import load as load_plugin
from rotdistill_core.step import options_of, stage_of, validator_of

MAX_BYTES = 1_000_000
NO_STEPS = "step: at least one [[step]] table is needed."
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


class Document(BaseModel):
    """Base of every recipe table: unknown keys are errors, values are never coerced or changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelRef(Document):
    """A model: where it is and how it is run."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    """A Hugging Face id, a local folder (relative to the current folder), a .gguf file, or `package:module/file.gguf`."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Dtype = "auto"
    """Compute dtype; `auto` is float32 on CPU and the checkpoint's own on GPU."""
    device: str = "auto"
    """`auto` is CUDA when there, else CPU."""


class StudentRef(ModelRef):
    """The student: what is edited and saved."""

    save_dtype: Dtype = "auto"
    """Of the student: dtype of its checkpoints; `auto` is its own. Narrower than float32, an exact step adds a variant `round-trip`."""


class SamplesRef(Document):
    """The texts; paths are relative to the recipe."""

    index: str = "../samples/index.tsv"
    """Blurbs, questions with their answers: id, language, place, country, question, blurb."""
    style: str = "../samples/tour_guide.md"
    """The system prompt."""
    heldout: str = "../samples/heldout.tsv"
    """Held-out questions; their answers are the teacher's own."""
    guard: str | None = None
    """Texts outside the domain: id, language, kind, text. What they cost is shown beside what the domain gains."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the blurbs on which options are chosen; split by id."""
    max_tokens: Annotated[int, Field(ge=16)] = 512
    """Blurbs and own answers are cut after this many tokens; held-out answers never are."""
    answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """Longest held-out answer that the teacher generates."""
    own_answers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Also fit on the teacher's own answers to the blurbs' questions, up to this many tokens each; 0 for blurbs alone."""
    limit: PositiveInt | None = None
    """Use only the first blurbs in order of a hash of their id (for trials)."""


class Check(Document):
    """Tolerances; a run that breaks one ends with exit code 4 and keeps everything."""

    orthogonality: Annotated[float, Field(gt=0)] = 1e-5
    """max abs of `R Rᵀ - I`, of every stored rotation."""
    logits_float64: Annotated[float, Field(gt=0)] = 1e-9
    """Largest logit change of an exact step in float64."""
    logits_float32: Annotated[float, Field(gt=0)] = 1e-3
    """Largest logit change of an exact step in float32."""
    unfold: Annotated[float, Field(gt=0)] = 1e-12
    """Largest weight change after fold and unfold in float64."""
    kl_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest held-out KL of a variant, as a multiple of that of `base` (or the first variant that has one)."""
    guard: Annotated[float, Field(gt=0)] | None = None
    """Largest KL of a variant on the guard's texts, as a multiple of that of `base`."""
    facts: Annotated[float, Field(ge=0)] | None = None
    """Least factual completeness of a variant, as a multiple of that of `base`."""


class Recipe(Document):
    """The top level of a recipe, steps apart."""

    name: Annotated[str, Field(pattern=NAME)]
    """Names the run folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random; each step derives its own from it."""
    teacher: ModelRef
    """The large model."""
    student: StudentRef
    """The small model; the same reference as the teacher, with a `chop` step, cuts the teacher down."""
    anchor: ModelRef | None = None
    """Another checkpoint of the student's shape: what aligners align the student to, instead of to the teacher."""
    samples: SamplesRef = SamplesRef()
    """The texts."""
    check: Check = Check()
    """Tolerances."""
    observers: Annotated[list[str], Field(exclude=True)] = ["report"]
    """Plugins that watch the run. They change nothing that is computed, so the resolved recipe and its hash are without them."""
    variants: Annotated[dict[Annotated[str, Field(pattern=NAME)], list[str]], Field(min_length=1)] = {"full": []}
    """Variant name -> ids of the toggled steps that it runs; steps that no variant names always run."""


def digest(*parts: object) -> str:
    """Return the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Placed:
    """A step in its place: id, options and where its plugin comes from."""

    id: str
    step: Any
    origin: Origin

    @property
    def stage(self) -> str:
        """The one hook that the step answers."""
        return stage_of(type(self.step))

    def key(self, before: str) -> str:
        """Return the key of the step behind everything before it."""
        named: list[str] = getattr(self.step, "inputs", list)()  # the content of what its options name, such as other models
        origin = self.origin
        return digest(before, self.id, options_of(self.step), origin.distribution, origin.version, code_of(origin), *named)


@dataclass(frozen=True)
class Loaded:
    """A valid recipe with its steps."""

    path: Path
    text: str
    recipe: Recipe
    steps: tuple[Placed, ...]

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as JSON values after `extends`, `--set` and defaults."""
        steps = [{"id": p.id, **options_of(p.step)} for p in self.steps]
        return {**self.recipe.model_dump(mode="json"), "step": steps}

    def digest(self) -> str:
        """Return the sha256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Return the run's folder: the same recipe, options included, always has the same one."""
        return root / f"{self.recipe.name}-{self.digest()[:8]}"

    def chain(self, variant: str) -> tuple[Placed, ...]:
        """Return the steps of a variant in file order: those that no variant names, and those that this one names."""
        toggles = {name for names in self.recipe.variants.values() for name in names}
        return tuple(p for p in self.steps if p.id not in toggles or p.id in self.recipe.variants[variant])

    def chains(self, narrow: bool) -> dict[str, tuple[Placed, ...]]:
        """Return the steps of each variant; `round-trip` is one more where checkpoints are `narrow` (below 32 bits) and a fold is exact."""
        found = {name: self.chain(name) for name in self.recipe.variants}
        return {**found, "round-trip": exact, **found} if narrow and (exact := self.exact_chain()) else found

    def exact_chain(self) -> tuple[Placed, ...]:
        """Return the first variant's chain that has an exact fold, without its toggled transfers; empty when there is none."""
        toggles = {name for names in self.recipe.variants.values() for name in names}
        for chain in map(self.chain, self.recipe.variants):
            if any(getattr(p.step, "exact", False) for p in chain):
                return tuple(p for p in chain if p.id not in toggles or getattr(p.step, "exact", p.stage != "style"))
        return ()


def load(path: Path, sets: Sequence[str] = ()) -> Loaded:
    """Read and validate a recipe.

    Args:
        path: the TOML file.
        sets: overrides `key.path=value`; the first part may be a step id, the value is TOML or a bare string.

    Raises:
        RecipeError: everything that is wrong with it, in one report.
    """
    text = _read(path)
    return validated(path, text, _extend(path, _parse(path, text)), sets)


def validated(path: Path, text: str, tables: dict[str, Any], sets: Sequence[str] = ()) -> Loaded:
    """Return the recipe in `tables`, which become its own; see `load`."""
    steps = _step_tables(tables) or []
    problems = [] if steps else [NO_STEPS]
    problems += [p for item in sets for p in _override(tables, steps, item)]
    tables.pop("step", None)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        recipe = None
        problems += explain(error, tables, _known_keys())
    placed, step_problems = _place(steps)
    problems += step_problems
    for name in watching if isinstance(watching := tables.get("observers"), list) else ():
        try:
            load_plugin(OBSERVERS, str(name))
        except PluginError as error:
            problems.append(f"observers: {error}")
    variants = tables.get("variants", {})
    ids = [_id(raw) for raw in steps]
    for variant, names in variants.items() if isinstance(variants, dict) else ():
        for name in names if isinstance(names, list) else ():
            if name not in ids:
                problems.append(f'variants.{variant}: no step has the id "{name}".{nearest(str(name), map(str, ids))}')
    if problems or recipe is None:
        raise RecipeError(*(f"{path}: {p}" for p in problems))
    return Loaded(path, text, recipe, tuple(placed))


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes; a recipe is a short document.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        others = sorted(str(p) for folder in {path.parent, Path("recipes")} for p in folder.glob("*.toml") if p.name != "pyproject.toml")
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.{nearest(str(path), others)}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
        json.dumps(tables, default=str)  # nested too deeply to be walked: better refused here than anywhere after
        return tables
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}.") from error


def _step_tables(tables: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the [[step]] tables of a document, or None when its `step` is something else."""
    steps = tables.get("step", [])
    return steps if isinstance(steps, list) and all(isinstance(raw, dict) for raw in steps) else None


def _id(raw: Mapping[str, Any]) -> Any:
    return raw.get("id", raw.get("use"))


def _extend(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """Apply `extends`: one level, tables merged by key, steps replaced by id (or added when the id is new)."""
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str) or "\0" in parent:
        raise RecipeError(f"{path}: extends: must be the path of one recipe.")
    base_path = path.parent / parent
    base = _parse(base_path, _read(base_path))
    if "extends" in base:
        raise RecipeError(f"{path}: extends: {parent} itself extends another recipe; one level only.")
    merged = {**base, **tables}
    for key in base.keys() & tables.keys() - {"variants"}:
        if isinstance(base[key], dict) and isinstance(tables[key], dict):
            merged[key] = {**base[key], **tables[key]}
    by_id = {**_by_id(base_path, base), **_by_id(path, tables)}
    return {**merged, "step": [raw for same_id in by_id.values() for raw in same_id]}


def _by_id(path: Path, tables: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of a document by id. Two of one id stay two, so that they are reported."""
    steps = _step_tables(tables)
    if steps is None:
        raise RecipeError(f"{path}: {NO_STEPS}")
    found: dict[str, list[dict[str, Any]]] = {}
    for raw in steps:
        found.setdefault(str(_id(raw)), []).append(raw)
    return found


def _override(tables: dict[str, Any], steps: Sequence[dict[str, Any]], item: str) -> list[str]:
    """Apply one `--set` to the tables, or to the step that it names; return what is wrong with it."""
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [f"--set {item}: write it as key.path=value, for example chop.layers=24."]
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    target = next((raw for raw in steps if _id(raw) == parts[0]), None)
    if target is None and parts[0] not in Recipe.model_fields:
        known = [*(str(_id(raw)) for raw in steps), *Recipe.model_fields]
        return [f'--set {item}: no step or table is called "{parts[0]}".{nearest(parts[0], known)}']
    inner: Any = tables if target is None else target
    for part in parts[:-1] if target is None else parts[1:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            return [f"--set {item}: {part} is a value and has no keys."]
    inner[parts[-1]] = value
    return []


def _place(steps: Sequence[Mapping[str, Any]]) -> tuple[list[Placed], list[str]]:
    """Validate the options of all steps; return the valid steps and what is wrong with the others."""
    placed: list[Placed] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, raw in enumerate(steps, 1):
        options = dict(raw)
        use, name = options.get("use"), options.pop("id", options.get("use"))
        where = f'step "{name}" (#{number})'
        if not isinstance(use, str):
            problems.append(f"step #{number}: use: missing; name one of {', '.join(installed(STEPS))}.")
            continue
        if not isinstance(name, str) or name in seen:
            problems.append(f"{where}: id: must be a unique string.")
        seen.add(str(name))
        try:
            cls, origin = step_class(use)
            # As JSON, because strictly validated Python values may not be lists where a tuple is declared.
            step: Any = validator_of(cls).validate_json(json.dumps(options, default=str), strict=True)
            placed.append(Placed(str(name), step, origin))
        except PluginError as error:
            problems.append(f"{where}: {error}")
        except ValidationError as error:
            names = [field.name for field in dataclasses.fields(cls) if field.name != "use"]
            problems += [f"{where}: {p}" for p in explain(error, options, {(): names})]
    return placed, problems


def _known_keys() -> dict[tuple[str, ...], list[str]]:
    """Return the keys that a recipe may have, by the path of their table."""
    known: dict[tuple[str, ...], list[str]] = {(): [*Recipe.model_fields, "step", "extends"]}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Document):
            known[name,] = list(field.annotation.model_fields)
    return known
