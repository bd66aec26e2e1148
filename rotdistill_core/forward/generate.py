"""Answers of a model in this process, by transformers.

Prompts are answered in chunks. What is answered at once follows from the prompts of a chunk alone,
so a chunk that is made again holds the same tokens: another number of rows rounds differently, and
a greedy answer may then take another turn.

Some greedy answers of each chunk are confirmed by a forward pass of one text alone, without padding
and cache, with the attention of transformers: each of their tokens must be its best one, up to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.models import end_tokens, load_tokenizer, require_known_tokens
from rotdistill_core.data.batching import ANSWERS_AT_ONCE, ANSWERS_PER_CHUNK
from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.growth import Growth, one_by_one
from rotdistill_core.forward.slots import fits_slots, use_onednn
from rotdistill_core.forward.whole import is_beyond_rope_limit, whole_model
from rotdistill_core.plugin.engine import Answer, Asked

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights

ROUNDING = 1e-3
"""Share of the largest logit by which a token may be below the best one; batches round."""
ROUNDING_STEPS = 8
"""Steps of the dtype that it may be below, where they are coarser."""
CHUNK_WORK = 4e12
"""Parameters times tokens of a chunk of answers on a CPU, at most: minutes of a core."""
LEAST_PER_CHUNK = 32
"""Answers of a chunk, however long they take: fewer at once would use the processor badly."""
CONFIRMED_PER_CHUNK = 4
"""Answers of a chunk that a forward pass confirms."""


@dataclass(frozen=True)
class AnsweringModel:
    """Which model answers or is answered for, and where it computes."""

    folder: Path
    """Its folder, for the tokenizer and the tokens that end an answer."""
    weights: Weights
    """The model."""
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Model) -> AnsweringModel:
        """Return how an opened model answers by itself."""
        return cls(model.folder, model.weights, model.device, model.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.folder)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(entry.shape) for entry in self.weights.entries.values())

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer; there may be none."""
        return frozenset(stop_tokens(self.folder, self.weights, self.tokenizer))

    def require_known_tokens(self, tokens: Sequence[int], what: str) -> None:
        """Refuse tokens that have no row in the embedding; `what` names the text.

        Raises:
            SetupError: naming the token and the rows.
        """
        require_known_tokens(self.folder, self.weights, tokens, what)


def greedy_answers(
    model: AnsweringModel, prompts: Mapping[str, Sequence[int]], max_tokens: int
) -> dict[str, list[int]]:
    """Return the greedy continuation of each prompt, and keep nothing on disk.

    `rotdistill_core.forward.answers` keeps what is made.

    Args:
        model: what answers.
        prompts: token ids by name; at least one prompt.
        max_tokens: most tokens of an answer.

    Returns:
        The tokens of each answer, up to and with the first end-of-turn token.

    Raises:
        SetupError, CheckFailed: see `AnswerWriter.answers`.
    """
    asked = {name: Asked(tuple(prompt), max_tokens) for name, prompt in prompts.items()}
    writer = AnswerWriter(model, lambda _: None)
    answers: dict[str, list[int]] = {}
    for names in writer.chunks(asked):
        for name, answer in writer.answers({name: asked[name] for name in names}):
            answers[name] = list(answer.tokens)
    return answers


class AnswerWriter:
    """Answers prompts by a model in this process. It is loaded once, for the first answers.

    Each answer grows in a slot of its own, and one that ends makes room for the next prompt. The
    prefix that the prompts of a chunk share (the system prompt) is computed once.

    Args:
        model: what answers.
        log: takes one line when memory runs out.
    """

    def __init__(self, model: AnsweringModel, log: Callable[[str], None]) -> None:
        self.model = model
        self.log = log
        self.at_once = ANSWERS_AT_ONCE
        self.about = {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        }

    def chunks(self, asked: Mapping[str, Asked]) -> list[list[str]]:
        """Return the names of the prompts of each chunk, short prompts first.

        Chunks of a large model, or of long answers, on a CPU are smaller.
        """
        names = sorted(asked, key=lambda name: len(asked[name].prompt))
        size = ANSWERS_PER_CHUNK
        if self.model.device.type == "cpu":
            longest = max(each.max_tokens for each in asked.values())
            work = self.model.parameters * longest
            size = min(size, max(LEAST_PER_CHUNK, int(CHUNK_WORK // work)))
        return [names[k : k + size] for k in range(0, len(names), size)]

    def answers(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
        """Yield the answers to the prompts of a chunk.

        When the memory of the device runs out, half as many prompts are answered at once from
        there on.

        Args:
            asked: the prompts by name, short ones first.

        Raises:
            SetupError: the device has no memory for the model, or for a single prompt; the model
                cannot be built; or a prompt has tokens, or a length, that it does not know.
            CheckFailed: an answer is not what the model's own forward pass gives.
        """
        for name, each in asked.items():
            self.model.require_known_tokens(each.prompt, f"the text {name!r}")
        found: dict[str, list[int]] = {}
        for group in self._groups(asked):
            waiting = group
            while waiting:
                width = min(self.at_once, len(waiting))
                with suppress(torch.OutOfMemoryError):
                    for name, tokens in self._grown(waiting, width):
                        found[name] = tokens
                        yield name, self._answer(tokens)
                # The error would hold on to what the call had allocated.
                waiting = {name: each for name, each in waiting.items() if name not in found}
                if waiting:
                    self.at_once = self._half_of(width, waiting)
        greedy = [name for name, each in asked.items() if not each.temperature]
        for name in _some_of(greedy):
            self._confirm(name, asked[name], found[name])

    def _answer(self, tokens: list[int]) -> Answer:
        return Answer(tokens, "stop" if tokens[-1] in self.model.stops else "length")

    def _groups(self, asked: Mapping[str, Asked]) -> Iterator[dict[str, Asked]]:
        """Yield the prompts that may be answered at once.

        Prompts beyond the limit of the rotary tables have other tables than those below.
        """
        for _, names in groupby(asked, lambda name: self._is_beyond(name, asked[name])):
            yield {name: asked[name] for name in names}

    def _is_beyond(self, name: str, asked: Asked) -> bool:
        where = f"{self.model.folder}: text {name!r}"
        return is_beyond_rope_limit(self._loaded, len(asked.prompt), asked.max_tokens, where)

    def _grown(self, asked: Mapping[str, Asked], width: int) -> Iterator[tuple[str, list[int]]]:
        """Yield the tokens of answers as they end, so many at once."""
        model = self._loaded
        if not fits_slots(model):
            yield from one_by_one(model, asked, self.model.stops)
            return
        # Beyond the limit of the rotary tables, the prefix alone would have other ones.
        first = next(iter(asked))
        is_beyond = self._is_beyond(first, asked[first])
        prompts = [list(each.prompt) for each in asked.values()]
        shared = 0 if is_beyond else shared_prefix_length(prompts)
        yield from Growth(model, asked, width, shared, self.model.stops).run()

    def _half_of(self, width: int, waiting: Mapping[str, Asked]) -> int:
        """Return how many prompts to answer at once when so many did not fit.

        Raises:
            SetupError: it was a single prompt.
        """
        torch.cuda.empty_cache()  # so that blocks of other sizes fit; nothing without CUDA
        if width == 1:
            asked = next(iter(waiting.values()))
            raise _too_large(
                self.model,
                f"one prompt of {len(asked.prompt)} tokens with an answer of up to "
                f"{asked.max_tokens}",
            )
        self.log(
            f"{self.model.folder}: the memory of {self.model.device} does not hold {width} "
            f"answers at once; it goes on with {width // 2}."
        )
        return width // 2

    @cached_property
    def _loaded(self) -> Any:
        disable_progress_bar()
        model = self.model
        try:
            whole = whole_model(model.weights, model.device, model.dtype)
        except torch.OutOfMemoryError as error:
            raise _too_large(model, "the model") from error
        use_onednn(whole, model.device, model.dtype)
        return whole

    def _confirm(self, name: str, asked: Asked, answer: Sequence[int]) -> None:
        try:
            problem = unconfirmed_token(self._loaded, asked.prompt, answer)
        except torch.OutOfMemoryError as error:
            tokens = len(asked.prompt) + len(answer)
            raise _too_large(self.model, f"one text of {tokens} tokens") from error
        if problem:
            raise CheckFailed(f"{self.model.folder}: the answer to {name!r}: {problem}")


@torch.no_grad()
def unconfirmed_token(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Return why an answer is not the greedy one of a model's forward pass; empty if it is.

    The forward pass is of this text alone, without padding and cache. A token whose logit is best
    up to rounding counts as the best one.

    Args:
        model: a causal model of transformers.
        prompt: tokens.
        answer: tokens that were generated after them; at least one.
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    output = model(ids, use_cache=False, logits_to_keep=len(answer) + 1)
    logits = output.logits[0, -len(answer) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, -len(answer) :, None]).squeeze(1)
    gaps = logits.max(1).values - chosen
    tolerance = max(ROUNDING, ROUNDING_STEPS * torch.finfo(model.dtype).eps)
    wrong = gaps > tolerance * logits.abs().max(1).values
    if not bool(wrong.any() | gaps.isnan().any()):
        return ""
    place = int((wrong | gaps.isnan()).float().argmax())
    return (
        f"its token {place + 1} ({answer[place]}) is not what the model's own forward pass gives "
        f"there ({int(logits[place].argmax())}, whose logit is {float(gaps[place]):.3g} higher). "
        "Generation and forward pass of this architecture differ, so no score of answers would "
        "mean anything. Please report it with the model's config.json."
    )


def _some_of(names: Sequence[str]) -> list[str]:
    """Return a few names, spread over all of them, the first and the last among them."""
    different = list(dict.fromkeys(names))
    count = min(CONFIRMED_PER_CHUNK, len(different))
    if count == 1:
        return different
    return [different[k * (len(different) - 1) // (count - 1)] for k in range(count)]


def _too_large(model: AnsweringModel, what: str) -> SetupError:
    """Return the error to raise when something does not fit into the memory of the device."""
    return SetupError(
        f"{model.folder}: the memory of {model.device} does not hold {what}. Free memory "
        "there, ask for shorter answers, take a smaller model or dtype, or let this model compute "
        'on the CPU (device = "cpu").'
    )


def stop_tokens(folder: Path, weights: Weights, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's and the model's."""
    ends = {*end_tokens(folder, weights.config)}
    return ends if tokenizer.eos_token_id is None else {*ends, tokenizer.eos_token_id}


def greedy_settings(tokenizer: Any, stops: AbstractSet[int], max_tokens: int) -> GenerationConfig:
    """Return settings of greedy generation; nothing of the folder's own settings is used.

    Args:
        tokenizer: the model's.
        stops: tokens that end an answer; there may be none.
        max_tokens: longest answer.
    """
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stops), 0)
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=next(pad for pad in pads if pad is not None),
        eos_token_id=sorted(stops) or None,
    )
