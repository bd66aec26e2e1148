"""The files that `new` writes: templates of this package with their names filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template

from rotdistill_core.errors import RecipeError, SetupError, suggest
from rotdistill_core.plugin.registry import ADAPTERS, STEPS, adapter_origin, installed_plugins
from rotdistill_core.plugin.step import EDITING_STAGES, STAGES

COSTS = {
    "capture": "capture_cost",
    "refine": "alignment_cost",
    "fold": "edit_cost",
    "style": "edit_cost",
    "evaluate": "evaluation_cost",
}
"""Stage -> the function of `rotdistill_core.planning.cost` for a plain step of it. An aligner has
a template of its own."""


def template(name: str) -> str:
    """Return the text of a template."""
    return files("rotdistill_scaffold").joinpath("templates", name).read_text(encoding="utf-8")


def step_files(name: str, stage: str) -> dict[str, str]:
    """Return the files of a new step, relative path -> text.

    Raises:
        RecipeError: there is no such stage, or a step of that name is installed.
    """
    if stage not in STAGES:
        raise RecipeError(f'"{stage}" is no stage.{suggest(stage, STAGES)}')
    if name in installed_plugins(STEPS):
        raise RecipeError(f'a step "{name}" is installed already; choose another name.')
    values = {
        **_names(name, name),
        "cls": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "group": ".rotdistill",
        "title": f"A step of the stage {stage}, for rotdistill.",
    }
    kind = "aligner" if stage == "align" else "step"
    if kind == "step":
        values |= _hook_values(stage, values)
    modules = {"{module}.py": f"{kind}.py.txt", "tests/test_{snake}.py": f"{kind}_test.py.txt"}
    return _distribution(name, modules, values)


def _hook_values(stage: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return what the templates of a step need beyond its names."""
    hook = Template(template(f"hooks/{stage}.txt")).substitute(values)
    signature = hook.partition('"""')[0]
    edits = stage in EDITING_STAGES
    return {
        "hook": hook,
        "types": ", ".join(sorted(set(re.findall(r"[A-Z]\w+", signature)))),
        "cost": COSTS[stage],
        "exact": template("exact.txt").rstrip("\n") + "\n" if edits else "",
        "classvar": "ClassVar, " if edits else "",
    }


def require_no_adapter(name: str) -> None:
    """Refuse a model type that has an adapter.

    Raises:
        RecipeError: it is installed.
    """
    if name in installed_plugins(ADAPTERS):
        raise RecipeError(
            f'an adapter for model type "{name}" is installed already, by '
            f"{adapter_origin(name).distribution}. Uninstall that first to write another."
        )


def adapter_files(name: str) -> dict[str, str]:
    """Return the files of a new adapter, relative path -> text.

    Raises:
        SetupError: transformers knows no such model type, no table can express it, or a package is
            missing.
    """
    # Loads transformers, which the other verbs of this distribution do without.
    from transformers.models.auto.configuration_auto import (  # noqa: PLC0415
        CONFIG_MAPPING_NAMES,
    )

    if name not in CONFIG_MAPPING_NAMES:
        close = suggest(name, CONFIG_MAPPING_NAMES)
        raise SetupError(f'the installed transformers knows no model type "{name}".{close}')
    try:
        # Load torch, and the kit with pytest.
        from rotdistill_scaffold import _source  # noqa: PLC0415
        from rotdistill_scaffold._new_table import new_table  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SetupError(
            f"new adapter tries the table with the conformance kit, which needs {error.name}: "
            f"pip install {error.name}."
        ) from error
    table = new_table(name)
    values = {
        **_names(name, f"{name}-adapter"),
        "table": _source.table_source(table),
        "defaults": _source.defaults_source(table),
        "config": _source.config_name(table),
        "cases": _source.cases_source(table),
        "config_class": CONFIG_MAPPING_NAMES[name],
        "group": '."rotdistill.adapters"',
        "title": f"Architecture table of model type {name}.",
    }
    return _distribution(
        f"{name}-adapter",
        {"{module}.py": "adapter.py.txt", "tests/test_{snake}.py": "adapter_test.py.txt"},
        values,
    )


def _names(name: str, distribution: str) -> dict[str, str]:
    snake = distribution.replace("-", "_")
    return {
        "name": name,
        "distribution": distribution,
        "snake": snake,
        "module": f"rotdistill_{snake}",
    }


def _distribution(
    folder: str, modules: Mapping[str, str], values: Mapping[str, str]
) -> dict[str, str]:
    """Return the files of a distribution: project file, README, and modules by template."""
    templates = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        **modules,
    }
    return {
        f"{folder}/{path.format(**values)}": Template(template(name)).substitute(values)
        for path, name in templates.items()
    }
