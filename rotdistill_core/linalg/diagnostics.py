"""What aligners measure at each layer boundary, next to its nulls: one JSON document per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AssignmentDiagnostics:
    """How well an assignment of heads or neurons matches two layers, with its nulls."""

    identity: bool
    """Whether nothing moves."""
    moved: int
    """Number of heads or neurons that move."""
    of: int
    """Number of heads or neurons."""
    score: float
    """Mean similarity of the assigned pairs."""
    identity_score: float
    """Mean similarity if nothing moved."""
    random_score: float
    """Mean similarity over all pairs: chance."""
    permutation: tuple[int, ...] | None = None
    """For each target the source that takes its place, or -1. None where the list is too long."""


@dataclass(frozen=True, kw_only=True)
class GaugeDiagnostics:
    """Relative distances `‖S - T‖ / ‖T‖` of the parameters on both sides of a gauge."""

    distance_before: float
    distance_after: float
    distance_chance: float
    """After a fit to a teacher whose stream coordinates are out of step."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnostics:
    """The figures of one layer boundary. Each aligner fills some fields; `merge` joins them.

    Cosines are means over validation rows, each row divided by its RMS. `centred_*` are cosines of
    rows minus their mean.
    """

    layer: int | None = None
    aligner: str | None = None
    stage: int | None = None
    """Number of the stage whose boundaries share one map."""
    k: int | None = None
    """Rank that the fit determines. Beyond it the map is completed towards the identity."""
    gap_at_k: float | None = None
    """`(σ_k - σ_{k+1}) / σ_1`: how clearly the spectrum separates the first k directions."""
    scale: float | None = None
    """Least-squares factor of the map."""
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
    """Number of validation rows."""
    cosine_before: float | None = None
    """None between spaces of different width."""
    cosine_after: float | None = None
    cosine_shuffled: float | None = None
    """The null: a map fitted on shuffled teacher rows."""
    cosine_random: float | None = None
    """The null: a random rotation."""
    cosine_mean: float | None = None
    """The null: the teacher's mean in place of every row."""
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
    gauges: Mapping[str, GaugeDiagnostics] | None = None
    """Gauge (`value`, `key`, `up`) -> its figures."""
    cosine_unreflected: float | None = None
    """After the rotation as it came to a step that reflects it."""
    centred_unreflected: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Figures of one aligner alone, as JSON values; no program reads them."""

    def merge(self, later: LayerDiagnostics) -> LayerDiagnostics:
        """Return these figures, overridden by those that a later aligner measured."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: value for name, value in vars(later).items() if value is not None}
        return LayerDiagnostics(**{**values, "extra": {**self.extra, **later.extra}})

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values, `extra` among them; absent ones are left out."""
        values = {
            name: _json_value(value)
            for name, value in vars(self).items()
            if name != "extra" and value is not None
        }
        return {**values, **self.extra}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerDiagnostics:
        """Return the diagnostics that `as_dict` described. Unknown keys go to `extra`."""
        names = {f.name for f in fields(cls)} - {"extra"}
        known = {name: value for name, value in values.items() if name in names}
        for name in known.keys() & {"singular_values", "singular_values_shuffled"}:
            known[name] = _optional_tuple(known[name])
        for name in known.keys() & {"heads", "neurons"}:
            known[name] = _assignment_from_dict(known[name])
        if known.get("gauges") is not None:
            gauges = known["gauges"]
            known["gauges"] = {name: GaugeDiagnostics(**gauges[name]) for name in gauges}
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(**known, extra=extra)


def _json_value(value: Any) -> Any:
    """Return one field as a JSON value."""
    if isinstance(value, AssignmentDiagnostics):
        return {name: figure for name, figure in vars(value).items() if figure is not None}
    if isinstance(value, Mapping):
        return {name: dict(vars(gauge)) for name, gauge in value.items()}
    return value


def _optional_tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _assignment_from_dict(values: Mapping[str, Any] | None) -> AssignmentDiagnostics | None:
    if values is None:
        return None
    permutation = _optional_tuple(values.get("permutation"))
    return AssignmentDiagnostics(**{**values, "permutation": permutation})
