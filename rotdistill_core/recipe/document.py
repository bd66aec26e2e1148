"""The tables of a recipe, as pydantic models: their field docstrings are the help that editors
show."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from rotdistill_core.recipe.devices import DEVICE_HELP, is_device

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
"""Names of runs, variants and steps: they become parts of paths, so they may not be paths."""
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


class Document(BaseModel):
    """Base of every recipe table: unknown keys are errors, values are never coerced or changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelRef(Document):
    """A model: where it is and how it is run."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    """A Hugging Face id, a local folder (relative to the current one), or a reference that an
    installed source plugin opens: a .gguf file, `package:module/file.gguf`, `run:NAME/VARIANT`."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Dtype = "auto"
    """Compute dtype; `auto` is float32 on CPU and the checkpoint's own on GPU."""
    device: str = "auto"
    """Where the model computes: `cpu`, `cuda` (the first GPU), `cuda:1` (the second), `mps`; `auto`
    is the first GPU where CUDA is available, else the CPU. Float64 work of a device that has no
    fast float64 is done on the CPU."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if not is_device(name):
            raise ValueError(DEVICE_HELP)
        return name

    @model_validator(mode="after")
    def _device_has_the_dtype(self) -> Self:
        if self.device == "mps" and self.dtype == "float64":
            raise ValueError('an Apple GPU has no float64; write dtype = "float32" or "auto"')
        return self


def _day(value: object) -> object:
    """Return a day that is written as text; TOML and Python have days of their own."""
    if isinstance(value, str):
        try:
            return datetime.date.fromisoformat(value)
        except ValueError as error:
            raise ValueError('write a day as "2025-07-01"') from error
    return value


Date = Annotated[datetime.date, BeforeValidator(_day)]


class StudentRef(ModelRef):
    """The student: the model that is edited and saved."""

    save_dtype: Dtype = "auto"
    """Dtype of saved checkpoints; `auto` is the student's own. With a dtype narrower than float32
    and an exact step, a variant `round-trip` is added that measures what the rounding costs."""


SHIPPED_INDEX = "../samples/index.tsv"
SHIPPED_STYLE = "../samples/tour_guide.md"
SHIPPED_HELDOUT = "../samples/heldout.tsv"
"""The texts of a recipe that names none, relative to the folder of the shipped recipes."""


class SamplesRef(Document):
    """The texts; paths are relative to the recipe."""

    index: str = SHIPPED_INDEX
    """Conversations to fit on: a tab-separated table, `.jsonl`, `.parquet`, or
    `hub:owner/name`."""
    style: str | None = None
    """The system prompt of conversations that have none of their own. By default it is the one that
    all conversations of `index` have, if they have one; without `index` it is
    `../samples/tour_guide.md`."""
    heldout: str | None = None
    """Held-out questions, in the forms of `index`. The teacher answers them, and variants are
    scored on its answers. By default a share of `index` is held out; without `index` it is
    `../samples/heldout.tsv`."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the texts of `index` that is held out where `heldout` names no file."""
    guard: str | None = None
    """Texts outside the domain, in the forms of `index` or with a column `text`. They limit and
    show what the domain costs."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the texts on which options are chosen; split by a hash of the id. Texts of one
    `topic` stay together."""
    thinking: bool = False
    """Let models think before they answer, where their chat template knows how to
    (`enable_thinking`, or a prompt that ends with `<think>`). By default answers are written and
    learned without."""
    max_tokens: Annotated[int, Field(ge=16)] = 512
    """Longest text to fit on, in tokens; longer ones are cut. Held-out answers are never cut."""
    answer_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """Longest held-out answer that the teacher generates, in tokens."""
    own_answers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Also fit on the teacher's answers to the questions, up to so many tokens each; 0: do not."""
    bake_prompt: bool = False
    """Teach the student to answer without the system prompt as the teacher does with it: the
    teacher reads it, the student does not, and their rows are paired token by token. Variants are
    then scored and asked without it. Both models need one vocabulary."""
    date: Date | None = None
    """The day that chat templates write, such as `"2025-07-01"`. Only templates that write a date
    use it. By default it is the day of the first run of these models and texts; later runs keep it,
    so that they reuse what is there. `--fresh` takes today."""
    limit: PositiveInt | None = None
    """Use only this many texts of `index`, the first in order of a hash of their id (for trials). A
    share that is held out is a share of these. Files of `heldout` and `guard` are used whole, so
    that scores can be compared with those of the full run; to be quicker, name shorter files, or
    lower `answer_tokens`."""

    @model_validator(mode="before")
    @classmethod
    def _shipped_texts(cls, values: Any) -> Any:
        """Fill in prompt and held-out questions that belong to the shipped index."""
        if not isinstance(values, dict) or values.get("index", SHIPPED_INDEX) != SHIPPED_INDEX:
            return values
        held = {} if "heldout_share" in values else {"heldout": SHIPPED_HELDOUT}
        return {"style": SHIPPED_STYLE, **held, **values}


class Lessons(Document):
    """Lessons: more texts to fit on, which the teacher writes before anything is captured."""

    count: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How many. They are fitted on; none is held out or validated, and none is about a topic that
    is. 0: none."""
    source: Annotated[Literal["questions", "topics", "teacher"], Field(alias="from")] = "questions"
    """Where questions come from. `"questions"`: forms (those of `forms`, and each question of the
    index that names its topic) with the topics of the index. `"topics"`: the forms of `forms` with
    `topics`. `"teacher"`: the teacher proposes them itself, after two questions of the index."""
    general: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of lessons outside the domain, against forgetting."""
    general_from: Literal["texts", "questions"] = "texts"
    """What they are. `"texts"`: plain texts, which the teacher writes from a random token on.
    `"questions"`: questions that it proposes and answers without the system prompt; always so for
    a student of another vocabulary, which no plain text teaches."""
    tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Temperature of answers in the domain; 0 takes the best token. Proposed questions are always
    drawn at temperature 0.7, general texts at 1."""
    forms: str | None = None
    """A table of forms of question, relative to the recipe: language, and form with {topic} in it.
    """
    topics: str | None = None
    """A file of topics, relative to the recipe: one a line, with a language after a tab or none.
    Default: the topics of the index."""

    @model_validator(mode="after")
    def _topics_need_forms(self) -> Self:
        if self.source == "topics" and self.count and not self.forms:
            raise ValueError(
                'from = "topics" needs questions to ask about them; name a table as lessons.forms'
            )
        return self


class Check(Document):
    """Tolerances. A variant that breaks one is marked as failed; the run ends with exit code 4."""

    orthogonality: Annotated[float, Field(gt=0)] = 1e-5
    """Largest absolute entry of `R Rᵀ - I`, of every stored rotation."""
    logits_float64: Annotated[float, Field(gt=0)] = 1e-9
    """Largest logit change of an exact step in float64."""
    logits_float32: Annotated[float, Field(gt=0)] = 1e-3
    """Largest logit change of an exact step in float32."""
    unfold: Annotated[float, Field(gt=0)] = 1e-12
    """Largest weight change after fold and unfold, in float64."""
    kl_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest held-out KL of a variant, as a multiple of the baseline's."""
    guard: Annotated[float, Field(gt=0)] | None = None
    """Largest KL of a variant on the texts outside the domain, as a multiple of the baseline's."""
    facts: Annotated[float, Field(ge=0)] | None = None
    """Least factual completeness of a variant, as a multiple of the baseline's."""


class Recipe(Document):
    """The top level of a recipe, without its steps."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Name of the run; its folder is `runs/<name>-<hash>`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random; each step derives its own from it."""
    teacher: ModelRef
    """The large model."""
    student: StudentRef
    """The small model. The teacher's own reference, with a `chop` step, cuts the teacher down."""
    anchor: ModelRef | None = None
    """Another checkpoint of the student's shape. Aligners align the student to it, not to the
    teacher."""
    samples: SamplesRef = SamplesRef()
    """The texts."""
    lessons: Lessons = Lessons()
    """How many more texts the teacher writes."""
    check: Check = Check()
    """Tolerances."""
    observers: Annotated[list[str], Field(exclude=True)] = ["report"]
    """Plugins that watch the run. They change no result, and the recipe's hash leaves them out."""
    baseline: Annotated[str | None, Field(exclude=True)] = None
    """The variant that others are compared with. Default: `base`, else the first variant."""
    headline: Annotated[str | None, Field(exclude=True)] = None
    """The variant whose answers the report shows next to the baseline's. Default: `full`, else the
    last."""
    variants: Annotated[
        dict[Annotated[str, Field(pattern=NAME_PATTERN)], list[str]], Field(min_length=1)
    ] = {"full": []}
    """Variant -> ids of the toggled steps that it runs. Steps that no variant names always run."""
