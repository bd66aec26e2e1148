"""docs/plugins/adapters.md names every field and every shipped adapter, and its example works."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/plugins/adapters.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Adapter)])
def test_the_page_names_every_field_of_an_adapter(field: str) -> None:
    assert f"`{field}`" in PAGE


@pytest.mark.parametrize("argument", list(inspect.signature(rope_decoder).parameters)[:-1])
def test_the_page_names_every_argument_of_rope_decoder(argument: str) -> None:
    assert f"`{argument}`" in PAGE


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in ROOT.glob("plugins/*-adapter/pyproject.toml"))
)
def test_the_page_lists_every_shipped_adapter_with_its_model_type(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [model_type] = project["entry-points"]["rotdistill.adapters"]
    link = f"[{folder.name}](../../plugins/{folder.name}/README.md)"
    assert f"| {link} | `{model_type}` |" in PAGE


@pytest.fixture(scope="module")
def mistral() -> Adapter:
    """Return the table of the page's example."""
    [source] = re.findall(
        r"```python\n(\"\"\"Checkpoints of model type `mistral`.*?)```", PAGE, re.DOTALL
    )
    namespace: dict[str, object] = {"__name__": "example"}
    exec(source, namespace)
    [table] = namespace["adapters"]()  # type: ignore[operator]
    assert isinstance(table, Adapter)
    return table


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
def test_the_table_of_the_example_holds(
    tmp_path: Path, check: Callable[[Adapter, Path], None], mistral: Adapter
) -> None:
    folder = pico_folder(tmp_path / "model", "mistral", head_dim=12, intermediate_size=56)
    check(mistral, folder)
