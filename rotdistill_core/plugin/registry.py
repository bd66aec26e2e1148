"""Which plugins are installed, and how one is loaded.

Plugins are entry points in six groups: `rotdistill` (the name is a step's `use`),
`rotdistill.adapters` (a `model_type`), `rotdistill.sources` (an ending or a scheme of a model
reference, like `.gguf` or `hub:`), `rotdistill.engines` (an engine's `use`),
`rotdistill.observers` and `rotdistill.commands` (a verb of the command line). One engine is of the
core itself (`CORE_PLUGINS`).

Only plugins that a recipe names are imported. An installed but broken or hostile plugin cannot
touch a run that does not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from rotdistill_core.errors import PluginError, suggest
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.origin import Origin, origin_of
from rotdistill_core.plugin.step import use_of, validator_of

if TYPE_CHECKING:
    from rotdistill_core.architecture.table import Adapter
    from rotdistill_core.forward.generate import AnsweringModel
    from rotdistill_core.plugin.engine import Answering
    from rotdistill_core.recipe.resolved import RecipeEngine

STEPS = "rotdistill"
ADAPTERS = "rotdistill.adapters"
SOURCES = "rotdistill.sources"
ENGINES = "rotdistill.engines"
OBSERVERS = "rotdistill.observers"
COMMANDS = "rotdistill.commands"
KINDS = {
    STEPS: "step",
    ADAPTERS: "adapter for model type",
    SOURCES: "source for models that are",
    ENGINES: "engine",
    OBSERVERS: "observer",
    COMMANDS: "verb",
}
"""Group of entry points -> what messages call its plugins."""
CORE_PLUGINS = (
    EntryPoint(name="transformers", value="rotdistill_core.forward.engine", group=ENGINES),
)
"""What the core offers itself. Variants are answered by this engine, whatever a recipe names."""
INSTALL_ALL = "`pip install 'rotdistill[all]'` installs the plugins of this project."
SHIPPED_MODEL_TYPES = (
    "gemma3_text",
    "granite",
    "llama",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Model types for which a plugin of this project has a table."""
SHORT_KINDS = {
    STEPS: "step",
    ADAPTERS: "adapter",
    SOURCES: "source",
    ENGINES: "engine",
    OBSERVERS: "observer",
    COMMANDS: "verb",
}


def plugin_manager() -> pluggy.PluginManager:
    """Return a fresh plugin manager that knows the hook specifications."""
    manager = pluggy.PluginManager("rotdistill")
    manager.add_hookspecs(HookSpecs)
    return manager


def installed_plugins(group: str) -> list[str]:
    """Return the names that installed distributions offer in `group`, imported or not."""
    return sorted({point.name for point in _points(group)})


def _points(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, and what the core offers itself."""
    own = (each for each in CORE_PLUGINS if each.group == group)
    return [*_installed(group, tuple(map(_last_change, sys.path))), *own]


@lru_cache(maxsize=32)
def _installed(group: str, _folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group.

    They are read again when an entry of `sys.path` has changed: what is installed or removed adds
    or removes a folder there. A run asks several times, and each reading opens a file of every
    distribution.
    """
    return tuple(entry_points(group=group))


def _last_change(path: str) -> tuple[str, int]:
    """Return the folder of an entry of `sys.path`, and when it changed last in nanoseconds; -1
    where there is none."""
    folder = Path(path).absolute()
    try:
        return str(folder), folder.stat().st_mtime_ns
    except OSError:
        return str(folder), -1


def find_plugin(group: str, name: str) -> EntryPoint:
    """Return the one entry point called `name`.

    Raises:
        PluginError: no distribution offers it (the message lists close names), or two do (it names
            both).
    """
    # The same distribution is listed twice when it is found through two entries of sys.path.
    points = {
        (origin_of(point).distribution, point.value): point
        for point in _points(group)
        if point.name == name
    }
    if len(points) > 1:
        both = " and ".join(sorted({distribution for distribution, _ in points}))
        raise PluginError(f'plugin name "{name}" is offered by {both}; uninstall one of them.')
    if not points:
        raise PluginError(f'no {KINDS[group]} "{name}" is installed.{_missing_hint(group, name)}')
    return next(iter(points.values()))


def _missing_hint(group: str, name: str) -> str:
    """Return what to do about a plugin that is not installed, as a sentence after a blank."""
    if group == ADAPTERS and name in SHIPPED_MODEL_TYPES:
        return f" {INSTALL_ALL}"
    if group == ADAPTERS and _is_known_to_transformers(name):
        # A name that is near is another architecture, and no misspelling.
        return f" `rotdistill new adapter {name}` writes one, or says why no table can be written."
    close = suggest(name, installed_plugins(group))
    return close if "Did you mean" in close else f"{close} {INSTALL_ALL}"


def _is_known_to_transformers(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import (  # noqa: PLC0415  (takes seconds)
        CONFIG_MAPPING_NAMES,
    )

    return model_type in CONFIG_MAPPING_NAMES


def load_plugin(group: str, name: str) -> tuple[Any, Origin]:
    """Import the plugin module that offers `name`, and check its hooks against the specifications.

    Raises:
        PluginError: it is missing, offered twice, or fails on import (the message names its
            distribution).
    """
    point = find_plugin(group, name)
    origin = origin_of(point)
    manager = plugin_manager()
    try:
        module = point.load()
        manager.register(module)
        manager.check_pending()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'plugin "{name}" of {origin.release} ({origin.target}) fails on import: '
            f"{type(error).__name__}: {error}"
        ) from error
    return module, origin


def _offers(
    group: str, name: str, hook: str, names_of: Callable[[Any], Iterable[str]]
) -> tuple[dict[str, Any], Origin]:
    """Return what the plugin called `name` offers through `hook`, by name.

    Raises:
        PluginError: it cannot be loaded, or its hook fails; the message names its distribution.
    """
    module, origin = load_plugin(group, name)
    manager = plugin_manager()
    offers: dict[str, Any] = {}
    try:
        manager.register(module)
        for items in getattr(manager.hook, hook)():
            for item in items:
                offers |= dict.fromkeys(names_of(item), item)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'plugin "{name}" of {origin.release}: {type(error).__name__}: {error}'
        ) from error
    return offers, origin


def _options_names(cls: type) -> list[str]:
    name = use_of(cls)
    validator_of(cls)  # options that cannot be validated are the plugin's fault, so they fail here
    return [name]


def step_class(name: str) -> tuple[type, Origin]:
    """Return the step class that recipes call `name`, and its origin."""
    classes, origin = _offers(STEPS, name, "steps", _options_names)
    if name not in classes:
        raise PluginError(f'plugin "{name}" of {origin.release} offers no step of that name.')
    return classes[name], origin


def engine_class(name: str) -> tuple[type, Origin]:
    """Return the engine class that recipes call `name`, and its origin."""
    classes, origin = _offers(ENGINES, name, "engines", _options_names)
    if name not in classes:
        raise PluginError(f'plugin "{name}" of {origin.release} offers no engine of that name.')
    return classes[name], origin


def adapter_for(model_type: str) -> Adapter:
    """Return the table of an architecture. Unknown architectures are refused, never guessed."""
    tables, origin = _offers(ADAPTERS, model_type, "adapters", lambda table: table.model_types)
    if model_type not in tables:
        raise PluginError(f'{origin.release} offers no adapter for model type "{model_type}".')
    return tables[model_type]  # type: ignore[no-any-return]


def adapter_origin(model_type: str) -> Origin:
    """Return the origin of the table of an architecture."""
    return origin_of(find_plugin(ADAPTERS, model_type))


def command_function(name: str) -> Callable[..., None]:
    """Return the function of a verb of the command line."""
    verbs, origin = _offers(COMMANDS, name, "commands", lambda function: [function.__name__])
    if name not in verbs:
        raise PluginError(f'{origin.release} offers no verb "{name}".')
    return verbs[name]  # type: ignore[no-any-return]


def locate_source(kind: str, reference: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a model whose kind of reference a plugin opens."""
    manager = plugin_manager()
    manager.register(load_plugin(SOURCES, kind)[0])
    return manager.hook.locate(reference=reference, log=log)  # type: ignore[no-any-return]


def connected_engine(
    engine: RecipeEngine, model: AnsweringModel, log: Callable[[str], None]
) -> Answering:
    """Return the engine of a recipe with a model, ready to answer.

    Raises:
        PluginError: its hook gives None.
        RotdistillError: it cannot answer in the name of this model.
    """
    manager = plugin_manager()
    manager.register(engine.engine)
    answering = manager.hook.connect(model=model, folder=engine.folder, log=log)
    if answering is None:
        raise PluginError(
            f'engine "{engine.origin.name}" of {engine.origin.release}: `connect` gives None.'
        )
    return answering  # type: ignore[no-any-return]


class InstalledPlugin(NamedTuple):
    """One line of the list of plugins."""

    kind: str
    origin: Origin
    content: type | str
    """The class of a step or an engine, the first line of another plugin's docstring, or why it
    cannot be loaded."""


def iter_plugins() -> Iterator[InstalledPlugin]:
    """Yield every installed plugin, broken ones included."""
    for group, kind in SHORT_KINDS.items():
        for name in installed_plugins(group):
            try:
                yield _described(group, kind, name)
            except PluginError as error:
                yield InstalledPlugin(kind, Origin(name, "?", "?", "?"), str(error))


def _described(group: str, kind: str, name: str) -> InstalledPlugin:
    if group in (STEPS, ENGINES):
        cls, origin = (step_class if group == STEPS else engine_class)(name)
        return InstalledPlugin(kind, origin, cls)
    module, origin = load_plugin(group, name)
    return InstalledPlugin(kind, origin, (module.__doc__ or "").strip().partition("\n")[0])
