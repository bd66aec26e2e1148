"""How a run writes its conversations: the templates of its models, and the one date that it has.

`plan` and `run` ask the same functions, so that they speak of the same prompts.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rotdistill_core.checkpoint.models import Model, end_tokens
from rotdistill_core.data.chat import TOKENIZER_CONFIG, ChatFormat
from rotdistill_core.data.conversations import Conversation, first_chat, prompt_is_too_long
from rotdistill_core.data.splits import Split
from rotdistill_core.data.vocabularies import TOKENIZER_FILE, have_vocabularies, one_vocabulary
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes
from rotdistill_core.store.records import StartRecord

DATE = "date"
"""Name of the date among the inputs of a run. Runs whose templates write none have none."""
ANSWERED = 1_000
"""Conversations of one kind that a plan writes with their answers, at most."""
PROMPT_INPUTS = ("teacher", "student", "texts")
"""The inputs that decide prompts, apart from the date."""
SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3", "su", "proportional")
"""Types of rotary tables with which a model may go beyond the length that it was trained on."""
Prompts = dict[str, dict[str, str]]
"""Source of a format -> text id -> what it writes up to the answer."""


class Chats(NamedTuple):
    """How conversations are written for the teacher and for the student.

    Where both share a vocabulary, all texts are written as the teacher's template does it.
    """

    teacher: ChatFormat
    student: ChatFormat
    own: ChatFormat | None
    """The student's own format, before the teacher's took its place; None if it has none."""
    opening: str | None = None
    """What the template writes before a question without a system prompt, where the student reads
    none (`samples.bake_prompt`); None where it reads the teacher's."""

    @property
    def date(self) -> str:
        """The day that the texts name; empty if they name none."""
        return self.teacher.date or self.student.date

    @property
    def replaced(self) -> bool:
        """Whether the student's own format is another one than its texts are written in."""
        return self.own is None or not self.own.same_texts(self.student)

    def notes(self) -> list[str]:
        """Return what the user should know, a sentence each."""
        notes = []
        if self.date:
            writer = self.teacher if self.teacher.date else self.student
            notes.append(
                f"{writer.source}: its chat template writes the date; this run has {self.date}, "
                "and keeps it. `samples.date` sets another, --fresh takes today's."
            )
        if self.replaced:
            notes.append(
                "the student's chat template is not the teacher's: all texts are written as "
                f"{self.teacher.source} writes them, and checkpoints are saved with its tokenizer "
                "files, so that they are asked in the format that they were fitted on."
            )
        if self.opening is not None:
            notes.append(
                "samples.bake_prompt: the teacher reads the system prompt, the student does not. "
                f"Before a question the student reads {self.opening!r}, as the chat template "
                "begins without one."
            )
        formats = {chat.source: chat for chat in (self.student, self.teacher)}
        return [*notes, *(note for chat in formats.values() for note in _notes_on(chat))]


def _notes_on(chat: ChatFormat) -> Iterator[str]:
    """Yield what the user should know of how one model's conversations are written."""
    if chat.is_ours:
        yield (
            f"{chat.source}: has no chat template; conversations are written plainly, as `User: "
            "...` and `Assistant: ...` on lines of their own."
        )
    if not chat.system_turn:
        yield (
            f"{chat.source}: its chat template has no system role; the system prompt goes before "
            "each question, in the user's turn."
        )
    if chat.switches and not chat.thinking:
        yield (
            f"{chat.source}: its chat template lets models think before they answer; texts are "
            "written without that. `samples.thinking = true` lets them think."
        )
    elif not chat.thinking and chat.opens_thoughts:
        yield (
            f"{chat.source}: its chat template begins answers inside a thinking block; the block "
            "ends at once, empty. `samples.thinking = true` lets models think."
        )


def chats_of(
    teacher: ChatFormat,
    student: ChatFormat | None,
    one_tokenizer: bool,
    style: str,
    conversations: Sequence[Conversation],
    bake: bool = False,
) -> Chats:
    """Return how a run writes its conversations.

    Args:
        teacher: the teacher's format.
        student: the student's; None if it has no template.
        one_tokenizer: whether both give the same ids to the same tokens.
        style: the system prompt.
        conversations: the texts of the run.
        bake: whether the student reads no system prompt (`samples.bake_prompt`).

    Raises:
        SetupError: a template cannot write them; or the student reads no system prompt, and the
            vocabularies differ.
        RecipeError: there is no system prompt to leave out.
    """
    first = first_chat(style, conversations)
    theirs = teacher.for_style(*first)
    if one_tokenizer or student is None:
        own = student.for_style(*first) if student and student == teacher else student
        opening = _opening(theirs, style, conversations) if bake else None
        return Chats(theirs, theirs, own, opening)
    if bake:
        raise SetupError(
            f"{teacher.source} and {student.source} have different tokenizers: samples.bake_prompt "
            "pairs the rows of both models token by token, which needs one vocabulary. Take models "
            "of one family, or leave bake_prompt out."
        )
    own = student.for_style(*first)
    return Chats(theirs, own, own)


def _opening(chat: ChatFormat, style: str, conversations: Sequence[Conversation]) -> str:
    """Return what a template writes before a question without a system prompt.

    All conversations are written so once.

    Raises:
        SetupError: the template cannot write them.
        RecipeError: there is no system prompt.
    """
    asked = [each for each in conversations if not each.is_plain]
    if not any(each.system_under(style) for each in asked):
        raise RecipeError(
            "samples.bake_prompt: there is no system prompt to bake in. Name a file with one as "
            "samples.style, or leave bake_prompt out."
        )
    bare = [each.without_system_prompt() for each in asked]
    return chat.prompts([chat.chat_of(each, style) for each in bare])[0].partition(
        bare[0].turns[0].content
    )[0]


def date_of_run(
    settings: SamplesRef,
    inputs: Mapping[str, str] | None,
    starts: Iterable[StartRecord],
    fresh: bool,
) -> str:
    """Return the day that the templates of a run write, such as 2025-07-01.

    It is `samples.date`, else that of the newest run of these models and texts, else today. So
    what was made from the prompts of one day is found again on the next.

    Args:
        settings: the recipe's [samples].
        inputs: the inputs of the run without the date; None if they are not known.
        starts: what runs have started from, the newest first.
        fresh: take today instead of the day of an earlier run.
    """
    if settings.date:
        return settings.date.isoformat()
    for start in starts if inputs and not fresh else ():
        same = all(start.inputs.get(name) == (inputs or {})[name] for name in PROMPT_INPUTS)
        if same and DATE in start.inputs:
            return start.inputs[DATE]
    return datetime.date.today().isoformat()


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens of a text a model was made for; None if its config says no number.

    With scaled rotary tables there is no such number: they are made to go further.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):  # opening the model refuses it
        return None
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(kind.get("rope_type", kind.get("type")) in SCALED for kind in kinds):
        return None
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def ending_notes(chats: Chats, teacher: Model) -> list[str]:
    """Return what the user should know of how the teacher's answers end."""
    if chats.teacher.tokens.get("eos_token") or end_tokens(teacher.folder, teacher.config):
        return []
    return [
        f"{teacher.ref.model}: names no token that ends an answer (eos_token in "
        f"{TOKENIZER_CONFIG}, eos_token_id in generation_config.json); each answer goes on to its "
        "greatest length."
    ]


def cut_notes(lengths: Iterable[int], most: int, config: Mapping[str, Any]) -> list[str]:
    """Return how many texts to fit on are cut because the model was made for no longer ones.

    Args:
        lengths: tokens of each text to fit on.
        most: `samples.max_tokens`, which cuts without a word.
        config: the model's config.
    """
    limit = position_limit(config)
    cut = sum(length > limit for length in lengths) if limit and limit < most else 0
    if not cut:
        return []
    return [
        f"{cut} texts are cut after {limit} tokens, the most that the model was made for "
        "(max_position_embeddings)."
    ]


def require_room(
    prompts: Mapping[str, int], more: int, config: Mapping[str, Any], source: str
) -> None:
    """Refuse held-out questions whose answers go beyond the length that a model was made for.

    Args:
        prompts: text id -> tokens of its prompt.
        more: most tokens of an answer.
        config: the model's config.
        source: the model, for the message.

    Raises:
        RecipeError: naming the longest prompt.
    """
    limit = position_limit(config)
    if limit is None or not prompts:
        return
    name = max(prompts, key=prompts.__getitem__)
    if prompts[name] + more > limit:
        raise RecipeError(
            f"text {name}: its prompt has {prompts[name]} tokens; with an answer of up to {more} "
            f"it passes {limit}, the most that {source} was made for (max_position_embeddings). "
            "Shorten the system prompt or the question, or lower samples.answer_tokens."
        )


def require_room_to_fit(
    asked: Sequence[Conversation], lengths: Mapping[str, int], most: int
) -> None:
    """Refuse a text to fit on that is cut before its answer begins.

    Args:
        asked: the conversations.
        lengths: id -> tokens of its prompt, of all that have so many at least.
        most: the tokens after which every text but held-out ones is cut: `samples.max_tokens`, or
            fewer if a model was made for no more.

    Raises:
        SetupError: naming the first one.
    """
    for each in asked:
        length = lengths.get(each.id, 0)
        if each.split != Split.HELDOUT and length >= most:
            raise prompt_is_too_long(each.id, length, most)


def planned_chats(
    folders: tuple[Path, Path],
    style: str,
    conversations: Sequence[Conversation],
    date: str,
    thinking: bool = False,
    bake: bool = False,
) -> tuple[Chats, Prompts] | None:
    """Return how a run will write its conversations, from files alone, and all prompts.

    Args:
        folders: the folders of teacher and student.
        style: the system prompt.
        conversations: the texts of the run.
        date: the day that templates write, if they do.
        thinking: let models think, where their templates know how to.
        bake: whether the student reads no system prompt.

    Returns:
        None where transformers has to tell: a tokenizer has no tokenizer.json, or a template that
        fails names special tokens that are in no file.

    Raises:
        SetupError: the template of a model cannot be read, or cannot write the texts; or a system
            prompt cannot be baked in.
        RecipeError: there is no system prompt to bake in.
    """
    if not have_vocabularies(*folders):
        return None
    one_tokenizer = one_vocabulary(*folders)
    teacher = dated(ChatFormat.read(folders[0], thinking=thinking), date)
    try:
        student = dated(ChatFormat.read(folders[1], thinking=thinking), date)
    except SetupError:
        if not one_tokenizer:
            raise
        student = None
    try:
        chats = chats_of(teacher, student, one_tokenizer, style, conversations, bake)
        prompts = {
            chat.source: _write_all(chat, style, conversations)
            for chat in ((chats.teacher,) if one_tokenizer else (chats.teacher, chats.student))
        }
    except SetupError:
        if all(chat.is_whole for chat in (teacher, student) if chat):
            raise
        return None
    return chats, prompts


def _write_all(
    chat: ChatFormat, style: str, conversations: Sequence[Conversation]
) -> dict[str, str]:
    """Write all conversations once, and some with their answers, too; return the prompts by id.

    Of many that have the same turns some tell whether the template takes an answer after them.
    """
    asked = [each for each in conversations if not each.is_plain]
    prompts = chat.prompts([chat.chat_of(each, style) for each in asked])
    alike: dict[tuple[int, bool], list[Conversation]] = {}
    for each in asked:
        if each.answer:
            turns = len(each.earlier), bool(each.system_under(style))
            alike.setdefault(turns, []).append(each)
    some = [each for group in alike.values() for each in group[:: len(group) // ANSWERED + 1]]
    chat.render([chat.chat_of(each, style, each.answer) for each in some])
    return {each.id: prompt for each, prompt in zip(asked, prompts, strict=True)}


def planned_date(teacher: Path, chats: Chats | None, date: str) -> str:
    """Return the date among the inputs of a planned run; empty if its templates write none.

    Args:
        teacher: the teacher's folder.
        chats: how conversations will be written; None if only transformers can tell.
        date: the day that templates write, if they do.
    """
    if chats:
        return chats.date
    try:
        return dated(ChatFormat.read(teacher), date).date
    except SetupError:  # a run says so
        return ""


def require_end_token(chat: ChatFormat, rows: int) -> None:
    """Refuse an end token that the tokenizer's file lacks and the model has no row for.

    transformers gives such a token the next number.

    Args:
        chat: how conversations are written.
        rows: of the model's embedding.

    Raises:
        SetupError: naming the token.
    """
    token = chat.tokens.get("eos_token", "")
    path = Path(chat.source) / TOKENIZER_FILE
    content = read_bytes(path, COLLECTION_BYTES)
    # Few tokenizers have to be loaded to know.
    if not token or any(
        json.dumps(token, ensure_ascii=ascii_only).encode() in content
        for ascii_only in (True, False)
    ):
        return
    from tokenizers import Tokenizer  # noqa: PLC0415  most plans need none

    size = Tokenizer.from_file(str(path)).get_vocab_size()
    if size >= rows:
        raise SetupError(
            f"{path}: lacks the end token {token!r} of {TOKENIZER_CONFIG}, which becomes "
            f"token {size}, and the model has {rows} tokens. The tokenizer belongs to another "
            "model, or the model was not resized when tokens were added."
        )


def dated(chat: ChatFormat, date: str) -> ChatFormat:
    """Return a format with the day that its template writes; unchanged if it writes none."""
    return replace(chat, date=date) if chat.uses_date else chat
