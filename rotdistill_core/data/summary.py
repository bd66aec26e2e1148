"""What there is to say of the texts of a recipe: how many, where they come from, what they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rotdistill_core.data.conversations import OWN_ANSWER, Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.recipe.document import SamplesRef

FEWEST_SCORED = 4
"""Texts, held out or for validation, from which a change may be more than chance."""
IN_WORDS = {Split.HELDOUT: "held out"}
"""Split -> what is said of its texts, where that is not its name."""


def texts_in_words(
    conversations: Sequence[Conversation], samples: SamplesRef, lessons: int = 0
) -> str:
    """Return how many texts there are of each file and split, and where those of no file come from.

    Args:
        conversations: the texts of a recipe, as `read_conversations` returns them.
        samples: its `[samples]`.
        lessons: number of texts that the teacher writes besides.
    """
    own = [each for each in conversations if each.id.endswith(OWN_ANSWER)]
    # A row without an answer is there as the question that the teacher answers, and no more.
    rows = {each.id.removesuffix(OWN_ANSWER): each for each in conversations}.values()
    from_index = [Split.FIT, Split.VALIDATION, *([] if samples.heldout else [Split.HELDOUT])]
    files = [(samples.index, "conversations", from_index)]
    if samples.heldout:
        files.append((samples.heldout, "questions", [Split.HELDOUT]))
    if samples.guard:
        files.append((samples.guard, "texts", [Split.GUARD_VALIDATION, Split.GUARD]))
    parts = []
    for name, what, splits in files:
        counts = Counter(each.split for each in rows if each.split in splits)
        part = f"{counts.total()} {what} of {name}: {_listed(counts, splits)}"
        if name == samples.index and (unanswered := _unanswered(conversations)):
            part += f" ({unanswered} without an answer)"
        parts.append(part)
    if own:
        counts = Counter(each.split for each in own)
        parts.append(
            f"{_listed(counts, from_index)} once more, with the teacher's own answer "
            "(samples.own_answers)"
        )
    if lessons:
        parts.append(f"{lessons} lessons that the teacher writes, to fit on (lessons.count)")
    total = len(conversations) + lessons
    return "; ".join(parts) + (f"; {total} texts in all" if len(parts) > 1 else "")


def _listed(counts: Counter[Split], splits: Iterable[Split]) -> str:
    found = [f"{counts[split]} {IN_WORDS.get(split, split)}" for split in splits if counts[split]]
    return ", ".join(found)


def _unanswered(conversations: Sequence[Conversation]) -> int:
    """Return how many rows to fit on are there as a question that the teacher answers, alone."""
    ids = {each.id for each in conversations}
    return sum(
        each.id.endswith(OWN_ANSWER) and each.id.removesuffix(OWN_ANSWER) not in ids
        for each in conversations
    )


def _scored_for_validation(conversations: Iterable[Conversation]) -> int:
    """Return on how many different texts for validation a step is judged.

    These are the teacher's own answers where it answers any (`evaluation.acceptance.scored_rows`).
    """
    texts = [each for each in conversations if each.split == Split.VALIDATION]
    own = [each for each in texts if each.id.endswith(OWN_ANSWER)]
    return len({(each.system, each.words) for each in own or texts})


def text_notes(
    conversations: Sequence[Conversation],
    samples: SamplesRef,
    teacher: str,
    judged: Sequence[str] = (),
) -> Iterator[str]:
    """Yield what a user should know of the texts before a run, a sentence each.

    Args:
        conversations: the texts of a recipe, as `read_conversations` returns them.
        samples: its `[samples]`.
        teacher: how the recipe names the teacher.
        judged: ids of the steps that are not applied without a gain on validation texts.
    """
    unanswered = _unanswered(conversations)
    if unanswered:
        rows = "1 row has" if unanswered == 1 else f"{unanswered} rows have"
        yield f"texts: {rows} no answer: the teacher writes it (samples.own_answers)."
    validated = _scored_for_validation(conversations)
    if judged and validated < FEWEST_SCORED:
        texts = "text is" if validated == 1 else "texts are"
        steps = ", ".join(f"`{name}`" for name in judged)
        yield (
            f"texts: only {validated} {texts} for validation, too few to tell a gain from chance, "
            f"so {steps} would leave the student as it is: raise samples.validation, or give more "
            "texts."
        )
    scored = sum(each.split == Split.HELDOUT for each in conversations)
    if scored < FEWEST_SCORED:
        texts = "text is" if scored == 1 else "texts are"
        more = "add questions to samples.heldout" if samples.heldout else "raise heldout_share"
        yield f"texts: only {scored} {texts} held out, too few to tell a gain from chance: {more}."
    yield (
        "scores: variants are scored against the teacher's answers, not yours, so the teacher must "
        f"do the job well; `rotdistill chat --model {teacher}` shows how it answers, with "
        "`--system FILE` under a system prompt."
    )
