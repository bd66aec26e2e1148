"""The tables of a recipe's `[samples]`: read, checked, and split by a hash of their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from rotdistill_core.data.conversations import OWN_ANSWER, Claim, Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tables import LINE_END, NumberedRow, TableRow, read_table
from rotdistill_core.data.text_files import (
    NotUtf8Error,
    comparable,
    decode_utf8,
    foreign_characters,
)
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.store.plain import read_bytes

INDEX_COLUMNS = ("id", "language", "place", "country", "question", "blurb")
GUARD_COLUMNS = ("id", "language", "kind", "text")
HELDOUT_COLUMNS = ("id", "language", "place", "country", "question", "facts", "falsehoods")

CLAIMS = "It must be a JSON list of objects with `what` and `any`."
"""What a cell of facts or falsehoods holds."""


def read_conversations(ref: SamplesRef, base: Path) -> tuple[tuple[Conversation, ...], str]:
    """Read all texts of a recipe and the system prompt.

    Args:
        ref: names the files.
        base: folder of the recipe, to which the names are relative.

    Returns:
        The texts (blurbs in the order of their file, the teacher's own answers to them, held-out
        questions, texts outside the domain), and the system prompt.

    Raises:
        RecipeError: naming file, line and column of everything that is wrong.
    """
    problems: list[str] = []
    blurbs = read_table(base / ref.index, INDEX_COLUMNS, problems)
    heldout = read_table(base / ref.heldout, HELDOUT_COLUMNS, problems)
    guard = read_table(base / ref.guard, GUARD_COLUMNS, problems) if ref.guard else []
    style = _read_system_prompt(base / ref.style, problems)
    problems += _heldout_overlaps(blurbs, heldout, base / ref.heldout)
    if ref.guard:
        problems += _repeated_ids(guard, (*blurbs, *heldout), base / ref.guard)
    heldout_questions = [_heldout_question(row, base / ref.heldout, problems) for row in heldout]
    if problems:
        raise RecipeError(*problems)

    blurb_questions = _blurb_questions(blurbs, ref)
    conversations = list(blurb_questions)
    if ref.own_answers:
        conversations += _with_own_answers(blurb_questions)
    conversations += heldout_questions
    conversations += _guard_texts(guard)

    _require_every_split(conversations, index=base / ref.index, heldout=base / ref.heldout)
    return tuple(conversations), style


def assign_splits(blurbs: Iterable[TableRow], validation: float) -> dict[str, Split]:
    """Assign blurbs to the splits `fit` and `validation`.

    Copies of a text (the same question with the same answer, in any spelling that `comparable`
    takes for the same) go to the same split. Otherwise validation would score a fitted text.

    Args:
        blurbs: rows of the index in shuffled order; the first texts are for validation.
        validation: share of the distinct texts that is for validation.

    Returns:
        Blurb id -> split.
    """
    copies: dict[tuple[str, str], list[str]] = {}
    for row in blurbs:
        text = (comparable(row["question"]), comparable(row["blurb"]))
        copies.setdefault(text, []).append(row["id"])
    validation_count = round(len(copies) * validation)
    splits: dict[str, Split] = {}
    for number, ids in enumerate(copies.values()):
        split = Split.VALIDATION if number < validation_count else Split.FIT
        for blurb_id in ids:
            splits[blurb_id] = split
    return splits


def shuffled(rows: Iterable[TableRow]) -> list[TableRow]:
    """Return rows in the order of the sha256 of their ids.

    The order is the same on every machine. It depends neither on the order of the file nor on the
    texts, so a corrected text stays in its split.
    """
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())


def _blurb_questions(blurbs: Sequence[TableRow], ref: SamplesRef) -> list[Conversation]:
    """Return the blurbs within `samples.limit`, in the order of their file."""
    splits = assign_splits(shuffled(blurbs)[: ref.limit], ref.validation)
    conversations = []
    for row in blurbs:
        if row["id"] in splits:
            question = Conversation(
                id=row["id"],
                language=row["language"],
                split=splits[row["id"]],
                question=row["question"],
                answer=row["blurb"],
                topic=row["place"],
            )
            conversations.append(question)
    return conversations


def _with_own_answers(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Return each distinct question once more, for the teacher to answer.

    Several blurbs may ask the same. A fit question goes before a validation question, so that no
    question is fitted and validated.
    """
    representative: dict[str, Conversation] = {}
    for split in (Split.VALIDATION, Split.FIT):
        for q in conversations:
            if q.split == split:
                representative[comparable(q.question)] = q
    return [
        replace(q, id=q.id + OWN_ANSWER, answer=None)
        for q in conversations
        if representative[comparable(q.question)] is q
    ]


def _heldout_question(row: NumberedRow, path: Path, problems: list[str]) -> Conversation:
    return Conversation(
        id=row["id"],
        language=row["language"],
        split=Split.HELDOUT,
        question=row["question"],
        answer=None,
        facts=_claims(row, "facts", path, problems),
        falsehoods=_claims(row, "falsehoods", path, problems),
    )


def _guard_texts(rows: Iterable[TableRow]) -> list[Conversation]:
    """Return the texts outside the domain: every second one is scored, the others limit edits."""
    texts = []
    for number, row in enumerate(shuffled(rows)):
        text = Conversation(
            id=row["id"],
            language=row["language"],
            split=Split.GUARD_VALIDATION if number % 2 else Split.GUARD,
            question="",
            answer=row["text"].replace("\\n", "\n"),
        )
        texts.append(text)
    return texts


def _require_every_split(
    conversations: Iterable[Conversation], *, index: Path, heldout: Path
) -> None:
    """Refuse texts of which a split in the domain has none.

    Raises:
        RecipeError: naming the file and the empty splits.
    """
    empty = {Split.FIT, Split.VALIDATION, Split.HELDOUT} - {q.split for q in conversations}
    if empty:
        path = heldout if empty == {Split.HELDOUT} else index
        raise RecipeError(f"{path}: too few different texts: {', '.join(sorted(empty))} has none.")


def _heldout_overlaps(
    blurbs: Iterable[TableRow], heldout: Iterable[NumberedRow], path: Path
) -> list[str]:
    """Return a problem for what held-out questions share with the blurbs: ids, places, questions.

    Spellings of one name are one name; see `comparable`.
    """
    rows = list(blurbs)
    seen = {column: _forms(rows, column) for column in ("id", "place", "question")}
    problems = []
    for row in heldout:
        where = f"{path}: line {row.line}"
        if comparable(row["id"]) in seen["id"]:
            problems.append(f"{where}: the id {row['id']} is also in the blurbs.")
        for column in ("place", "question"):
            if comparable(row[column]) in seen[column]:
                problems.append(f"{where}: {column}: {row[column]} is also in the blurbs.")
    return problems


def _forms(rows: Iterable[TableRow], column: str) -> set[str]:
    """Return the cells of a column in the form in which spellings of one name are equal."""
    return {comparable(row[column]) for row in rows}


def _repeated_ids(rows: Iterable[NumberedRow], others: Iterable[TableRow], path: Path) -> list[str]:
    """Return a problem for each id that another file has too."""
    ids = _forms(others, "id")
    return [
        f"{path}: line {row.line}: the id {row['id']} is also in another file."
        for row in rows
        if comparable(row["id"]) in ids
    ]


def _claims(row: NumberedRow, column: str, path: Path, problems: list[str]) -> tuple[Claim, ...]:
    """Return the claims in a cell; where they cannot be read, none, and a problem says why."""
    where = f"{path}: line {row.line}: {column}"
    try:
        claims = TypeAdapter(tuple[Claim, ...]).validate_json(row[column])
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        problems.append(f"{where}{f', at {at}' if at else ''}: {first['msg']}. {CLAIMS}")
        return ()
    texts = [text for claim in claims for text in (claim.what, *claim.any)]
    foreign = sorted({name for text in texts for name in foreign_characters(text)})
    if foreign:
        problems.append(
            f"{where}: holds {', '.join(foreign)}, which is no character of a text; remove it."
        )
    if not all(text.strip() for text in texts) or not all(claim.any for claim in claims):
        problems.append(f"{where}: an empty statement or phrase is found in no answer. {CLAIMS}")
    return claims


def _read_system_prompt(path: Path, problems: list[str]) -> str:
    """Return the system prompt; empty, with a problem that says why, where it cannot be read."""
    try:
        text = decode_utf8(read_bytes(path))
    except NotUtf8Error as error:
        problems.append(f"{path}: the system prompt {error}. samples.style names it.")
        return ""
    except OSError as error:
        problems.append(
            f"{path}: the system prompt cannot be read: {error.strerror}. samples.style names it."
        )
        return ""
    text = LINE_END.sub("\n", text).strip()
    for number, line in enumerate(text.split("\n"), 1):
        foreign = sorted(set(foreign_characters(line, allowed="\t")))
        if foreign:
            problems.append(
                f"{path}: line {number}: holds {', '.join(foreign)}, which is no character of a "
                "text; remove it."
            )
    return text
