"""Plugins are entry points in five groups: `rotdistill` (name = step), `rotdistill.adapters` (name = model_type), `rotdistill.sources`
(name = ending or scheme of a model reference, like `.gguf` or `package:`), `rotdistill.observers` (name = observer) and
`rotdistill.commands` (name = verb of the command line).

Only what a recipe names is imported, so an installed but broken or hostile plugin cannot touch a run that does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from rotdistill_core.errors import PluginError, suggest
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.origin import Origin, origin_of
from rotdistill_core.plugin.step import use_of, validator_of

if TYPE_CHECKING:
    from rotdistill_core.architecture.table import Adapter


STEPS, ADAPTERS, SOURCES, OBSERVERS, COMMANDS = (
    "rotdistill",
    *(f"rotdistill.{k}" for k in ("adapters", "sources", "observers", "commands")),
)
KINDS = {
    STEPS: "step",
    ADAPTERS: "adapter for model type",
    SOURCES: "source for models that are",
    OBSERVERS: "observer",
    COMMANDS: "verb",
}

OFFERED_BY = {
    name: f"rotdistill-{name.strip('.:')}"
    for name in (
        "residuals", "chop", "procrustes", "hungarian-permute", "head-gauge", "cca", "weight-matching", "householder", "rotation-sanity",
        "basis-fold", "writer-refit", "blend", "soups", "lm-head-ridge", "prompt-kl", "interpolation-barrier", "lm-eval", "fidelity",
        "report", "hub:", ".gguf",
    )
} | {name: f"rotdistill-{name}-adapter" for name in ("llama", "qwen2", "qwen3", "phi3", "olmo2")} | {
    "gemma3_text": "rotdistill-gemma3-adapter", "package:": "rotdistill-gguf",
}  # fmt: skip


def plugin_manager() -> pluggy.PluginManager:
    """Return a fresh plugin manager that knows the hook specifications."""
    pm = pluggy.PluginManager("rotdistill")
    pm.add_hookspecs(HookSpecs)
    return pm


def installed_plugins(group: str) -> list[str]:
    """Return the names that installed distributions offer in `group`, imported or not."""
    return sorted({point.name for point in entry_points(group=group)})


def find_plugin(group: str, name: str) -> EntryPoint:
    """Return the one entry point called `name`.

    Raises:
        PluginError: nobody offers it (the message says what to install), or two distributions do (it names both).
    """
    # The same distribution is listed twice when it is found through two entries of sys.path.
    points = {(origin_of(p).distribution, p.value): p for p in entry_points(group=group, name=name)}
    if len(points) > 1:
        both = " and ".join(sorted({distribution for distribution, _ in points}))
        raise PluginError(f'plugin name "{name}" is offered by {both}; uninstall one of them.')
    if not points:
        hint = (
            f" Install it with: pip install {OFFERED_BY[name]}."
            if name in OFFERED_BY
            else suggest(name, installed_plugins(group))
        )
        raise PluginError(f'no {KINDS[group]} "{name}" is installed.{hint}')
    return next(iter(points.values()))


def load_plugin(group: str, name: str) -> tuple[Any, Origin]:
    """Import the plugin module that offers `name`, and hold its hooks to the specifications.

    Raises:
        PluginError: it is missing, offered twice, or fails on import (the message names its distribution).
    """
    point, pm = find_plugin(group, name), plugin_manager()
    origin = origin_of(point)
    try:
        pm.register(module := point.load())
        pm.check_pending()
        return module, origin
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'plugin "{name}" of {origin.distribution} {origin.version} ({origin.target}) fails on import: {type(error).__name__}: {error}'
        ) from error


def _collect(
    group: str, name: str, hook: str, names_of: Callable[[Any], Iterable[str]]
) -> tuple[dict[str, Any], Origin]:
    """Return what the plugin called `name` offers, by name. Whatever fails meanwhile is told with its distribution."""
    module, origin = load_plugin(group, name)
    pm = plugin_manager()
    try:
        pm.register(module)
        found = {
            each: item
            for items in getattr(pm.hook, hook)()
            for item in items
            for each in names_of(item)
        }
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'plugin "{name}" of {origin.distribution} {origin.version}: {type(error).__name__}: {error}'
        ) from error
    return found, origin


def _step_names(cls: type) -> list[str]:
    name = use_of(cls)
    validator_of(cls)  # options that cannot be validated are the plugin's fault, so they fail here
    return [name]


def step_class(name: str) -> tuple[type, Origin]:
    """Return the step class that recipes call `name`, and where it comes from."""
    classes, origin = _collect(STEPS, name, "steps", _step_names)
    if name not in classes:
        raise PluginError(
            f'plugin "{name}" of {origin.distribution} {origin.version} offers no step of that name.'
        )
    return classes[name], origin


def adapter_for(model_type: str) -> Adapter:
    """Return the table of an architecture. Unknown architectures are refused, never guessed."""
    tables, origin = _collect(ADAPTERS, model_type, "adapters", lambda table: table.model_types)
    if model_type not in tables:
        raise PluginError(
            f'{origin.distribution} {origin.version} offers no adapter for model type "{model_type}".'
        )
    return tables[model_type]  # type: ignore[no-any-return]


def command_function(name: str) -> Callable[..., None]:
    """Return the function behind a verb of the command line."""
    verbs, origin = _collect(COMMANDS, name, "commands", lambda function: [function.__name__])
    if name not in verbs:
        raise PluginError(f'{origin.distribution} {origin.version} offers no verb "{name}".')
    return verbs[name]  # type: ignore[no-any-return]


def locate_source(kind: str, reference: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a model whose kind of reference a plugin opens."""
    pm = plugin_manager()
    pm.register(load_plugin(SOURCES, kind)[0])
    return pm.hook.locate(reference=reference, log=log)  # type: ignore[no-any-return]


def iter_plugins() -> Iterator[tuple[str, Origin, type | str]]:
    """Yield (kind, origin, step class or error text or summary) for all that is installed, broken plugins included."""
    for name in installed_plugins(STEPS):
        try:
            cls, origin = step_class(name)
            yield "step", origin, cls
        except PluginError as error:
            yield "step", Origin(name, "?", "?", "?"), str(error)
    for group, kind in (
        (ADAPTERS, "adapter"),
        (SOURCES, "source"),
        (OBSERVERS, "observer"),
        (COMMANDS, "verb"),
    ):
        for name in installed_plugins(group):
            try:
                module, origin = load_plugin(group, name)
                yield kind, origin, (module.__doc__ or "").strip().partition("\n")[0]
            except PluginError as error:
                yield kind, Origin(name, "?", "?", "?"), str(error)
