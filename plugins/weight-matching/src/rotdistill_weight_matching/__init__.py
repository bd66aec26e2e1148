"""Bring a model into another's basis: weight matching, and gauges inside heads and neurons.

`WeightMatching` and `vocabulary_moments` are public; other distributions import them from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_weight_matching._method import vocabulary_moments
    from rotdistill_weight_matching.step import WeightMatching

__all__ = ["WeightMatching", "vocabulary_moments"]

_HOME = {"WeightMatching": "step", "vocabulary_moments": "_method"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `_method` loads torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
