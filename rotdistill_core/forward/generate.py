"""Greedy answers by plain transformers generation, from a plain checkpoint folder.

Prompts are answered in chunks, and a chunk in batches. Which prompts go together follows from the
prompts alone, so a chunk that is made again holds the same tokens: a batch of another shape rounds
differently, and a greedy answer may then take another turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.data.batching import ANSWERS_AT_ONCE, ANSWERS_PER_CHUNK
from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.errors import SetupError

if TYPE_CHECKING:
    from rotdistill_core.forward.layerwise import Progress

Prompts = Mapping[str, Sequence[int]]
"""Token ids by name."""


@dataclass(frozen=True)
class Decoding:
    """Which model answers, where, and how long its answers may be."""

    folder: Path
    """The checkpoint."""
    max_tokens: int
    """Most tokens of an answer."""
    device: torch.device
    dtype: torch.dtype


class AnswerChunk(NamedTuple):
    """Answers that are made and kept together."""

    answers: dict[str, list[int]]
    """Name of the prompt -> tokens up to and with the first end-of-turn token."""
    at_once: int
    """Most prompts that were answered at once, at the end of the chunk."""


class _Loaded(NamedTuple):
    """A model that is ready to answer."""

    model: Any
    stops: set[int]
    """Tokens that end an answer."""
    settings: GenerationConfig
    prefix_cache: Any
    """Keys and values of the tokens that all prompts share; None if they share none."""


def greedy_answers(
    folder: Path,
    prompts: Prompts,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, list[int]]:
    """Return the greedy continuation of each prompt, and keep nothing on disk.

    `rotdistill_core.forward.answers` keeps what is made.

    Args:
        folder: the checkpoint.
        prompts: token ids by name; at least one prompt.
        max_tokens: most tokens of an answer.
        device: where to compute.
        dtype: the dtype to compute in.
        progress: called before each batch.

    Returns:
        The tokens of each answer, up to and with the first end-of-turn token.

    Raises:
        SetupError: see `AnswerWriter.write`.
    """
    answers: dict[str, list[int]] = {}

    def warn(line: str) -> None:
        progress(len(answers), len(prompts), line)

    writer = AnswerWriter(Decoding(folder, max_tokens, device, dtype), prompts, progress, warn)
    at_once = ANSWERS_AT_ONCE
    for names in chunks_of(prompts):
        made, at_once = writer.write(names, at_once, done=len(answers))
        answers |= made
    return answers


def chunks_of(prompts: Prompts) -> list[list[str]]:
    """Return the names of the prompts of each chunk, short prompts first."""
    names = sorted(prompts, key=lambda name: len(prompts[name]))
    return [names[k : k + ANSWERS_PER_CHUNK] for k in range(0, len(names), ANSWERS_PER_CHUNK)]


class AnswerWriter:
    """Answers prompts greedily. The model is loaded once, for the first chunk that is written.

    The prefix that all prompts share (the system prompt) is computed once.

    Args:
        decoding: the model and the length of its answers.
        prompts: all prompts; at least one.
        progress: called before each batch with the number of answers so far.
        warn: takes one line when memory runs out.
    """

    def __init__(
        self,
        decoding: Decoding,
        prompts: Prompts,
        progress: Progress,
        warn: Callable[[str], None],
    ) -> None:
        self.decoding = decoding
        self.prompts = prompts
        self.progress = progress
        self.warn = warn
        self._shared = shared_prefix_length(list(prompts.values()))

    def write(self, names: Sequence[str], at_once: int, done: int) -> AnswerChunk:
        """Answer the prompts of a chunk.

        When the memory of the device runs out, half as many prompts are answered at once from
        there on.

        Args:
            names: the prompts, short ones first.
            at_once: most prompts that are answered at once.
            done: prompts that were answered before, for the progress.

        Raises:
            SetupError: the device has no memory for the model, or for a single prompt.
        """
        answers: dict[str, list[int]] = {}
        for group in self._groups(names):
            waiting = group
            while waiting:
                batch = waiting[:at_once]
                done_now = done + len(answers)
                self.progress(done_now, len(self.prompts), "questions are answered")
                made = self._answers_that_fit(batch)
                if made is None:
                    at_once = self._half_of(batch)
                    continue
                answers |= made
                waiting = waiting[len(batch) :]
        return AnswerChunk(answers, at_once)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield the prompts that may share a batch.

        A sliding window counts padding as tokens: with one, they have one length.
        """
        one_length = _has_sliding_window(self._loaded.model)

        def group(name: str) -> int:
            return len(self.prompts[name]) if one_length else 0

        for _, members in groupby(names, group):
            yield list(members)

    def _answers_that_fit(self, names: Sequence[str]) -> dict[str, list[int]] | None:
        """Return the answers to a batch; None if the device has no memory for it."""
        try:
            return self._answers(names)
        except torch.OutOfMemoryError:
            # The error holds on to what the call had allocated until this handler is left.
            return None

    def _half_of(self, names: Sequence[str]) -> int:
        """Return how many prompts to answer at once after a batch that did not fit.

        Raises:
            SetupError: it was a single prompt.
        """
        torch.cuda.empty_cache()  # so that blocks of other sizes fit; nothing without CUDA
        decoding = self.decoding
        if len(names) == 1:
            tokens = len(self.prompts[names[0]])
            raise _too_large(
                decoding,
                f"one prompt of {tokens} tokens with an answer of up to {decoding.max_tokens}",
            )
        half = len(names) // 2
        self.warn(
            f"{decoding.folder}: the memory of {decoding.device} does not hold {len(names)} "
            f"answers at once; it goes on with {half}."
        )
        return half

    @cached_property
    def _loaded(self) -> _Loaded:
        disable_progress_bar()
        decoding = self.decoding
        tokenizer = load_tokenizer(decoding.folder)
        model = AutoModelForCausalLM.from_pretrained(
            decoding.folder, dtype=decoding.dtype, local_files_only=True, trust_remote_code=False
        )
        try:
            model.to(decoding.device).eval()
        except torch.OutOfMemoryError as error:
            raise _too_large(decoding, "the model") from error
        stops = _stop_tokens(model, tokenizer)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        settings = GenerationConfig(
            max_new_tokens=decoding.max_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
        )
        model.generation_config = settings
        return _Loaded(model, stops, settings, self._prefix_cache(model))

    @torch.no_grad()
    def _prefix_cache(self, model: Any) -> Any:
        if not self._shared:
            return None
        tokens = list(next(iter(self.prompts.values())))[: self._shared]
        return model(
            torch.tensor([tokens], device=self.decoding.device), use_cache=True
        ).past_key_values

    @torch.no_grad()
    def _answers(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the answers to a batch."""
        model, stops, settings, prefix_cache = self._loaded
        prompts = [self.prompts[name] for name in names]
        ids, mask = _pad_after_prefix(prompts, self._shared, settings.pad_token_id)
        cache = copy.deepcopy(prefix_cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(names))
        generated = model.generate(
            input_ids=ids.to(self.decoding.device),
            attention_mask=mask.to(self.decoding.device),
            past_key_values=cache,
            generation_config=settings,
        )
        continuations = generated[:, ids.shape[1] :].tolist()
        return {
            name: _until_stop(tokens, stops)
            for name, tokens in zip(names, continuations, strict=True)
        }


def _too_large(decoding: Decoding, what: str) -> SetupError:
    """Return the error to raise when something does not fit into the memory of the device."""
    return SetupError(
        f"{decoding.folder}: the memory of {decoding.device} does not hold {what}. Free memory "
        "there, ask for shorter answers, take a smaller model or dtype, or let this model compute "
        'on the CPU (device = "cpu").'
    )


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's and the model's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}


def _has_sliding_window(model: Any) -> bool:
    """Whether a layer attends through a sliding window."""
    return "sliding_attention" in (getattr(model.config, "layer_types", None) or ())


def _pad_after_prefix(
    prompts: Sequence[Sequence[int]], shared: int, pad: int
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [B, S]; padding lies between shared prefix and the rest.

    So the prefix stays in the columns of its cache, and all prompts end in the last column.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor(list(prompt))
        rest = longest - len(prompt) + shared
        ids[row, :shared] = tokens[:shared]
        ids[row, rest:] = tokens[shared:]
        mask[row, :shared] = 1
        mask[row, rest:] = 1
    return ids, mask


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """Return the tokens up to and with the first stop token."""
    for j, token in enumerate(tokens):
        if token in stops:
            return tokens[: j + 1]
    return tokens
