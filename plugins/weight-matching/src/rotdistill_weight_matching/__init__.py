"""Bring a model into another's basis: weight matching, and gauges inside heads and neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_weight_matching.step import WeightMatching

__all__ = ["WeightMatching"]


def __getattr__(name: str) -> Any:
    if name == "WeightMatching":
        from rotdistill_weight_matching.step import WeightMatching  # noqa: PLC0415  (lazily)

        return WeightMatching
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
