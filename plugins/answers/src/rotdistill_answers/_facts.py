"""Which claims an answer states: phrases in normalised spelling, unless the answer denies them.

The test is coarse by design: no model judges another. A phrase counts in a statement, not in a
question, and only if nothing in its clause denies it. The README lists the errors on answers that
were labelled by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from rotdistill_answers._negation import (
    ALTERNATIVES,
    AUXILIARY_DENIALS,
    CLAUSE_MARKS,
    CONJUNCTIONS,
    CONTRASTS,
    DENIALS,
    DOUBLE_DENIALS,
    FALSEHOOD_WORDS,
    PREPOSITIONS,
    PSEUDO_DENIALS,
    RELATIVES,
    RHETORICAL_QUESTIONS,
    TURNS,
    UNSPACED,
    VERB_LAST,
)
from rotdistill_answers._normalize import normalize
from rotdistill_core.data.conversations import Claim

SENTENCE_END = re.compile(
    r"[!?;:()¿¡।。！？；\n]|(?<!\bst)(?<!\bmt)(?<!\b[a-ln-z])\.(?=[\s»\"']|$)"
)
"""The end of a sentence or of a part in brackets, but not the dot of St. or of an initial."""
BLANK = r"[^\w,;:!?()]{1,3}"
"""Characters between two words of a clause."""


def stated_claims(text: str, claims: Iterable[Claim], language: str) -> tuple[str, ...]:
    """Return the claims that a text in normalised spelling states."""
    return tuple(claim.what for claim in claims if states(text, claim, language))


def states(text: str, claim: Claim, language: str) -> bool:
    """Return whether a text in normalised spelling states a claim.

    It does if it has a phrase of the claim that is neither asked nor denied.
    """
    for phrase in claim.any:
        for match in phrase_pattern(phrase, language).finditer(text):
            if not _denied(text, match, language):
                return True
    return False


@cache
def phrase_pattern(phrase: str, language: str) -> re.Pattern[str]:
    """Return the pattern of a phrase; its last part is the group `last`.

    `[a|b]` is one of several parts. `[!a|b]` is any year or century but those. `…` is up to five
    words without a comma (eight characters in Chinese and Japanese), and without a number before a
    number. A phrase that ends in a blank ends at the end of a word.
    """
    first, *others = [_piece_pattern(piece.strip(), language) for piece in phrase.split("…")]
    parts = [first]
    for piece in others:
        parts += [_gap_pattern(piece, language), piece]
    end = r"(?!\w)" if phrase.endswith(" ") else ""
    parts[-1] = f"(?P<last>{parts[-1]}){end}"
    return re.compile("".join(parts))


def _piece_pattern(piece: str, language: str) -> str:
    """Return the pattern of a phrase without `…`."""
    blank = r"\s*" if _is_dense(language) else rf"\w*{BLANK}"
    pattern = ""
    # Every second part was in brackets.
    for k, part in enumerate(re.split(r"\[([^\]]*)\]", piece)):
        in_brackets = k % 2 == 1
        if in_brackets or part.strip():
            if pattern and part.startswith(" "):
                pattern += blank
            begins = not pattern or pattern.endswith(blank)
            alternatives = part if in_brackets else part.replace("|", " ")
            pattern += _alternatives_pattern(alternatives, language, begins)
        if part.endswith(" ") and not in_brackets:
            pattern += blank
    return pattern


def _gap_pattern(following: str, language: str) -> str:
    """Return the pattern of `…` before a piece with the pattern `following`."""
    turn = TURNS.get(language, TURNS["en"])
    if _is_dense(language):
        return rf"(?:(?!{CLAUSE_MARKS}|{SENTENCE_END.pattern}|{turn}).){{0,8}}?"
    word = r"[^\W\d]" if r"\d" in following else r"\w"
    return rf"\w*(?:{BLANK}(?!(?:{turn})(?!\w)){word}+){{0,5}}?{BLANK}"


def _is_dense(language: str) -> bool:
    """Return whether a language is written without blanks."""
    return language in ("ja", "zh")


def _alternatives_pattern(parts: str, language: str, begins: bool) -> str:
    """Return the pattern of `a|b`, or of `!a|b`."""
    alternatives = parts.removeprefix("!").split("|")
    either = "|".join(_words_pattern(part, language, begins) for part in alternatives)
    if not parts.startswith("!"):
        return f"(?:{either})"
    number = r"century-\d+" if "century" in either else r"\d{4}"
    return rf"(?<!\d)(?!{either}){number}(?!\d)"


def _words_pattern(words: str, language: str, begins: bool) -> str:
    """Return the pattern of words.

    Numbers and Roman numerals are matched whole. Other words are matched from their beginning (if
    `begins`) and may go on.
    """
    bare = normalize(words, language).strip()
    head = tail = ""
    if bare[:1].isdecimal():
        head = r"(?<!\d)(?<!\d[.,])"
    elif bare[:1].isalpha() and begins and language not in UNSPACED:
        head = r"(?<!\w)"
    if re.search(r"(?:^|[ .])[ivxlc]+$|\d (?:m|ft|km|mi)$", bare):
        tail = r"(?!\w)"
    elif bare[-1:].isdecimal():
        tail = r"(?!\d|[.,]\d)"
    return head + re.escape(bare) + tail


class _Sentence(NamedTuple):
    """A sentence around a phrase."""

    before: str
    phrase: str
    """The last part of the phrase."""
    after: str
    end: str
    """The mark that ends the sentence, or nothing."""


def _denied(text: str, match: re.Match[str], language: str) -> bool:
    """Return whether a phrase in a text is asked, or denied in its clause."""
    sentence = _sentence_around(text, match)
    if _is_asked(sentence, language):
        return True
    before = sentence.before
    if _is_enumerated(sentence, language):
        before = before.replace(",", " ")  # not in Egypt, Syria or Lebanon
    if language not in VERB_LAST and _opens_denial(before, language):
        return True
    clause = _rest_of_clause(sentence.after, language)
    if re.search(_any_of(FALSEHOOD_WORDS, language=language), clause):
        return True
    if language in VERB_LAST:
        return bool(re.search(_any_of(DENIALS, language=language), clause))
    # The temple of King Suryavarman II is not ...: the king is not what is denied.
    if _follows_preposition(text[: match.start()], language):
        return False
    return _begins_with_denial(clause, language)


def _any_of(*tables: dict[str, str], language: str) -> str:
    """Return the pattern of any word of some tables in a language, as whole words."""
    words = "|".join(table.get(language, table["en"]) for table in tables)
    return rf"(?:{words})" if language in UNSPACED else rf"(?<!\w)(?:{words})(?!\w)"


def _sentence_around(text: str, match: re.Match[str]) -> _Sentence:
    start, end = match.span("last")
    stop = SENTENCE_END.search(text, end)
    begin = max((s.end() for s in SENTENCE_END.finditer(text, 0, start)), default=0)
    return _Sentence(
        before=text[begin:start],
        phrase=text[start:end],
        after=text[end : stop.start() if stop else len(text)],
        end=stop[0] if stop else "",
    )


def _is_asked(sentence: _Sentence, language: str) -> bool:
    """Return whether a sentence is a question that does not state what it asks."""
    if not sentence.end or sentence.end not in "?？":
        return False
    whole = sentence.before + sentence.phrase + sentence.after
    return not re.search(_any_of(RHETORICAL_QUESTIONS, language=language), whole)


def _is_enumerated(sentence: _Sentence, language: str) -> bool:
    """Return whether the phrase is in an enumeration whose commas do not end a clause."""
    either = _any_of(ALTERNATIVES, language=language)
    # ... Syria or PHRASE
    if re.search(rf",[^,]{{0,30}}{either}\W*(?:\w+\W+)?$", sentence.before):
        return True
    # ..., PHRASE, Syria or Lebanon
    after_comma = re.search(r",\W*(?:\w+\W+){0,2}$", sentence.before)
    return bool(after_comma and re.match(rf"\w*(?:,[^,]{{1,25}})*,?\s*{either}", sentence.after))


def _opens_denial(before: str, language: str) -> bool:
    """Return whether the beginning of a sentence denies what follows it."""
    denials = _any_of(DENIALS, language=language)
    # After a pseudo-denial nothing is denied, nor by "or": do not miss this nor that.
    for table in (DOUBLE_DENIALS, PSEUDO_DENIALS):
        matches = list(re.finditer(_any_of(table, language=language), before))
        if matches:
            either = _any_of(ALTERNATIVES, language=language)
            before = re.sub(either, " ", before[matches[-1].end() :])
    # An opinion in commas does not end the denial: not, as many think, built ...
    before = re.sub(
        rf"({denials}), (?:as|como?e?|comme|wie|come|как|contrary|contrair\w+|despite|entgegen)"
        r"\W[^,]{1,40},",
        r"\1 ",
        before,
    )
    clause = _last_clause(before, language)
    # It is a myth that ...
    untrue = (
        rf"{_any_of(FALSEHOOD_WORDS, language=language)}(?:\W+\w+){{0,2}}?\W+"
        rf"(?:{RELATIVES}|to|de|zu)(?!\w)"
    )
    denied = _any_of(DENIALS, CONTRASTS, language=language)
    return bool(re.search(rf"{denied}|{untrue}", clause))


def _last_clause(before: str, language: str) -> str:
    """Return the beginning of a sentence from its last clause on."""
    only_prepositions = rf"(?:\W+{_any_of(PREPOSITIONS, language=language)})*\W*$"
    conjunction = rf"{_any_of(CONJUNCTIONS, language=language)}(?!{only_prepositions})"
    comma = rf"{CLAUSE_MARKS}(?!\s?(?:{RELATIVES})(?!\w))"
    turn = _any_of(TURNS, language=language)
    return re.split(rf"{turn}|{comma}|{conjunction}", before)[-1]


def _rest_of_clause(after: str, language: str) -> str:
    """Return what follows a phrase in its clause, without pseudo-denials."""
    after = re.sub(_any_of(PSEUDO_DENIALS, language=language), " ", after)
    turn = _any_of(TURNS, language=language)
    conjunction = _any_of(CONJUNCTIONS, language=language)
    relative = rf"(?<!\w)(?:{RELATIVES})(?!\w)"
    return re.split(rf"{turn}|{CLAUSE_MARKS}|{conjunction}|{relative}", after)[0]


def _follows_preposition(before: str, language: str) -> bool:
    """Return whether a preposition precedes a phrase, with up to two words in between."""
    preposition = PREPOSITIONS.get(language, "(?!)")
    conjunction = _any_of(CONJUNCTIONS, language=language)
    words = rf"(?:(?!{conjunction})[^\W\d]+[\s'-]+){{0,2}}"
    return bool(re.search(rf"(?<!\w)(?:{preposition})[\s'-]+{words}$", before))


def _begins_with_denial(clause: str, language: str) -> bool:
    """Return whether a denial follows a phrase within three words."""
    table = AUXILIARY_DENIALS if language == "en" else DENIALS
    denial = _any_of(table, language=language)
    if language == "zh":
        return bool(re.match(rf".{{0,4}}{denial}", clause))
    either = _any_of(ALTERNATIVES, language=language)
    return bool(re.match(rf"(?!'s)\w*(?:\W+\w+){{0,3}}?\W*(?!{either}){denial}", clause))
