"""The engine of the core, and the example of the documents, conform."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.forward.engine import Transformers
from rotdistill_core.testing import parametrize_with_checks
from rotdistill_core.testing.engine_checks import ENGINE_CHECKS, every_prompt_is_answered_once

Check = Callable[[Path], None]
PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the engine class of the page, imported from a file."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "code" / "parrot_of_the_page.py").parent.mkdir()
    (tmp_path / "code" / "parrot_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "parrot_of_the_page", raising=False)
    [cls] = importlib.import_module("parrot_of_the_page").engines()
    return cls


@parametrize_with_checks(Transformers)
def test_the_engine_of_the_core_conforms(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("check", ENGINE_CHECKS)
def test_the_example_of_the_page_conforms(check: Any, example: Any, tmp_path: Path) -> None:
    check(example, {"tokens": 2}, tmp_path)


def test_an_ending_that_is_none_is_seen(example: Any, tmp_path: Path) -> None:
    plain = example.connect

    def connect(self: Any) -> Any:
        answering = plain(self)
        names = answering.answers

        def answers(asked: Any) -> Any:
            for name, answer in names(asked):
                yield name, answer._replace(finish="stop")

        answering.answers = answers
        return answering

    example.connect = connect
    with pytest.raises(AssertionError, match="q0"):
        every_prompt_is_answered_once(example, {}, tmp_path)
