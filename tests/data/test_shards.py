"""Shards: which of the texts to fit on a step learns from."""

from __future__ import annotations

import pytest

from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.shards import in_shard, require_shard, share_of
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError


def samples_of(*names: str) -> Samples:
    """Return texts to fit on with these ids, and one of each other split."""
    fit = [Text(name, "en", Split.FIT, (1, 2, 3), 2) for name in names]
    others = [Text(split.value, "en", split, (1, 2, 3), 2) for split in Split if split != Split.FIT]
    return Samples(PackedTexts((*fit, *others), 0), (), "")


SAMPLES = samples_of("a", "a.own", "b", "c", "c.own", "7.lesson", "8.lesson", "d.own")


def kept(*shard: int) -> list[str]:
    keeps = in_shard(SAMPLES, (shard[0], shard[1]))
    return [text.id for text in SAMPLES.layout.texts if text.split == Split.FIT and keeps(text)]


def test_questions_are_dealt_in_turns_with_all_that_is_made_of_them() -> None:
    assert kept(1, 3) == ["a", "a.own", "7.lesson"]
    assert kept(2, 3) == ["b", "8.lesson"]
    assert kept(3, 3) == ["c", "c.own", "d.own"]


def test_all_but_one_shard_is_the_rest() -> None:
    assert kept(-2, 3) == [text for text in kept(1, 1) if text not in kept(2, 3)]


def test_a_continuation_is_in_the_shard_of_its_topic() -> None:
    keeps = in_shard(SAMPLES, (2, 3))
    assert keeps(Text("b.place", "en", Split.FIT, (1, 2), 1))
    assert not keeps(Text("a.place", "en", Split.FIT, (1, 2), 1))


def test_texts_that_are_not_to_fit_on_stay() -> None:
    keeps = in_shard(SAMPLES, (2, 3))
    others = [text for text in SAMPLES.layout.texts if text.split != Split.FIT]
    assert len(others) == 4
    assert all(map(keeps, others))


@pytest.mark.parametrize(
    ("shard", "share"), [((1, 1), 1.0), ((2, 4), 0.25), ((-2, 4), 0.75), ((-1, 2), 0.5)]
)
def test_the_share_of_a_shard(shard: tuple[int, int], share: float) -> None:
    assert share_of(shard) == share


@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        ((4, 3), "no shard 4 of 3"),
        ((0, 3), "no shard 0 of 3"),
        ((-4, 3), "no shard -4 of 3"),
        ((-1, 1), "leaves no text"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(shard: tuple[int, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        require_shard(shard)


def test_a_shard_without_texts_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"shard = \[9, 9\] has none of the 6 texts to fit on"):
        in_shard(SAMPLES, (9, 9))
