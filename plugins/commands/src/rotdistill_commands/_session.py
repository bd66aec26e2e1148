"""One variant that talks: a plain Hugging Face folder, plain greedy generation, word by word."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.data.tokenization import conversation
from rotdistill_core.errors import SetupError


@dataclass
class ChatSession:
    """A loaded variant and what was said so far."""

    name: str
    model: Any
    tokenizer: Any
    most: int
    """Longest answer in tokens."""
    talk: list[dict[str, str]] = field(default_factory=list)

    def ask(self, system: str, question: str) -> Iterator[str]:
        """Yield the greedy answer piece by piece, and remember it for the next question."""
        from transformers import GenerationConfig, TextIteratorStreamer

        own = conversation(system, question)
        self.talk += own[1:] if self.talk or not system else own
        given = self.tokenizer.apply_chat_template(
            self.talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        given = given.to(self.model.device)
        ends = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        stops = sorted({self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)})
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stops[0]
        settings = GenerationConfig(
            max_new_tokens=self.most, do_sample=False, pad_token_id=pad, eos_token_id=stops
        )
        stream = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[Exception] = []

        def generate() -> None:
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore"
                    )  # the folder's own sampling settings, which are not used
                    self.model.generate(**given, streamer=stream, generation_config=settings)
            except Exception as error:
                failed.append(error)
                stream.end()

        worker, said = Thread(target=generate, daemon=True), ""
        worker.start()
        for piece in stream:
            said += piece
            yield piece
        worker.join()
        if failed:
            raise failed[0]
        self.talk.append({"role": "assistant", "content": said})


def load_session(name: str, folder: Path, most: int, device: str) -> ChatSession:
    """Load a checkpoint folder.

    Raises:
        SetupError: there is none, it is torn, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise SetupError(f"{folder}: there is no checkpoint of {name}.")
    folder_headers(folder)  # says which file is torn
    where = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    dtype = torch.float32 if where.type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"{folder}: cannot be loaded: {error}") from error
    return ChatSession(name, model.to(where).eval(), load_tokenizer(folder), most)
