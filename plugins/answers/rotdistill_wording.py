"""One spelling for texts that say the same: letters, numbers and dates of a language in one form, so that phrases can be looked for."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

SPELLED = ("de", "en", "es", "fr", "it", "pt")
"""Languages whose number words are read (text2num)."""
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?P<sep>[ ,.'’٬])\d{3})(?:(?P=sep)\d{3})*(?![\d])(?!(?P=sep)\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)")
"""1,234 and 1.234 and 1 234 and 1’234, and 12,34,567 as in India."""
CHINESE = {character: k for k, character in enumerate("〇一二三四五六七八九")} | {"零": 0, "两": 2, "兩": 2}
TENS = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "萬": 10_000}
RUN = re.compile(f"[{''.join([*CHINESE, *TENS])}]{{2,}}")


def plain(text: str, language: str) -> str:
    """Return a text in the spelling in which phrases are looked for.

    Compatibility characters, letter case, accents of Latin letters, kinds of dashes, quotation marks and spaces are one; digits of
    all scripts, grouped digits, number words and Chinese numerals are plain digits; dates are `1789-07-14`.
    """
    spaced = re.sub(r"[\u00a0\u202f\u2009]", " ", text)
    folded = "".join(_letter(c) for c in unicodedata.normalize("NFKC", spaced).casefold())
    folded = re.sub(r"[‐‑‒–—−]", "-", re.sub(r"[’‘ʼ`´]", "'", folded))
    folded = RUN.sub(lambda found: _chinese(found[0]), folded) if language in ("zh", "ja") else folded
    if language in SPELLED:
        from text_to_num import alpha2digit

        folded = alpha2digit(folded, language)
        folded = re.sub(r"\b(1\d|20) (\d\d)\b", r"\1\2", folded) if language == "en" else folded  # nineteen eighty-nine
    folded = GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), folded)
    return re.sub(r"\s+", " ", _dated(folded, language))


def _letter(character: str) -> str:
    """Return a character without Latin accents, and digits of any script as 0 to 9."""
    if not character.isascii() and character.isdecimal():
        return str(unicodedata.decimal(character))
    parts = unicodedata.normalize("NFD", character)
    return parts[0] if len(parts) > 1 and parts[0].isascii() and parts[0].isalpha() else character


def _chinese(run: str) -> str:
    """Return the number that Chinese numerals spell: digit by digit (一九七四), or with tens and thousands (八千)."""
    if not set(run) & set(TENS):
        return "".join(str(CHINESE[character]) for character in run)
    total = section = digit = 0
    for character in run:
        if character in CHINESE:
            digit = CHINESE[character]
        elif TENS[character] == 10_000:
            total, section, digit = total + (section + digit) * 10_000, 0, 0
        else:
            section, digit = section + (digit or 1) * TENS[character], 0
    return str(total + section + digit)


@cache
def _dates(language: str) -> tuple[dict[str, int], re.Pattern[str], re.Pattern[str]]:
    """Return the months by name, and the patterns `14 july 1789` and `july 14, 1789` of a language."""
    from babel import UnknownLocaleError
    from babel.dates import get_month_names

    months: dict[str, int] = {}
    try:
        for context in ("format", "stand-alone"):
            for number, name in get_month_names("wide", context, language).items():
                months["".join(map(_letter, str(name).casefold()))] = int(number)
    except UnknownLocaleError:
        months = {f"{k}月": k for k in range(1, 13)}
    any_month = "|".join(sorted(map(re.escape, months), key=len, reverse=True))
    of = r"(?:st|nd|rd|th|er|\.|º|°)?\s+(?:of |de |d')?"
    first = re.compile(rf"\b(?P<d>\d{{1,2}}){of}(?P<m>{any_month}),?\s+(?:de |del |do )?(?P<y>\d{{4}})\b")
    return months, first, re.compile(rf"\b(?P<m>{any_month})\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y>\d{{4}})\b")


NUMERIC = (
    re.compile(r"(?P<y>\d{4})\s?[年년]\s?(?P<m>\d{1,2})\s?[月월]\s?(?P<d>\d{1,2})\s?[日일]"),
    re.compile(r"\b(?P<d>\d{1,2})[./](?P<m>\d{1,2})[./](?P<y>\d{4})\b"),
)


def _dated(text: str, language: str) -> str:
    """Return a text whose whole dates are `year-month-day`; of 5/6/1789 the day comes first, as everywhere but in America."""
    months, *named = _dates(language)

    def iso(found: re.Match[str]) -> str:
        month = months.get(found["m"]) or (int(found["m"]) if found["m"].isdecimal() else 0)
        return f"{found['y']}-{month:02d}-{int(found['d']):02d}" if 1 <= month <= 12 else found[0]

    for pattern in (*named, *NUMERIC):
        text = pattern.sub(iso, text)
    return text
