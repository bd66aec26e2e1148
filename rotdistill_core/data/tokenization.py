"""Tokenisation of conversations and plain texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.conversations import LESSON, Conversation, first_chat, prompt_is_too_long
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import comparable
from rotdistill_core.data.thoughts import (
    MARKS,
    continuing,
    opens_block,
    with_beginning,
    without_thoughts,
)
from rotdistill_core.errors import SetupError

PROMPT_END = 16
"""Tokens at the end of a prompt that hold the beginning of a thinking block, if it opens one."""


def tokenize_texts(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    answers: Mapping[str, Sequence[int]],
    style: str,
    max_tokens: int,
    chat: ChatFormat | None = None,
    limit: int | None = None,
) -> Samples:
    """Tokenise all texts, conversations with their chat template, and pack them.

    Args:
        tokenizer: a transformers tokenizer.
        conversations: the texts.
        answers: question id -> the teacher's tokens, for questions without an answer.
        style: the system prompt.
        max_tokens: conversations are cut after this many tokens; held-out ones never are.
        chat: how conversations are written; by default as the tokenizer does it today.
        limit: most tokens of a text outside the domain, plain or a conversation; by default they
            are not cut.

    Raises:
        SetupError: the chat template cannot write the texts, or a
            text leaves no room for its answer.
    """
    asked = {each.id: each for each in conversations if not each.is_plain}
    chat = chat or chat_format(tokenizer, style, conversations)
    prompts = prompt_tokens(tokenizer, style, asked.values(), chat)
    answers = {**_written_answers(tokenizer, chat, style, asked, prompts), **answers}
    texts = []
    for each in conversations:
        if each.is_plain:
            texts.append(_plain_text(tokenizer, each, answers.get(each.id), limit))
        elif each.split.outside_domain:
            texts.append(_conversation_text(each, prompts[each.id], answers[each.id], limit))
        else:
            most = None if each.split == Split.HELDOUT else max_tokens
            texts.append(_conversation_text(each, prompts[each.id], answers[each.id], most))
    sharing = [prompts[each.id] for each in asked.values() if not _is_apart(each)]
    shared = shared_prefix_length(sharing) if sharing else 0
    return Samples(PackedTexts(tuple(texts), shared), tuple(conversations), style, chat=chat)


def tokenize_for_both(
    student: Any,
    teacher: Any,
    conversations: Sequence[Conversation],
    answers: Mapping[str, Sequence[int]],
    style: str,
    max_tokens: int,
    chats: tuple[ChatFormat | None, ChatFormat | None] = (None, None),
) -> Samples:
    """Tokenise all texts twice, for two models with different tokenizers.

    The student gets the teacher's answers as text, in its own tokens. Texts outside the domain are
    left out: on those only logits are compared, which two vocabularies do not allow.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        conversations: the texts.
        answers: question id -> the teacher's tokens, for questions without an answer.
        style: the system prompt.
        max_tokens: conversations are cut after this many tokens of either tokenizer.
        chats: how conversations are written for the student, and for the teacher.

    Raises:
        SetupError: see `tokenize_texts`.
    """
    conversations = [q for q in conversations if not q.is_plain]
    own, theirs = chats
    teacher_samples = tokenize_texts(teacher, conversations, answers, style, max_tokens, theirs)
    prompts = {
        text.id: _end(teacher, text.tokens[: text.answer])
        for text in teacher_samples.layout.texts
        if text.id in answers
    }
    said = {
        name: with_beginning(prompt, decode_answer(teacher, answers[name]))
        for name, prompt in prompts.items()
    }
    if any(opens_block(prompt) for prompt in prompts.values()):
        own = own or chat_format(student, style, conversations)
        asked = [each for each in conversations if each.id in said]
        written = prompt_tokens(student, style, asked, own)
        said = {name: continuing(_end(student, written[name]), said[name]) for name in said}
    student_answers = {name: tokenize_answer(student, text) for name, text in said.items()}
    student_samples = tokenize_texts(
        student, conversations, student_answers, style, max_tokens, own
    )
    return replace(student_samples, theirs=teacher_samples.layout)


def without_system_prompt(samples: Samples, tokenizer: Any) -> Samples:
    """Return samples whose conversations the student reads without the system prompt.

    The teacher reads them as they are. A conversation without a system turn is what the template
    makes of it, a system prompt of its own included. Answers are the same tokens in both. Texts
    outside the domain stay as they are.

    Args:
        samples: texts that both models read alike.
        tokenizer: a transformers tokenizer.

    Raises:
        SetupError: the template cannot write a conversation without a system turn.
    """
    chat = samples.chat or ChatFormat.of(tokenizer)
    asked = [
        each.without_system_prompt()
        for each in samples.conversations
        if not each.is_plain and not each.split.outside_domain
    ]
    prompts = prompt_tokens(tokenizer, samples.style, asked, chat)
    texts = tuple(
        with_prompt(text, prompts[text.id]) if text.id in prompts else text
        for text in samples.layout.texts
    )
    sharing = [text.tokens[: text.answer] for text in texts if not text.plain]
    layout = PackedTexts(texts, shared_prefix_length(sharing) if sharing else 0)
    return replace(samples, layout=layout, theirs=samples.layout, baked=True)


def with_prompt(text: Text, prompt: Sequence[int]) -> Text:
    """Return a text with other tokens before its answer."""
    return replace(text, tokens=(*prompt, *text.tokens[text.answer :]), answer=len(prompt))


def chat_format(
    tokenizer: Any, style: str, conversations: Sequence[Conversation], date: str = ""
) -> ChatFormat:
    """Return how a tokenizer writes these conversations under a system prompt.

    Raises:
        SetupError: its chat template cannot write them.
    """
    chat = ChatFormat.of(tokenizer, date)
    asked = [each for each in conversations if not each.split.outside_domain]
    return chat.for_style(*first_chat(style, asked)) if asked else chat


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens, up to the first special token or broken character."""
    text_tokens = []
    for token in tokens:
        if token in tokenizer.all_special_ids and not is_thought_mark(tokenizer, token):
            break
        text_tokens.append(token)
    text: str = tokenizer.decode(text_tokens)
    return text.partition("\ufffd")[0].strip()


def answer_after_thoughts(tokenizer: Any, prompt: Sequence[int], answer: str) -> str:
    """Return an answer without the thinking block that it begins with, or that its prompt opens.

    Nothing is left of an answer that ends inside the block.

    Args:
        tokenizer: that of the prompt.
        prompt: tokens that the answer follows.
        answer: the answer as text, with the marks of blocks.
    """
    return without_thoughts(with_beginning(_end(tokenizer, prompt), answer))


def _end(tokenizer: Any, prompt: Sequence[int]) -> str:
    """Return the end of a prompt as text: whether it opens a thinking block stands there."""
    text: str = tokenizer.decode(list(prompt[-PROMPT_END:]))
    return text


def is_thought_mark(tokenizer: Any, token: int) -> bool:
    """Return whether a token begins or ends a thinking block; some tokenizers call it special."""
    return tokenizer.decode([token]).strip() in (*MARKS, *MARKS.values())


def require_text_of_transformers(
    chat: ChatFormat, tokenizer: Any, style: str, question: str
) -> None:
    """Check that a tokenizer with its own way of writing chats writes a prompt as we do.

    Others write it as the template says, and that runs nowhere but in its own process.

    Raises:
        SetupError: it writes another text, or none.
    """
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415  (takes seconds)

    own = type(tokenizer).apply_chat_template
    if own is PreTrainedTokenizerBase.apply_chat_template or chat.is_ours:
        return
    messages = chat.messages(style, question)
    (ours,) = chat.render([messages], generation=True)
    try:
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **chat.switches
        )
    except Exception as error:
        # Templates raise what they like, and so do libraries that read them.
        raise SetupError(
            f"{chat.source}: transformers cannot use its chat template: {error}."
        ) from error
    if theirs != ours:
        raise SetupError(
            f"{chat.source}: its tokenizer ({type(tokenizer).__name__}) does not write chats as "
            f"its chat template does. A question is {ours[:80]!r}, and {theirs[:80]!r} as the "
            "tokenizer writes it. Take a folder of the model with a tokenizer.json."
        )


def texts_that_are_lost(tokenizer: Any, texts: Mapping[str, str]) -> list[str]:
    """Return the names of the texts that a tokenizer does not give back.

    It has no tokens for some of their characters. Letter case and blanks do not count.
    """

    def letters(text: str) -> str:
        return "".join(comparable(text).split())

    return [
        name
        for name, text in texts.items()
        if letters(tokenizer.decode(tokens_of(tokenizer, text))) != letters(text)
    ]


def prompt_tokens(
    tokenizer: Any, style: str, conversations: Iterable[Conversation], chat: ChatFormat
) -> dict[str, list[int]]:
    """Return the tokens of each conversation by id, up to the first token of the answer.

    Args:
        tokenizer: a transformers tokenizer.
        style: the system prompt of conversations without their own.
        conversations: what is asked; no plain texts.
        chat: how conversations are written.

    Raises:
        SetupError: see `ChatFormat.prompts`.
    """
    asked = list(conversations)
    texts = chat.prompts([chat.chat_of(each, style) for each in asked])
    return {each.id: tokens_of(tokenizer, text) for each, text in zip(asked, texts, strict=True)}


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that has its special tokens.

    Raises:
        SetupError: the tokenizer has none for a part of it.
    """
    return _encoded(tokenizer, text, add_special_tokens=False)


def _encoded(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Return the tokens of a text.

    Raises:
        SetupError: the tokenizer has none for a part of it.
    """
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # tokenizers raise plain ones
        raise SetupError(
            f"{tokenizer.name_or_path}: its tokenizer cannot read the text {text[:80]!r}: {error}."
        ) from error


def tokenize_answer(tokenizer: Any, answer: str) -> list[int]:
    """Return the tokens of an answer by itself, and the end-of-turn token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokens_of(tokenizer, answer), *end]


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share.

    At least one token of each prompt stays outside: its row predicts the first answer token.
    """
    longest = min(len(prompt) for prompt in prompts) - 1
    for k in range(longest):
        if len({prompt[k] for prompt in prompts}) > 1:
            return k
    return longest


def _is_apart(conversation: Conversation) -> bool:
    """Return whether a conversation is outside the domain, and packed without the shared prefix.

    A lesson without system prompt shares no more than the first tokens of a template with the
    others, and would leave no prefix.
    """
    is_lesson = conversation.id.endswith(LESSON)
    return conversation.split.outside_domain or (is_lesson and conversation.system == "")


def _plain_text(
    tokenizer: Any, question: Conversation, written: Sequence[int] | None, limit: int | None
) -> Text:
    """Tokenise a plain text as it is; all tokens but the first count as answer.

    Args:
        tokenizer: a transformers tokenizer.
        question: the text.
        written: its tokens, if the teacher wrote it.
        limit: most tokens.
    """
    encoded = written or _encoded(tokenizer, question.answer or "")
    tokens = tuple(encoded)[:limit]
    return Text(question.id, question.language, question.split, tokens, answer=1, plain=True)


def _conversation_text(
    question: Conversation, prompt: list[int], answer: Sequence[int], limit: int | None
) -> Text:
    """Return a tokenised conversation; its last answer alone counts as answer.

    Args:
        question: the conversation.
        prompt: its tokens up to the answer.
        answer: the tokens of the answer.
        limit: most tokens; None for held-out texts, whose scores no option of the fit may move.

    Raises:
        SetupError: the prompt alone is longer.
    """
    tokens = tuple([*prompt, *answer][:limit])
    if len(tokens) <= len(prompt):
        raise prompt_is_too_long(question.id, len(prompt), limit or len(tokens))
    return Text(
        question.id,
        question.language,
        question.split,
        tokens,
        answer=len(prompt),
        plain=_is_apart(question),
    )


def _written_answers(
    tokenizer: Any,
    chat: ChatFormat,
    style: str,
    asked: Mapping[str, Conversation],
    prompts: Mapping[str, list[int]],
) -> dict[str, list[int]]:
    """Return the tokens of the answers that questions have, as the template writes them.

    With some templates the prompt is not a prefix of the whole chat. Then the answer is tokenised
    by itself, as it follows the prompt.
    """
    answered = {name: q for name, q in asked.items() if q.answer is not None}
    chats = [chat.chat_of(q, style, q.answer) for q in answered.values()]
    found = {}
    for (name, q), text in zip(answered.items(), chat.render(chats), strict=True):
        prompt, tokens = prompts[name], tokens_of(tokenizer, text)
        if tokens[: len(prompt)] == prompt and len(tokens) > len(prompt):
            found[name] = tokens[len(prompt) :]
        else:
            answer = continuing(_end(tokenizer, prompt), q.answer or "")
            found[name] = tokenize_answer(tokenizer, answer)
    return found
