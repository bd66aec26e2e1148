"""Merge checkpoints and LoRA adapters out of core; measure the barrier between them.

`Lora`, `read_lora` and `transform_lora` carry an adapter through an exact fold and back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_soups._lora import Lora, read_lora, transform_lora

__all__ = ["Lora", "read_lora", "transform_lora"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rotdistill_soups import _lora  # noqa: PLC0415  (loads torch)

        return getattr(_lora, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
