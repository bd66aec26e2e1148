"""What a step reports besides its result, with types, for the programs that read it.

Free notes (`StepOutput.notes`) are for people; no program reads them. What a program reads is here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

CURVE_OF_VARIANT = "variant"
"""As the end of a `Curve`: the variant itself that the evaluator scores."""


@dataclass(frozen=True)
class Certificate:
    """Proof of an exact step, measured on real prompts."""

    logits_float64: float
    """Largest absolute change of a logit, everything in float64."""
    logits_float32: float
    """The same with weights and arithmetic in float32."""
    kl_float32: float
    """Mean KL between the two, nats."""
    unfold: float
    """Largest change of a weight after fold and unfold, float64."""
    texts: int
    """Number of prompts."""


@dataclass(frozen=True)
class Parity:
    """The layerwise forward of a model next to transformers' own, in float32 on real texts."""

    difference: float
    """Largest difference of a logit, relative to the spread of a text's logits."""
    allowed: float
    """What it may be."""
    text: str
    """The text with the largest difference."""
    texts: tuple[str, ...]
    """All texts that were compared."""
    tokens: tuple[int, ...]
    """Their lengths."""

    @property
    def holds(self) -> bool:
        """Whether nothing but rounding differs; a NaN does not hold."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Curve:
    """A loss along a path between two checkpoints."""

    start: str
    """Reference of the model at one end, or `CURVE_OF_VARIANT`."""
    end: str
    positions: tuple[float, ...]
    """Where on the path each loss was measured; 0 is `start`, 1 is `end`."""
    losses: tuple[float, ...]
    """KL to the teacher at each position, nats per token."""


@dataclass(frozen=True)
class TrainingCurve:
    """What a training run minimised, and what it was judged by."""

    loss: str
    """Name of what each step minimised: `forward` for the KL to the teacher."""
    losses: tuple[float, ...]
    """Of each step on its batch, before the step was taken; nats per token."""
    checks: tuple[int, ...]
    """Steps that were taken when the validation KL was measured; 0 is before training."""
    validation_kl: tuple[float, ...]
    """The KL to the teacher on validation texts at each check, nats per token."""


@dataclass(frozen=True)
class Answer:
    """One held-out question as the teacher and a variant answer it."""

    language: str
    question: str
    teacher: str
    """The teacher's answer."""
    student: str
    """The variant's answer."""
    teacher_facts: tuple[str, ...] = ()
    """Expected facts that the teacher's answer states."""
    student_facts: tuple[str, ...] = ()
    """Expected facts that the variant's answer states."""
    teacher_errors: tuple[str, ...] = ()
    """Known errors that the teacher's answer asserts."""
    student_errors: tuple[str, ...] = ()
    """Known errors that the variant's answer asserts."""


class CautionKind(StrEnum):
    """What a user should know of an edit that was applied."""

    GUARDED = "guarded"
    """The guard allowed a part of it only."""
    OVERFITTED = "overfitted"
    """It is much nearer to the teacher on the texts that it was fitted on than on others."""


@dataclass(frozen=True)
class Remedy:
    """What to try next."""

    what: str
    """In words; no sentence end."""
    sets: tuple[str, ...] = ()
    """Overrides as `--set` takes them, `refit.guard=1.04`. A step names its own options without its
    id, `guard=1.04`; the run puts the id before them (`of_step`)."""

    @property
    def text(self) -> str:
        """Words and overrides."""
        flags = " ".join(f"--set {shlex.quote(each)}" for each in self.sets)
        return f"{self.what} ({flags})" if flags else self.what

    def of_step(self, step: str) -> Remedy:
        """Return the remedy with the step's id before the options of the step."""
        keyed = (each if "." in each.partition("=")[0] else f"{step}.{each}" for each in self.sets)
        return Remedy(self.what, tuple(keyed))


def _read_remedy(value: object) -> object:
    """Return a remedy as it is now; records of earlier versions have words alone."""
    return Remedy(value) if isinstance(value, str) else value


StoredRemedy = Annotated[Remedy, BeforeValidator(_read_remedy)]


@dataclass(frozen=True)
class Caution:
    """What speaks against an edit that was applied, and what to try next."""

    kind: CautionKind
    reason: str
    """In words; no sentence end."""
    remedies: tuple[StoredRemedy, ...] = ()
    """What to try next, the most promising first."""

    @property
    def text(self) -> str:
        """Reason and remedies in sentences."""
        return f"{self.reason}.{_tried(self.remedies)}"


def _tried(remedies: Sequence[Remedy]) -> str:
    return f" Try: {'; '.join(each.text for each in remedies)}." if remedies else ""


@dataclass
class StepReport:
    """The typed part of what a step reports. The ledger keeps it with the step's files."""

    refused: str = ""
    """Why the step left the weights as they were; empty if its edit was applied."""
    remedies: tuple[StoredRemedy, ...] = ()
    """What to try next if the edit was refused, the most promising first."""
    cautions: list[Caution] = field(default_factory=list)
    """What speaks against an edit that was applied."""
    certificate: Certificate | None = None
    parity: Parity | None = None
    """Of a step that cut the model: the model after it, in transformers."""
    members: tuple[str, ...] = ()
    """Names of the models that a merge chose, of those that it was offered."""
    curves: list[Curve] = field(default_factory=list)
    training: TrainingCurve | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    """Question id -> both answers."""

    @property
    def refusal(self) -> str:
        """Why the edit was refused and what to try next, in sentences; empty if it was applied."""
        if not self.refused:
            return ""
        return f"{self.refused}.{_tried(self.remedies)}"

    def with_remedies(self, change: Callable[[Remedy], Remedy]) -> StepReport:
        """Return the report with each of its remedies changed."""
        cautions = [
            replace(caution, remedies=tuple(map(change, caution.remedies)))
            for caution in self.cautions
        ]
        return replace(self, remedies=tuple(map(change, self.remedies)), cautions=cautions)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values; see `from_dict`."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepReport:
        """Return the report that `as_dict` described.

        Raises:
            ValueError: it describes none.
        """
        return _report_validator().validate_python(values)


@cache
def _report_validator() -> TypeAdapter[StepReport]:
    return TypeAdapter(StepReport)
