"""Faults of the process and of the disk: kills, signals, power, errors of the system, limits."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rotdistill_core.store.layout import ledger_paths
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from tests.faults.child import Ended, Signal, begin, call
from tests.faults.disk import Disk, Event, failing, killer, recorded, recorder
from tests.faults.power import LOSSES, lose, power_failure
from tests.faults.rows import Case, Row, row, unsound
from tests.faults.workshop import Undisturbed, Workshop, state_of

RUN = ("run", "trial.toml", "--no-plan")
REPORTS = ("report.html", "report.md", "report.json")
"""Files of a report say what a run reused, so a second run writes other ones."""
ERRNOS = {
    "open": (errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "sync folder": (errno.EIO,),
    "rename": (errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC),
    "mkdir": (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    "read": (errno.EIO, errno.EACCES, errno.EMFILE),
}
"""Operation -> errors that it can meet."""


def process_cases(events: dict[str, list[Event]]) -> Iterator[Case]:
    """Yield all cases of this module.

    Args:
        events: name of a workspace -> the events of its undisturbed run.
    """
    yield from _random_kills()
    yield from _signals()
    yield from _protocol_kills(events)
    yield from _power_losses(events)
    yield from _system_errors(events)
    yield from _limits()
    yield from _pairs()


def events_of(workshop: Workshop, name: str) -> list[Event]:
    """Return the events of an undisturbed run of a workspace."""
    base = workshop.undisturbed(name)
    folder = base.copy(workshop.folder / f"events-{name}")
    log = workshop.folder / f"events-{name}.jsonl"
    plant = Disk(folder / "runs", recorder(log)).plant
    ended = call(folder, *RUN, fault=plant)
    assert ended.code == 0, ended.text
    return recorded(log)


# What must follow


def not_healed(base: Undisturbed, folder: Path) -> tuple[Ended, list[str]]:
    """Run again and check; return the call and what is not as after an undisturbed run."""
    again = call(folder, *RUN)
    faults = [unsound(again, {0})]
    if again.code == 0:
        faults += differences(base, folder)
        check = call(folder, "check", base.run)
        wrong = unsound(check, {0})
        faults.append(f"then check: {wrong}: {check.text[:400]}" if wrong else "")
    return again, [f"rerun: {fault}" for fault in faults if fault]


def differences(base: Undisturbed, folder: Path) -> list[str]:
    """Return what the runs in a folder have otherwise than the undisturbed run."""
    found = base.state.differences(state_of(folder / "runs"))
    if base.name == "reported":
        found = [line for line in found if not (_of_report(line) and "missing" not in line)]
    return found[:4]


def _of_report(line: str) -> bool:
    return any(name in line for name in REPORTS)


def twice_made(before: set[str], folder: Path) -> str:
    """Return a fault if a step that was committed before the rerun was committed again."""
    keys = [record.key for path in ledger_paths(folder / "runs") for record in _steps(path)]
    twice = {key for key in before if keys.count(key) > 1}
    return f"{len(twice)} committed steps were made again" if twice else ""


def _steps(ledger: Path) -> Sequence[object]:
    return Ledger(ledger.parent).steps


def committed(folder: Path) -> set[str]:
    """Return the keys of all steps that are committed."""
    return {record.key for path in ledger_paths(folder / "runs") for record in _steps(path)}


def lost_commits(folder: Path) -> str:
    """Return a fault if a ledger commits a file that is not as it says."""
    store = ArtifactStore(folder / "runs")
    for path in ledger_paths(folder / "runs"):
        newest = {record.path: record.file for record in Ledger(path.parent).files}
        for file in newest.values():
            if not store.verify(file):
                return f"the ledger commits {file.path}, which is lost or damaged"
    return ""


# kill -9 and signals at random moments


def _random_kills() -> Iterator[Case]:
    for name, count in (("whole", 110), ("small", 60), ("reported", 40)):
        for seed in range(count):
            yield Case("kill -9 at random moments", f"{name} {seed}", partial(_kill, name, seed))


def _kill(name: str, seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed(name)
    base.copy(folder / "work")
    work = folder / "work"
    choice = random.Random(f"{name} {seed}")
    moments, done = [], set[str]()
    for _ in range(choice.choice((1, 1, 2, 3))):
        moment = choice.random() * base.seconds
        moments.append(moment)
        killed = call(work, *RUN, signals=[Signal(signal.SIGKILL, moment)])
        if killed.code not in (0, -signal.SIGKILL):
            return [
                row("kill -9 at random moments", f"{name} {seed}", killed, unsound(killed, {0}))
            ]
        done = committed(work)
    again, faults = not_healed(base, work)
    where = ", ".join(f"{moment:.3f} s" for moment in moments)
    faults.append(twice_made(done, work))
    return [row("kill -9 at random moments", f"{name} {seed} at {where}", again, *faults)]


def _signals() -> Iterator[Case]:
    for name, count in (("whole", 36), ("reported", 12)):
        for seed in range(count):
            number = (signal.SIGINT, signal.SIGTERM)[seed % 2]
            title = f"{name} {number.name} {seed}"
            yield Case("SIGINT, SIGTERM", title, partial(_signal, name, number, seed))


def _signal(
    name: str, number: signal.Signals, seed: int, workshop: Workshop, folder: Path
) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work")
    moment = random.Random(f"signal {name} {seed}").uniform(0.02, base.seconds)
    twice = [Signal(number, moment)] * (1 + (seed % 5 == 0))
    ended = call(work, *RUN, signals=twice)
    faults = [unsound(ended, {0, 128 + number})]
    if ended.code and ended.err.splitlines()[-1:] != ["rotdistill run trial.toml --no-plan"]:
        faults.append("the last line is not the command that goes on")
    again, more = not_healed(base, work)
    title = f"{name} {number.name} {seed} at {moment:.3f} s"
    return [row("SIGINT, SIGTERM", title, ended if faults[0] else again, *faults, *more)]


# kill -9 at each step of the protocol


def _protocol_kills(events: dict[str, list[Event]]) -> Iterator[Case]:
    for name in ("whole", "reported"):
        for at in _one_of_each(events[name], random.Random(f"protocol {name}")):
            if name == "reported" and at.stage not in (*REPORTS, "checkpoints/full"):
                continue
            title = f"{name}: {at.phase} {at.op}, {at.name} ({at.nth})"
            yield Case("kill -9 at steps of the protocol", title, partial(_kill_at, name, at))


def _one_of_each(events: Sequence[Event], choice: random.Random) -> list[Event]:
    """Return one event of each stage, operation and phase."""
    groups: dict[tuple[str, str, str], list[Event]] = {}
    for event in events:
        if event.op != "read":
            groups.setdefault((event.stage, event.op, event.phase), []).append(event)
    return [choice.choice(group) for group in groups.values()]


def _kill_at(name: str, at: Event, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work")
    title = f"{name}: {at.phase} {at.op}, {at.name} ({at.nth})"
    killed = call(work, *RUN, fault=Disk(work / "runs", killer(at)).plant)
    missed = "" if killed.code == -signal.SIGKILL else f"the moment never came: {killed.code}"
    done = committed(work)
    again, faults = not_healed(base, work)
    kind = "kill -9 at steps of the protocol"
    return [row(kind, title, again, missed, *faults, twice_made(done, work))]


# Power loss


def _power_losses(events: dict[str, list[Event]]) -> Iterator[Case]:
    choice = random.Random("power")
    changing = [
        event
        for event in events["whole"]
        if event.op not in ("read", "unlink") and event.name != "."
    ]
    for number in range(140):
        at = choice.choice(changing)
        loss = LOSSES[number % len(LOSSES)]
        title = f"{loss} lost, {at.phase} {at.op}, {at.name} ({at.nth})"
        yield Case("power loss", title, partial(_power, title, at, loss, number))


def _power(
    title: str, at: Event, loss: str, seed: int, workshop: Workshop, folder: Path
) -> list[Row]:
    base = workshop.undisturbed("whole")
    work = base.copy(folder / "work")
    root, shadow = work / "runs", folder / "shadow"
    root.mkdir()
    shadow.mkdir()

    def plant() -> None:
        Disk(root, power_failure(root, shadow, at)).plant()

    cut = call(work, *RUN, fault=plant)
    if cut.code != -signal.SIGKILL:
        return [row("power loss", title, cut, f"the moment never came: {cut.code}")]
    lose(root, shadow, loss, seed)
    lost = lost_commits(work)
    again, faults = not_healed(base, work)
    return [row("power loss", title, again, lost, *faults)]


# Errors of the system


def _system_errors(events: dict[str, list[Event]]) -> Iterator[Case]:
    choice = random.Random("errno")
    for name in ("whole", "reported"):
        groups: dict[tuple[str, str], list[Event]] = {}
        for event in events[name]:
            wanted = "middle" if event.op == "write" else "before"
            if event.op in ERRNOS and event.phase == wanted:
                groups.setdefault((event.op, event.stage), []).append(event)
        for (op, _), group in groups.items():
            few = choice.sample(ERRNOS[op], min(2, len(ERRNOS[op])))
            for number in few if name == "whole" else few[:1]:
                at = choice.choice(group)
                lasting = choice.random() < 0.3 and op != "read"
                title = (
                    f"{name}: {errno.errorcode[number]}{' for good' * lasting} "
                    f"at {op}, {at.name} ({at.nth})"
                )
                trial = partial(_system_error, title, name, at, number, lasting)
                yield Case("errors of the system", title, trial)


def _system_error(
    title: str,
    name: str,
    at: Event,
    number: int,
    lasting: bool,
    workshop: Workshop,
    folder: Path,
) -> list[Row]:
    base = workshop.undisturbed(name)
    work = base.copy(folder / "work")
    ended = call(work, *RUN, fault=Disk(work / "runs", failing(at, number, lasting)).plant)
    faults = [unsound(ended, {0, 3})]
    told = os.strerror(number) in ended.err
    if ended.code == 0:
        # An observer that fails is told, and ends no run.
        faults += [] if told else differences(base, work)
    elif not told:
        faults.append("the message does not say what the system said")
    if not lasting:
        left = list((work / "runs").rglob("*.tmp"))
        faults.append(f"{left[0].name} is left" if left else "")
    again, more = not_healed(base, work)
    return [row("errors of the system", title, ended if any(faults) else again, *faults, *more)]


# Limits of the machine


def _limits() -> Iterator[Case]:
    for size in (500, 2_000, 5_000, 9_000, 20_000, 40_000):
        title = f"files of at most {size} bytes"
        yield Case("limits of the machine", title, partial(_limit, title, _file_limit(size)))
    for count in (8, 12, 16, 20, 30):
        title = f"at most {count} open files"
        yield Case("limits of the machine", title, partial(_limit, title, _handle_limit(count)))
    for megabytes in (1, 4, 16, 48, 128, 512):
        title = f"{megabytes} MB of memory more"
        yield Case("limits of the machine", title, partial(_limit, title, _memory_limit(megabytes)))


def _file_limit(size: int) -> Callable[[], None]:
    def fault() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return fault


def _handle_limit(count: int) -> Callable[[], None]:
    def fault() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

    return fault


def _memory_limit(megabytes: int) -> Callable[[], None]:
    def fault() -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        most = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return fault


def _limit(title: str, fault: Callable[[], None], workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("whole")
    work = base.copy(folder / "work")
    ended = call(work, *RUN, fault=fault)
    again, more = not_healed(base, work)
    wrong = unsound(ended, {0, 3})
    return [row("limits of the machine", title, ended if wrong else again, wrong, *more)]


# Two calls at once


def _pairs() -> Iterator[Case]:
    for seed in range(20):
        title = f"two runs, the second {seed * 20} ms later"
        yield Case("two runs on one folder", title, partial(_two_runs, title, seed))
    for seed in range(16):
        title = f"a run and rm, {seed * 30} ms later"
        yield Case("run beside rm, rm killed", title, partial(_run_and_rm, title, seed))
    for seed in range(12):
        title = f"rm, killed after {2 + 3 * seed} ms"
        yield Case("run beside rm, rm killed", title, partial(_rm_killed, title, seed))
    for seed in range(8):
        title = f"a run and check, {seed * 40} ms later"
        yield Case("two runs on one folder", title, partial(_run_and_check, title, seed))


def _after(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


def _two_runs(title: str, seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("small")
    work = base.copy(folder / "work")
    words = (*RUN, "--fresh") if seed % 4 == 3 else RUN
    first = begin(work, *RUN)
    _after(seed * 0.02)
    second = begin(work, *words)
    ends = [first.end(), second.end()]
    faults = [unsound(ended, {0, 3}) for ended in ends]
    if all(ended.code for ended in ends):
        faults.append("neither went through")
    again, more = not_healed(base, work)
    shown = next((ended for ended in ends if unsound(ended, {0, 3})), again)
    return [row("two runs on one folder", title, shown, *faults, *more)]


def _run_and_check(title: str, seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("small")
    work = base.copy(folder / "work")
    running = begin(work, *RUN)
    _after(0.1 + seed * 0.04)
    check = call(work, "check", base.run)
    ended = running.end()
    _, more = not_healed(base, work)
    wrong = [unsound(check, {0, 2, 3, 4}), unsound(ended, {0})]
    return [row("two runs on one folder", title, check if wrong[0] else ended, *wrong, *more)]


def _run_and_rm(title: str, seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("whole" if seed % 2 else "small")
    work = base.copy(folder / "work", runs=seed % 4 == 0)
    running = begin(work, *RUN)
    _after(0.05 + seed * 0.03)
    removed = call(work, "rm", base.run, "--yes")
    ended = running.end()
    _, more = not_healed(base, work)
    wrong = [unsound(removed, {0, 2, 3}), unsound(ended, {0})]
    kind = "run beside rm, rm killed"
    return [row(kind, title, removed if wrong[0] else ended, *wrong, *more)]


def _rm_killed(title: str, seed: int, workshop: Workshop, folder: Path) -> list[Row]:
    base = workshop.undisturbed("small")
    work = base.copy(folder / "work", runs=True)
    call(work, "rm", base.run, "--yes", signals=[Signal(signal.SIGKILL, 0.002 + 0.003 * seed)])
    listed = call(work, "runs")
    wrong = [unsound(listed, {0})]
    if seed % 2:
        removed = call(work, "rm", base.run, "--yes")
        wrong.append(unsound(removed, {0, 2}))
        left = list((work / "runs").iterdir())
        wrong.append(f"{left[0].name} is left" if left else "")
    again, more = not_healed(base, work)
    faults = [*wrong, *more]
    return [row("run beside rm, rm killed", title, listed if wrong[0] else again, *faults)]
