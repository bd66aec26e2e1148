"""Tokenisation of conversations and plain texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.questions import Question
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError


def conversation(style: str, question: str) -> list[dict[str, str]]:
    """Return the chat up to an answer: system prompt and question."""
    return [{"role": "system", "content": style}, {"role": "user", "content": question}]


def tokenize_texts(
    tokenizer: Any,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[int]],
    style: str,
    max_tokens: int,
) -> Samples:
    """Tokenise all texts, conversations with their chat template, and pack them.

    Args:
        tokenizer: a transformers tokenizer.
        questions: the texts.
        answers: question id -> the teacher's tokens, for questions without an answer.
        style: the system prompt.
        max_tokens: conversations are cut after this many tokens; held-out ones never are.

    Raises:
        SetupError: the tokenizer has no chat template, or a text leaves no room for its answer.
    """
    if not tokenizer.chat_template:
        raise SetupError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
            "use an instruction-tuned model."
        )
    texts = []
    for q in questions:
        if q.split.outside_domain:
            texts.append(_plain_text(tokenizer, q))
        else:
            texts.append(_conversation_text(tokenizer, q, answers, style, max_tokens))
    prompts = [text.tokens[: text.answer] for text in texts if not text.plain]
    layout = PackedTexts(tuple(texts), shared_prefix_length(prompts))
    return Samples(layout, tuple(questions), style)


def tokenize_for_both(
    student: Any,
    teacher: Any,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[int]],
    style: str,
    max_tokens: int,
) -> Samples:
    """Tokenise all texts twice, for two models with different tokenizers.

    The student gets the teacher's answers as text, in its own tokens. Texts outside the domain are
    left out: on those only logits are compared, which two vocabularies do not allow.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        questions: the texts.
        answers: question id -> the teacher's tokens, for questions without an answer.
        style: the system prompt.
        max_tokens: conversations are cut after this many tokens of either tokenizer.

    Raises:
        SetupError: see `tokenize_texts`.
    """
    questions = [q for q in questions if not q.split.outside_domain]
    teacher_samples = tokenize_texts(teacher, questions, answers, style, max_tokens)
    student_answers = {
        name: tokenize_answer(student, decode_answer(teacher, tokens))
        for name, tokens in answers.items()
    }
    student_samples = tokenize_texts(student, questions, student_answers, style, max_tokens)
    return replace(student_samples, theirs=teacher_samples.layout)


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens, up to the first special token or broken character."""
    text_tokens = []
    for token in tokens:
        if token in tokenizer.all_special_ids:
            break
        text_tokens.append(token)
    text: str = tokenizer.decode(text_tokens)
    return text.partition("\ufffd")[0].strip()


def prompt_tokens(tokenizer: Any, style: str, question: str) -> list[int]:
    """Return the tokens of system prompt and question, up to the first token of the answer."""
    encoded = tokenizer.apply_chat_template(
        conversation(style, question), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def tokenize_answer(tokenizer: Any, answer: str) -> list[int]:
    """Return the tokens of an answer by itself, and the end-of-turn token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share.

    At least one token of each prompt stays outside: its row predicts the first answer token.
    """
    longest = min(len(prompt) for prompt in prompts) - 1
    for k in range(longest):
        if len({prompt[k] for prompt in prompts}) > 1:
            return k
    return longest


def _plain_text(tokenizer: Any, question: Question) -> Text:
    """Tokenise a text outside the domain as it is; all tokens but the first count as answer."""
    tokens = tuple(tokenizer(question.answer)["input_ids"])
    return Text(question.id, question.language, question.split, tokens, answer=1, plain=True)


def _conversation_text(
    tokenizer: Any,
    question: Question,
    answers: Mapping[str, Sequence[int]],
    style: str,
    max_tokens: int,
) -> Text:
    prompt = prompt_tokens(tokenizer, style, question.question)
    if question.answer is None:
        answer = answers[question.id]
    else:
        answer = _answer_in_chat(tokenizer, style, question.question, question.answer, prompt)
    # An option of the fit must not move a score, so held-out texts keep their length.
    limit = None if question.split == Split.HELDOUT else max_tokens
    tokens = tuple([*prompt, *answer][:limit])
    if len(tokens) <= len(prompt):
        raise SetupError(
            f"text {question.id}: its prompt alone has {len(prompt)} tokens; "
            f"raise samples.max_tokens above {max_tokens}."
        )
    return Text(question.id, question.language, question.split, tokens, answer=len(prompt))


def _answer_in_chat(
    tokenizer: Any, style: str, question: str, answer: str, prompt: list[int]
) -> list[int]:
    """Return the tokens of an answer as the chat template writes it after the prompt.

    With some templates the prompt is not a prefix of the whole chat. Then the answer is tokenised
    by itself.
    """
    chat = [*conversation(style, question), {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
    tokens = list(encoded["input_ids"])
    if tokens[: len(prompt)] == prompt:
        return tokens[len(prompt) :]
    return tokenize_answer(tokenizer, answer)
