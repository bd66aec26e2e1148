"""Faults of what a run has stored: flipped bits, lost and replaced files, damaged ledgers."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rotdistill_core.store.layout import RunLayout
from tests.faults.child import Ended, call
from tests.faults.process_faults import not_healed
from tests.faults.rows import Case, Row, row, unsound
from tests.faults.workshop import Undisturbed, Workshop

AT_ONCE = 8
"""Files that are flipped in one copy of a run; each is judged by itself."""
FLIPS = "one bit flipped in a stored file"


def stored_cases(workshop: Workshop) -> Iterator[Case]:
    """Yield all cases of this module."""
    yield from _flips(workshop)
    yield from _damages(workshop)
    yield from _ledgers()
    yield from _readers()


def kind_of(name: str) -> str:
    """Return the kind of a stored file by its name below the run."""
    top, _, rest = name.partition("/")
    last = name.rpartition("/")[2]
    if top == "shards":
        return "shard" if last.endswith(".safetensors") else "shard's document"
    if top == "rotations":
        return "map" if last.endswith(".safetensors") else "diagnostics"
    if top == "weights":
        return last if last in ("undo.safetensors", "changed.safetensors") else "weights of a step"
    if top == RunLayout.CHECKPOINTS:
        return f"checkpoint: {rest.partition('/')[2]}"
    return last if not rest else top


def flip(path: Path, choice: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    place = choice.randrange(len(content))
    content[place] ^= 1 << choice.randrange(8)
    path.write_bytes(content)


# One bit


def _flips(workshop: Workshop) -> Iterator[Case]:
    for name, groups in (("whole", 88), ("reported", 16)):
        files = _stored(workshop.undisturbed(name))
        choice = random.Random(f"flips {name}")
        waiting: list[str] = []
        for number in range(groups):
            chosen: list[str] = []
            while len(chosen) < AT_ONCE:
                waiting = waiting or choice.sample(files, len(files))
                chosen.append(waiting.pop())
            yield Case(FLIPS, f"{name} {number}", partial(_flip, name, number, sorted(set(chosen))))
    for number in range(130):
        yield Case("one bit flipped in a ledger", f"{number}", partial(_flip_ledger, number))
    for number in range(50):
        yield Case("one bit flipped in a source model", f"{number}", partial(_flip_source, number))


def _stored(base: Undisturbed) -> list[str]:
    """Return the files of the run, its ledger apart, relative to it."""
    below = f"{base.run}/"
    names = [name.removeprefix(below) for name in base.state.files if name.startswith(below)]
    return sorted(name for name in names if name != RunLayout.LEDGER)


def _flip(
    name: str, seed: int, files: Sequence[str], workshop: Workshop, folder: Path
) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work", runs=True)
    choice = random.Random(f"flip {name} {seed}")
    for file in files:
        flip(work / "runs" / base.run / file, choice)
    check = call(work, "check", base.run)
    again, faults = not_healed(base, work)
    rows = []
    for file in files:
        unseen = "" if _names(check, base.run, file) else "check does not name it"
        of_others = [fault for fault in faults if any(other in fault for other in files)]
        about = [fault for fault in faults if file in fault or fault not in of_others]
        kind = f"{kind_of(file)}: {file} ({name} {seed})"
        rows.append(
            row(FLIPS, kind, again if faults else check, unsound(check, {4}), unseen, *about)
        )
    return rows


def _names(check: Ended, run: str, file: str) -> bool:
    return f"{run}/{file}" in check.text or f"{run}/{file}" in check.text.replace("\n", "")


def _flip_ledger(seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("small" if seed % 3 else "whole")
    work = base.copy(folder / "work", runs=True)
    flip(work / "runs" / base.run / RunLayout.LEDGER, random.Random(f"ledger {seed}"))
    return [_judge_ledger("one bit flipped in a ledger", str(seed), base, work, {4})]


def _judge_ledger(kind: str, title: str, base: Undisturbed, work: Path, codes: set[int]) -> Row:
    check = call(work, "check", base.run)
    shown = call(work, "show", base.run)
    listed = call(work, "runs")
    faults = [
        unsound(check, codes),
        ""
        if check.code != 4 or RunLayout.LEDGER in check.text
        else "check does not name the ledger",
        unsound(shown, {0, 2, 4}) and f"show: {unsound(shown, {0, 2, 4})}",
        unsound(listed, {0}) and f"runs: {unsound(listed, {0})}",
    ]
    again, more = not_healed(base, work)
    return row(kind, title, again if more else check, *faults, *more)


def _flip_source(seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("small")
    work = base.copy(folder / "work", runs=True)
    model = work / "model"
    names = ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja")
    file = model / names[seed % len(names)]
    before = file.read_bytes()
    flip(file, random.Random(f"source {seed}"))
    check = call(work, "check", base.run)
    run = call(work, "run", "trial.toml", "--no-plan")
    kind = "one bit flipped in a source model"
    faults = [unsound(check, {4}), unsound(run, {0, 2, 3, 4}) and f"run: {unsound(run, {0, 3})}"]
    file.write_bytes(before)
    again = call(work, "run", "trial.toml", "--no-plan")
    faults.append(unsound(again, {0}) and f"with the model back: {unsound(again, {0})}")
    shown = next((e for e, f in zip((check, run, again), faults, strict=True) if f), check)
    return [row(kind, f"{file.name} ({seed})", shown, *faults)]


# Whole files


def _truncated(path: Path, choice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: choice.randrange(len(content))])


def _extended(path: Path, choice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + choice.randbytes(choice.choice((1, 8, 1000))))


def _emptied(path: Path, choice: random.Random) -> None:
    path.write_bytes(b"")


def _deleted(path: Path, choice: random.Random) -> None:
    path.unlink()


def _zeroed(path: Path, choice: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _swapped(path: Path, choice: random.Random) -> None:
    others = [p for p in path.parents[1].rglob(f"*{path.suffix}") if p.is_file() and p != path]
    others = [p for p in others if p.read_bytes() != path.read_bytes()]
    content = choice.choice(sorted(others)).read_bytes() if others else path.read_bytes()[::-1]
    path.write_bytes(content)


def _folder(path: Path, choice: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _full_folder(path: Path, choice: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"x")


def _fifo(path: Path, choice: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path, choice: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncated,
    "extended": _extended,
    "emptied": _emptied,
    "deleted": _deleted,
    "zeroed": _zeroed,
    "another file's bytes": _swapped,
    "a folder in its place": _folder,
    "a folder with a file in its place": _full_folder,
    "a fifo in its place": _fifo,
    "a link to an endless device in its place": _endless,
}
"""What happens to a file."""


def _damages(workshop: Workshop) -> Iterator[Case]:
    for name in ("whole", "reported"):
        by_kind: dict[str, list[str]] = {}
        for file in _stored(workshop.undisturbed(name)):
            by_kind.setdefault(kind_of(file), []).append(file)
        choice = random.Random(f"damage {name}")
        for number, (kind, files) in enumerate(by_kind.items()):
            of_report = kind.startswith("report") or kind.endswith("README.md")
            if name == "reported" and not of_report:
                continue
            # Each kind meets half of what can happen, one after the other.
            for damage in list(DAMAGES)[number % 2 :: 2]:
                file = choice.choice(files)
                title = f"{damage}: {kind}, {file}"
                trial = partial(_damage, title, name, file, damage)
                yield Case("files lost, cut or replaced", title, trial)


def _damage(
    title: str, name: str, file: str, damage: str, workshop: Workshop, folder: Path
) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work", runs=True)
    DAMAGES[damage](work / "runs" / base.run / file, random.Random(title))
    check = call(work, "check", base.run)
    unseen = "" if _names(check, base.run, file) else "check does not name it"
    path = work / "runs" / base.run / file
    if path.is_dir():
        refused = call(work, "run", "trial.toml", "--no-plan")
        unseen = unseen or _kept_folder(refused, path)
        shutil.rmtree(path)
    again, more = not_healed(base, work)
    wrong = unsound(check, {4})
    shown = again if more else check
    return [row("files lost, cut or replaced", title, shown, wrong, unseen, *more)]


def _kept_folder(refused: Ended, path: Path) -> str:
    """Return a fault unless a folder in the place of a file was refused and left alone.

    A folder may hold what somebody wants to keep, so a run does not remove it.
    """
    # An observer that cannot write its report is told, and ends no run.
    of_report = path.name.startswith("report.") or path.name == RunLayout.CARD
    if wrong := unsound(refused, {0, 3} if of_report else {3}):
        return f"a folder in its place: {wrong}"
    told = path.name in refused.err and ("folder" in refused.err or "directory" in refused.err)
    return "" if told else "the folder in its place is not told"


# Whole ledgers


def _ledgers() -> Iterator[Case]:
    kind = "a damaged ledger"
    for title, (codes, damage) in LEDGER_DAMAGES.items():
        for name in ("small", "whole"):
            yield Case(kind, f"{title} ({name})", partial(_ledger, title, name, codes, damage))


def _ledger(
    title: str,
    name: str,
    codes: set[int],
    damage: Callable[[list[bytes]], bytes],
    workshop: Workshop,
    folder: Path,
) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work", runs=True)
    path = work / "runs" / base.run / RunLayout.LEDGER
    path.write_bytes(damage(path.read_bytes().splitlines(keepends=True)))
    return [_judge_ledger("a damaged ledger", f"{title} ({name})", base, work, codes)]


def _without(*places: int) -> Callable[[list[bytes]], bytes]:
    def damage(lines: list[bytes]) -> bytes:
        gone = {place % len(lines) for place in places}
        return b"".join(line for k, line in enumerate(lines) if k not in gone)

    return damage


def _with(line: bytes, place: int = -1) -> Callable[[list[bytes]], bytes]:
    def damage(lines: list[bytes]) -> bytes:
        at = place % (len(lines) + 1)
        return b"".join([*lines[:at], line, *lines[at:]])

    return damage


LEDGER_DAMAGES: dict[str, tuple[set[int], Callable[[list[bytes]], bytes]]] = {
    "the last line torn": ({0, 4}, lambda lines: b"".join(lines)[:-40]),
    "a line in the middle torn": (
        {4},
        lambda lines: b"".join([*lines[:9], lines[9][:50], *lines[10:]]),
    ),
    "cut in the middle": ({0, 4}, lambda lines: b"".join(lines)[: len(b"".join(lines)) // 2]),
    "the first line lost": ({4}, _without(0)),
    "the third line lost": ({4}, _without(2)),
    "a line in the middle lost": ({4}, _without(20)),
    "another line lost": ({4}, _without(-6)),
    "three lines lost": ({4}, _without(5, 6, 30)),
    "a line doubled": ({0, 4}, lambda lines: b"".join([*lines[:7], lines[6], *lines[7:]])),
    "all lines doubled": ({0, 4}, lambda lines: b"".join(lines + lines)),
    "reversed": ({4}, lambda lines: b"".join(lines[::-1])),
    "two lines exchanged": (
        {4},
        lambda lines: b"".join([*lines[:5], lines[6], lines[5], *lines[7:]]),
    ),
    "a byte-order mark": ({0, 4}, lambda lines: b"\xef\xbb\xbf" + b"".join(lines)),
    "CRLF": ({0, 4}, lambda lines: b"".join(lines).replace(b"\n", b"\r\n")),
    "NULs at the end": ({0, 4}, _with(bytes(512))),
    "a line of NULs in the middle": ({4}, _with(bytes(512) + b"\n", 10)),
    "bytes that are no text": ({4}, _with(b"\xff\xfe\x80\n", 10)),
    "a line of another program": ({4}, _with(b"hello\n", 10)),
    "a list": ({4}, _with(b"[1, 2]\n", 10)),
    "a deep line": ({4}, _with(b'{"a":' * 20_000 + b"\n", 10)),
    "a long line": ({4}, _with(b"x" * 3_000_000 + b"\n", 10)),
    "a line without fields": ({4}, _with(b'{"schema": 3, "kind": "step", "mark": "0"}\n', 10)),
    "a number of 5000 digits": ({4}, _with(b'{"schema": ' + b"9" * 5000 + b"}\n", 10)),
    "only a torn line": ({2, 4}, lambda lines: lines[0][:30]),
    "empty": ({2, 4}, lambda lines: b""),
}
"""What happens to a ledger: the codes with which `check` may end, and the damage."""


# Verbs beside `run`


def _readers() -> Iterator[Case]:
    for seed in range(4):
        for title, words, files in READERS:
            full = f"{title} ({seed})"
            trial = partial(_reader, full, words, files[seed % len(files)], seed)
            yield Case("changed bytes read by other verbs", full, trial)


WEIGHTS = "checkpoints/full/model.safetensors"
READERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("show reads", ("show", "RUN"), ("results.jsonl",)),
    ("diff reads", ("diff", "RUN", "RUN"), ("results.jsonl",)),
    ("chat reads", ("chat", "RUN"), (WEIGHTS, "system.md", "checkpoints/full/tokenizer.json")),
    ("report reads", ("report", "RUN"), ("results.jsonl", "checkpoints/full/config.json")),
    ("a run reads", ("run", "next.toml", "--no-plan"), (WEIGHTS, "checkpoints/full/config.json")),
    ("a plan reads", ("plan", "next.toml"), (WEIGHTS, "checkpoints/full/config.json")),
)
"""Title, words, files that it reads."""


def _reader(
    title: str, words: Sequence[str], file: str, seed: int, workshop: Workshop, folder: Path
) -> list[Row]:
    base = workshop.undisturbed("small")
    work = base.copy(folder / "work", runs=True)
    recipe = (work / "trial.toml").read_text(encoding="utf-8")
    source = f'student.model = "run:{base.run}/full"'
    recipe = recipe.replace('student.model = "model"', source)
    (work / "next.toml").write_text(recipe.replace('"trial"', '"next"'), encoding="utf-8")
    path = work / "runs" / base.run / file
    shutil.copy(path, folder / "whole")
    flip(path, random.Random(f"reader {title}"))
    spoken = [base.run if word == "RUN" else word for word in words]
    ended = call(work, *spoken)
    # A plan hashes no weights; what it reads of documents has to be true.
    codes = {0, 4} if words[0] == "plan" and file == WEIGHTS else {4}
    silent = "" if ended.code != 4 or path.name in ended.text else "the file is not named"
    return [
        row(
            "changed bytes read by other verbs",
            f"{title}: {file}",
            ended,
            unsound(ended, codes),
            silent,
        )
    ]
