"""The parts that texts are split into, and the sides whose activations are captured."""

from __future__ import annotations

from enum import StrEnum


class Split(StrEnum):
    """What a text is used for."""

    FIT = "fit"
    """Steps are fitted on it."""
    VALIDATION = "validation"
    """Options are chosen on it."""
    HELDOUT = "heldout"
    """Variants are scored on it; nothing else sees it."""
    GUARD_VALIDATION = "guard-validation"
    """Outside the domain: limits how much of an edit is applied."""
    GUARD = "guard"
    """Outside the domain: variants are scored on it."""

    @property
    def outside_domain(self) -> bool:
        """Whether the texts are plain ones outside the domain."""
        return self in (Split.GUARD, Split.GUARD_VALIDATION)


class Side(StrEnum):
    """Whose activations a shard holds."""

    TEACHER = "teacher"
    STUDENT = "student"
    ANCHOR = "anchor"
    """The reference that aligners align the student to, in place of the teacher."""
    SPANS = "spans"
    """Row pairs where the two read different tokens: for each row of the student, the teacher's
    rows [start, end)."""
