"""A variant that answers questions: a plain Hugging Face folder and plain greedy generation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.devices import resolve_device
from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.data.tokenization import conversation
from rotdistill_core.errors import SetupError
from rotdistill_core.store.layout import RunLayout


@dataclass
class ChatSession:
    """A loaded variant and its conversation so far."""

    name: str
    model: Any
    tokenizer: Any
    max_tokens: int
    """Longest answer in tokens."""
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, system: str, question: str) -> Iterator[str]:
        """Yield the greedy answer piece by piece, and keep it for the next question.

        Args:
            system: the system prompt; given once, with the first question.
            question: the question.
        """
        turn = conversation(system, question)
        self.messages += turn[1:] if self.messages or not system else turn
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        answer = ""
        for piece in self._generate(inputs):
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def _generate(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text that the model generates; generation runs in a thread of its own."""
        stream = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[Exception] = []

        def generate() -> None:
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    # About the folder's own sampling settings, which are not used.
                    warnings.simplefilter("ignore")
                    self.model.generate(**inputs, streamer=stream, generation_config=self._greedy())
            except Exception as error:
                errors.append(error)
                stream.end()

        worker = Thread(target=generate, daemon=True)
        worker.start()
        yield from stream
        worker.join()
        if errors:
            raise errors[0]

    def _greedy(self) -> GenerationConfig:
        """Return settings of greedy generation, which ends at any end-of-text token."""
        end = self.tokenizer.eos_token_id
        ends = self.model.generation_config.eos_token_id or end
        stops = sorted({end, *([ends] if isinstance(ends, int) else ends)})
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=self.max_tokens,
            do_sample=False,
            pad_token_id=stops[0] if pad is None else pad,
            eos_token_id=stops,
        )


def load_session(name: str, folder: Path, max_tokens: int, device: str) -> ChatSession:
    """Load a checkpoint folder.

    Args:
        name: the variant.
        folder: its folder.
        max_tokens: longest answer.
        device: `auto`, `cpu`, `cuda:1`, or another name that recipes know.

    Raises:
        RecipeError: the device has no such name.
        SetupError: there is no such device or checkpoint, it is torn, or it cannot be loaded.
    """
    disable_progress_bar()
    if not (folder / RunLayout.CONFIG).is_file():
        raise SetupError(f"{folder}: there is no checkpoint of {name}.")
    folder_headers(folder)  # raises if a file is torn, and names it
    target = resolve_device(device)
    dtype = torch.float32 if target.type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"{folder}: cannot be loaded: {error}") from error
    return ChatSession(
        name=name,
        model=model.to(target).eval(),
        tokenizer=load_tokenizer(folder),
        max_tokens=max_tokens,
    )
