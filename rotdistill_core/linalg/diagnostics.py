"""What aligners measure at each layer boundary, beside their nulls: one JSON document per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AssignmentDiagnostics:
    """How well an assignment of heads or neurons matches two layers, beside its nulls."""

    identity: bool
    """Whether nothing moves."""
    moved: int
    """How many move."""
    of: int
    """How many there are."""
    score: float
    """Mean similarity of the assigned pairs."""
    identity_score: float
    """The same where nothing moves."""
    random_score: float
    """The mean over all pairs: chance."""
    permutation: tuple[int, ...] | None = None
    """For each target the source that takes its place, or -1; None where it is too long to be kept here."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnostics:
    """What is known of a layer boundary after alignment. Aligners fill different fields; `merge` puts them together.

    Cosines are means over validation rows, each row divided by its RMS; `centred_*` are of rows minus their mean.
    """

    layer: int | None = None
    aligner: str | None = None
    stage: int | None = None
    """Number of the stage whose boundaries share one map."""
    k: int | None = None
    """Rank that the fit itself decides; beyond it the map is completed towards the identity."""
    gap_at_k: float | None = None
    scale: float | None = None
    singular_values: tuple[float, ...] | None = None
    singular_values_shuffled: tuple[float, ...] | None = None
    """The null: the same from shuffled teacher rows."""
    max_rrt: float | None = None
    """Largest absolute entry of `R Rᵀ - I`."""
    max_rtr: float | None = None
    """Largest absolute entry of `Rᵀ R - I`, of a square map."""
    rank_rtr: float | None = None
    """Trace of the projector `Rᵀ R`, of a rectangular map."""
    rows: int | None = None
    cosine_before: float | None = None
    """None between spaces of different width."""
    cosine_after: float | None = None
    cosine_shuffled: float | None = None
    cosine_random: float | None = None
    cosine_mean: float | None = None
    centred_before: float | None = None
    centred_after: float | None = None
    centred_shuffled: float | None = None
    centred_random: float | None = None
    centred_mean: float | None = None
    rms_ratio: float | None = None
    """RMS of the student's rows over that of the teacher's."""
    reference: int | None = None
    """The teacher's layer whose heads and neurons this layer is matched with."""
    heads: AssignmentDiagnostics | None = None
    neurons: AssignmentDiagnostics | None = None
    attention: str | None = None
    """File of attention maps before and after, relative to the folder of runs."""
    gauges: Mapping[str, Mapping[str, float]] | None = None
    """Gauge -> its figures."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Figures of one aligner alone; nothing but people reads them."""

    def merge(self, later: LayerDiagnostics) -> LayerDiagnostics:
        """Return these figures with those of a later aligner in place of its predecessors'."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: value for name, value in vars(later).items() if value is not None}
        return LayerDiagnostics(**{**values, "extra": {**self.extra, **later.extra}})

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values, those of `extra` beside the others; absent ones are left out."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name != "extra" and value is not None:
                assignment = isinstance(value, AssignmentDiagnostics)
                found[name] = _present(value) if assignment else value
        return {**found, **self.extra}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerDiagnostics:
        """Return the figures that `as_dict` described."""
        known = {f.name for f in fields(cls)} - {"extra"}
        found: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        for name in ("singular_values", "singular_values_shuffled"):
            if found.get(name) is not None:
                found[name] = tuple(found[name])
        for name in ("heads", "neurons"):
            if found.get(name) is not None:
                permutation = found[name].get("permutation")
                kept = None if permutation is None else tuple(permutation)
                found[name] = AssignmentDiagnostics(**{**found[name], "permutation": kept})
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**found, extra=extra)


def _present(assignment: AssignmentDiagnostics) -> dict[str, Any]:
    return {name: value for name, value in vars(assignment).items() if value is not None}
