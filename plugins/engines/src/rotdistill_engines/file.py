"""The engine `file`: answers that were made elsewhere, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from rotdistill_core import Cost, CostContext, hookimpl
from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.answering import Outlook, Questions
from rotdistill_core.plugin.engine import Answering, engine
from rotdistill_core.store.hashing import sha256_of
from rotdistill_engines._lines import AnswerLines, FileOfAnswers, listed_names

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel


@engine
class File:
    """Take answers from a file of JSON lines that was made elsewhere.

    A line names what it answers by `id`, by `prompt` (text or token ids) or by `messages`, and has
    the answer as `answer` (text) or `tokens`. With `"finish_reason": "length"` it was cut.
    """

    use: Literal["file"] = "file"
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    """The file, relative to the recipe."""
    logistics: ClassVar[frozenset[str]] = frozenset({"path"})

    def check(self, folder: Path) -> None:
        """Refuse a file that is not there.

        Raises:
            RecipeError: naming the file.
        """
        if not self.file_in(folder).is_file():
            raise RecipeError(
                f"engine.path: {self.file_in(folder)}: there is no such file. Paths are relative "
                "to the recipe."
            )

    def inputs(self, folder: Path) -> Sequence[str]:
        """Return the hash of the file.

        Raises:
            RecipeError: it is not there.
        """
        self.check(folder)
        return [sha256_of(self.file_in(folder))]

    def file_in(self, folder: Path) -> Path:
        """Return the path of the file; `folder` is that of the recipe."""
        return folder / Path(self.path).expanduser()

    def outlook(self, _: CostContext, questions: Questions, folder: Path) -> Outlook:
        """Return how many answers the file has, and which it lacks.

        Raises:
            RecipeError: it cannot be read, or a line of it is no answer.
        """
        path = self.file_in(folder)
        lines = AnswerLines.read(path)
        asked = questions.by_name
        missing = tuple(
            name
            for name, each in asked.items()
            if not lines.find(name, (each.tokens, each.prompt), each.messages)
        )
        note = f"{len(asked) - len(missing)} of {len(asked)} answers are in {path.name}"
        if missing:
            note += f", not {listed_names(missing)}"
        return Outlook(cost=Cost(host_bytes=lines.bytes), note=note, missing=missing)

    @hookimpl
    def connect(self, model: AnsweringModel, folder: Path) -> Answering:
        """See `HookSpecs.connect`.

        Raises:
            RecipeError: the file cannot be read, or a line of it is no answer.
        """
        return FileOfAnswers(self.file_in(folder), model)


@hookimpl
def engines() -> list[type]:
    """Offer the engine."""
    return [File]
