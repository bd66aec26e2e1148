"""Who answers in a chat: a folder by plain greedy generation here, or an engine for the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from transformers import TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.devices import resolve_device
from rotdistill_core.checkpoint.models import Model, load_tokenizer
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.thoughts import without_thoughts
from rotdistill_core.data.tokenization import tokens_of
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.answers import answered_once
from rotdistill_core.forward.generate import (
    AnsweringModel,
    greedy_settings,
    stop_tokens,
    unconfirmed_token,
)
from rotdistill_core.forward.whole import is_beyond_rope_limit, whole_model
from rotdistill_core.plugin.engine import Answering, Asked
from rotdistill_core.plugin.registry import connected_engine
from rotdistill_core.recipe.resolved import RecipeEngine
from rotdistill_core.store.layout import RunLayout

LONGEST_NAME = 60
"""Characters of a question by which an engine names it."""


class Writer(Protocol):
    """Writes answers."""

    def pieces(self, asked: Asked) -> Iterator[str]:
        """Yield the greedy answer to a prompt, piece by piece."""


@dataclass
class ChatSession:
    """One that answers, and its conversation so far."""

    name: str
    tokenizer: Any
    writer: Writer
    max_tokens: int
    """Longest answer in tokens."""
    chat: ChatFormat
    """How its conversation is written."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, system: str, question: str) -> Iterator[str]:
        """Yield the greedy answer piece by piece, and keep it for the next question.

        Args:
            system: the system prompt; given once, with the first question.
            question: the question.

        Raises:
            SetupError: the chat template cannot write the conversation, or nobody can answer it.
            CheckFailed: the answer is not what the model's own forward pass gives.
        """
        if self.messages:
            self.messages.append({"role": "user", "content": question})
        else:
            self.chat = self.chat.for_style(system, question)
            self.messages = self.chat.messages(system, question)
        (text,) = self.chat.prompts([self.messages])
        prompt = tuple(tokens_of(self.tokenizer, text))
        asked = Asked(prompt, self.max_tokens, messages=tuple(self.messages))
        answer = ""
        for piece in self.writer.pieces(asked):
            answer += piece
            yield piece
        # Thoughts are no part of a conversation; an answer that was cut in them is.
        said = without_thoughts(answer) or answer
        self.messages.append({"role": "assistant", "content": said})


@dataclass(frozen=True)
class Generation:
    """A model that generates here."""

    name: str
    model: Any
    """A causal model of transformers."""
    tokenizer: Any

    def pieces(self, asked: Asked) -> Iterator[str]:
        """Yield the text that the model generates; generation runs in a thread of its own.

        Raises:
            CheckFailed: the answer is not what the model's own forward pass gives.
        """
        prompt = list(asked.prompt)
        is_beyond_rope_limit(self.model, len(prompt), asked.max_tokens, self.name)
        stream = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[Exception] = []
        made: list[int] = []

        def generate() -> None:
            ids = torch.tensor([prompt], device=self.model.device)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tokens = self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=stream,
                        generation_config=self.model.generation_config,
                    )
                made.extend(tokens[0, len(prompt) :].tolist())
            except Exception as error:
                errors.append(error)
                stream.end()

        worker = Thread(target=generate, daemon=True)
        worker.start()
        yield from stream
        worker.join()
        if errors:
            raise errors[0]
        problem = unconfirmed_token(self.model, prompt, made)
        if problem:
            raise CheckFailed(f"{self.name}: the answer: {problem}")


@dataclass(frozen=True)
class ByEngine:
    """An engine that answers for the teacher; its answer comes as one piece."""

    answering: Answering
    model: AnsweringModel
    """The teacher."""

    def pieces(self, asked: Asked) -> Iterator[str]:
        """Yield the answer.

        Raises:
            RotdistillError: the engine cannot answer the question, which it names.
        """
        question = asked.messages[-1]["content"]
        name = f"{question[:LONGEST_NAME]}..." if len(question) > LONGEST_NAME else question
        self.model.require_known_tokens(asked.prompt, f"the question {name!r}")
        for _, answer in answered_once(self.answering, {name: asked}):
            yield self.model.tokenizer.decode(list(answer.tokens), skip_special_tokens=True)


def load_session(
    name: str,
    folder: Path,
    max_tokens: int,
    device: str,
    date: str = "",
    thinking: bool = False,
) -> ChatSession:
    """Load a checkpoint folder.

    Args:
        name: the variant.
        folder: its folder.
        max_tokens: longest answer.
        device: `auto`, `cpu`, `cuda:1`, or another name that recipes know.
        date: the day that its chat template writes, if it does; empty for today.
        thinking: let it think before it answers, where its chat template knows how to.

    Raises:
        RecipeError: the device has no such name.
        SetupError: there is no such device or checkpoint, it is torn, or it cannot be loaded.
    """
    disable_progress_bar()
    if not (folder / RunLayout.CONFIG).is_file():
        raise SetupError(f"{folder}: there is no checkpoint of {name}.")
    weights = open_checkpoint(folder).weights  # raises if a file is torn, and names it
    target = resolve_device(device)
    dtype = torch.float32 if target.type == "cpu" else weights.dtype
    tokenizer = load_tokenizer(folder)
    model = whole_model(weights, target, dtype)
    stops = stop_tokens(folder, weights, tokenizer)
    model.generation_config = greedy_settings(tokenizer, stops, max_tokens)
    return ChatSession(
        name=name,
        tokenizer=tokenizer,
        writer=Generation(name, model, tokenizer),
        max_tokens=max_tokens,
        chat=ChatFormat.of(tokenizer, date, thinking),
    )


def engine_session(
    name: str,
    engine: RecipeEngine,
    teacher: Model,
    max_tokens: int,
    log: Callable[[str], None],
    date: str = "",
    thinking: bool = False,
) -> ChatSession:
    """Return how an engine answers for the teacher; no weight of the teacher is loaded here.

    Args:
        name: what the answers are called.
        engine: the engine of the run's recipe.
        teacher: the teacher.
        max_tokens: longest answer.
        log: takes a line when a server dies.
        date, thinking: see `load_session`.

    Raises:
        RotdistillError: the engine cannot answer in the name of this model.
    """
    model = AnsweringModel.of(teacher)
    return ChatSession(
        name=name,
        tokenizer=model.tokenizer,
        writer=ByEngine(connected_engine(engine, model, log), model),
        max_tokens=max_tokens,
        chat=ChatFormat.of(model.tokenizer, date, thinking),
    )
