"""What every part of a run needs: fixed before the first step, the same for all variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.lessons import NO_LESSON_TEXTS, LessonTexts
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.planning.chats import Chats
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput


@dataclass(frozen=True)
class RunContext:
    """One run of a recipe: its models, texts and folder, and where it reports to."""

    loaded: ResolvedRecipe
    pair: Pair
    conversations: tuple[Conversation, ...]
    style: str
    """The system prompt."""
    chats: Chats
    """How its conversations are written."""
    store: ArtifactStore
    ledger: Ledger
    log: Callable[[str], None]
    progress: Progress
    lesson_texts: LessonTexts = NO_LESSON_TEXTS
    """The files that the recipe names for its lessons."""

    @property
    def recipe(self) -> Recipe:
        """The top level of the recipe."""
        return self.loaded.recipe

    @property
    def tokenizer_folder(self) -> Path:
        """The folder whose tokenizer files belong to the student's texts and checkpoints."""
        role = self.pair.teacher if self.chats.replaced else self.pair.student
        return role.folder

    def output(self, key: str, step: str = "", before: str = "") -> StepOutput:
        """Return where the files of a key are written; see `StepOutput`."""
        return StepOutput(self.store, self.ledger, key, step, before)
