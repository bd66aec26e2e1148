"""Pairing of the tokens of two tokenizers by the bytes that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.pairing import UNPAIRED
from rotdistill_core.data.thoughts import without_thoughts
from rotdistill_core.data.tokenization import decode_answer
from rotdistill_core.errors import RecipeError
from rotdistill_residuals._tokenizers import not_of_bytes

TABLE_COLUMNS = ("id", "bytes", "tokens", "teacher_tokens", "paired_tokens", "covered")

PRINTED_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that a byte-level vocabulary writes as the character of the same number."""


class ByteSpan(NamedTuple):
    """Bytes `[start, end)` of the contents of a text, joined."""

    start: int
    end: int

    def overlaps(self, other: ByteSpan) -> bool:
        """Return whether the two have a byte in common."""
        return self.start < other.end and other.start < self.end


class PairedRows(NamedTuple):
    """Rows of the student's layout and of the teacher's that stand for the same bytes."""

    spans: Tensor
    """For each row of the student, the rows `[start, end)` of the teacher `[rows, 2]`; `UNPAIRED`
    where no row of the teacher shares a byte."""
    table: list[str]
    """Lines of a table of the texts (`TABLE_COLUMNS`), tab-separated, with a header."""


def pair_rows(samples: Samples, student_tokenizer: Any, teacher_tokenizer: Any) -> PairedRows:
    """Pair rows by the bytes of system prompt, turns and answer.

    Tokens that the chat templates put around these are not paired: each model has its own.

    Raises:
        SetupError: see `token_bytes`.
        RecipeError: a tokenizer does not reproduce the bytes of a text.
    """
    student_bytes = token_bytes(student_tokenizer)
    teacher_bytes = token_bytes(teacher_tokenizer)
    student, teacher = samples.layout, samples.teacher
    spans = torch.tensor([UNPAIRED]).repeat(student.rows, 1)
    table = ["\t".join(TABLE_COLUMNS)]
    texts = zip(student.texts, teacher.texts, samples.conversations, strict=True)
    for k, (student_text, teacher_text, question) in enumerate(texts):
        contents = _contents(samples.style, question, teacher_tokenizer, teacher_text)
        student_spans = content_spans(
            student_text, student_bytes, contents, student_tokenizer.name_or_path
        )
        teacher_spans = content_spans(
            teacher_text, teacher_bytes, contents, teacher_tokenizer.name_or_path
        )
        paired_count = 0
        for token, span in student_spans.items():
            overlapping = [j for j, other in teacher_spans.items() if span.overlaps(other)]
            if overlapping:
                first, last = _rows_of_one_text(teacher, k, overlapping)
                spans[_row(student, k, token)] = torch.tensor([first, last + 1])
                paired_count += 1
        cells = (
            student_text.id,
            sum(map(len, contents)),
            len(student_text.tokens),
            len(teacher_text.tokens),
            paired_count,
            min(_covered(student_spans), _covered(teacher_spans)),
        )
        table.append("\t".join(map(str, cells)))
    return PairedRows(spans, table)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id.

    Raises:
        SetupError: the tokenizer's vocabulary is neither byte-level nor falls back to bytes.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    names: list[str | None] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if "ByteLevel" in decoder:
        byte_of = _byte_level_alphabet()
        pieces = [bytes(byte_of.get(c, 0) for c in name or "") for name in names]
    elif "ByteFallback" in decoder:
        pieces = [_bytes_with_fallback(name or "") for name in names]
    else:
        raise not_of_bytes(tokenizer.name_or_path, decoder)
    # Added tokens stand for themselves in every vocabulary. Their ids may leave gaps.
    added = tokenizer.added_tokens_decoder
    pieces += [b""] * (max(added, default=-1) + 1 - len(pieces))
    for token_id, token in added.items():
        pieces[token_id] = token.content.encode()
    return pieces


def content_spans(
    text: Text, bytes_of: Sequence[bytes], contents: Sequence[bytes], tokenizer_name: str
) -> dict[int, ByteSpan]:
    """Return which bytes of the contents each token stands for.

    Args:
        text: the tokenised conversation.
        bytes_of: the bytes of every token id. Ids beyond it stand for no bytes.
        contents: system prompt, turns and answer, in the order of the conversation.
        tokenizer_name: for the error.

    Returns:
        Index of a token -> its bytes, counted through all contents joined. Tokens of the chat
        template are left out.

    Raises:
        RecipeError: a content is not in the bytes of the tokens.
    """
    # A model has more ids than its tokenizer where its embedding is padded. It can write them.
    pieces = [bytes_of[token] if token < len(bytes_of) else b"" for token in text.tokens]
    whole = b"".join(pieces)
    ends = [0, *accumulate(map(len, pieces))]
    spans: dict[int, ByteSpan] = {}
    position = 0  # in the bytes of the tokens, after the contents before
    offset = 0  # in the joined contents
    for content in contents:
        start = whole.find(content, position)
        if start < 0:
            start = _start_of_cut(content, whole, max(position, ends[text.answer]))
        if start < 0:
            shown = content[:40].decode(errors="replace")
            raise RecipeError(
                f"text {text.id}: the tokens of {tokenizer_name} do not give its bytes back: "
                f"{shown!r} is not there. Leave the text out."
            )
        stop = min(start + len(content), len(whole))
        shift = offset - start
        for j, (token_start, token_end) in enumerate(pairwise(ends)):
            first, last = max(token_start, start), min(token_end, stop)
            if first < last:
                spans[j] = ByteSpan(first + shift, last + shift)
        position = stop
        offset += len(content)
    return spans


def _contents(
    style: str, question: Conversation, teacher_tokenizer: Any, teacher_text: Text
) -> list[bytes]:
    """Return the bytes of system prompt, turns and answer of a text.

    Thoughts in a given answer are left out: each template writes them in its own way.
    """
    answer = without_thoughts(question.answer or "")
    if question.answer is None:
        answer = decode_answer(teacher_tokenizer, teacher_text.tokens[teacher_text.answer :])
    turns = (turn.content for turn in question.turns)
    return [part.encode() for part in (question.system_under(style), *turns, answer)]


def _start_of_cut(content: bytes, whole: bytes, first: int) -> int:
    """Return where a content begins that the end of a cut text breaks off, or -1."""
    for position in range(first, len(whole)):
        if content.startswith(whole[position:]):
            return position
    return -1


def _covered(spans: Mapping[int, ByteSpan]) -> int:
    """Return how many bytes of the contents are there before the text is cut."""
    return max(span.end for span in spans.values())


def _rows_of_one_text(layout: PackedTexts, text: int, tokens: Sequence[int]) -> tuple[int, int]:
    """Return the first and the last row of consecutive tokens of a text.

    Prefix and text are apart in the layout. Tokens on both sides of the border are represented by
    those of the text alone.
    """
    crosses = tokens[0] < layout.prefix <= tokens[-1]
    kept = [token for token in tokens if token >= layout.prefix] if crosses else tokens
    return _row(layout, text, kept[0]), _row(layout, text, kept[-1])


def _row(layout: PackedTexts, text: int, token: int) -> int:
    """Return the row of a token of a text."""
    return token if token < layout.prefix else layout.starts[text] + token - layout.prefix


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    Bytes without a printed character are written as the characters from 256 on. (Radford et al.,
    GPT-2, 2019.)
    """
    alphabet = {chr(byte): byte for byte in PRINTED_BYTES}
    others = [byte for byte in range(256) if byte not in PRINTED_BYTES]
    for k, byte in enumerate(others):
        alphabet[chr(256 + k)] = byte
    return alphabet


def _bytes_with_fallback(name: str) -> bytes:
    """Return the bytes of a token of a vocabulary with byte fallback: `<0x0A>`, or a text."""
    if name.startswith("<0x") and len(name) == 6:
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()
