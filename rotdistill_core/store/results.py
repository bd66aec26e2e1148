"""What a step reports beside its result, with types, for those who read it: report, check, plots.

Free notes (`StepOutput.notes`) are for people; no program reads them. What a program reads is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
class Curve:
    """A loss along a path: between two checkpoints, or over the steps of a training run."""

    start: str
    end: str
    positions: tuple[float, ...]
    """Where on the path each loss was measured; 0 is `start`, 1 is `end`."""
    losses: tuple[float, ...]
    """KL to the teacher at each position, nats per token."""


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
    teacher_errors: tuple[str, ...] = ()
    """Known errors that the teacher's answer asserts."""
    student_errors: tuple[str, ...] = ()


@dataclass
class StepReport:
    """The typed part of what a step reports. The ledger keeps it beside the step's files."""

    refused: str = ""
    """Why the step left the weights as they were; empty where its edit was applied."""
    certificate: Certificate | None = None
    curves: list[Curve] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    """Question id -> both answers."""

    def as_dict(self) -> dict[str, Any]:
        """Return what is set as JSON values; see `from_dict`."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepReport:
        """Return the report that `as_dict` described."""
        certificate = values.get("certificate")
        return cls(
            refused=values.get("refused", ""),
            certificate=Certificate(**certificate) if certificate else None,
            curves=[
                Curve(
                    start=curve["start"],
                    end=curve["end"],
                    positions=tuple(curve["positions"]),
                    losses=tuple(curve["losses"]),
                )
                for curve in values.get("curves", ())
            ],
            answers={
                name: Answer(
                    **{
                        key: tuple(value) if isinstance(value, list) else value
                        for key, value in answer.items()
                    }
                )
                for name, answer in values.get("answers", {}).items()
            },
        )
