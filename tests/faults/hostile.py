"""Hostile inputs: recipes, texts, names, models, tokenizers, templates, adapters, .gguf files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from tests.faults.child import Ended, call
from tests.faults.hostile_adapters import adapter_inputs
from tests.faults.hostile_models import model_inputs
from tests.faults.hostile_recipes import recipe_inputs
from tests.faults.hostile_rows import row_inputs
from tests.faults.hostile_texts import text_inputs
from tests.faults.hostile_tokenizers import tokenizer_inputs
from tests.faults.inputs import REFUSED, Input
from tests.faults.rows import Case, Row, row, unsound
from tests.faults.workshop import Workshop


def hostile_cases() -> Iterator[Case]:
    """Yield all cases of this module."""
    for each in chain(
        recipe_inputs(),
        text_inputs(),
        row_inputs(),
        model_inputs(),
        tokenizer_inputs(),
        adapter_inputs(),
    ):
        yield Case(each.kind, each.name, partial(_try, each))


def _try(each: Input, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("light")
    work = base.copy(folder / "work")
    each.change(work)
    before = _outside(folder)
    ends = [_call(work, words) for words in each.calls]
    # What a plan does not look at, the run has to find.
    codes = [frozenset({0, *each.codes})] * (len(ends) - 1) + [frozenset(each.codes)]
    faults = [unsound(ended, right) for ended, right in zip(ends, codes, strict=True)]
    named = [
        f"{' '.join(e.words[:2])}: {fault}" for e, fault in zip(ends, faults, strict=True) if fault
    ]
    changed = sorted(set(_outside(folder).items()) ^ set(before.items()))
    named += [f"{changed[0][0]} was changed outside the runs"] if changed else []
    named += ["code of the input ran"] if (work / "CANARY").exists() else []
    silent = [e for e in ends if e.code and each.tells not in e.text]
    named += [f"{silent[0].words[0]} does not say {each.tells!r}"] if silent else []
    if each.early and ends[0].code == 0 and ends[-1].code in REFUSED:
        named.append(f"{ends[0].words[0]} finds nothing, {ends[-1].words[0]} refuses")
    wrong = next((ended for ended, fault in zip(ends, faults, strict=True) if fault), ends[-1])
    return [row(each.kind, each.name, wrong, *named)]


def _call(work: Path, words: Sequence[str]) -> Ended:
    environment = {"XDG_CACHE_HOME": str(work / "cache"), "CANARY": str(work / "CANARY")}
    return call(work, *words, limited=True, environment=environment)


def _outside(folder: Path) -> dict[str, str]:
    """Return the hash of each file below a folder that is no file of runs or of the cache."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("work/runs/", "work/cache/")) or name in ("work/runs", "work/cache"):
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)  # noqa: PTH115
        elif path.is_file() and path.stat().st_size < 1 << 24:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "no plain file" if not path.is_dir() else "folder"
    return found
