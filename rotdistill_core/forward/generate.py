"""Greedy answers by plain transformers generation, from a plain checkpoint folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.forward.layerwise import Progress


@torch.no_grad()
def greedy_answers(
    folder: Path,
    prompts: Mapping[str, Sequence[int]],
    most: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, list[int]]:
    """Return the greedy continuation of each prompt, up to `most` tokens, ending with the end-of-turn token where it came.

    What all prompts begin with (the system prompt) is computed once; shorter prompts are padded behind it.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()
    ends = (
        model.generation_config.eos_token_id
        if model.generation_config.eos_token_id is not None
        else tokenizer.eos_token_id
    )
    stops = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops)
    )
    model.generation_config = settings
    shared = shared_prefix_length(list(prompts.values()))
    first = torch.tensor([list(next(iter(prompts.values())))[:shared]], device=device)
    start = model(first, use_cache=True).past_key_values if shared else None
    answers: dict[str, list[int]] = {}
    names = sorted(prompts, key=lambda name: len(prompts[name]))
    # A sliding window counts padding as tokens, so with one only prompts of one length go together.
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    groups = [
        list(group)
        for _, group in groupby(names, lambda name: len(prompts[name]) if sliding else 0)
    ]
    for some in (group[k : k + 64] for group in groups for k in range(0, len(group), 64)):
        progress(len(answers), len(prompts), "questions are answered")
        longest = max(len(prompts[name]) for name in some)
        ids, mask = (
            torch.full((len(some), longest), pad),
            torch.zeros(len(some), longest, dtype=torch.long),
        )
        for row, name in enumerate(some):
            own = list(prompts[name])
            ids[row, :shared], ids[row, longest - len(own) + shared :] = (
                torch.tensor(own[:shared]),
                torch.tensor(own[shared:]),
            )
            mask[row, :shared], mask[row, longest - len(own) + shared :] = 1, 1
        past = copy.deepcopy(start)
        if past is not None:
            past.batch_repeat_interleave(len(some))
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=past,
            generation_config=settings,
        )
        for name, tokens in zip(some, made[:, longest:].tolist(), strict=True):
            answers[name] = tokens[
                : next((j + 1 for j, token in enumerate(tokens) if token in stops), None)
            ]
    return answers
