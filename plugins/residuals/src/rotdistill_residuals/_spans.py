"""Pairing the tokens of two tokenizers by the bytes that they stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import RecipeError, SetupError

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.data.packed import PackedTexts, Samples, Text


UNPAIRED = (0, 1)
"""Row 0 belongs to the chat template in every layout; no content is ever there."""
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTED} | {
    chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in PRINTED)
}
"""The byte behind each character of a byte-level vocabulary. (Radford et al., GPT-2, 2019.)"""


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id.

    Raises:
        SetupError: the tokenizer's vocabulary is neither byte-level nor falls back to bytes.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    names: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if "ByteLevel" in decoder:
        found = [
            bytes(BYTE_OF.get(c, 0) for c in name or "") for name in names
        ]  # added tokens are put right below
    elif "ByteFallback" in decoder:
        hexes = [name.startswith("<0x") and len(name) == 6 for name in names]
        found = [
            bytes([int(n[3:5], 16)]) if h else n.replace("\u2581", " ").encode()
            for n, h in zip(names, hexes, strict=True)
        ]
    else:
        raise SetupError(
            f"{tokenizer.name_or_path}: its tokens are not bytes (decoder {decoder[:60]}); it cannot be paired with another."
        )
    for k, token in tokenizer.added_tokens_decoder.items():
        found[k] = token.content.encode()
    return found


def pair_rows(samples: Samples, tokenizers: Sequence[Any]) -> tuple[Tensor, list[str]]:
    """Pair the rows of the student's layout with the teacher's, by the bytes of system prompt, question and answer.

    What the chat templates put around these is each model's own, and is not paired.

    Args:
        samples: read by two tokenizers.
        tokenizers: of student and teacher.

    Returns:
        For each row of the student the teacher's rows [start, end) whose bytes overlap its own `[rows, 2]`, `UNPAIRED` where there
        are none; and a table of the texts.

    Raises:
        RecipeError: a text whose bytes one of the tokenizers does not give back.
    """
    import torch

    from rotdistill_core.data.tokenization import decode_answer

    known = [token_bytes(tokenizer) for tokenizer in tokenizers]
    student, teacher = samples.layout, samples.teacher
    pairs, lines = (
        torch.tensor([UNPAIRED]).repeat(student.rows, 1),
        ["id\tbytes\ttokens\tteacher_tokens\tpaired_tokens\tcovered"],
    )
    for k, (text, other, asked) in enumerate(
        zip(student.texts, teacher.texts, samples.questions, strict=True)
    ):
        answer = (
            asked.answer
            if asked.answer is not None
            else decode_answer(tokenizers[1], other.tokens[other.answer :])
        )
        said = [part.encode() for part in (samples.style, asked.question, answer)]
        mine, theirs = (
            _placed(t, b, said, z) for t, b, z in zip((text, other), known, tokenizers, strict=True)
        )
        paired = 0
        for token, (start, end) in mine.items():
            over = [j for j, (a, b) in theirs.items() if a < end and start < b]
            if over:
                rows = [
                    _row(teacher, k, j)
                    for j in over
                    if j >= teacher.prefix or over[-1] < teacher.prefix
                ]
                pairs[_row(student, k, token)] = torch.tensor([rows[0], rows[-1] + 1])
                paired += 1
        size, seen = (
            sum(map(len, said)),
            min(max(end for _, end in side.values()) for side in (mine, theirs)),
        )
        lines.append(
            f"{text.id}\t{size}\t{len(text.tokens)}\t{len(other.tokens)}\t{paired}\t{seen}"
        )
    return pairs, lines


def _row(layout: PackedTexts, text: int, token: int) -> int:
    return token if token < layout.prefix else layout.starts[text] + token - layout.prefix


def _placed(
    text: Text, known: Sequence[bytes], said: Sequence[bytes], tokenizer: Any
) -> dict[int, tuple[int, int]]:
    """Return token -> the bytes `[start, end)` of the contents, one behind the other, that it stands for."""
    pieces = [known[token] for token in text.tokens]
    whole, ends = b"".join(pieces), [0, *accumulate(map(len, pieces))]
    recipe_step, at, offset = {}, 0, 0
    for part in said:
        found = whole.find(part, at)
        if found < 0:  # a text cut short ends in the middle of its answer
            found = next(
                (
                    p
                    for p in range(max(at, ends[text.answer]), len(whole))
                    if part.startswith(whole[p:])
                ),
                -1,
            )
        if found < 0:
            shown = part[:40].decode(errors="replace")
            raise RecipeError(
                f"text {text.id}: the tokens of {tokenizer.name_or_path} do not give its bytes back: {shown!r} is not there."
            )
        stop = min(found + len(part), len(whole))
        for j, (a, b) in enumerate(pairwise(ends)):
            if a < stop and found < b:
                recipe_step[j] = (max(a, found) - found + offset, min(b, stop) - found + offset)
        at, offset = stop, offset + len(part)
    return recipe_step
