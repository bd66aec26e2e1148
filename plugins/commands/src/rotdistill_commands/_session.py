"""A variant that answers questions: a plain Hugging Face folder and plain greedy generation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.devices import resolve_device
from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.generate import greedy_settings, stop_tokens, unconfirmed_token
from rotdistill_core.forward.whole import is_beyond_rope_limit, whole_model
from rotdistill_core.store.layout import RunLayout


@dataclass
class ChatSession:
    """A loaded variant and its conversation so far."""

    name: str
    model: Any
    tokenizer: Any
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
            SetupError: the chat template cannot write the conversation.
        """
        if self.messages:
            self.messages.append({"role": "user", "content": question})
        else:
            self.chat = self.chat.for_style(system, question)
            self.messages = self.chat.messages(system, question)
        (text,) = self.chat.render([self.messages], generation=True)
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(
            self.model.device
        )
        answer = ""
        for piece in self._generate(inputs):
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def _generate(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text that the model generates; generation runs in a thread of its own.

        Raises:
            CheckFailed: the answer is not what the model's own forward pass gives.
        """
        prompt = inputs["input_ids"][0].tolist()
        is_beyond_rope_limit(self.model, len(prompt), self.max_tokens, self.name)
        stream = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[Exception] = []
        made: list[int] = []

        def generate() -> None:
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tokens = self.model.generate(
                        **inputs,
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
        model=model,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        chat=ChatFormat.of(tokenizer, date, thinking),
    )
