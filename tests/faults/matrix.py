"""All cases, chosen and carried out by workers; the table of what came out."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.hostile import hostile_cases
from tests.faults.process_faults import events_of, process_cases
from tests.faults.rows import Case, Row
from tests.faults.stored_faults import stored_cases
from tests.faults.workshop import RECIPES, Workshop

CASE_SECONDS = 600.0
"""A case that takes longer is wrong; a call in it ends long before."""


def all_cases(workshop: Workshop) -> list[Case]:
    """Return every case, in an order that is the same each time."""
    events = {name: events_of(workshop, name) for name in ("whole", "reported")}
    for name in RECIPES:
        workshop.undisturbed(name)
    return [*process_cases(events), *stored_cases(workshop), *hostile_cases()]


def sample(cases: Sequence[Case], count: int) -> list[Case]:
    """Return so many cases, from each class in proportion and at least one."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.kind, []).append(case)
    chosen: list[Case] = []
    for kind, group in groups.items():
        share = max(1, round(count * len(group) / len(cases)))
        chosen += random.Random(kind).sample(group, min(share, len(group)))
    return chosen


@dataclass(frozen=True)
class _Worker:
    """A child that carries out one case."""

    case: Case
    folder: Path
    answer: Path
    handle: int
    pid: int
    started: float


def carry_out(
    workshop: Workshop, cases: Iterable[Case], workers: int, told: Callable[[Row], None]
) -> list[Row]:
    """Carry out cases, several at once; each in a child of its own."""
    rows: list[Row] = []
    waiting = list(enumerate(cases))[::-1]
    busy: dict[int, _Worker] = {}
    while waiting or busy:
        while waiting and len(busy) < workers:
            worker = _begin(workshop, *waiting.pop())
            busy[worker.handle] = worker
        ready = select.select(list(busy), [], [], 5.0)[0]
        late = [each for each in busy.values() if time.monotonic() - each.started > CASE_SECONDS]
        for worker in late:
            os.kill(worker.pid, signal.SIGKILL)
        for handle in {*ready, *(worker.handle for worker in late)}:
            for each in _end(busy.pop(handle)):
                rows.append(each)
                told(each)
    return rows


def _begin(workshop: Workshop, number: int, case: Case) -> _Worker:
    folder = workshop.folder / f"case-{number:05d}"
    answer = workshop.folder / f"case-{number:05d}.json"
    pid = os.fork()
    if pid == 0:
        try:
            folder.mkdir()
            rows = case.trial(workshop, folder)
            answer.write_text(json.dumps([each.as_dict() for each in rows]), encoding="utf-8")
        except BaseException:
            words = traceback.format_exc()[-1500:]
            failed = Row(case.kind, case.name, "the harness failed", None, words)
            answer.write_text(json.dumps([failed.as_dict()]), encoding="utf-8")
        finally:
            os._exit(0)
    return _Worker(case, folder, answer, os.pidfd_open(pid), pid, time.monotonic())


def _end(worker: _Worker) -> list[Row]:
    os.waitpid(worker.pid, 0)
    os.close(worker.handle)
    rows = [Row(worker.case.kind, worker.case.name, "the case did not end")]
    if worker.answer.exists():
        found = json.loads(worker.answer.read_text(encoding="utf-8"))
        rows = [Row(**values) for values in found]
        worker.answer.unlink()
    shutil.rmtree(worker.folder, ignore_errors=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the outcome as a table in Markdown."""
    kinds = list(dict.fromkeys(each.kind for each in rows))
    lines = ["| class | tried | right | wrong |", "|---|---|---|---|"]
    for kind in kinds:
        mine = [each for each in rows if each.kind == kind]
        lines.append(_line(kind, mine))
    lines.append(_line("**all**", rows))
    return "\n".join(lines)


def _line(title: str, rows: Sequence[Row]) -> str:
    wrong = sum(bool(each.wrong) for each in rows)
    return f"| {title} | {len(rows)} | {len(rows) - wrong} | {wrong} |"


def show(row: Row) -> None:
    """Print a wrong row on stderr."""
    if row.wrong:
        print(f"WRONG {row.kind}: {row.name}: {row.wrong}\n{row.words}", file=sys.stderr)
