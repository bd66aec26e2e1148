"""Greedy answers by plain transformers generation.

Prompts are answered in chunks, and a chunk in batches. Which prompts go together follows from the
prompts alone, so a chunk that is made again holds the same tokens: a batch of another shape rounds
differently, and a greedy answer may then take another turn.

Some answers of each chunk are confirmed by a forward pass of one text alone, without padding and
cache: each of their tokens must be its best one, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.models import end_tokens, load_tokenizer, require_known_tokens
from rotdistill_core.data.batching import ANSWERS_AT_ONCE, ANSWERS_PER_CHUNK
from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.whole import has_window_below, is_beyond_rope_limit, whole_model
from rotdistill_core.plugin.engine import Answer, Asked

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights

ROUNDING = 1e-3
"""Share of the largest logit by which a token may be below the best one; batches round."""
ROUNDING_STEPS = 8
"""Steps of the dtype that it may be below, where they are coarser."""
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

    The prefix that all prompts of a chunk share (the system prompt) is computed once.

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
        """Return the names of the prompts of each chunk, short prompts first."""
        names = sorted(asked, key=lambda name: len(asked[name].prompt))
        return [names[k : k + ANSWERS_PER_CHUNK] for k in range(0, len(names), ANSWERS_PER_CHUNK)]

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
        self._asked = asked
        self._shared = shared_prefix_length([list(each.prompt) for each in asked.values()])
        self.__dict__.pop("_prefix_cache", None)
        answers: dict[str, list[int]] = {}
        first_of_batches: list[str] = []
        for group in self._groups(list(asked)):
            waiting = group
            while waiting:
                batch = waiting[: self.at_once]
                made = self._answers_that_fit(batch)
                if made is None:
                    self.at_once = self._half_of(batch)
                    continue
                answers |= made
                for name in batch:
                    yield name, self._answer(made[name])
                # The shortest prompt of a batch has the most padding.
                first_of_batches.append(batch[0])
                waiting = waiting[len(batch) :]
        for name in _some_of([*first_of_batches, list(asked)[-1]]):
            self._confirm(name, answers[name])

    def _answer(self, tokens: list[int]) -> Answer:
        return Answer(tokens, "stop" if tokens[-1] in self.model.stops else "length")

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield the prompts that may share a batch.

        A sliding window counts padding as tokens: with one, they have one length. Prompts beyond
        the limit of the rotary tables have other tables than those below.
        """
        asked = self._asked
        longest = max(len(each.prompt) + each.max_tokens for each in asked.values())
        one_length = has_window_below(self._loaded, longest)

        def group(name: str) -> tuple[int, bool, int]:
            length = len(asked[name].prompt) if one_length else 0
            return length, self._is_beyond(name), asked[name].max_tokens

        for _, members in groupby(names, group):
            yield list(members)

    def _is_beyond(self, name: str) -> bool:
        asked = self._asked[name]
        where = f"{self.model.folder}: text {name!r}"
        return is_beyond_rope_limit(self._loaded, len(asked.prompt), asked.max_tokens, where)

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
        if len(names) == 1:
            asked = self._asked[names[0]]
            raise _too_large(
                self.model,
                f"one prompt of {len(asked.prompt)} tokens with an answer of up to "
                f"{asked.max_tokens}",
            )
        half = len(names) // 2
        self.log(
            f"{self.model.folder}: the memory of {self.model.device} does not hold {len(names)} "
            f"answers at once; it goes on with {half}."
        )
        return half

    @cached_property
    def _loaded(self) -> Any:
        disable_progress_bar()
        model = self.model
        try:
            return whole_model(model.weights, model.device, model.dtype)
        except torch.OutOfMemoryError as error:
            raise _too_large(model, "the model") from error

    @cached_property
    @torch.no_grad()
    def _prefix_cache(self) -> Any:
        """Keys and values of the tokens that all prompts share; None if they share none."""
        if not self._shared:
            return None
        tokens = list(next(iter(self._asked.values())).prompt)[: self._shared]
        return self._loaded(
            torch.tensor([tokens], device=self.model.device), use_cache=True
        ).past_key_values

    @torch.no_grad()
    def _answers(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the answers to a batch."""
        asked = [self._asked[name] for name in names]
        prompts = [each.prompt for each in asked]
        settings = greedy_settings(self.model.tokenizer, self.model.stops, asked[0].max_tokens)
        # Beyond the limit of the rotary tables, the prefix alone would have other ones.
        is_shared = not self._is_beyond(names[0])
        shared = self._shared if is_shared else 0
        ids, mask = _pad_after_prefix(prompts, shared, settings.pad_token_id)
        cache = copy.deepcopy(self._prefix_cache) if is_shared else None
        if cache is not None:
            cache.batch_repeat_interleave(len(names))
        generated = self._loaded.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            past_key_values=cache,
            generation_config=settings,
        )
        continuations = generated[:, ids.shape[1] :].tolist()
        return {
            name: _until_stop(tokens, self.model.stops)
            for name, tokens in zip(names, continuations, strict=True)
        }

    def _confirm(self, name: str, answer: Sequence[int]) -> None:
        try:
            problem = unconfirmed_token(self._loaded, self._asked[name].prompt, answer)
        except torch.OutOfMemoryError as error:
            tokens = len(self._asked[name].prompt) + len(answer)
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


def _until_stop(tokens: list[int], stops: AbstractSet[int]) -> list[int]:
    """Return the tokens up to and with the first stop token."""
    for j, token in enumerate(tokens):
        if token in stops:
            return tokens[: j + 1]
    return tokens
