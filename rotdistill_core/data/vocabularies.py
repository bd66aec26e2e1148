"""Whether two models have one vocabulary, from their files alone: `plan` loads no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotdistill_core.errors import SetupError

TOKENIZER_FILE = "tokenizer.json"


def have_vocabularies(*folders: Path) -> bool:
    """Return whether the vocabulary of each folder is in a file that can be read here."""
    return all((folder / TOKENIZER_FILE).is_file() for folder in folders)


def one_vocabulary(one: Path, two: Path) -> bool:
    """Return whether two folders give the same ids to the same tokens."""
    if one == two:
        return True
    first, second = (tokenizer_of(folder).get_vocab() for folder in (one, two))
    return bool(first == second)


def require_one_vocabulary(pair: Any) -> None:
    """Refuse a pair whose logits cannot be compared, as far as files tell.

    Tokens that were added to a vocabulary do not count: there are further files that add some.

    Args:
        pair: the `Pair` of a run.

    Raises:
        SetupError: see `different_vocabularies`.
    """
    teacher, student = pair.teacher, pair.student
    if teacher.folder == student.folder or not have_vocabularies(teacher.folder, student.folder):
        return
    one, two = tokenizer_of(student.folder), tokenizer_of(teacher.folder)
    differ = _missing(one, two)
    if differ or _missing(two, one):
        raise different_vocabularies(pair, differ, one.get_vocab_size(with_added_tokens=False))


def different_vocabularies(pair: Any, differ: int, tokens: int) -> SetupError:
    """Return the error of logits that cannot be compared.

    Args:
        pair: the `Pair` of a run.
        differ: so many tokens of the student have another id in the teacher, or none.
        tokens: tokens of the student.
    """
    return SetupError(
        f"{pair.teacher.ref.model} and {pair.student.ref.model} have different tokenizers: "
        f"{differ} of {tokens} tokens of the student have another id or none in the teacher. "
        "Their streams can be aligned, but their logits cannot be compared."
    )


def _missing(one: Any, two: Any) -> int:
    """Return how many tokens of one vocabulary have another id in the other, or none."""
    others = two.get_vocab()
    own = one.get_vocab(with_added_tokens=False)
    return sum(others.get(token) != number for token, number in own.items())


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a folder with a tokenizer.json, without transformers."""
    from tokenizers import Tokenizer  # noqa: PLC0415  most plans need none

    return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
