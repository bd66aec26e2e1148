"""Observers of a run: each gets every event, and none can stop the run or another observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pluggy

from rotdistill_core.errors import PluginError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.plugin.registry import OBSERVERS, load_plugin, plugin_manager
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.output import StepOutput

Log = Callable[[str], None]


class Listener(Protocol):
    """What a run reports to. It may also implement any observer hook."""

    def log(self, text: str) -> None:
        """Take one line of text."""


class RunObserver(Listener, Protocol):
    """A listener that follows the progress inside a step too."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Take how far the current step is."""


class QuietObserver:
    """An observer that shows nothing."""

    def log(self, text: str) -> None:
        """Drop a line."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Drop the progress of a step."""


class Observers:
    """The observers of one run.

    Each observer is registered in a plugin manager of its own. A hook called there reaches that
    observer alone, so an exception ends one observer's call and no other. Within its manager an
    observer is an ordinary pluggy plugin: wrappers (`@hookimpl(wrapper=True)`) work.

    Args:
        listener: what the run reports to; it is the first observer.
        names: observers that the recipe names. A repeated name counts once.
        folder: the run's folder, which hooks receive.

    Raises:
        PluginError: an observer is missing, or does not fit the hook specifications.
    """

    def __init__(self, listener: Listener, names: Sequence[str], folder: Path) -> None:
        self.log: Log = listener.log
        self.folder = folder
        self._managers = {type(listener).__name__: _manager_of(listener)}
        for name in dict.fromkeys(names):
            self._managers[f"observer.{name}"] = _manager_of(load_plugin(OBSERVERS, name)[0])

    @contextmanager
    def step(self, recipe_step: RecipeStep, variant: str) -> Iterator[None]:
        """Report that a step begins, and that it fails if it raises."""
        step = {"step_id": recipe_step.id, "stage": recipe_step.stage, "variant": variant}
        self._notify("before_step", **step, folder=self.folder)
        try:
            yield
        except Exception as error:
            self._notify("step_failed", **step, folder=self.folder, error=error)
            raise

    def after_step(
        self, recipe_step: RecipeStep, variant: str, seconds: float, reused: bool
    ) -> None:
        """Report that the result of a step is committed."""
        self._notify(
            "after_step",
            step_id=recipe_step.id,
            stage=recipe_step.stage,
            variant=variant,
            seconds=seconds,
            reused=reused,
            folder=self.folder,
        )

    def variant_saved(self, variant: str, folder: Path) -> None:
        """Report that the checkpoint of a variant is complete in `folder`."""
        self._notify("variant_saved", variant=variant, folder=folder)

    def run_ended(self, recipe: ResolvedRecipe, result: RunResult, out: StepOutput) -> list[object]:
        """Report that all variants are made and scored; return what observers want shown."""
        return self._notify("run_ended", recipe=recipe, result=result, out=out)

    def _notify(self, hook: str, **facts: object) -> list[object]:
        """Call a hook of every observer. Log in one line what an observer raises."""
        answers: list[object] = []
        for name, manager in self._managers.items():
            try:
                answers += getattr(manager.hook, hook)(**facts, log=self.log) or ()
            except (Exception, SystemExit) as error:
                line = f"{name} failed in {hook}, the run goes on: {type(error).__name__}: {error}"
                self.log(line.partition("\n")[0])
        return answers


def _manager_of(observer: object) -> pluggy.PluginManager:
    """Return a plugin manager that knows one observer."""
    manager = plugin_manager()
    try:
        manager.register(observer)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"observer {observer!r}: {error}") from error
    return manager
