"""Which expected facts an answer names, and which known falsehoods it asserts: phrases in plain spelling, unless they are denied.

A coarse test by design: no model judges another. A phrase counts where it stands in a statement, not in a question, and where nothing in
its clause denies it. What it gets wrong on answers labelled by hand is listed in the README.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_answers._negation import (
    AUXILIARIES,
    CLOSES,
    CONTRASTS,
    DENIALS,
    FALSE,
    JOINS,
    KNOWN,
    ONLY,
    OR,
    PLACED,
    RELATIVES,
    TURNS,
    UNLESS,
    UNSPACED,
    VERB_LAST,
)
from rotdistill_answers._normalize import plain

if TYPE_CHECKING:
    from rotdistill_core.data.questions import Claim


STOP = re.compile(r"[!?;:()¿¡।。！？；\n]|(?<!\bst)(?<!\bmt)(?<!\b[a-ln-z])\.(?=[\s»\"']|$)")
"""Where a sentence or a part in brackets ends; not behind St. and initials."""
BLANK = r"[^\w,;:!?()]{1,3}"
"""What stands between two words of a clause."""


class Judged(NamedTuple):
    """What one answer says."""

    named: tuple[str, ...]
    """The expected facts that it states."""
    asserted: tuple[str, ...]
    """The known falsehoods that it states."""


def judge(
    answer: str, facts: Iterable[Claim], falsehoods: Iterable[Claim], language: str
) -> Judged:
    """Return which facts an answer in a language states, and which falsehoods."""
    text = plain(answer, language)
    return Judged(
        *(
            tuple(claim.what for claim in claims if states(text, claim, language))
            for claims in (facts, falsehoods)
        )
    )


def states(text: str, claim: Claim, language: str) -> bool:
    """Say whether a text in plain spelling states a claim: a phrase of it stands there, and is neither asked nor denied."""
    found = (hit for phrase in claim.any for hit in _pattern(phrase, language).finditer(text))
    return any(not _denied(text, hit, language) for hit in found)


@cache
def _pattern(phrase: str, language: str) -> re.Pattern[str]:
    """Return the pattern of a phrase, whose last part is the group `last`.

    `[a|b]` is one of several parts, `[!a|b]` any year or century but those, and `…` up to five words without a comma (eight
    characters in Chinese and Japanese), and without a number before a number.
    """
    dense = language in ("ja", "zh")
    blank = r"\s*" if dense else rf"\w*{BLANK}"
    pieces = []
    for piece in phrase.split("…"):
        known = ""
        for k, part in enumerate(re.split(r"\[([^\]]*)\]", piece.strip())):
            if k % 2 or part.strip():
                known += blank if known and part.startswith(" ") else ""
                known += _either(
                    part if k % 2 else part.replace("|", " "),
                    language,
                    not known or known.endswith(blank),
                )
            known += blank if part.endswith(" ") and not k % 2 else ""
        word = r"[^\W\d]" if r"\d" in known else r"\w"
        turn = TURNS.get(language, TURNS["en"])
        spaced = rf"\w*(?:{BLANK}(?!(?:{turn})(?!\w)){word}+){{0,5}}?{BLANK}"
        near = rf"(?:(?!{CLOSES}|{STOP.pattern}|{turn}).){{0,8}}?" if dense else spaced
        pieces += [near, known]
    pieces[-1] = f"(?P<last>{pieces[-1]})" + (r"(?!\w)" if phrase.endswith(" ") else "")
    return re.compile("".join(pieces[1:]))


def _either(parts: str, language: str, begins: bool) -> str:
    """Return the pattern of `a|b`, or of `!a|b`."""
    known = "|".join(_part(part, language, begins) for part in parts.removeprefix("!").split("|"))
    number = r"century-\d+" if "century" in known else r"\d{4}"
    return rf"(?<!\d)(?!{known}){number}(?!\d)" if parts.startswith("!") else f"(?:{known})"


def _part(phrase: str, language: str, begins: bool) -> str:
    """Return the pattern of words: whole numbers, whole Roman numerals, and words that begin where they begin, or go on."""
    bare = plain(phrase, language).strip()
    begins = begins and language not in UNSPACED
    head = (
        r"(?<!\d)(?<!\d[.,])"
        if bare[:1].isdecimal()
        else r"(?<!\w)"
        if bare[:1].isalpha() and begins
        else ""
    )
    whole = re.search(r"(?:^|[ .])[ivxlc]+$|\d (?:m|ft|km|mi)$", bare)
    return (
        head
        + re.escape(bare)
        + (r"(?!\w)" if whole else r"(?!\d|[.,]\d)" if bare[-1:].isdecimal() else "")
    )


def _denied(text: str, hit: re.Match[str], language: str) -> bool:
    """Say whether a phrase that stands in a text is asked, or denied in its clause."""
    start, end = hit.span("last")
    stop = STOP.search(text, end)
    before = text[max((s.end() for s in STOP.finditer(text, 0, start)), default=0) : start]
    after = text[end : stop.start() if stop else len(text)]

    def words(*tables: dict[str, str]) -> str:
        some = "|".join(table.get(language, table["en"]) for table in tables)
        return rf"(?:{some})" if language in UNSPACED else rf"(?<!\w)(?:{some})(?!\w)"

    if stop and stop[0] in "?？" and not re.search(words(KNOWN), before + text[start:end] + after):
        return True
    either = words(OR)
    if re.search(rf",[^,]{{0,30}}{either}\W*(?:\w+\W+)?$", before) or (
        re.search(r",\W*(?:\w+\W+){0,2}$", before)
        and re.match(rf"\w*(?:,[^,]{{1,25}})*,?\s*{either}", after)
    ):
        before = before.replace(",", " ")  # not in Egypt, Syria or Lebanon
    if language not in VERB_LAST and _opens_denial(before, words):
        return True
    clause = re.split(
        rf"{words(TURNS)}|{CLOSES}|{words(JOINS)}|(?<!\w)(?:{RELATIVES})(?!\w)",
        re.sub(words(ONLY), " ", after),
    )[0]
    if re.search(words(FALSE), clause):
        return True
    if language in VERB_LAST:
        return bool(re.search(words(DENIALS), clause))
    recipe_step = rf"(?<!\w)(?:{PLACED.get(language, '(?!)')})[\s'-]+(?:(?!{words(JOINS)})[^\W\d]+[\s'-]+){{0,2}}$"
    if re.search(recipe_step, text[: hit.start()]):  # the temple of King Suryavarman II is not ...
        return False
    cue = words(AUXILIARIES if language == "en" else DENIALS)
    return bool(
        re.match(
            rf".{{0,4}}{cue}"
            if language == "zh"
            else rf"(?!'s)\w*(?:\W+\w+){{0,3}}?\W*(?!{either}){cue}",
            clause,
        )
    )


def _opens_denial(before: str, words: Callable[..., str]) -> bool:
    """Say whether the beginning of a sentence denies what follows it."""
    for table in (UNLESS, ONLY):
        *_, last = [None, *re.finditer(words(table), before)]
        before = (
            re.sub(words(OR), " ", before[last.end() :]) if last else before
        )  # do not miss this nor that
    before = re.sub(
        rf"({words(DENIALS)}), (?:as|como?e?|comme|wie|come|как|contrary|contrair\w+|despite|entgegen)\W[^,]{{1,40}},",
        r"\1 ",
        before,
    )  # not, as many think, built ...
    only_names = rf"(?:\W+{words(PLACED)})*\W*$"
    joined = rf"{words(JOINS)}(?!{only_names})"
    clause = re.split(rf"{words(TURNS)}|{CLOSES}(?!\s?(?:{RELATIVES})(?!\w))|{joined}", before)[-1]
    untrue = rf"{words(FALSE)}(?:\W+\w+){{0,2}}?\W+(?:{RELATIVES}|to|de|zu)(?!\w)"
    return bool(re.search(rf"{words(DENIALS, CONTRASTS)}|{untrue}", clause))
