"""A step is its options: a frozen dataclass whose fields are what a recipe may set."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import (
    ConfigDict,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    with_config,
)

from rotdistill_core.errors import PluginError

STAGES = ("capture", "align", "refine", "fold", "style", "evaluate")

StepType = TypeVar("StepType")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def step(cls: type[StepType]) -> type[StepType]:
    """Make `cls` a step: frozen, keyword-only options, validated strictly.

    `eq=False` because pluggy compares plugins by equality and would take two equal steps for one. A dataclass and not a
    pydantic model, because pluggy reads every attribute of a plugin and pydantic models refuse that.
    """
    config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )
    made = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(with_config(config)(cls))
    use_of(made)
    stage_of(made)
    return made


def stage_of(cls: type) -> str:
    """Return the one stage hook that a step class implements.

    Raises:
        PluginError: it implements none or several.
    """
    found = [stage for stage in STAGES if hasattr(cls, stage)]
    if len(found) != 1:
        raise PluginError(
            f"step {cls.__name__} must implement exactly one of {', '.join(STAGES)}; it has {found or 'none'}."
        )
    return found[0]


def use_of(cls: type) -> str:
    """Return the name by which recipes select a step class: the default of its field `use`.

    Raises:
        PluginError: it is no step class, or has no such field.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"{cls!r} is no step; a step is a class made with @step.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "use" not in fields or not isinstance(fields["use"].default, str):
        raise PluginError(f'step {cls.__name__} needs a field `use: Literal["name"] = "name"`.')
    return fields["use"].default


def validator_of(cls: type[StepType]) -> TypeAdapter[StepType]:
    """Return what validates the options of a step class.

    Raises:
        PluginError: the type of an option cannot be resolved.
    """
    try:
        adapter = TypeAdapter(cls)
        adapter.rebuild()  # pydantic puts off what it cannot resolve; here it must fail
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise PluginError(
            f"the options of step {cls.__name__} cannot be validated: {error}"
        ) from error
    return adapter


def options_of(instance: object) -> dict[str, Any]:
    """Return a step's options as plain JSON values, defaults included."""
    return cast("dict[str, Any]", validator_of(type(instance)).dump_python(instance, mode="json"))
