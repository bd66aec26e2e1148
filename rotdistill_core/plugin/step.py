"""A step is its options: a frozen dataclass whose fields are what a recipe may set.

Besides its field `use` and its one stage hook a step class may have these members:

- `exact`: whether its edit leaves logits unchanged, of `fold` steps;
- `check_models(pair)`: refuses what cannot work with the run's models, before any work;
- `needs_all_rows`: whether it reads captured rows of all texts, so that no capture will do that
  keeps those of a part;
- `keeps_all_rows`: of `capture` steps, whether they keep the rows of all texts at every boundary;
  they do unless they say otherwise;
- `inputs()`: hashes of files or models that its options name; they become part of its key;
- `caveats()`: why its result is not to be trusted with these options (`HasCaveats`);
- `cost(context)`: memory, disk and operations that it needs (`rotdistill_core.planning.cost`);
- `context_after(context)`: the shape of the student after it, where that changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, cast, dataclass_transform, runtime_checkable

from pydantic import (
    ConfigDict,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    with_config,
)

from rotdistill_core.errors import PluginError
from rotdistill_core.plugin.caveats import Caveat

STAGES = ("capture", "align", "refine", "fold", "style", "evaluate")
"""The stage hooks, of which a step class implements exactly one."""
EDITING_STAGES = ("fold", "style")
"""The stages that return edited weights."""

StepType = TypeVar("StepType")


@runtime_checkable
class HasInputs(Protocol):
    """A step whose result depends on files or models that its options name."""

    def inputs(self) -> Sequence[str]:
        """Return a hash of each of them."""


@runtime_checkable
class HasModelChecks(Protocol):
    """A step that can tell from the opened models alone that it cannot work with them."""

    def check_models(self, pair: Any) -> None:
        """Raise the error that the step would end with; `pair` is the `Pair` of the run.

        It reads headers and small files, and computes nothing.
        """


@runtime_checkable
class HasCaveats(Protocol):
    """A step that some options turn into a control, or into a fit of noise.

    The report shows its caveats first, in place of a verdict.
    """

    def caveats(self) -> Sequence[Caveat]:
        """Return why the result with these options is not to be trusted; empty for most."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def step(cls: type[StepType]) -> type[StepType]:
    """Make `cls` a step: frozen, keyword-only options, validated strictly.

    A dataclass and not a pydantic model: pluggy reads every attribute of what it registers, and
    pydantic models refuse that. `eq=False`: two steps with equal options are still two steps.

    Raises:
        PluginError: `cls` has no field `use`, or does not implement exactly one stage hook.
    """
    made = options_class(cls)
    use_of(made)
    stage_of(made)
    return made


def options_class(cls: type[StepType]) -> type[StepType]:
    """Make `cls` a frozen dataclass of keyword-only options that pydantic can validate strictly."""
    config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )
    return dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(with_config(config)(cls))


def stage_of(cls: type) -> str:
    """Return the one stage hook that a step class implements.

    Raises:
        PluginError: it implements none or several.
    """
    found = [stage for stage in STAGES if hasattr(cls, stage)]
    if len(found) != 1:
        raise PluginError(
            f"step {cls.__name__} must implement exactly one of {', '.join(STAGES)}; "
            f"it has {found or 'none'}."
        )
    return found[0]


def is_exact(step: object) -> bool:
    """Return whether a step says that its edit leaves logits unchanged."""
    return bool(getattr(step, "exact", False))


def changes_behaviour(step: object) -> bool:
    """Return whether a step may change what the model computes: an edit that is not exact."""
    return stage_of(type(step)) in EDITING_STAGES and not is_exact(step)


def has_to_show_a_gain(step: object) -> bool:
    """Return whether a step is not applied where it is no gain on validation texts.

    These are the steps with a `guard`, unless an option `require_improvement` is off, or they are
    judged on texts that they make themselves (`makes_texts`).
    """
    judged = getattr(step, "require_improvement", True) and not getattr(step, "makes_texts", False)
    return hasattr(step, "guard") and bool(judged)


def needs_all_rows(step: object) -> bool:
    """Return whether a step says that it reads captured rows of all texts."""
    return bool(getattr(step, "needs_all_rows", False))


def keeps_all_rows(step: object) -> bool:
    """Return whether a capture step keeps the rows of all texts."""
    return bool(getattr(step, "keeps_all_rows", True))


def inputs_of(step: object) -> list[str]:
    """Return hashes of what the options of a step name, such as other models; empty for most."""
    return list(step.inputs()) if isinstance(step, HasInputs) else []


def check_models(step: object, pair: Any) -> None:
    """Let a step refuse the models of a run before any work.

    Raises:
        RotdistillError: as the step would later.
    """
    if isinstance(step, HasModelChecks):
        step.check_models(pair)


def caveats_of(step: object) -> list[Caveat]:
    """Return why the result of a step is not to be trusted; empty for most."""
    return list(step.caveats()) if isinstance(step, HasCaveats) else []


def use_of(cls: type) -> str:
    """Return the name by which recipes select a step class: the default of its field `use`.

    Raises:
        PluginError: it is no step class, or has no such field.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"{cls!r} is no class made with @step or @engine.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "use" not in fields or not isinstance(fields["use"].default, str):
        raise PluginError(f'{cls.__name__} needs a field `use: Literal["name"] = "name"`.')
    return fields["use"].default


def validator_of(cls: type[StepType]) -> TypeAdapter[StepType]:
    """Return what validates the options of a step class.

    Raises:
        PluginError: the type of an option cannot be resolved.
    """
    hashable: Any = cls
    validator: TypeAdapter[StepType] = _validator(hashable)
    return validator


@cache  # a plan asks for each class dozens of times
def _validator(cls: Any) -> TypeAdapter[Any]:
    try:
        adapter = TypeAdapter(cls)
        adapter.rebuild()  # pydantic defers types that it cannot resolve; here that must fail
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise PluginError(f"the options of {cls.__name__} cannot be validated: {error}") from error
    return adapter


def options_of(instance: object) -> dict[str, Any]:
    """Return a step's options as plain JSON values, defaults included."""
    return cast("dict[str, Any]", validator_of(type(instance)).dump_python(instance, mode="json"))
