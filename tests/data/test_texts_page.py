"""The examples of docs/texts.md are texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rotdistill_core.data.chat import PLAIN_TEMPLATE, ChatFormat
from rotdistill_core.data.drafts import LONGEST_CELL, drafts_of
from rotdistill_core.data.files import read_rows
from rotdistill_core.data.rows import KEYS

PAGE = (Path(__file__).parents[2] / "docs/texts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```(jsonl|tsv)\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("form", "text"), BLOCKS)
def test_an_example_is_read(tmp_path: Path, form: str, text: str) -> None:
    (tmp_path / f"t.{form}").write_text(text, encoding="utf-8")
    problems: list[str] = []
    drafts = drafts_of(read_rows(f"t.{form}", tmp_path, problems), "index", problems)
    assert not problems
    assert len(drafts) == 2
    assert all(draft.question and draft.answer for draft in drafts)


def test_both_forms_have_examples() -> None:
    assert {form for form, _ in BLOCKS} == {"jsonl", "tsv"}


def test_every_column_is_named() -> None:
    assert [key for key in sorted(KEYS) if f"`{key}`" not in PAGE] == []
    assert f"{LONGEST_CELL:,} characters" in PAGE


def test_the_plain_form_is_the_one_of_the_page() -> None:
    (block,) = re.findall(r"^    ```\n(.*?)^    ```$", PAGE, re.MULTILINE | re.DOTALL)
    chat = ChatFormat("base", PLAIN_TEMPLATE)
    messages = chat.messages("Be brief.", "Where is my parcel?", "The link in our mail shows it.")
    (text,) = chat.render([messages])
    lines = (line.removeprefix("    ") for line in block.splitlines(keepends=True))
    assert text == "".join(lines).rstrip("\n")
