"""The texts of a run: read, split, tokenised, and laid out as rows. torch loads when rows are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.questions import Question
from rotdistill_core.errors import SetupError


def conversation(style: str, question: str) -> list[dict[str, str]]:
    """Return the chat in front of an answer."""
    return [{"role": "system", "content": style}, {"role": "user", "content": question}]


def tokenize_texts(
    tokenizer: Any,
    questions: Sequence[Question],
    answers: dict[str, list[int]],
    style: str,
    max_tokens: int,
) -> Samples:
    """Tokenise all texts with their chat template and lay them out.

    `answers` holds the teacher's own tokens for held-out questions.

    Raises:
        SetupError: the tokenizer has no chat template, or a text leaves no room for its answer.
    """
    if not tokenizer.chat_template:
        raise SetupError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model."
        )
    texts = []
    for q in questions:
        if q.split.startswith("guard"):  # as it stands, without the chat around it
            texts.append(
                Text(
                    q.id,
                    q.language,
                    q.split,
                    tuple(tokenizer(q.answer)["input_ids"]),
                    1,
                    plain=True,
                )
            )
            continue
        prompt = prompt_tokens(tokenizer, style, q.question)
        if q.answer is None:
            answer = answers[q.id]
        else:
            chat = [*conversation(style, q.question), {"role": "assistant", "content": q.answer}]
            whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)[
                "input_ids"
            ]
            answer = (
                list(whole[len(prompt) :])
                if list(whole[: len(prompt)]) == prompt
                else tokenize_answer(tokenizer, q.answer)
            )
        tokens = tuple(
            [*prompt, *answer][: None if q.split == "heldout" else max_tokens]
        )  # an option of the fit moves no score
        if len(tokens) <= len(prompt):
            raise SetupError(
                f"text {q.id}: its prompt alone has {len(prompt)} tokens; raise samples.max_tokens above {max_tokens}."
            )
        texts.append(Text(q.id, q.language, q.split, tokens, len(prompt)))
    return Samples(
        PackedTexts(
            tuple(texts),
            shared_prefix_length([text.tokens[: text.answer] for text in texts if not text.plain]),
        ),
        tuple(questions),
        style,
    )


def tokenize_for_both(
    student: Any,
    teacher: Any,
    questions: Sequence[Question],
    answers: dict[str, list[int]],
    *about: Any,
) -> Samples:
    """Tokenise for two tokenizers; the teacher's answers are read as text, and that is what the student is given."""
    questions = [
        q for q in questions if not q.split.startswith("guard")
    ]  # only probabilities are compared on those
    theirs = tokenize_texts(teacher, questions, answers, *about).layout
    said = {
        name: tokenize_answer(student, decode_answer(teacher, tokens))
        for name, tokens in answers.items()
    }
    return replace(tokenize_texts(student, questions, said, *about), theirs=theirs)


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens, up to the first special token or broken character."""
    plainly = list(takewhile(lambda token: token not in tokenizer.all_special_ids, tokens))
    text: str = tokenizer.decode(plainly)
    return text.partition("\ufffd")[0].strip()


def prompt_tokens(tokenizer: Any, style: str, question: str) -> list[int]:
    """Return the tokens of system prompt and question, up to where the answer starts."""
    chat = conversation(style, question)
    return list(
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    )


def tokenize_answer(tokenizer: Any, answer: str) -> list[int]:
    """Tokenise an answer by itself, for templates whose generation prompt is not a prefix of the whole chat."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving each at least one of its own (it predicts the answer)."""
    most = min(len(prompt) for prompt in prompts) - 1
    return next((k for k in range(most) if len({prompt[k] for prompt in prompts}) > 1), most)
