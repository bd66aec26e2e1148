"""Rows of datasets of the Hugging Face hub, through the library `datasets`.

A reference is `hub:owner/name`, then, as needed, `/config`, `:split` and `@revision`:
`hub:owner/name/en:train[:1000]@refs/pr/1`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from rotdistill_core.data.rows import KEYS, Row, ignored_keys, known_values
from rotdistill_core.errors import RecipeError, SetupError

HUB = "hub:"
"""Beginning of the references of datasets."""
REFERENCE = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^@]+))?(@(?P<revision>.+))?"
)
SPLIT = "train"
"""The split that is read where none is named."""


def read_hub(reference: str) -> list[Row]:
    """Return the rows of a dataset.

    Args:
        reference: such as `hub:owner/name`.

    Raises:
        RecipeError: it is no such reference.
        SetupError: the library is not installed, or gives no such dataset.
    """
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise RecipeError(
            f"{reference:.200}: is no dataset; write hub:owner/name, then /config, :split and "
            "@revision where they are needed."
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise SetupError(
            f"{reference}: datasets of the hub are read with the library datasets, which is not "
            "installed: `pip install 'rotdistill[hub]'`, or save the texts as JSON lines (.jsonl)."
        ) from error
    try:
        datasets.disable_progress_bars()
        found = datasets.load_dataset(
            parts["name"],
            parts["config"],
            split=parts["split"] or SPLIT,
            revision=parts["revision"],
        )
        known = found.select_columns([name for name in found.column_names if name in KEYS])
        others = tuple(ignored_keys(found.column_names))
        return [_row(reference, k, values, others) for k, values in enumerate(known, 1)]
    except Exception as error:  # the library raises what those below it raise
        said = " ".join(str(error).split())[:300]
        raise SetupError(
            f"{reference}: cannot be loaded: {type(error).__name__}: {said}. Name config and split "
            "as hub:owner/name/config:split, and see whether the hub can be reached."
        ) from error


def _row(reference: str, number: int, values: Mapping[str, Any], others: tuple[str, ...]) -> Row:
    return Row(f"{reference}: row {number}", known_values(values), others)
