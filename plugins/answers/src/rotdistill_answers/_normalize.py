"""One spelling for texts that state the same.

Letters, numbers, dates, centuries and lengths of a language get one form, so that phrases can be
searched for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import pairwise, product
from typing import Literal, NamedTuple

from babel import Locale, UnknownLocaleError
from babel.dates import get_month_names
from babel.numbers import format_compact_decimal
from babel.units import format_unit
from text_to_num import alpha2digit

NUMBER_WORD_LANGUAGES = ("de", "en", "es", "fr", "it", "pt")
"""Languages whose number words are read (text2num)."""

GROUPED = re.compile(
    r"(?<![\d.,])\d{1,3}(?:(?P<sep>[ ,.'’٬])\d{3})(?:(?P=sep)\d{3})*(?![\d])(?!(?P=sep)\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
)
"""1,234 and 1.234 and 1 234 and 1’234, and 12,34,567 as in India."""

CHINESE_DIGITS = {character: k for k, character in enumerate("〇一二三四五六七八九")} | {
    "零": 0,
    "两": 2,
    "兩": 2,
}
CHINESE_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "萬": 10_000}
CHINESE_NUMBER = re.compile(
    f"[{''.join([*CHINESE_DIGITS, *CHINESE_POWERS])}]{{2,}}|[{''.join(CHINESE_DIGITS)}](?=世)"
)
"""Two or more numerals, or one before the word for century."""

SCALED = re.compile(r"(?<![\d.,])(\d{1,3}(?:[.,]\d{1,2})?) (1000|1000000)(?!\d)")
"""3.2 1000000: what `alpha2digit` makes of 3.2 million."""

UNITS = {"length-meter": "m", "length-foot": "ft", "length-kilometer": "km", "length-mile": "mi"}
"""Name of a length in CLDR -> its normalised spelling."""

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
"""12th century, XIIe siècle, siglo XII, XII secolo, 12. Jahrhundert, XII век, 12世紀, 12세기,
१२वीं सदी, 12ος αιώνας, 1100s."""

FIRST_OF_TWO_CENTURIES = re.compile(
    r"(?<![\w-])(?:(?P<n>[ivx]+)(?:e|eme)|(?P<k>\d{1,2})(?:st|nd|rd|th|e|eme|\.)?)"
    r"(?P<and> ?(?:-|and|to|et|au|und|bis) ?)(?=century-)"
)
"""12th and century-13."""
SECOND_OF_TWO_CENTURIES = re.compile(r"(?<=century-)(?P<and>\d+ (?:y|e|al?|ou|o) )(?P<n>[ivx]+)\b")
"""century-12 y XIII."""

NUMERIC_DATES = (
    re.compile(r"(?P<y>\d{4})\s?[年년]\s?(?P<m>\d{1,2})\s?[月월]\s?(?P<d>\d{1,2})\s?[日일]"),
    re.compile(r"\b(?P<d>\d{1,2})[./](?P<m>\d{1,2})[./](?P<y>\d{4})\b"),
)


def normalize(text: str, language: str) -> str:
    """Return a text in the spelling in which phrases are searched for.

    - Compatibility characters, letter case, accents of Latin letters, and kinds of dashes,
      quotation marks and blanks have one form.
    - Digits of all scripts, grouped digits, thousands and millions, number words and Chinese
      numerals are plain digits.
    - Dates are `1789-07-14`, centuries `century-12`, lengths `57 m`, `187 ft`, `3 km` and `2 mi`.

    Args:
        text: the text.
        language: its ISO 639-1 code, or a tag such as `pt-BR`.
    """
    language = primary_language(language)
    text = unicodedata.normalize("NFKC", re.sub(r"\s+", " ", text)).casefold()
    text = re.sub(r"[’‘ʼ`´]", "'", text)
    text = re.sub(r"[‐‑‒–—−]", "-", text)
    if language in ("zh", "ja"):
        text = CHINESE_NUMBER.sub(_chinese_number, text)
    if language in NUMBER_WORD_LANGUAGES:
        text = _without_number_words(text, language)
    text = GROUPED.sub(_digits_alone, _plain_letters(text))
    text = _scales_and_lengths(text, language)
    text = _dates(_centuries(text), language)
    return re.sub(r"\s+", " ", text)


def primary_language(tag: str) -> str:
    """Return the ISO 639 code of a language tag: `pt` of `pt-BR`."""
    return tag.partition("-")[0].lower()


def _without_number_words(text: str, language: str) -> str:
    # A hyphen before "century" would keep the number word before it from being read.
    text = alpha2digit(re.sub("-(?=centur)", " ", text), language)
    text = SCALED.sub(lambda match: _multiplied(match[1], match[2]), text)
    if language == "en":
        text = re.sub(r"\b(1\d|20) (\d\d)\b", r"\1\2", text)  # nineteen eighty-nine
    return text


def _multiplied(number: str, scale: str) -> str:
    """Return a number, with a decimal point or comma, times a thousand or a million."""
    return str(round(float(number.replace(",", ".")) * int(scale)))


def _digits_alone(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _plain_letters(text: str) -> str:
    """Return a text in lower case, without accents of Latin letters, digits as 0 to 9."""
    return "".join(map(_plain_letter, unicodedata.normalize("NFKC", text).casefold()))


def _plain_letter(character: str) -> str:
    """Return a character without Latin accents; a digit of any script as 0 to 9."""
    if not character.isascii() and character.isdecimal():
        return str(unicodedata.decimal(character))
    parts = unicodedata.normalize("NFD", character)
    accented_latin = len(parts) > 1 and parts[0].isascii() and parts[0].isalpha()
    return parts[0] if accented_latin else character


def _chinese_number(match: re.Match[str]) -> str:
    """Return the number that Chinese numerals spell.

    They are read digit by digit (一九七四), or with tens and thousands (八千).
    """
    numerals = match[0]
    if not set(numerals) & set(CHINESE_POWERS):
        return "".join(str(CHINESE_DIGITS[character]) for character in numerals)
    total = section = digit = 0
    for character in numerals:
        if character in CHINESE_DIGITS:
            digit = CHINESE_DIGITS[character]
        elif CHINESE_POWERS[character] == 10_000:
            total += (section + digit) * 10_000
            section = digit = 0
        else:
            section += (digit or 1) * CHINESE_POWERS[character]
            digit = 0
    return str(total + section + digit)


def _centuries(text: str) -> str:
    """Return a text whose centuries are `century-12`."""

    def century(match: re.Match[str]) -> str:
        if match["hundreds"]:
            return f"century-{int(match['hundreds']) + 1}"
        return f"century-{_arabic(match[match.lastgroup or 'a'])}"

    def first_of_two(match: re.Match[str]) -> str:
        return f"century-{_arabic(match['n'] or match['k'])}{match['and']}"

    def second_of_two(match: re.Match[str]) -> str:
        return f"{match['and']}century-{_arabic(match['n'])}"

    text = CENTURIES.sub(century, text)
    text = FIRST_OF_TWO_CENTURIES.sub(first_of_two, text)
    return SECOND_OF_TWO_CENTURIES.sub(second_of_two, text)


def _arabic(numeral: str) -> str:
    """Return a Roman numeral in digits; digits stay as they are."""
    if numeral.isdecimal():
        return numeral
    values = [{"i": 1, "v": 5, "x": 10, "х": 10}[letter] for letter in numeral]
    # A letter before a larger one is subtracted.
    signed = [-value if value < after else value for value, after in pairwise([*values, 0])]
    return str(sum(signed))


class _Names(NamedTuple):
    """Names of thousands, millions and lengths in English and in a language."""

    values: dict[str, str]
    """Name -> factor (`1000000`), or unit (`m`)."""
    scaled: re.Pattern[str]
    """A number and the name of a factor."""
    lengths: re.Pattern[str]
    """A number and the name of a unit."""


def _scales_and_lengths(text: str, language: str) -> str:
    """Return a text whose numbers have no names of factors, and whose units are abbreviated."""
    names = _names(language)

    def scaled(match: re.Match[str]) -> str:
        return _multiplied(match[1], names.values[match[2]])

    def length(match: re.Match[str]) -> str:
        return f"{match[1]} {names.values[match[2]]}"

    return names.lengths.sub(length, names.scaled.sub(scaled, text))


@cache
def _names(language: str) -> _Names:
    units: dict[str, str] = {}
    factors: dict[str, str] = {}
    styles: tuple[Literal["long", "short"], ...] = ("long", "short")
    # Several numbers, for the grammatical numbers of a language.
    for code, number, style in product(("en", "en_GB", language), (1, 2, 5), styles):
        with suppress(UnknownLocaleError, ValueError):
            locale = Locale.parse(code)
            for unit, short in UNITS.items():
                name = _plain_letters(format_unit(number, unit, style, locale=locale))
                units[name.strip("125 ")] = short
            if style in locale.compact_decimal_formats:
                factors.update(_factor_names(locale, number, style))
    # "mi" is a million in Irish, and a mile.
    factors = {name: factor for name, factor in factors.items() if name not in units}
    end = "" if language in ("ja", "zh", "ko") else r"(?!\w)"
    return _Names(factors | units, _number_before(factors, end), _number_before(units, end))


def _factor_names(
    locale: Locale, number: int, style: Literal["long", "short"]
) -> Iterator[tuple[str, str]]:
    """Yield the names of thousands, millions and so on, and the factor of each."""
    for zeros in range(3, 9):
        compact = format_compact_decimal(number * 10**zeros, format_type=style, locale=locale)
        match = re.fullmatch(r"(\d+) ?(.*)", _plain_letters(compact))
        # A short name such as M is skipped: it is read as metres.
        if match and (len(match[2]) > 2 or not match[2].isascii()):
            yield match[2], str(number * 10**zeros // int(match[1]))


def _number_before(names: Iterable[str], end: str) -> re.Pattern[str]:
    """Return the pattern of a number and one of some names; longer names go first."""
    escaped = [re.escape(name) for name in names if name]
    either = "|".join(sorted(escaped, key=len, reverse=True))
    return re.compile(rf"(\d+(?:[.,]\d{{1,2}})?)(?:-[хx])?[- ]?({either}){end}")


class _MonthNames(NamedTuple):
    """The months of a language."""

    numbers: dict[str, int]
    """Name -> 1 to 12."""
    day_first: re.Pattern[str]
    """14 July 1789."""
    month_first: re.Pattern[str]
    """July 14, 1789."""


def _dates(text: str, language: str) -> str:
    """Return a text whose whole dates are `year-month-day`.

    Of 5/6/1789 the day comes first, as everywhere but in America.
    """
    months = _months(language)

    def iso(match: re.Match[str]) -> str:
        month = months.numbers.get(match["m"])
        if not month:
            month = int(match["m"]) if match["m"].isdecimal() else 0
        if not 1 <= month <= 12:
            return match[0]
        return f"{match['y']}-{month:02d}-{int(match['d']):02d}"

    for pattern in (months.day_first, months.month_first, *NUMERIC_DATES):
        text = pattern.sub(iso, text)
    return text


@cache
def _months(language: str) -> _MonthNames:
    numbers: dict[str, int] = {}
    try:
        for context in ("format", "stand-alone"):
            for number, name in get_month_names("wide", context, language).items():
                numbers["".join(map(_plain_letter, str(name).casefold()))] = int(number)
    except (UnknownLocaleError, ValueError):  # a code that CLDR does not know, or no code
        numbers = {f"{k}月": k for k in range(1, 13)}
    month = "|".join(sorted(map(re.escape, numbers), key=len, reverse=True))
    of = r"(?:st|nd|rd|th|er|\.|º|°)?\s+(?:of |de |d')?"
    return _MonthNames(
        numbers=numbers,
        day_first=re.compile(
            rf"\b(?P<d>\d{{1,2}}){of}(?P<m>{month}),?\s+(?:de |del |do )?(?P<y>\d{{4}})\b"
        ),
        month_first=re.compile(
            rf"\b(?P<m>{month})\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y>\d{{4}})\b"
        ),
    )
