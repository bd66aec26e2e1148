"""Blocks in which models think before they answer: in prompts that open one, and in answers.

Some chat templates begin every answer inside such a block (DeepSeek-R1, QwQ: the prompt ends with
`<think>`). What such a model writes has an end of the block and no beginning.
"""

from __future__ import annotations

import re

MARKS = {"<think>": "</think>", "<thought>": "</thought>", "[THINK]": "[/THINK]"}
"""Beginning of a block -> its end."""
_BEGIN = "|".join(map(re.escape, MARKS))
_END = "|".join(map(re.escape, MARKS.values()))
_OPEN = re.compile(rf"({_BEGIN})(\s*)\Z")
_CLOSED = re.compile(rf"({_END})\s*\Z")
_BLOCK = re.compile(rf"\A\s*({_BEGIN}).*?(({_END})\s*|\Z)", re.DOTALL)
_OPENED = re.compile(rf"\A\s*({_BEGIN})\s*")
_REST = re.compile(rf"\A((?!{_BEGIN}).)*?(\A|\n)[ \t]*({_END})\s*", re.DOTALL)
"""A block from which the beginning is missing: its end stands on a line of its own."""


def opens_block(prompt: str) -> bool:
    """Return whether a prompt ends inside a block, so that an answer begins with thoughts."""
    return bool(_OPEN.search(prompt))


def closed(prompt: str) -> str:
    """Return a prompt that ends outside of a block: one that it opens ends at once, empty."""
    found = _OPEN.search(prompt)
    return prompt + _ending(found) if found else prompt


def without_thoughts(answer: str) -> str:
    """Return an answer without the block that it begins with, or begins in.

    A block without an end is all of the answer, and nothing is left.
    """
    return _REST.sub("", _BLOCK.sub("", answer, count=1), count=1)


def with_beginning(prompt: str, answer: str) -> str:
    """Return an answer that was written after a prompt with the beginning of the block that the
    prompt opens; unchanged if it opens none."""
    found = _OPEN.search(prompt)
    return f"{found[1]}\n{answer}" if found else answer


def continuing(prompt: str, answer: str) -> str:
    """Return an answer that was not written after this very prompt as it would follow it.

    After a prompt that ends inside a block, an answer without thoughts ends the block first, and
    that of one with thoughts is not opened twice. After a prompt that ends with a block, thoughts
    are left out. After others, thoughts have a beginning.

    Args:
        prompt: the prompt as text.
        answer: the answer, with or without its thoughts.
    """
    found = _OPEN.search(prompt)
    if found and _OPENED.match(answer):
        return _OPENED.sub("", answer, count=1)
    if found:
        return answer if _REST.match(answer) else _ending(found) + answer
    if _CLOSED.search(prompt):
        return without_thoughts(answer)
    rest = _REST.match(answer)
    begins = [begin for begin, end in MARKS.items() if rest and end in rest[0]]
    return f"{begins[0]}\n{answer}" if begins else answer


def _ending(found: re.Match[str]) -> str:
    """Return what ends an open block; a block that begins with a line ends with one."""
    mark, blanks = found.groups()
    return f"\n{MARKS[mark]}\n\n" if "\n" in blanks else f"{MARKS[mark]}\n\n"
