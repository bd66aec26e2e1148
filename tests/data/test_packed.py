"""The packing of texts: rows, masks, selections, and batches."""

from __future__ import annotations

import pytest
import torch

from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split

TEXTS = (
    Text("a", "en", Split.FIT, (1, 2, 3, 4, 5), 3),
    Text("b", "de", Split.HELDOUT, (1, 2, 6, 7, 8, 9), 4),
    Text("c", "en", Split.FIT, (1, 2, 10), 2),
    Text("d", "fr", Split.HELDOUT, (1, 2, 11, 12), 3),
)
FULL = PackedTexts(TEXTS, 2)
MIXED = PackedTexts(
    (
        TEXTS[0],
        Text("g", "en", Split.GUARD, (20, 21, 22), 1, plain=True),
        TEXTS[1],
        Text("h", "en", Split.GUARD, (23, 24), 1, plain=True),
    ),
    2,
)


def test_the_prefix_is_stored_once_and_each_text_has_its_rows() -> None:
    assert FULL.starts == [2, 5, 9, 10, 12]
    assert FULL.rows == len(FULL.tokens) == 12
    assert FULL.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert FULL.split("fit").tolist() == [True] * 5 + [False] * 4 + [True] + [False] * 2
    assert not bool((FULL.split("fit") & FULL.split("heldout")).any())
    assert bool(FULL.split("fit", "heldout").all())


@pytest.mark.parametrize(
    ("split", "targets", "languages"),
    [
        (Split.FIT, [4, 5, 10], ["en", "en", "en"]),
        (Split.HELDOUT, [8, 9, 12], ["de", "de", "fr"]),
    ],
)
def test_prediction_rows_are_the_tokens_before_answer_tokens(
    split: Split, targets: list[int], languages: list[str]
) -> None:
    rows, predicted, texts = FULL.prediction_rows(split)
    assert predicted.tolist() == targets
    assert [text.language for text in texts] == languages
    answered = [
        (text, position)
        for text in TEXTS
        if text.split == split
        for position in range(text.answer, len(text.tokens))
    ]
    assert texts == [text for text, _ in answered]
    before = [text.tokens[position - 1] for text, position in answered]
    assert FULL.tokens[rows].tolist() == before


@pytest.mark.parametrize("chosen", [("fit",), ("heldout",), ("fit", "heldout"), ("validation",)])
def test_selected_rows_are_found_in_the_full_packing(chosen: tuple[str, ...]) -> None:
    selection = FULL.select(*chosen)
    assert selection.prefix == FULL.prefix
    assert [text.id for text in selection.texts] == [t.id for t in TEXTS if t.split in chosen]
    indices = selection.row_indices_in(FULL)
    assert len(indices) == selection.rows
    if selection.texts:
        assert torch.equal(FULL.tokens[indices], selection.tokens)


def test_a_selection_can_be_limited() -> None:
    assert [text.id for text in FULL.select("fit", "heldout", limit=3).texts] == ["a", "b", "c"]


def test_the_digest_depends_on_the_texts_and_not_on_how_they_were_selected() -> None:
    assert FULL.select("fit", "heldout").digest() == FULL.digest() != FULL.select("fit").digest()


def test_the_digest_of_plain_split_names_is_the_same() -> None:
    named = [Text(t.id, t.language, str(t.split), t.tokens, t.answer, t.plain) for t in TEXTS]  # type: ignore[arg-type]
    assert PackedTexts(tuple(named), 2).digest() == FULL.digest()


def test_plain_texts_have_all_their_rows_and_no_prefix() -> None:
    assert MIXED.starts == [2, 5, 8, 12, 14]
    assert MIXED.tokens.tolist() == [1, 2, 3, 4, 5, 20, 21, 22, 6, 7, 8, 9, 23, 24]
    rows, targets, _ = MIXED.prediction_rows("guard")
    assert MIXED.tokens[rows].tolist() == [20, 21, 23]
    assert targets.tolist() == [21, 22, 24]


def test_a_selection_of_plain_texts_has_no_prefix() -> None:
    plain = MIXED.select("guard")
    assert (plain.prefix, plain.tokens.tolist()) == (0, [20, 21, 22, 23, 24])
    assert torch.equal(MIXED.tokens[plain.row_indices_in(MIXED)], plain.tokens)
    assert MIXED.select("guard", "heldout").prefix == 2


@pytest.mark.parametrize("budget", [1, 5, 8, 1000])
def test_batches_hold_every_text_once_and_keep_their_budget(budget: int) -> None:
    batches = FULL.batches(budget)
    assert sorted(k for batch in batches for k in batch) == [0, 1, 2, 3]
    for batch in batches:
        longest = max(len(TEXTS[k].tokens) - FULL.prefix for k in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget


@pytest.mark.parametrize("budget", [4, 1536])
def test_plain_texts_and_conversations_have_separate_batches(budget: int) -> None:
    batches = MIXED.batches(budget)
    assert sorted(k for batch in batches for k in batch) == [0, 1, 2, 3]
    for batch in batches:
        assert len({MIXED.texts[k].plain for k in batch}) == 1
