"""Text files as people's programs save them: with or without a byte-order mark, any line ends."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes

LINE_END = re.compile(r"\r\n|\r|\n")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""First bytes of a file -> its encoding; the longer ones first, because they begin as others do."""
NAMED_BY = "The recipe, or the one that it extends, names it under [samples]."
"""What follows a problem with a whole file."""
SAMPLED_BYTES = 4096
"""So much of a file tells whether it is UTF-16 without a byte-order mark."""
MARK = "\ufeff"
"""The byte-order mark as a character. Within a text it comes from files that were joined."""
FOREIGN = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff{MARK}]")
"""Characters that no text has: those of the categories Cc and Cs, and byte-order marks."""

PLAIN_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u0060\u00b4", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2012\u2013\u2014\u2015\u2212", "-")
)
"""Apostrophes, quotation marks and dashes as a plain keyboard has them. Spreadsheets and word
processors replace those of a plain keyboard by themselves."""
DOTTED_I = "i\u0307"
"""What the upper-case I with a dot is in lower case: the letter i."""
STOPS = ".!?\u2026\u3002\uff0e\u061f\u037e;"
"""Marks that end a sentence, some of which a name or question may lack in one of two files."""


class NotUtf8Error(ValueError):
    """A file that is no UTF-8 text. The message says why, and how to save it."""


def decode_utf8(data: bytes) -> str:
    """Return the text of a file, without its byte-order mark; line ends stay as they are.

    Raises:
        NotUtf8Error: it is another encoding.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise NotUtf8Error(f"is not UTF-8 text but {encoding}; save it as UTF-8")
    sample = data[:SAMPLED_BYTES]
    if sample.count(0) > len(sample) // 4:
        raise NotUtf8Error("is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotUtf8Error(
            f"is not UTF-8 text ({error.reason} at byte {error.start}, line {line}); "
            "save it as UTF-8"
        ) from error


def decode_file(path: Path, problems: list[str]) -> str | None:
    """Return the text of a file of texts; None, with a problem that says why, if it has none."""
    try:
        return decode_utf8(read_bytes(path, COLLECTION_BYTES))
    except NotUtf8Error as error:
        problems.append(f"{path}: {error}. {NAMED_BY}")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}. {NAMED_BY}")
    return None


def foreign_characters(text: str, allowed: str = "") -> Iterator[str]:
    """Yield the name of each character that no text has: controls, surrogates, byte-order marks.

    Args:
        text: the text.
        allowed: control characters that it may have.
    """
    for character in FOREIGN.findall(text):
        if character not in allowed:
            yield f"U+{ord(character):04X}"


def comparable(text: str) -> str:
    """Return the form in which two spellings of one name are equal.

    Composed and decomposed letters, letter case, kinds and runs of blanks, kinds of apostrophes,
    quotation marks and dashes, and characters that are not seen make no difference.
    """
    if text.isascii():  # the same, sooner
        return " ".join(text.lower().replace("`", "'").split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = " ".join(folded.translate(PLAIN_MARKS).replace(DOTTED_I, "i").split())
    if words.isprintable():  # as nearly all texts are, and a look at each character is slow
        return words
    seen = "".join(c for c in words if unicodedata.category(c) != "Cf")
    return " ".join(seen.split())


def comparable_name(text: str) -> str:
    """Return the `comparable` form of a name or question, without the stop at its end."""
    form = comparable(text)
    return form.rstrip(STOPS + " ") or form
