"""Recipes: one TOML document, validated whole before anything is opened."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from rotdistill_core.errors import PluginError, RecipeError, nearest
from rotdistill_core.plugins import STEPS, Origin, installed, step_class
from rotdistill_core.step import options_of, stage_of

MAX_BYTES = 1_000_000
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
    """Dtype of the checkpoints; `auto` is the student's own. A narrower type than the compute dtype adds a variant `round-trip`."""


class SamplesRef(Document):
    """The texts; paths are relative to the recipe."""

    index: str = "../samples/index.tsv"
    """Blurbs: id, language, place, country, question, blurb."""
    style: str = "../samples/tour_guide.md"
    """The system prompt."""
    heldout: str = "../samples/heldout.tsv"
    """Held-out questions; their answers are the teacher's own."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the blurbs on which options are chosen; split by id."""
    max_tokens: Annotated[int, Field(ge=16)] = 512
    """Texts are cut after this many tokens."""
    answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """Longest held-out answer that the teacher generates."""
    own_answers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Also fit on the teacher's own answers to the blurbs' questions, up to this many tokens each; 0 for blurbs alone."""
    limit: PositiveInt | None = None
    """Use only the first blurbs in order of a hash of their id (for trials)."""


class Check(Document):
    """Tolerances; a run that breaks one ends with exit code 4 and keeps everything."""

    orthogonality: Annotated[float, Field(gt=0)] = 1e-5
    """max |R Rᵀ - I| of every stored rotation."""
    logits_float64: Annotated[float, Field(gt=0)] = 1e-9
    """Largest logit change of an exact step in float64."""
    logits_float32: Annotated[float, Field(gt=0)] = 1e-3
    """Largest logit change of an exact step in float32."""
    unfold: Annotated[float, Field(gt=0)] = 1e-12
    """Largest weight change after fold and unfold in float64."""


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
    samples: SamplesRef = SamplesRef()
    """The texts."""
    check: Check = Check()
    """Tolerances."""
    variants: Annotated[dict[Annotated[str, Field(pattern=NAME)], list[str]], Field(min_length=1)] = {"full": []}  # noqa: RUF012
    """Variant name -> ids of the toggled steps that it runs; steps that no variant names always run."""


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

    def chain(self, variant: str) -> tuple[Placed, ...]:
        """Return the steps of a variant in file order: those that no variant names, and those that this one names."""
        toggles = {name for names in self.recipe.variants.values() for name in names}
        mine = self.recipe.variants[variant]
        return tuple(p for p in self.steps if p.id not in toggles or p.id in mine)


def load(path: Path, sets: Sequence[str] = ()) -> Loaded:
    """Read and validate a recipe.

    Args:
        path: the TOML file.
        sets: overrides `key.path=value`; the first part may be a step id, the value is TOML or a bare string.

    Raises:
        RecipeError: everything that is wrong with it, in one report.
    """
    text = _read(path)
    tables = _extend(path, _parse(path, text))
    problems = [p for item in sets for p in _override(tables, item)]
    raw_steps = tables.pop("step", [])
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        recipe = None
        problems += [_explain(e, Recipe) for e in error.errors()]
    placed, step_problems = _place(raw_steps)
    problems += step_problems
    variants = tables.get("variants", {})
    ids = [raw.get("id", raw.get("use")) for raw in raw_steps if isinstance(raw, dict)] if isinstance(raw_steps, list) else []
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
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}.") from error


def _extend(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """Apply `extends`: one level, tables merged by key, steps replaced by id (or added when the id is new)."""
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: must be the path of one recipe.")
    base_path = path.parent / parent
    base = _parse(base_path, _read(base_path))
    if "extends" in base:
        raise RecipeError(f"{path}: extends: {parent} itself extends another recipe; one level only.")
    steps = {s.get("id", s.get("use")): s for s in base.get("step", [])}
    steps.update({s.get("id", s.get("use")): s for s in tables.get("step", [])})
    merged = {
        key: {**base[key], **value} if isinstance(value, dict) and key != "variants" and isinstance(base.get(key), dict) else value
        for key, value in {**base, **tables}.items()
    }
    return {**merged, "step": list(steps.values())}


def _override(tables: dict[str, Any], item: str) -> list[str]:
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [f'--set {item}: write it as key.path=value, for example chop.layers=24.']
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    target: Any = next((s for s in tables.get("step", []) if s.get("id", s.get("use")) == parts[0]), None)
    if target is None and parts[0] not in Recipe.model_fields:
        known = [*(s.get("id", s.get("use")) for s in tables.get("step", [])), *Recipe.model_fields]
        return [f'--set {item}: no step or table is called "{parts[0]}".{nearest(parts[0], known)}']
    inner = tables if target is None else target
    for part in parts[:-1] if target is None else parts[1:-1]:
        inner = inner.setdefault(part, {})
    inner[parts[-1]] = value
    return []


def _place(raw_steps: object) -> tuple[list[Placed], list[str]]:
    if not isinstance(raw_steps, list) or not raw_steps:
        return [], ["step: at least one [[step]] table is needed."]
    placed: list[Placed] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, raw in enumerate(raw_steps, 1):
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
            adapter: TypeAdapter[Any] = TypeAdapter(cls)
            placed.append(Placed(str(name), adapter.validate_python(options), origin))
        except PluginError as error:
            problems.append(f"{where}: {error}")
        except ValidationError as error:
            names = [f for f in cls.__dataclass_fields__ if f != "use"]  # type: ignore[attr-defined]
            problems += [f"{where}: {_explain(e, None, names)}" for e in error.errors()]
    return placed, problems


def _explain(error: Any, model: type[BaseModel] | None, names: Sequence[str] = ()) -> str:
    """Turn one pydantic error into 'key.path: what is wrong, what was meant'."""
    loc = [str(part) for part in error["loc"] if not str(part).endswith("]")]
    where = ".".join(loc)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known: Sequence[str] = names
        for part in loc[:-1] if model else ():
            annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if model:
            known = [*model.model_fields, "step", "extends"]
        return f"{where}: unknown key.{nearest(loc[-1], known)}"
    value = "" if error["type"] == "missing" else f" (it is {error['input']!r:.80})"
    return f"{where}: {error['msg']}{value}."


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipes for the plugins installed here.

    Written for editors: each `const` becomes a one-value `enum` and `use` is required, because validators of older drafts
    ignore `const` and would accept any step.
    """
    document = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    defs: dict[str, Any] = document.setdefault("$defs", {})
    references = []
    for name in installed(STEPS):
        try:
            cls, _ = step_class(name)
        except PluginError:
            continue
        one = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
        defs.update(one.pop("$defs", {}))
        one["properties"]["id"] = {"type": "string", "description": "Unique name of the step; defaults to `use`."}
        one["required"] = sorted({*one.get("required", []), "use"})
        defs[f"step.{name}"] = one
        references.append({"$ref": f"#/$defs/step.{name}"})
    document["properties"]["step"] = {"type": "array", "items": {"anyOf": references}}
    document["properties"]["extends"] = {"type": "string", "description": "Path of a recipe whose tables and steps are taken over."}
    document.pop("required", None)
    return _enums(document)  # type: ignore[no-any-return]


def _enums(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {("enum" if k == "const" else k): [v] if k == "const" else _enums(v) for k, v in node.items() if k != "discriminator"}
    return [_enums(item) for item in node] if isinstance(node, list) else node
