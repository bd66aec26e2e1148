"""Which claims an answer states: phrases in normalised spelling.

The test is coarse by design: no model judges another. A fact counts wherever the answer has one of
its phrases. A falsehood does not count in a sentence with a word of denial, because that is how an
answer corrects an error. Rules for what exactly a denial denies were hardly better on answers that
were labelled by hand (`benchmarks/facts_scorers.py`). The README lists the errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from rotdistill_answers._normalize import normalize
from rotdistill_core.data.conversations import Claim

DENIALS = {
    "ar": r"ليس\w*|[وف]?(?:لم|لن|لا)",
    "de": r"nicht|nichts|kein\w*|nie|niemals|niemand\w*|nirgends|weder",
    "el": r"δεν|δε|μην?|όχι|ποτέ|ούτε|πουθενά",
    "en": r"not|\w+n't|cannot|never|no|nor|neither|nobody|none|nowhere|nothing",
    "es": r"no|nunca|jamas|ni|tampoco|ningun\w*|nadie|nada",
    "fr": r"pas|jamais|ni|aucun\w*|non|nullement|rien|personne|nulle part",
    "hi": r"नहीं",
    "it": r"non|mai|nessun\w*|niente|nulla|neppure|neanche|nemmeno",
    "ja": r"ない|なく|なかった|ません",
    "ko": r"아니|않|없|못",
    "pt": r"nao|nunca|jamais|nem|nenhum\w*|tampouco|ninguem|nada",
    "ru": r"не|ни|никогда|нет|никак|никто|нигде|ничего",
    "zh": r"不|没|沒|未|[并並而绝絕]非",
}
"""Words that deny, by language: regular expressions in normalised spelling."""
DENIALS_IN_WORDS = ("ja", "ko", "zh")
"""Languages whose denials are parts of words, or have no blank around them."""
SENTENCE_END = re.compile(
    r"[!?;:()¿¡।。！？；\n]|(?<!\bst)(?<!\bmt)(?<!\b[a-ln-z])\.(?=[\s»\"']|$)"
)
"""The end of a sentence or of a part in brackets, but not the dot of St. or of an initial."""
CLAUSE_END = rf"[,、，]|\s-\s|{SENTENCE_END.pattern}"
"""The end of a clause."""
BLANK = r"[^\w,;:!?()]{1,3}"
"""Characters between two words of a clause."""
UNSPACED = ("ja", "zh", "ko", "ar", "hi")
"""Languages whose words have no blank between them, or grow at both ends."""


def named_claims(text: str, claims: Iterable[Claim], language: str) -> tuple[str, ...]:
    """Return the claims of which a text in normalised spelling has a phrase."""
    return tuple(
        claim.what
        for claim in claims
        if any(phrase_pattern(phrase, language).search(text) for phrase in claim.any)
    )


def undenied_claims(text: str, claims: Iterable[Claim], language: str) -> tuple[str, ...]:
    """Return the claims of which a text has a phrase in a sentence without a word of denial.

    A phrase that has such a word itself (*no lift*) counts in every sentence.

    Args:
        text: the text, in normalised spelling.
        claims: what is searched for.
        language: that of the text; one without a list of denials is read as English.
    """
    sentences = SENTENCE_END.split(text)
    # No phrase goes on after a semicolon.
    undenied = ";".join(sentence for sentence in sentences if not has_denial(sentence, language))
    return tuple(
        claim.what
        for claim in claims
        if any(
            phrase_pattern(phrase, language).search(
                text if has_denial(normalize(phrase, language), language) else undenied
            )
            for phrase in claim.any
        )
    )


def has_denial(text: str, language: str) -> bool:
    """Return whether a text in normalised spelling has a word of denial."""
    return bool(_denial_pattern(language).search(text))


@cache
def _denial_pattern(language: str) -> re.Pattern[str]:
    """Return the pattern of the words of denial of a language."""
    words = DENIALS.get(language, DENIALS["en"])
    return re.compile(words if language in DENIALS_IN_WORDS else rf"(?<!\w)(?:{words})(?!\w)")


@cache
def phrase_pattern(phrase: str, language: str) -> re.Pattern[str]:
    """Return the pattern of a phrase.

    `[a|b]` is one of several parts. `[!a|b]` is any year or century but those. `…` is up to five
    words without a comma (eight characters in Chinese and Japanese), and without a number before a
    number. A phrase that ends in a blank ends at the end of a word.
    """
    first, *others = [_piece_pattern(piece.strip(), language) for piece in phrase.split("…")]
    parts = [first]
    for piece in others:
        parts += [_gap_pattern(piece, language), piece]
    end = r"(?!\w)" if phrase.endswith(" ") else ""
    return re.compile("".join(parts) + end)


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
    if _is_dense(language):
        return rf"(?:(?!{CLAUSE_END}).){{0,8}}?"
    word = r"[^\W\d]" if r"\d" in following else r"\w"
    return rf"\w*(?:{BLANK}{word}+){{0,5}}?{BLANK}"


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
