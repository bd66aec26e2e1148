"""The counts of a config, looked at before anything is made in their numbers.

A table of parameters has a row for each layer that a config names. A config is a file of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.errors import SetupError

MOST_LAYERS = 10_000
"""Layers of the deepest model that is opened."""
LARGEST_SIZE = 10_000_000
"""Largest width, vocabulary or number of neurons of a model that is opened."""
OTHER_COUNTS = ("vocab_size", "head_dim")
"""Counts that go by one name in all configs."""
LARGEST_WINDOW = 100_000_000
"""Positions of the largest window that a config may name."""


def require_counts(adapter: Adapter, config: Config, where: str) -> None:
    """Refuse a config whose counts are no numbers that a model can have.

    A count that is missing or null has a default, or is reported where it is needed.

    Raises:
        SetupError: naming each key, with its value.
    """
    problems = list(_count_problems(adapter, config))
    if problems:
        raise SetupError(f"{where}: its config.json does not fit: {'; '.join(problems)}.")


def require_depth(adapter: Adapter, config: Config, tensors: Iterable[str], where: str) -> None:
    """Compare the number of layers in a config with those that tensors of a checkpoint belong to.

    Raises:
        SetupError: they differ.
    """
    numbered = re.compile(re.escape(adapter.layers) + r"\.(\d{1,9})\.")
    layers = {int(match[1]) for name in tensors if (match := numbered.match(name))}
    stated = adapter.depth(config)
    if layers and stated != len(layers):
        raise SetupError(
            f"{where}: its config.json does not fit: {adapter.depth_key} is {stated}, but its "
            f"weights are of {len(layers)} layers. The files may be of two models."
        )


def _count_problems(adapter: Adapter, config: Config) -> Iterator[str]:
    largest = {
        adapter.depth_key: MOST_LAYERS,
        **dict.fromkeys(
            (
                adapter.width_key,
                adapter.neurons_key,
                adapter.query_key,
                adapter.groups_key,
                *OTHER_COUNTS,
            ),
            LARGEST_SIZE,
        ),
        "sliding_window": LARGEST_WINDOW,
    }
    for key, most in largest.items():
        value = config.get(key)
        if value is not None and not _is_count(value, most):
            shown = f"{value!r:.40}" if not isinstance(value, int) else _short(value)
            yield f"{key} is {shown}, and has to be a whole number from 1 to {most}"


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _short(value: int) -> str:
    """Return a whole number; one of many digits by its size, which Python would not print."""
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
