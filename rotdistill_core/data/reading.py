"""The texts of a recipe's `[samples]`: read, checked, completed and split."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rotdistill_core.characters import visible
from rotdistill_core.data.conversations import OWN_ANSWER, Conversation
from rotdistill_core.data.drafts import Draft, Use, drafts_of
from rotdistill_core.data.files import read_rows, text_path
from rotdistill_core.data.hub import HUB
from rotdistill_core.data.languages import told_languages
from rotdistill_core.data.partition import assign_splits, shuffled
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import (
    LINE_END,
    NotUtf8Error,
    comparable,
    comparable_name,
    decode_utf8,
    foreign_characters,
)
from rotdistill_core.errors import RecipeError, first_few
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.store.plain import read_bytes

Log = Callable[[str], None]

ID_DIGITS = 12
"""Hexadecimal digits of an id that is the hash of its text."""


def read_conversations(
    ref: SamplesRef, base: Path, log: Log = lambda _: None
) -> tuple[tuple[Conversation, ...], str]:
    """Read all texts of a recipe and the system prompt.

    Args:
        ref: names the files.
        base: folder of the recipe, to which the names are relative.
        log: receives lines on what was decided where rows leave it open.

    Returns:
        The texts (those to fit on in the order of their file, the teacher's own answers to them,
        held-out questions, texts outside the domain), and the system prompt; empty for none.

    Raises:
        RecipeError: naming file, line and column of everything that is wrong.
        SetupError: a form of file needs a library that is not installed, or the hub does not give
            a dataset.
    """
    problems: list[str] = []
    notes: list[str] = []
    _refuse_held_out_index(ref, base)
    how = (base, problems, notes.append, ref.thinking)
    index = _read(ref.index, "index", *how)
    heldout = _read(ref.heldout, "heldout", *how) if ref.heldout else []
    guard = _read(ref.guard, "guard", *how) if ref.guard else []
    style = _read_system_prompt(base / ref.style, problems) if ref.style else ""
    if not ref.style and (style := _shared_prompt(index)):
        index, heldout = _without_prompt(index, style), _without_prompt(heldout, style)
        notes.append(
            f"{text_path(ref.index, base)}: all {len(index)} conversations have one system prompt: "
            "it is that of the run."
        )
    elif ref.style and style and {draft.system for draft in index}.isdisjoint({None, style}):
        notes.append(
            f"{base / ref.style}: no conversation reads this system prompt: all {len(index)} of "
            f"{text_path(ref.index, base)} have their own. Leave one of them out."
        )
    problems += first_few(_overlaps(index, heldout))
    problems += first_few(_repeated_ids(guard, (*index, *heldout)))
    if not ref.own_answers:
        problems += first_few(_unanswered(index))
    if problems:
        raise RecipeError(*problems)
    # What is wrong comes alone; the notes are for texts that can be used.
    for note in (*_misspelt_columns(index, guard, heldout), *notes):
        log(note)

    conversations = _of_index(index, ref)
    asked = {draft.id: draft.asked for draft in (*index, *heldout)}
    if ref.own_answers:
        conversations += _with_own_answers(conversations, asked)
    conversations = [each for each in conversations if _is_complete(each)]
    conversations += [_conversation(draft, Split.HELDOUT) for draft in heldout]
    conversations = _held_out_once(conversations, asked, log)
    conversations += _guard_texts(guard)

    in_file = text_path(ref.heldout, base) if ref.heldout else None
    _require_every_split(conversations, index=text_path(ref.index, base), heldout=in_file)
    return tuple(conversations), style


# From rows to drafts that lack nothing.


def _read(
    reference: str, use: Use, base: Path, problems: list[str], log: Log, thinking: bool
) -> list[Draft]:
    """Return the conversations of a file, each with an id and a language.

    Rows of a dataset of the hub cannot be repaired, so those that cannot be read are left out.
    """
    path = text_path(reference, base)
    found: list[str] = []
    drafts = drafts_of(read_rows(reference, base, found), use, found, thinking)
    if found and drafts and reference.startswith(HUB):
        log(f"{path}: {len(found)} rows are left out, the first: {found[0]}")
        found = []
    named = _with_ids(drafts, found)
    problems += first_few(found)
    return _with_languages(named, path, log)


def _with_ids(drafts: Iterable[Draft], problems: list[str]) -> list[Draft]:
    """Return drafts with ids: their own, or the hash of their text.

    Copies of a text without ids are numbered. `problems` takes ids that are used twice.
    """
    seen: set[str] = set()
    copies: Counter[str] = Counter()
    named = []
    for draft in drafts:
        name = draft.id
        if not name:
            content = [draft.system, draft.earlier, draft.question, draft.answer]
            text = json.dumps(content, ensure_ascii=False)
            name = hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
            copies[name] += 1
            name += f"-{copies[name]}" if copies[name] > 1 else ""
        form = comparable(name)
        if form in seen:
            problems.append(f"{draft.where}: the id {name} is already used.")
            continue
        seen.add(form)
        named.append(draft if name == draft.id else replace(draft, id=name))
    return named


def _with_languages(drafts: list[Draft], path: str, log: Log) -> list[Draft]:
    """Return drafts with languages: their own, or those that their texts are told to be in."""
    unknown = {draft.id: _words(draft) for draft in drafts if not draft.language}
    if not unknown:
        return drafts
    told = told_languages(unknown, {draft.language for draft in drafts if draft.language})
    counts = Counter(told.values()).most_common()
    log(
        f"note: {path}: the language of {len(told)} of {len(drafts)} texts is told by their words: "
        f"{', '.join(f'{language} {count}' for language, count in counts)}. Nothing needs to be "
        "done; where that is wrong, a column `language` sets it right."
    )
    return [replace(draft, language=draft.language or told[draft.id]) for draft in drafts]


def _shared_prompt(index: Sequence[Draft]) -> str:
    """Return the system prompt that all texts of the index have themselves; empty for none."""
    prompts = {draft.system for draft in index}
    return (prompts.pop() or "") if len(prompts) == 1 else ""


def _without_prompt(drafts: Iterable[Draft], prompt: str) -> list[Draft]:
    """Return drafts that leave a system prompt to that of the run, where it is theirs."""
    return [replace(each, system=None) if each.system == prompt else each for each in drafts]


def _words(draft: Draft) -> str:
    """Return all that is said in a text."""
    turns = (turn.content for turn in draft.earlier)
    return "\n".join((*turns, draft.question, draft.answer or ""))


# From drafts to conversations.


def _conversation(draft: Draft, split: Split) -> Conversation:
    """Return a draft as a conversation; the teacher answers the held-out ones itself."""
    return Conversation(
        id=draft.id,
        language=draft.language,
        split=split,
        question=draft.question,
        answer=None if split == Split.HELDOUT else draft.answer,
        topic=draft.topic,
        earlier=draft.earlier,
        system=draft.system,
        facts=draft.facts,
        falsehoods=draft.falsehoods,
    )


def _of_index(index: Sequence[Draft], ref: SamplesRef) -> list[Conversation]:
    """Return the texts within `samples.limit`, in the order of their file."""
    share = None if ref.heldout else ref.heldout_share
    splits = assign_splits(shuffled(index)[: ref.limit], ref.validation, share)
    return [_conversation(draft, splits[draft.id]) for draft in index if draft.id in splits]


def _is_complete(conversation: Conversation) -> bool:
    """Return whether a text of the index has an answer, or is one that the teacher answers."""
    return (
        conversation.answer is not None
        or conversation.split == Split.HELDOUT
        or conversation.id.endswith(OWN_ANSWER)
    )


def _with_own_answers(
    conversations: Sequence[Conversation], asked: Mapping[str, tuple[str, ...]]
) -> list[Conversation]:
    """Return each distinct question once more, for the teacher to answer.

    Several texts may ask the same. A fit question goes before a validation question, so that no
    question is fitted and validated.

    Args:
        conversations: the texts.
        asked: id -> what is asked, in a form in which spellings are equal.
    """
    representative: dict[tuple[str, ...], Conversation] = {}
    for split in (Split.VALIDATION, Split.FIT):
        for each in conversations:
            if each.split == split:
                representative[asked[each.id]] = each
    return [
        replace(each, id=each.id + OWN_ANSWER, answer=None)
        for each in conversations
        if representative.get(asked[each.id]) is each
    ]


def _held_out_once(
    conversations: Sequence[Conversation], asked: Mapping[str, tuple[str, ...]], log: Log
) -> list[Conversation]:
    """Return texts without held-out questions that ask what another one asks.

    The teacher answers both alike, and an interval over texts would take the second for news.

    Args:
        conversations: the texts.
        asked: id -> what is asked, in a form in which spellings are equal.
        log: receives a line on questions that are left out.
    """
    first: dict[tuple[str, ...], Conversation] = {}
    for each in conversations:
        if each.split == Split.HELDOUT:
            first.setdefault(asked[each.id], each)
    kept = [
        each
        for each in conversations
        if each.split != Split.HELDOUT or first[asked[each.id]] is each
    ]
    again = len(conversations) - len(kept)
    if again:
        log(f"note: held-out questions that repeat others: {again}. Each is scored once.")
    return kept


def _guard_texts(drafts: Iterable[Draft]) -> list[Conversation]:
    """Return the texts outside the domain: every second one is scored, the others limit edits.

    Of copies only the first is one of them: else both halves could hold a text.
    """
    texts: dict[tuple[str, ...], Draft] = {}
    for draft in shuffled(drafts):
        texts.setdefault(draft.text_key[1:], draft)  # under any system prompt
    return [
        _conversation(draft, Split.GUARD_VALIDATION if number % 2 else Split.GUARD)
        for number, draft in enumerate(texts.values())
    ]


# Checks over several rows.


def _refuse_held_out_index(ref: SamplesRef, base: Path) -> None:
    """Refuse to score on the very file that is fitted on.

    Raises:
        RecipeError: `heldout` names the file of `index`.
    """
    files = [reference for reference in (ref.index, ref.heldout) if reference]
    paths = {each if each.startswith(HUB) else os.path.realpath(base / each) for each in files}
    if len(paths) < len(files):
        raise RecipeError(
            f"{text_path(ref.index, base)}: heldout is the index file. Leave heldout out: then "
            "samples.heldout_share of the texts is held out."
        )


def _unanswered(index: Iterable[Draft]) -> Iterable[str]:
    """Yield a problem for each text of the index that nobody answers."""
    for draft in index:
        if draft.answer is None:
            yield (
                f"{draft.where}: has no answer{draft.answer_hint}; write one, or let the teacher: "
                "samples.own_answers = 64."
            )


def _misspelt_columns(index: Sequence[Draft], *others: Sequence[Draft]) -> Iterable[str]:
    """Yield a warning for each misspelt column, with the first row that has it.

    Args:
        index: the texts to fit on; one that lacks an answer gets one of the teacher.
        others: the texts of other files.
    """
    for drafts in (index, *others):
        rows: dict[str, list[str]] = {}
        for draft in drafts:
            unanswered = draft.answer_hint if drafts is index and draft.answer is None else ""
            if unanswered:
                warning = f"has no answer{unanswered}; the teacher will write it."
                rows.setdefault(warning, []).append(draft.where)
            for name, key in draft.misspelt:
                if f"has {visible(name)};" not in unanswered:
                    warning = f"{visible(name)} is not read; did you mean {key}?"
                    rows.setdefault(warning, []).append(draft.where)
        for warning, places in rows.items():
            more = f" So it is in {len(places)} rows." if len(places) > 1 else ""
            yield f"warning: {places[0]}: {warning}{more}"


def _require_every_split(
    conversations: Iterable[Conversation], *, index: str, heldout: str | None
) -> None:
    """Refuse texts of which a split in the domain has none.

    Raises:
        RecipeError: naming the file and the empty splits.
    """
    empty = {Split.FIT, Split.VALIDATION, Split.HELDOUT} - {each.split for each in conversations}
    if empty:
        path = heldout if heldout and empty == {Split.HELDOUT} else index
        raise RecipeError(
            f"{path}: too few different texts, none for: {', '.join(sorted(empty))}. Copies, texts "
            "of one topic, and texts that ask the same where a share is held out, stay together; "
            "add texts that differ, about other topics."
        )


def _overlaps(index: Iterable[Draft], heldout: Iterable[Draft]) -> Iterable[str]:
    """Yield a problem for what held-out texts share with the index: ids, topics, questions.

    Spellings of one name are one name; see `comparable_name`.
    """
    texts = list(index)
    ids = {comparable(draft.id) for draft in texts}
    topics = {comparable_name(draft.topic) for draft in texts if draft.topic}
    asked = {draft.asked[1:] for draft in texts}  # under any system prompt
    for draft in heldout:
        if comparable(draft.id) in ids:
            yield f"{draft.where}: the id {draft.id} is also in the texts to fit on."
        if draft.topic and comparable_name(draft.topic) in topics:
            yield (
                f"{draft.where}: {'topic' if draft.has_group else 'place'}: {draft.topic} is also "
                "in the texts to fit on."
            )
        if draft.asked[1:] in asked:
            yield (
                f"{draft.where}: question: {draft.question:.200} is also in the texts to fit on."
            )


def _repeated_ids(drafts: Iterable[Draft], others: Iterable[Draft]) -> Iterable[str]:
    """Yield a problem for each id that another file has too."""
    ids = {comparable(draft.id) for draft in others}
    for draft in drafts:
        if comparable(draft.id) in ids:
            yield f"{draft.where}: the id {draft.id} is also in another file."


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
