"""A folder with pico models, texts and recipes: all that a test of whole runs needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import Overrides, load_recipe
from rotdistill_core.testing.pico import pico_folder, pico_head, pico_texts
from rotdistill_core.testing.runs import SilentObserver, command_line


@dataclass(frozen=True)
class PicoWorkspace:
    """One folder: `texts/`, models, recipes, and `runs/` once something has run."""

    folder: Path

    @property
    def runs(self) -> Path:
        """The folder of runs."""
        return self.folder / "runs"

    def texts(self, blurbs: int = 20, questions: int = 3) -> Mapping[str, Path]:
        """Write texts for pico tokenizers into `texts/`, anew where they are there, and return the
        files."""
        return pico_texts(self.folder / "texts", blurbs, questions)

    def model(self, name: str = "model", model_type: str = "llama", **config: Any) -> Path:
        """Write a pico model and return its folder. `seed` and config keys make another one."""
        return pico_folder(self.folder / name, model_type, **config)

    def recipe(
        self,
        steps: str,
        *,
        name: str = "trial",
        teacher: str | Path = "model",
        student: str | Path = "model",
        answer_tokens: int = 4,
        observers: Sequence[str] = (),
        tables: str = "",
    ) -> Path:
        """Write a recipe and return its path.

        Args:
            steps: TOML of the steps and, if wanted, of the variants: `[[step]]` tables with
                `[variants]` at the end, or one `step = [...]` list.
            name: name of the recipe and of its file.
            teacher, student: folders of models, relative to the workspace.
            answer_tokens: tokens that the teacher writes to each held-out question.
            observers: plugins that watch the run. `report` takes longer than the steps of a pico
                model together, so only tests that read the report name it.
            tables: further keys and tables, before the steps.
        """
        head = pico_head(name, teacher, student, answer_tokens)
        path = self.folder / f"{name}.toml"
        watching = f"observers = {json.dumps(list(observers))}"
        path.write_text("\n".join([head, watching, tables, steps]), encoding="utf-8")
        return path

    def run(
        self, recipe: Path, sets: Overrides = (), *, observer: Any = None, fresh: bool = False
    ) -> RunResult:
        """Carry out a recipe of this workspace, in its folder.

        Raises:
            RotdistillError: as the run itself does.
        """
        loaded = load_recipe(recipe, sets)
        watching = observer or SilentObserver()
        with chdir(self.folder):
            return Executor(loaded, self.runs, watching, lambda *_: None, fresh).go()

    def command(self, *words: str) -> tuple[int, str, str]:
        """Call the command line in this folder; return exit code, stdout and stderr."""
        with chdir(self.folder):
            return command_line(*words)
