"""Splits and sides are strings to JSON, sets and formats, so files and digests hold plain names."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rotdistill_core.data.splits import Side, Split
from rotdistill_core.store.hashing import digest


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (Split.FIT, "fit"),
        (Split.VALIDATION, "validation"),
        (Split.HELDOUT, "heldout"),
        (Split.GUARD, "guard"),
        (Split.GUARD_VALIDATION, "guard-validation"),
        (Side.TEACHER, "teacher"),
        (Side.STUDENT, "student"),
        (Side.ANCHOR, "anchor"),
        (Side.SPANS, "spans"),
    ],
)
def test_a_member_is_written_as_its_name(member: Split | Side, name: str) -> None:
    assert json.dumps({member: [member]}) == json.dumps({name: [name]})
    assert digest(member) == digest(name)
    assert f"{member}/{member!s}" == f"{name}/{name}"


def test_a_member_counts_as_its_name_in_sets() -> None:
    assert {Split.FIT, "fit"} == {"fit"}
    assert Counter([Split.FIT, Split.GUARD]) == {"fit": 1, "guard": 1}
    assert sorted(Split) == sorted(str(split) for split in Split)


def test_guard_splits_are_outside_the_domain() -> None:
    assert {split for split in Split if split.outside_domain} == {"guard", "guard-validation"}
