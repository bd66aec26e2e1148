"""Refit the matrices that write into the residual stream, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_writer_refit._scoring import score_split

__all__ = ["score_split"]


def __getattr__(name: str) -> Any:
    if name == "score_split":
        from rotdistill_writer_refit._scoring import score_split  # noqa: PLC0415 - loads torch

        return score_split
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
