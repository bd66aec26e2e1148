"""Greedy answers by plain transformers generation, from a plain checkpoint folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.data.batching import ANSWERS_AT_ONCE
from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.forward.layerwise import Progress


@torch.no_grad()
def greedy_answers(
    folder: Path,
    prompts: Mapping[str, Sequence[int]],
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, list[int]]:
    """Return the greedy continuation of each prompt.

    The prefix that all prompts share (the system prompt) is computed once.

    Args:
        folder: the checkpoint.
        prompts: token ids by name; at least one prompt.
        max_tokens: most tokens of an answer.
        device: where to compute.
        dtype: the dtype to compute in.
        progress: called before each batch.

    Returns:
        The tokens of each answer, up to and with the first end-of-turn token.
    """
    disable_progress_bar()
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()
    stops = _stop_tokens(model, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops)
    )
    model.generation_config = settings
    shared = shared_prefix_length(list(prompts.values()))
    prefix = torch.tensor([list(next(iter(prompts.values())))[:shared]], device=device)
    prefix_cache = model(prefix, use_cache=True).past_key_values if shared else None
    answers: dict[str, list[int]] = {}
    for names in _batches(prompts, one_length=_has_sliding_window(model)):
        progress(len(answers), len(prompts), "questions are answered")
        ids, mask = _pad_after_prefix([prompts[name] for name in names], shared, pad)
        cache = copy.deepcopy(prefix_cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(names))
        generated = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            generation_config=settings,
        )
        continuations = generated[:, ids.shape[1] :].tolist()
        for name, tokens in zip(names, continuations, strict=True):
            answers[name] = _until_stop(tokens, stops)
    return answers


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's and the model's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}


def _has_sliding_window(model: Any) -> bool:
    """Whether a layer attends through a sliding window."""
    return "sliding_attention" in (getattr(model.config, "layer_types", None) or ())


def _batches(prompts: Mapping[str, Sequence[int]], one_length: bool) -> Iterator[list[str]]:
    """Yield the names of prompts that are answered together, short prompts first.

    A sliding window counts padding as tokens: with one, a batch holds prompts of one length only.
    """

    def group(name: str) -> int:
        return len(prompts[name]) if one_length else 0

    names = sorted(prompts, key=lambda name: len(prompts[name]))
    for _, members in groupby(names, group):
        same = list(members)
        for k in range(0, len(same), ANSWERS_AT_ONCE):
            yield same[k : k + ANSWERS_AT_ONCE]


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
