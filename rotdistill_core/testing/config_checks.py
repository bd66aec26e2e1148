"""What every adapter must pass beyond one config: other settings of its class, and cuts of layers.

A pico config leaves every switch of an architecture where its class has it. A published model may
not. So each setting is changed, and either the table's computation follows transformers, or the
table refuses the setting.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint.headers import read_config
from rotdistill_core.checkpoint.layer_lists import DTYPE_KEYS, expanded_config, layer_lists
from rotdistill_core.checkpoint.weights import open_folder
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import RotdistillError
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing.adapter_checks import (
    PLAIN,
    TABLE_CHECKS,
    gauges_are_exact,
    permutations_are_exact,
    report,
    sites_are_found,
    the_layerwise_forward_computes_what_transformers_computes,
)
from rotdistill_core.testing.compute import logits, max_difference, plain_transformers, save_folder
from rotdistill_core.testing.key_checks import KEY_CHECKS
from rotdistill_core.testing.pico import PICO, pico_checkpoint, pico_samples

OTHER_FACTORS = (0.37, 1.9, 0.61, 2.3, 0.53, 1.7)
"""Multipliers that are not neutral. Each setting has its own: two could else be exchanged."""
OTHER_EPS = 0.01
"""An epsilon that a pico model's values do not hide."""
OTHER_CAP = 3.0
"""A cap, or any number where the class has none, that a pico model's values exceed."""
OTHER_COUNT = 5
"""A window, or any count where the class has none, that is shorter than a pico text."""
ROPE = "rope_parameters"
WINDOWS = {"use_sliding_window": True, "sliding_window": OTHER_COUNT, "max_window_layers": 3}
"""Settings that give some layers a window, in config classes that have them."""
CUT_DEPTH = 7
KEPT = (0, 2, 3, 6)
"""Layers of `CUT_DEPTH` that stay in a cut."""
PATTERN = (0, 0, 1, 0, 1, 1, 0)
"""Which of two values a per-layer list has: no period."""


def every_setting_of_the_config_is_computed_or_refused(adapter: Adapter, folder: Path) -> None:
    """Change every setting that is neutral in the config class; the table follows, or refuses."""
    settings = read_config(folder)
    report(
        [
            f'config key "{key}", here {settings.get(key)!r}: {problem}; name it in the table'
            f"{_argument_for(key)}, or state in `requires` what the table holds for"
            for key, problem in settings_computed_wrongly(adapter, folder).items()
        ]
    )


def _argument_for(key: str) -> str:
    """Return the argument that names a config key of this kind, in brackets; else nothing."""
    fields = {f"{key}_key", "softcap_key" if "softcap" in key else ""}
    found = [field.name for field in dataclasses.fields(Adapter) if field.name in fields]
    return f' (`{found[0]}="{key}"`)' if found else ""


def settings_computed_wrongly(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Return the config keys whose other values a table neither computes rightly nor refuses.

    Args:
        adapter: the table.
        folder: a pico checkpoint; others are written next to it.

    Returns:
        Config key -> what is wrong with its other value.
    """
    settings = _silent_settings(adapter, read_config(folder))
    changes = {
        key: value
        for key, value in other_settings(settings).items()
        if not _refuses(adapter, settings, {key: value})
    }
    together = tried_settings(adapter, folder, settings, changes)
    if together.computed:
        return {}
    problems = {}
    for key, value in changes.items():
        problem = tried_settings(adapter, folder, settings, {key: value}).problem
        if problem:
            problems[key] = f"with {value!r}, {problem}"
    if not problems and together.problem:
        problems[" ".join(changes)] = f"with {changes}, {together.problem}"
    return problems


def other_settings(settings: Config) -> dict[str, Any]:
    """Return another value for every setting of a config whose class has a neutral default.

    These are switches, factors, caps, windows and biases: whatever is true or false, a fraction, or
    nothing by default. Sizes and tokens are left out.
    """
    config_class = CONFIG_MAPPING[settings["model_type"]]
    changes: dict[str, Any] = {}
    factors = cycle(OTHER_FACTORS)
    for field in dataclasses.fields(config_class):
        own = field.name == "tie_word_embeddings" or not hasattr(PreTrainedConfig, field.name)
        if own and field.name not in PICO and "token" not in field.name:
            value = _other_value(field, settings.get(field.name, field.default), factors)
            if value is not None:
                changes[field.name] = value
    rope = expanded_config(settings).get(ROPE)
    if isinstance(rope, Mapping) and "rope_type" in rope:
        changes[ROPE] = {**rope, "partial_rotary_factor": 0.5}
    return changes


def _other_value(field: dataclasses.Field[Any], value: Any, factors: Iterator[float]) -> Any:
    """Return another value of a setting; None where it is a size, a list or a text."""
    kind = str(field.type)
    if isinstance(value, bool):
        return not value
    if value is None:
        return _value_for_none(kind)
    if isinstance(value, float) or (isinstance(value, int) and "float" in kind):
        if value == 1.0:
            return next(factors)
        return max(1.7 * value, OTHER_EPS) if value else 0.25
    if isinstance(value, int) and "layers" in field.name:
        return 1  # from which layer on something holds
    return None


def _value_for_none(kind: str) -> Any:
    """Return a value of a kind where the class has none."""
    if "list" in kind or "dict" in kind or "str" in kind:
        return None
    if "float" in kind:
        return OTHER_CAP
    if "int" in kind:
        return OTHER_COUNT
    return True if "bool" in kind else None


def _silent_settings(adapter: Adapter, config: Config) -> dict[str, Any]:
    """Return a config without per-layer lists, which its class then computes."""
    lists = layer_lists(config, adapter.depth_key)
    return {key: value for key, value in config.items() if key not in (*lists, *DTYPE_KEYS)}


def _refuses(adapter: Adapter, settings: Config, change: Config) -> bool:
    """Return whether a table refuses a changed setting by its key."""
    changed = adapter.completed({**settings, **change})
    return any(key in reason for key in change for reason in adapter.uncovered(changed))


class Tried(NamedTuple):
    """How a table does with a model of other settings."""

    computed: bool
    """The model was computed, as transformers computes it."""
    problem: str
    """What is computed wrongly. Empty too if transformers makes no such model, or the table refuses
    it."""


def tried_settings(adapter: Adapter, beside: Path, settings: Config, change: Config) -> Tried:
    """Return how a table does with a pico model of changed settings.

    Args:
        adapter: the table.
        beside: a folder; the checkpoint is written next to it.
        settings: the config without the change.
        change: config keys and their other values.
    """
    folder = beside.with_name(f"{beside.name}-{'-'.join(change)[:80]}")
    try:
        config = AutoConfig.for_model(**{**settings, **change})
        pico_checkpoint(folder, config)
        plain_transformers(adapter, folder, _texts(adapter, folder))
    except Exception:
        # A config class or a model may raise anything at settings that do not go together.
        return Tried(computed=False, problem="")
    try:
        open_folder(folder, adapter.completed(read_config(folder)), adapter)
    except RotdistillError:
        return Tried(computed=False, problem="")
    for check in (
        the_layerwise_forward_computes_what_transformers_computes,
        sites_are_found,
        permutations_are_exact,
        gauges_are_exact,
    ):
        try:
            check(adapter, folder)
        except AssertionError as error:
            return Tried(computed=False, problem=str(error).splitlines()[-1])
    return Tried(computed=True, problem="")


def _texts(adapter: Adapter, folder: Path) -> PackedTexts:
    config = adapter.completed(read_config(folder))
    return pico_samples(int(adapter.sizes(config)[VOCAB]), texts=4).layout


def a_cut_computes_what_transformers_computes_without_the_layers(
    adapter: Adapter, folder: Path
) -> None:
    """Cut layers, once with per-layer lists that the class computes, once with lists that have no
    period; plain transformers computes from the whole checkpoint what it computes from the cut."""
    problems: list[str] = []
    for kind, config in _deep_configs(adapter, read_config(folder)).items():
        whole = folder.with_name(f"{folder.name}-{kind}")
        pico_checkpoint(whole, AutoConfig.for_model(**config))
        _write_config(whole, config)
        problems += _cut_problems(adapter, whole, kind)
    report(problems)


def _deep_configs(adapter: Adapter, config: Config) -> dict[str, dict[str, Any]]:
    """Return configs of a deeper model: per-layer lists left out, and written without a period."""
    silent = {**_silent_settings(adapter, config), adapter.depth_key: CUT_DEPTH}
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[config["model_type"]])}
    for key, value in WINDOWS.items():
        if key in known and not _refuses(adapter, silent, {key: value}):
            silent[key] = value
    written = {
        key: [values[PATTERN[i] % len(values)] for i in range(CUT_DEPTH)]
        for key, found in layer_lists(silent, adapter.depth_key).items()
        if (values := list(dict.fromkeys(found)))
    }
    return {"silent": silent, "written": {**silent, **written}} if written else {"silent": silent}


def _write_config(folder: Path, config: Config) -> None:
    """Write a config as a published model has it, without what transformers adds when it saves."""
    text = json.dumps({**config, "dtype": "float32"})
    (folder / RunLayout.CONFIG).write_text(text, encoding="utf-8")


def _cut_problems(adapter: Adapter, whole: Path, kind: str) -> Iterator[str]:
    """Yield how a cut differs from the same checkpoint without the layers."""
    layout = _texts(adapter, whole)
    try:
        weights = open_folder(whole, adapter.completed(read_config(whole)), adapter)
        cut = weights.cut(KEPT)
    except RotdistillError:  # refused by key, or for what other checks report
        return
    short = whole.with_name(f"{whole.name}-cut")
    save_folder(cut, whole, short, torch.float64)
    others = sorted(set(range(CUT_DEPTH)) - set(KEPT))
    _, expected = plain_transformers(adapter, whole, layout, without=others)
    _, saved = plain_transformers(adapter, short, layout)
    for who, found in (("transformers", saved), ("the layerwise forward", logits(cut, layout))):
        difference = max_difference(found, expected)
        if difference > PLAIN:
            yield (
                f"of {CUT_DEPTH} layers {list(KEPT)} were kept, per-layer lists {kind}: logits of "
                f"{who} differ by {difference:.1e} from the whole model without the others"
            )


ADAPTER_CHECKS: tuple[Callable[[Adapter, Path], None], ...] = (
    *TABLE_CHECKS,
    *KEY_CHECKS,
    every_setting_of_the_config_is_computed_or_refused,
    a_cut_computes_what_transformers_computes_without_the_layers,
)
"""What every adapter must pass, on a pico checkpoint of each variant: `check(adapter, folder)`."""
