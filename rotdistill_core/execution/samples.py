"""The texts of a run: the teacher's answers, tokens, and the frozen copy in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import Conversation, first_chat
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import (
    prompt_tokens,
    require_text_of_transformers,
    texts_that_are_lost,
    tokenize_for_both,
    tokenize_texts,
    without_system_prompt,
)
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.engines import teacher_answers
from rotdistill_core.execution.lessons import write_lessons
from rotdistill_core.forward.rope import tables_by_length, transformers_config
from rotdistill_core.planning.chats import Chats, chats_of, dated, position_limit, require_room
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout

HELDOUT_QUESTIONS = "heldout"
TRAINING_QUESTIONS = "own"


def run_chats(
    pair: Pair,
    conversations: Sequence[Conversation],
    style: str,
    date: str,
    thinking: bool = False,
    bake: bool = False,
) -> Chats:
    """Return how a run writes its conversations, before any model computes.

    Args:
        pair: the models.
        conversations: the texts.
        style: the system prompt.
        date: the day that templates write, if they do.
        thinking: let models think, where their templates know how to.
        bake: whether the student reads no system prompt (`samples.bake_prompt`).

    Raises:
        SetupError: a template cannot write them, or transformers would write another text; see
            `chats_of`.
        RecipeError: there is no system prompt to bake in.
    """
    teacher = dated(ChatFormat.of(pair.teacher.tokenizer, thinking=thinking), date)
    try:
        student = dated(ChatFormat.of(pair.student.tokenizer, thinking=thinking), date)
    except SetupError:
        # A student of the teacher's vocabulary needs no template of its own.
        if not pair.one_tokenizer:
            raise
        student = None
    chats = chats_of(teacher, student, pair.one_tokenizer, style, conversations, bake)
    first = first_chat(style, conversations)
    for chat, model in ((chats.teacher, pair.teacher), (chats.student, pair.student)):
        if chat.source == str(model.tokenizer.name_or_path) and not chat.uses_date:
            require_text_of_transformers(chat, model.tokenizer, *first)
    return chats


def lost_texts_notes(pair: Pair, conversations: Sequence[Conversation], style: str) -> list[str]:
    """Return how many texts the tokenizers of a run do not hold, a sentence for each tokenizer."""
    texts = {"the system prompt": style}
    texts |= {each.id: each.words for each in conversations}
    notes = []
    for model in (pair.teacher,) if pair.one_tokenizer else (pair.teacher, pair.student):
        lost = texts_that_are_lost(model.tokenizer, texts)
        if lost:
            notes.append(
                f"{model.ref.model}: its tokenizer does not give back {len(lost)} of {len(texts)} "
                f"texts, {lost[0]} the first: it has no tokens for some of their characters, and "
                "the models read something else."
            )
    return notes


def prepare_samples(run: RunContext) -> Samples:
    """Tokenise the texts of a run, the teacher's answers among them, and freeze them.

    The teacher answers the held-out questions. With `samples.own_answers` it also answers the
    questions of the blurbs. With `[lessons]` it writes more texts to fit on, which come last.

    Raises:
        SetupError: a chat template cannot write the texts, a text leaves no room for its answer, or
            the teacher's device has no memory for a single answer.
    """
    settings = run.recipe.samples
    unanswered = [question for question in run.conversations if question.answer is None]
    heldout = [question for question in unanswered if question.split == Split.HELDOUT]
    training = [question for question in unanswered if question.split != Split.HELDOUT]
    answers = _teacher_answers(run, HELDOUT_QUESTIONS, heldout, settings.answer_tokens)
    answers |= _teacher_answers(run, TRAINING_QUESTIONS, training, settings.own_answers)

    pair, chats = run.pair, run.chats
    known = [position_limit(model.config) for model in pair.by_role.values()]
    longest = min((limit for limit in known if limit), default=None)
    limit = min(settings.max_tokens, longest or settings.max_tokens)
    lessons = write_lessons(run, limit)
    answers |= {lesson.conversation.id: lesson.tokens for lesson in lessons}
    conversations = (*run.conversations, *(lesson.conversation for lesson in lessons))
    texts = (pair.teacher.tokenizer, conversations, answers, run.style, limit)
    if pair.one_tokenizer:
        samples = tokenize_texts(*texts, chats.teacher, longest)
        if settings.bake_prompt:
            samples = without_system_prompt(samples, pair.teacher.tokenizer)
    else:
        samples = tokenize_for_both(pair.student.tokenizer, *texts, (chats.student, chats.teacher))
    _tell_cuts(run, samples, longest)
    _require_known_tokens(samples, pair)
    samples = with_prefix_of_common_tables(samples, pair)
    _freeze(run, samples)
    return samples


def _tell_cuts(run: RunContext, samples: Samples, longest: int | None) -> None:
    """Say how many texts were cut because a model was made for no longer ones."""
    cut = [text.id for text in samples.layout.texts if len(text.tokens) == longest]
    if cut:
        run.log(
            f"{len(cut)} texts, {cut[0]} the first, are cut after {longest} tokens, the most that "
            "the models were made for (max_position_embeddings)."
        )


def _require_known_tokens(samples: Samples, pair: Pair) -> None:
    """Refuse texts with tokens that a model of the run has no row for.

    Raises:
        SetupError: naming model, text and token.
    """
    for role, model in pair.by_role.items():
        layout = samples.theirs if role == "teacher" and samples.theirs else samples.layout
        for text in layout.texts:
            model.require_known_tokens(text.tokens, f"the text {text.id!r}")


def with_prefix_of_common_tables(samples: Samples, pair: Pair) -> Samples:
    """Return samples whose texts share a prefix only if its states are the same for all of them.

    They are not where the rotary tables of a model depend on the length of a text; see
    `rotdistill_core.forward.rope`. Then each text keeps its beginning to itself.
    """
    if samples.theirs is None:
        return replace(samples, layout=_with_common_tables(samples.layout, pair.by_role.values()))
    students = [model for model in (pair.student, pair.anchor) if model]
    return replace(
        samples,
        layout=_with_common_tables(samples.layout, students),
        theirs=_with_common_tables(samples.theirs, [pair.teacher]),
    )


def _with_common_tables(layout: PackedTexts, models: Iterable[Model]) -> PackedTexts:
    lengths = {len(text.tokens) for text in layout.texts if not text.plain}
    for model in models:
        table_of = tables_by_length(transformers_config(model.config))
        if len({table_of(length) for length in lengths}) > 1:
            return replace(layout, prefix=0)
    return layout


def _teacher_answers(
    run: RunContext, name: str, conversations: Sequence[Conversation], max_tokens: int
) -> dict[str, list[int]]:
    """Return the teacher's greedy answers by question id; every run shares them."""
    if not conversations:
        return {}
    teacher, chat = run.pair.teacher, run.chats.teacher
    prompts = prompt_tokens(teacher.tokenizer, run.style, conversations, chat)
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    require_room(lengths, max_tokens, teacher.config, teacher.ref.model)
    asked = {
        each.id: Asked(
            prompt=tuple(prompts[each.id]),
            max_tokens=max_tokens,
            messages=tuple(chat.chat_of(each, run.style)),
        )
        for each in conversations
    }
    started = time.monotonic()
    answers = teacher_answers(run, asked, f"teacher-{name}")
    if answers.made:
        seconds = time.monotonic() - started
        run.log(f"  {'teacher':<12} {f'{answers.made} answers':<16} {seconds:6.1f} s")
    return answers.tokens


def _freeze(run: RunContext, samples: Samples) -> None:
    """Commit the system prompt, and a table of the texts.

    The table has the hash of each text's tokens, and of the system prompt that it is read with.
    """
    out = run.output(samples.digest())
    given = {each.id: each for each in (*samples.conversations, *run.conversations)}
    prompts = {
        name: "" if each.is_plain else each.system_under(run.style) for name, each in given.items()
    }
    lines = ["id\tlanguage\tsplit\ttokens\tanswer_from\tsystem\tsha256\n"]
    for text in samples.layout.texts:
        cells = (
            text.id,
            text.language,
            text.split,
            str(len(text.tokens)),
            str(text.answer),
            digest(prompts[text.id]) if prompts.get(text.id) else "",
            digest(text.tokens),
        )
        lines.append("\t".join(cells) + "\n")
    out.document(RunLayout.TEXTS, [line.encode() for line in lines])
    out.document(RunLayout.SYSTEM_PROMPT, [run.style.encode()])
