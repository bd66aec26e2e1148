"""One spelling for texts that say the same: letters, numbers and dates of a language in one form, so that phrases can be looked for."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from functools import cache
from itertools import product
from typing import Literal

SPELLED = ("de", "en", "es", "fr", "it", "pt")
"""Languages whose number words are read (text2num)."""
GROUPED = re.compile(
    r"(?<![\d.,])\d{1,3}(?:(?P<sep>[ ,.'’٬])\d{3})(?:(?P=sep)\d{3})*(?![\d])(?!(?P=sep)\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
)
"""1,234 and 1.234 and 1 234 and 1’234, and 12,34,567 as in India."""
CHINESE = {character: k for k, character in enumerate("〇一二三四五六七八九")} | {
    "零": 0,
    "两": 2,
    "兩": 2,
}
TENS = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "萬": 10_000}
RUN = re.compile(f"[{''.join([*CHINESE, *TENS])}]{{2,}}|[{''.join(CHINESE)}](?=世)")
SCALED = re.compile(r"(?<![\d.,])(\d{1,3}(?:[.,]\d{1,2})?) (1000|1000000)(?!\d)")
UNITS = {"length-meter": "m", "length-foot": "ft", "length-kilometer": "km", "length-mile": "mi"}
"""Lengths by their names in CLDR, and how they are written here."""
CENTURIES = re.compile(
    r"\b(?P<a>\d{1,2})(?:st|nd|rd|th)?[- ]?centur(?:y|ies)\b|"
    r"\b(?P<b>[ivx]+?|\d{1,2}) ?-?(?:e|eme|er)? siecles?\b|"
    r"(?:\b(?:siglos?|seculos?|secol[oi])|(?<![\w.'’])s\.) (?P<c>[ivx]+|\d{1,2})(?!\w)|"
    r"\b(?P<d>[ivx]+|\d{1,2})[º°o]? secolo\b|"
    r"\b(?P<e>\d{1,2})\.? ?(?:jahrhundert\w*|jh\b\.?|jhdt?\b\.?)|"
    r"\b(?P<f>[ivxх]+|\d{1,2})(?:-?[а-я]{1,3})? (?:век\w*|столети\w*)|"
    r"(?P<g>\d{1,2}) ?(?:世紀|世纪|세기)|"
    r"(?P<h>\d{1,2}) ?वीं (?:शताब्दी|सदी)|"
    r"(?P<i>\d{1,2})(?:ος|ου|ο)? αι[ωώ]ν\w*|"
    r"\b(?P<hundreds>1\d)00'?s\b"
)
"""12th century, XIIe siècle, siglo XII, XII secolo, 12. Jahrhundert, XII век, 12世紀, 12세기, १२वीं सदी, 12ος αιώνας, 1100s."""
JOINED = (
    re.compile(
        r"(?<![\w-])(?:(?P<n>[ivx]+)(?:e|eme)|(?P<k>\d{1,2})(?:st|nd|rd|th|e|eme|\.)?)(?P<and> ?(?:-|and|to|et|au|und|bis) ?)(?=century-)"
    ),
    re.compile(r"(?<=century-)(?P<and>\d+ (?:y|e|al?|ou|o) )(?P<n>[ivx]+)\b"),
)
"""The other one of two: 12th and 13th centuries, siglos XII y XIII."""


def plain(text: str, language: str) -> str:
    """Return a text in the spelling in which phrases are looked for.

    Compatibility characters, letter case, accents of Latin letters, kinds of dashes, quotation marks and spaces are one; digits of
    all scripts, grouped digits, thousands and millions, number words and Chinese numerals are plain digits; dates are `1789-07-14`,
    centuries `century-12`, lengths `57 m`, `187 ft`, `3 km` and `2 mi`.
    """
    folded = unicodedata.normalize("NFKC", re.sub(r"\s+", " ", text)).casefold()
    folded = re.sub(r"[‐‑‒–—−]", "-", re.sub(r"[’‘ʼ`´]", "'", folded))
    folded = (
        RUN.sub(lambda found: _chinese(found[0]), folded) if language in ("zh", "ja") else folded
    )
    if language in SPELLED:
        from text_to_num import alpha2digit

        folded = alpha2digit(re.sub("-(?=centur)", " ", folded), language)
        folded = SCALED.sub(
            lambda found: _times(found[1], found[2]), folded
        )  # 3 million, after alpha2digit
        folded = (
            re.sub(r"\b(1\d|20) (\d\d)\b", r"\1\2", folded) if language == "en" else folded
        )  # nineteen eighty-nine
    folded = GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), _letters(folded))
    words, many, lengths = _names(language)
    folded = many.sub(lambda found: _times(found[1], words[found[2]]), folded)
    folded = lengths.sub(lambda found: f"{found[1]} {words[found[2]]}", folded)
    return re.sub(r"\s+", " ", _dated(_by_century(folded), language))


def _times(number: str, scale: str) -> str:
    """Return a number, with a decimal point or comma, times a thousand or a million."""
    return str(round(float(number.replace(",", ".")) * int(scale)))


def _letters(text: str) -> str:
    """Return a text's letters in lower case and without Latin accents, and its digits as 0 to 9."""
    return "".join(map(_letter, unicodedata.normalize("NFKC", text).casefold()))


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


def _by_century(text: str) -> str:
    """Return a text whose centuries are `century-12`."""

    def number(numeral: str) -> str:
        if numeral.isdecimal():
            return numeral
        ones = [{"i": 1, "v": 5, "x": 10, "х": 10}[letter] for letter in numeral]
        return str(
            sum(-k if k < after else k for k, after in zip(ones, [*ones[1:], 0], strict=True))
        )

    def century(found: re.Match[str]) -> str:
        return f"century-{int(found['hundreds']) + 1 if found['hundreds'] else number(found[found.lastgroup or 'a'])}"

    text = JOINED[0].sub(
        lambda found: f"century-{number(found['n'] or found['k'])}{found['and']}",
        CENTURIES.sub(century, text),
    )
    return JOINED[1].sub(lambda found: f"{found['and']}century-{number(found['n'])}", text)


@cache
def _names(language: str) -> tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]:
    """Return what names of thousands, millions and lengths stand for, in English and a language, and the patterns of a number with each."""
    from babel import Locale, UnknownLocaleError
    from babel.numbers import format_compact_decimal
    from babel.units import format_unit

    many: dict[str, str] = {}
    units: dict[str, str] = {}
    lengths: tuple[Literal["long", "short"], ...] = ("long", "short")
    for name, k, length in product(("en", "en_GB", language), (1, 2, 5), lengths):
        with suppress(UnknownLocaleError, ValueError):
            place = Locale.parse(name)
            for unit, short in UNITS.items():
                units[_letters(format_unit(k, unit, length, locale=place)).strip("125 ")] = short
            for zeros in range(3, 9) if length in place.compact_decimal_formats else ():
                shown = re.fullmatch(
                    r"(\d+) ?(.*)",
                    _letters(
                        format_compact_decimal(k * 10**zeros, format_type=length, locale=place)
                    ),
                )
                if shown and (
                    len(shown[2]) > 2 or not shown[2].isascii()
                ):  # not M, which is read as metres
                    many[shown[2]] = str(k * 10**zeros // int(shown[1]))
    many = {
        name: scale for name, scale in many.items() if name not in units
    }  # "mi" in Irish is a mile too
    end = "" if language in ("ja", "zh", "ko") else r"(?!\w)"
    either = (
        "|".join(sorted(map(re.escape, filter(None, some)), key=len, reverse=True))
        for some in (many, units)
    )
    first, second = (rf"(\d+(?:[.,]\d{{1,2}})?)(?:-[хx])?[- ]?({some}){end}" for some in either)
    return many | units, re.compile(first), re.compile(second)


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
    first = re.compile(
        rf"\b(?P<d>\d{{1,2}}){of}(?P<m>{any_month}),?\s+(?:de |del |do )?(?P<y>\d{{4}})\b"
    )
    return (
        months,
        first,
        re.compile(
            rf"\b(?P<m>{any_month})\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y>\d{{4}})\b"
        ),
    )


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
