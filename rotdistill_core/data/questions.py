"""TODO: rotdistill_core.data.questions."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.store.hashing import digest

INDEX_COLUMNS = ("id", "language", "place", "country", "question", "blurb")
GUARD_COLUMNS = ("id", "language", "kind", "text")
HELDOUT_COLUMNS = ("id", "language", "place", "country", "question", "facts", "falsehoods")


class Claim(NamedTuple):
    """A statement, in English, and phrases in a question's language of which one in an answer is a sign that it makes the statement."""

    what: str
    any: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One line of the samples: a question, and its answer where the answer is known; a text of the guard has no question."""

    id: str
    language: str
    split: str
    question: str
    answer: str | None
    place: str = ""
    facts: tuple[Claim, ...] = ()
    falsehoods: tuple[Claim, ...] = ()


def read_questions(ref: SamplesRef, base: Path) -> tuple[tuple[Question, ...], str]:
    """Read blurbs, held-out questions and system prompt.

    Raises:
        RecipeError: naming file, line and column of everything that is wrong.
    """
    problems: list[str] = []
    blurbs = _read_table(base / ref.index, INDEX_COLUMNS, problems)
    heldout = _read_table(base / ref.heldout, HELDOUT_COLUMNS, problems)
    guard = _read_table(base / ref.guard, GUARD_COLUMNS, problems) if ref.guard else []
    style = ""
    try:
        style = (base / ref.style).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        problems.append(
            f"{base / ref.style}: the system prompt cannot be read: {error.args[-1]}. samples.style names it."
        )
    ids, places = {row["id"] for row in blurbs}, {row["place"].casefold() for row in blurbs}
    for row in heldout:
        if row["id"] in ids:
            problems.append(f"{base / ref.heldout}: the id {row['id']} is also in the blurbs.")
        if row["place"].casefold() in places:
            problems.append(
                f"{base / ref.heldout}: {row['id']}: {row['place']} is also in the blurbs."
            )
    ids |= {row["id"] for row in heldout}
    problems += [
        f"{ref.guard}: the id {row['id']} is also in another file."
        for row in guard
        if row["id"] in ids
    ]
    claims = {
        r["id"]: [
            _claims(r, column, base / ref.heldout, problems) for column in HELDOUT_COLUMNS[-2:]
        ]
        for r in heldout
    }
    if problems:
        raise RecipeError(*problems)
    fit = sorted(blurbs, key=_shuffle_key)[: ref.limit]
    said = list(
        dict.fromkeys((row["question"], row["blurb"]) for row in fit)
    )  # copies on one side: what was fitted must not judge
    judges = set(said[: round(len(said) * ref.validation)])
    part = {
        row["id"]: "validation" if (row["question"], row["blurb"]) in judges else "fit"
        for row in fit
    }
    questions = [
        Question(r["id"], r["language"], part[r["id"]], r["question"], r["blurb"], r["place"])
        for r in blurbs
        if r["id"] in part
    ]
    if ref.own_answers:  # the teacher answers these, each question once
        asked = {q.question: q for q in sorted(questions, key=lambda q: q.split, reverse=True)}
        questions += [
            replace(q, id=f"{q.id}.own", answer=None) for q in questions if asked[q.question] is q
        ]
    questions += [
        Question(r["id"], r["language"], "heldout", r["question"], None, "", *claims[r["id"]])
        for r in heldout
    ]
    for k, r in enumerate(sorted(guard, key=_shuffle_key)):  # half to choose by, half to report
        questions.append(
            Question(
                r["id"],
                r["language"],
                "guard-validation" if k % 2 else "guard",
                "",
                r["text"].replace("\\n", "\n"),
            )
        )
    if lost := {"fit", "validation", "heldout"} - {q.split for q in questions}:
        where = base / (ref.heldout if lost == {"heldout"} else ref.index)
        raise RecipeError(f"{where}: too few different texts: {', '.join(sorted(lost))} has none.")
    return tuple(questions), style


def facts_digest(questions: Sequence[Question]) -> str:
    """Return the hash of what answers are scored against: facts and falsehoods, which nothing but an evaluator sees."""
    return digest([q.facts + q.falsehoods for q in questions])


def _claims(
    row: Mapping[str, str], column: str, path: Path, problems: list[str]
) -> tuple[Claim, ...]:
    try:
        return TypeAdapter(tuple[Claim, ...]).validate_json(row[column])
    except ValidationError as error:
        problems.append(
            f"{path}: {row['id']}: {column}: must be a JSON list of objects with `what` and `any`: {error.errors()[0]['msg']}."
        )
        return ()


def _shuffle_key(row: Mapping[str, str]) -> str:
    return hashlib.sha256(row["id"].encode()).hexdigest()


def _read_table(path: Path, columns: Sequence[str], problems: list[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(
            f"{path}: cannot be read: {error.args[-1]}. The recipe names it under [samples]."
        )
        return []
    if not rows or tuple(rows[0]) != tuple(columns):
        problems.append(f"{path}: line 1: the columns must be {', '.join(columns)}.")
        return []
    found: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) != len(columns) or not all(cell.strip() for cell in cells):
            filled = sum(bool(cell.strip()) for cell in cells)
            problems.append(
                f"{path}: line {number}: needs {len(columns)} non-empty cells, has {filled}."
            )
        elif cells[0] in found:
            problems.append(f"{path}: line {number}: the id {cells[0]} is already used.")
        else:
            found[cells[0]] = dict(zip(columns, cells, strict=True))
    return list(found.values())
