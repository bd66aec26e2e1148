"""Observers: each is called alone, wrappers work, and what one raises stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rotdistill_core import hookimpl
from rotdistill_core.errors import PluginError
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.observers import Observers

BROKEN = """
from rotdistill_core import hookimpl

@hookimpl
def before_step(stage, log):
    raise RuntimeError(stage)

@hookimpl
def after_step(step_id, variant, stage, folder):
    raise SystemExit(f"{step_id} of {variant}, {stage}, {folder.name}\\nand more")

@hookimpl
def variant_saved(variant):
    raise ValueError
"""


class Listener:
    """Keeps lines, and the variants that were saved."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.saved: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    @hookimpl
    def variant_saved(self, variant: str) -> None:
        self.saved.append(variant)


class Wrapped:
    """Wraps its own hook: measures around it, and changes what it returns."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @hookimpl
    def run_ended(self, result: Any) -> str:
        self.events.append("inside")
        return f"{result} ended"

    @hookimpl(wrapper=True, specname="run_ended")
    def around(self) -> Generator[None, list[str], list[str]]:
        self.events.append("before")
        answers = yield
        self.events.append("after")
        return [answer.upper() for answer in answers]


class WrapperAlone:
    """Has nothing to wrap, and forgets to return."""

    @hookimpl(wrapper=True)
    def run_ended(self) -> Generator[None, list[str], None]:
        assert (yield) == []


class Failing:
    """Fails around a hook."""

    @hookimpl(wrapper=True)
    def run_ended(self) -> Generator[None, list[str], list[str]]:
        yield
        raise RuntimeError("too late\nand more")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that installs observers by name."""

    def make(**observers: object) -> None:
        def load(group: str, name: str) -> tuple[object, None]:
            return observers[name], None

        monkeypatch.setattr("rotdistill_core.execution.observers.load_plugin", load)

    return make


def ended(observers: Observers) -> list[object]:
    return observers.run_ended(None, "run", None)  # type: ignore[arg-type]


def test_a_wrapper_surrounds_the_hook_of_its_observer(install: Callable[..., None]) -> None:
    wrapped = Wrapped()
    install(wrapped=wrapped)
    assert ended(Observers(Listener(), ["wrapped"], Path())) == ["RUN ENDED"]
    assert wrapped.events == ["before", "inside", "after"]


def test_a_wrapper_does_not_surround_another_observer(install: Callable[..., None]) -> None:
    install(wrapped=Wrapped(), alone=WrapperAlone(), second=Wrapped())
    observers = Observers(Listener(), ["wrapped", "alone", "second"], Path())
    assert ended(observers) == ["RUN ENDED", "RUN ENDED"]


def test_a_failing_wrapper_is_one_line_and_the_others_answer(
    install: Callable[..., None],
) -> None:
    listener = Listener()
    install(failing=Failing(), wrapped=Wrapped())
    assert ended(Observers(listener, ["failing", "wrapped"], Path())) == ["RUN ENDED"]
    assert listener.lines == [
        "observer.failing failed in run_ended, the run goes on: RuntimeError: too late"
    ]


def test_a_name_given_twice_is_called_once(install: Callable[..., None]) -> None:
    install(wrapped=Wrapped())
    assert ended(Observers(Listener(), ["wrapped", "wrapped"], Path())) == ["RUN ENDED"]


def test_the_listener_hears_events_too(install: Callable[..., None]) -> None:
    listener = Listener()
    Observers(listener, [], Path()).variant_saved("full", Path())
    assert listener.saved == ["full"]


def test_an_observer_that_asks_for_something_else_is_refused(
    install: Callable[..., None],
) -> None:
    module = ModuleType("asking")

    def variant_saved(weather: str) -> None:
        """Ask for what no hook offers."""

    module.variant_saved = hookimpl(variant_saved)  # type: ignore[attr-defined]
    install(asking=module)
    with pytest.raises(PluginError, match="weather"):
        Observers(Listener(), ["asking"], Path())


def test_a_broken_observer_is_a_few_lines_and_loses_nothing(
    work: Path, executor: Callable[..., Executor], recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "broken_watch.py").write_text(BROKEN)
    info = work / "broken_watch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-watch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rotdistill.observers]\nbroken = broken_watch\n")
    monkeypatch.syspath_prepend(str(work))
    plain = executor("one").go()
    watched = executor("one", 'observers=["broken", "broken"]', observer=recorder).go()
    assert recorder.ran == []
    assert watched.folder == plain.folder
    assert (watched.rows, watched.checkpoints) == (plain.rows, plain.checkpoints)
    failures = [line for line in recorder.lines if line.startswith("observer.broken failed")]
    assert (
        "observer.broken failed in after_step, the run goes on: "
        f"SystemExit: refit of full, fold, {plain.folder.name}" in failures
    )
    hooks = {line.partition(",")[0].rpartition(" ")[2] for line in failures}
    assert hooks == {"before_step", "after_step", "variant_saved"}
    assert all("\n" not in line for line in failures)
