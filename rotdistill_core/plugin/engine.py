"""An engine answers prompts: a plugin kind of its own, like sources of models.

An engine is its options, as a step is: a frozen dataclass made with `@engine`, whose field `use`
is the name that the table `[engine]` of a recipe selects it by. It implements one hook, `connect`,
which returns an `Answering`: the engine with a model, ready to answer.

Besides these an engine class may have the members

- `logistics: ClassVar[frozenset[str]]`: options that change no answer, such as where a server is;
  keys and the names of runs leave them out;
- `inputs(folder)`: hashes of files that its options name, versions of libraries (`HasInputs`);
- `check(folder)`: refuses options that cannot work, before any work (`HasOptionChecks`);
- `outlook(context, questions, folder)`: what its answers cost, and which it cannot give
  (`rotdistill_core.planning.answering.HasOutlook`).

Paths in options are relative to `folder`, that of the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    dataclass_transform,
    runtime_checkable,
)

from rotdistill_core.errors import PluginError
from rotdistill_core.plugin.step import options_class, options_of, use_of

Finish = Literal["stop", "length"]
"""Why an answer ends: with a token that ends it, or with the last token that it may have."""
EngineType = TypeVar("EngineType")


@dataclass(frozen=True)
class Asked:
    """One prompt, and how it is to be answered."""

    prompt: Sequence[int]
    """Token ids of the model; at least one."""
    max_tokens: int
    """Largest number of tokens of the answer."""
    temperature: float = 0.0
    """What logits are divided by before a token is drawn; 0 takes the best token."""
    seed: int = 0
    """Seed of what is drawn for this answer, whatever else is answered with it."""
    messages: Sequence[Mapping[str, str]] = ()
    """The conversation that the prompt is written from, for engines that match texts."""

    def content(self) -> list[Any]:
        """Return what the answer depends on, as JSON values, for keys."""
        return [list(self.prompt), self.max_tokens, self.temperature, self.seed]


class Answer(NamedTuple):
    """The answer to one prompt."""

    tokens: Sequence[int]
    """Token ids, up to and with the first one that ends an answer."""
    finish: Finish = "stop"


class Answering(Protocol):
    """An engine with a model, ready to answer.

    It lives as long as a series of answers. `about` is read after answers came.
    """

    about: dict[str, Any]
    """What wrote the answers, for the record: engine, version, model, settings; JSON values."""
    at_once: int
    """Number of prompts that are answered at once, at most. A resumed series sets it to what the
    chunk before ended with; engines that memory does not limit have 0."""

    def chunks(self, asked: Mapping[str, Asked]) -> Sequence[Sequence[str]] | None:
        """Return the names of the prompts that are answered and kept together, chunk by chunk.

        An engine whose answers depend on what is answered with them divides the prompts so; a
        chunk that is made again is then the same. None: each answer stands for itself.
        """

    def answers(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
        """Yield the answer to each prompt with its name, in any order, each exactly once.

        Raises:
            SetupError: a prompt cannot be answered; the message names it. What was yielded before
                stands.
        """


@runtime_checkable
class HasInputs(Protocol):
    """An engine whose answers depend on more than its options and its code."""

    def inputs(self, folder: Path) -> Sequence[str]:
        """Return a hash of each file that options name, relative to `folder`, and so on."""


@runtime_checkable
class HasOptionChecks(Protocol):
    """An engine that can tell from its options alone that it cannot work."""

    def check(self, folder: Path) -> None:
        """Raise the error that the engine would end with; paths are relative to `folder`."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def engine(cls: type[EngineType]) -> type[EngineType]:
    """Make `cls` an engine: frozen, keyword-only options, validated strictly.

    Raises:
        PluginError: `cls` has no field `use`, or does not implement `connect`.
    """
    made = options_class(cls)
    use_of(made)
    if not callable(getattr(made, "connect", None)):
        raise PluginError(f"engine {cls.__name__} must implement the hook `connect`.")
    return made


def settings_of(instance: object) -> dict[str, Any]:
    """Return the options of an engine that answers depend on, as plain JSON values."""
    logistics: frozenset[str] = getattr(instance, "logistics", frozenset())
    unknown = logistics - {field.name for field in dataclasses.fields(instance)}  # type: ignore[arg-type]
    if unknown:
        raise PluginError(f"engine {type(instance).__name__}: no option {sorted(unknown)}.")
    return {key: value for key, value in options_of(instance).items() if key not in logistics}
