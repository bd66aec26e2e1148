"""A new table: looked up, tried on pico models, and refused where it does not hold.

What a run of a model does not show is tried with the checks of the conformance kit: which gauges
are free, and under which settings the table holds. A table is offered only if it passes all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from rotdistill_core.architecture.rope_decoder import MLP, rope_decoder
from rotdistill_core.architecture.spaces import KEY_GAUGE, UP_GAUGE
from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint.headers import folder_headers, read_config
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.parity import quiet_transformers
from rotdistill_core.testing import PICO, adapter_problems, gauges_are_exact, pico_folder
from rotdistill_core.testing.adapter_checks import WrongTableError
from rotdistill_core.testing.compute import one_thread
from rotdistill_core.testing.config_checks import ROPE, settings_computed_wrongly, tried_settings
from rotdistill_scaffold._lookup import (
    QUERY_KEY,
    QueryHeads,
    looked_up_arguments,
    looked_up_defaults,
    trial_cases,
)
from rotdistill_scaffold._refusals import inexpressible, require_expressible
from rotdistill_scaffold._small_model import known_settings, small_model, small_sizes

HALF_TURNED = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
"""A rotary table that turns half of each head."""
NARROW_TABLES: tuple[Mapping[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]},
)
"""Kinds of rotary tables that are as wide as what they turn: here four coordinates, two pairs."""


@dataclass(frozen=True)
class NewTable:
    """A table of `rope_decoder`, with what its tests try."""

    model_type: str
    arguments: Mapping[str, Any]
    """Of `rope_decoder`, by name."""
    defaults: Mapping[str, Any]
    """Config key -> what the config class takes without it, or `QueryHeads`."""
    cases: tuple[Mapping[str, Any], ...]
    """Changes of the pico config that its tests try."""

    @property
    def adapter(self) -> Adapter:
        """The table itself."""
        defaults = partial(_completed, self.defaults)
        return rope_decoder((self.model_type,), **self.arguments, defaults=defaults)

    def with_arguments(self, found: Mapping[str, Any]) -> NewTable:
        """Return the table with more arguments."""
        return replace(self, arguments={**self.arguments, **found})


def _completed(defaults: Mapping[str, Any], config: Config) -> Config:
    return {
        key: config[QUERY_KEY] if value is QueryHeads else value for key, value in defaults.items()
    }


def new_table(model_type: str) -> NewTable:
    """Return the table of a model type. It passes the conformance kit.

    Raises:
        SetupError: no table can express the model, transformers makes no causal model of it, or the
            nearest table does not pass.
    """
    with quiet_transformers(), one_thread():
        table = nearest_table(model_type)
    with tempfile.TemporaryDirectory() as root:
        problems = adapter_problems(table.adapter, Path(root), *table.cases)
    if problems:
        arguments = ", ".join(f"{key}={value!r}" for key, value in table.arguments.items())
        nearest = f"the nearest one, rope_decoder({arguments}), is wrong"
        raise inexpressible(model_type, [nearest, *problems])
    return table


def nearest_table(model_type: str) -> NewTable:
    """Return the table that is looked up from the class and tried, before it is checked.

    Raises:
        SetupError: no table can express the model, or transformers makes no causal model of it.
    """
    model = require_expressible(model_type)
    arguments = looked_up_arguments(model_type, model)
    defaults = looked_up_defaults(model_type, arguments)
    table = NewTable(model_type, arguments, defaults, trial_cases(model_type))
    with tempfile.TemporaryDirectory() as root:
        folder = pico_folder(Path(root) / "model", model_type, **small_sizes(model_type))
        _require_claimed(table, folder)
        table = table.with_arguments(_gauge_arguments(table, folder))
        return table.with_arguments(_requirements(table, folder))


def _require_claimed(table: NewTable, folder: Path) -> None:
    """Refuse parameters that no Llama-like table has.

    Raises:
        SetupError: the model has some.
    """
    adapter = table.adapter
    config = adapter.completed(read_config(folder))
    shapes = {name: header.shape for name, header in folder_headers(folder).items()}
    known = adapter.expand(config)
    others = [name for name in adapter.unfused(config, shapes) if name not in known]
    if others:
        of_any_layer = dict.fromkeys(
            name.replace(".0.", ".{i}.").replace(".1.", ".{i}.") for name in others
        )
        raise inexpressible(
            table.model_type,
            [f"it has parameters that Llama-like tables lack: {', '.join(of_any_layer)}"],
        )


def _gauge_arguments(table: NewTable, folder: Path) -> dict[str, Any]:
    """Return the arguments that make the gauges of a table exact, also where parts of heads turn.

    A gate that takes the place of `up` has the gauge of `up`, and not its own.
    """
    arguments: dict[str, Any] = {}
    wrong = _wrong_gauges(table.adapter, folder)
    if "rope_type" in _rotary_table(table.model_type):
        partly: dict[str, Any] = {
            ROPE: {"rope_type": "default", **HALF_TURNED},
            **small_sizes(table.model_type),
        }
        # A class may raise anything at a rotary table that it does not know.
        with suppress(Exception):
            half = pico_folder(folder.with_name("partly"), table.model_type, **partly)
            wrong |= _wrong_gauges(table.adapter, half)
    if KEY_GAUGE in wrong:
        arguments["key_gauge"] = False
    fused = dict(table.arguments.get("fused", {}))
    if UP_GAUGE in wrong and fused:
        swapped = {name: parts[::-1] for name, parts in fused.items() if name.startswith(MLP)}
        arguments["fused"] = {**fused, **swapped}
    if _turns_parts(table.model_type):
        arguments["partial_rotary"] = True
    return arguments


def _wrong_gauges(adapter: Adapter, folder: Path) -> set[str]:
    """Return the kinds of gauges that change logits."""
    try:
        gauges_are_exact(adapter, folder)
    except WrongTableError as error:
        return {problem.lstrip('"').partition(".")[0] for problem in error.problems}
    except SetupError:  # the checks of the whole kit say why
        return set()
    return set()


def _turns_parts(model_type: str) -> bool:
    """Return whether attention can turn only some coordinates of a head.

    Attention that turns whole heads fails with a rotary table of half the width.
    """
    if "rope_type" not in _rotary_table(model_type):
        return False  # it has no table, or one for each kind of layer
    for narrow in NARROW_TABLES:
        try:
            small_model(model_type, **{ROPE: {**narrow, **HALF_TURNED}})
        except SetupError:
            continue
        return True
    return False


def _rotary_table(model_type: str) -> Mapping[str, Any]:
    """Return the rotary table of a small config, as it stands in a config.json."""
    config = AutoConfig.for_model(model_type, **PICO, **small_sizes(model_type))
    return getattr(config, ROPE, None) or {}


def _requirements(table: NewTable, folder: Path) -> dict[str, Any]:
    """Return the values under which the table holds, of settings that it does not compute."""
    if not tried_settings(table.adapter, folder, read_config(folder), {}).computed:
        return {}  # the checks of the whole kit say what is wrong
    known = CONFIG_MAPPING[table.model_type]()
    values = {
        key: getattr(known, key)
        for key in settings_computed_wrongly(table.adapter, folder)
        if key in known_settings(table.model_type) and not isinstance(getattr(known, key), dict)
    }
    return {"requires": values} if values else {}
