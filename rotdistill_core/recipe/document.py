"""TODO: rotdistill_core.recipe.document."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


class Document(BaseModel):
    """Base of every recipe table: unknown keys are errors, values are never coerced or changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
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
    variants: Annotated[
        dict[Annotated[str, Field(pattern=NAME_PATTERN)], list[str]], Field(min_length=1)
    ] = {"full": []}
    """Variant name -> ids of the toggled steps that it runs; steps that no variant names always run."""
