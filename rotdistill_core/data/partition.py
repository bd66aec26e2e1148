"""Which split a text is in: by a hash of its id, with its copies and the texts of its topic."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

from rotdistill_core.data.drafts import Draft
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import comparable_name


def shuffled(drafts: Iterable[Draft]) -> list[Draft]:
    """Return drafts in the order of the sha256 of their ids.

    The order is the same on every machine. It depends neither on the order of the file nor on the
    texts, so a corrected text stays in its split.
    """
    return sorted(drafts, key=lambda draft: hashlib.sha256(draft.id.encode()).hexdigest())


def assign_splits(
    drafts: Sequence[Draft], validation: float, heldout: float | None = None
) -> dict[str, Split]:
    """Assign the texts of the index to splits.

    Copies of a text (the same question with the same answer, in any spelling that `comparable`
    takes for the same, under any system prompt) go to the same split, and so do the texts of one
    topic. Otherwise validation would score a fitted text.

    Args:
        drafts: the texts in shuffled order; the first are for validation.
        validation: share of the distinct texts that is for validation, at least one of them.
        heldout: share that is held out, at least one text, before validation takes its own; None
            where the held-out texts have a file of their own. Texts with the same question, under
            the same system prompt, then stay together too.

    Returns:
        Id -> split.
    """
    groups = _groups(drafts, by_question=heldout is not None)
    total = sum(map(_distinct, groups))
    splits: dict[str, Split] = {}
    if heldout is not None:
        taken, groups = _taken(groups, max(round(total * heldout), 1))
        splits |= _in_split(taken, Split.HELDOUT)
    taken, groups = _taken(groups, max(round(total * validation), 1))
    return splits | _in_split(taken, Split.VALIDATION) | _in_split(groups, Split.FIT)


def _in_split(groups: Iterable[Sequence[Draft]], split: Split) -> dict[str, Split]:
    return {draft.id: split for group in groups for draft in group}


def _taken(
    groups: Sequence[list[Draft]], texts: int
) -> tuple[list[list[Draft]], list[list[Draft]]]:
    """Return the first groups that have at most so many texts together, and the other groups.

    If each has more, the smallest is taken.
    """
    taken, left = [], []
    for group in groups:
        if _distinct(group) <= texts:
            taken.append(group)
            texts -= _distinct(group)
        else:
            left.append(group)
    if not taken and left and texts:
        smallest = min(left, key=_distinct)
        taken.append(smallest)
        left.remove(smallest)
    return taken, left


def _distinct(group: Sequence[Draft]) -> int:
    """Return how many different texts a group has."""
    return len({draft.text_key for draft in group})


def _groups(drafts: Iterable[Draft], by_question: bool) -> list[list[Draft]]:
    """Return the texts that must stay together, each group at the place of its first."""
    numbers: dict[Hashable, int] = {}
    parents: list[int] = []

    def numbered(key: Hashable) -> int:
        number = numbers.setdefault(key, len(parents))
        if number == len(parents):
            parents.append(number)
        return number

    def find(number: int) -> int:
        while (parent := parents[number]) != number:
            parents[number] = parents[parent]  # halves the path
            number = parent
        return number

    ordered = list(drafts)
    firsts = []
    for draft in ordered:
        first, *others = map(numbered, _keys(draft, by_question))
        firsts.append(first)
        for other in others:
            parents[find(other)] = find(first)
    groups: dict[int, list[Draft]] = {}
    for draft, first in zip(ordered, firsts, strict=True):
        groups.setdefault(find(first), []).append(draft)
    return list(groups.values())


def _keys(draft: Draft, by_question: bool) -> list[Hashable]:
    """Return the names of what ties a text to others."""
    # The first part is the system prompt: it makes no other text of the same words.
    keys: list[Hashable] = [("text", draft.text_key[1:])]
    if by_question:
        # With other answers it may be what is asked about, such as a document.
        keys.append(("question", draft.asked))
    if draft.has_group:
        keys.append(("topic", comparable_name(draft.topic)))
    return keys
