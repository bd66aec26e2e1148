"""The engine `transformers`: the teacher answers here, as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rotdistill_core.plugin.engine import Answering, engine
from rotdistill_core.plugin.markers import hookimpl

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel


@engine
class Transformers:
    """Let the teacher answer in this process: the same model that is captured, on its device."""

    use: Literal["transformers"] = "transformers"

    def inputs(self, _: Path) -> Sequence[str]:
        """Return the version of transformers."""
        return [f"transformers {version('transformers')}"]

    @hookimpl
    def connect(self, model: AnsweringModel, log: Callable[[str], None]) -> Answering:
        """See `HookSpecs.connect`."""
        from rotdistill_core.forward.generate import AnswerWriter  # noqa: PLC0415  (loads torch)

        return AnswerWriter(model, log)


@hookimpl
def engines() -> list[type]:
    """Offer the engine."""
    return [Transformers]
