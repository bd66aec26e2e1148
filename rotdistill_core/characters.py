"""Characters that a reader does not see, made visible.

Names, texts and messages come from files and arguments. Printed as they are, control characters
steer a terminal (they clear it, rename its window, write to its clipboard), and marks of direction
show a text in another order than it has.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, apart from tab and line end
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of direction, and a blank
    "\u2028\u2029\u2060-\u2065\ufeff\ufff9-\ufffb"  # other line ends, and marks without a width
    "\ud800-\udfff"  # halves of characters, which no output takes
    "\U000e0000-\U000e007f"  # an alphabet that is not shown
    "]"
)
"""Characters that are printed as their escapes. Joiners (U+200C, U+200D) are not among them: the
scripts of India and Persia are not written without."""


def visible(text: str) -> str:
    r"""Return a text with an escape such as `\x1b` in the place of each character not seen.

    Tabs and line ends stay.
    """
    return UNSEEN.sub(_escape, text)


def escaped_in_strings(text: str) -> str:
    r"""Return TOML whose strings have escapes (`\u001b`) for characters that are not seen."""
    return UNSEEN.sub(_long_escape, text)


def visible_json(value: object) -> str:
    """Return a value as JSON that reads back equal and holds no character that is not seen.

    JSON has no number that is not finite: `nan` and `inf` become text, as in results.jsonl.
    """
    return UNSEEN.sub(_json_escape, json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Return a JSON value with numbers that are not finite as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else _long_escape(match)


def _long_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Beyond 16 bits JSON has no escape of its own, and writes two.
    return f"\\u{code:04x}" if code < 0x10000 else json.dumps(match[0])[1:-1]
