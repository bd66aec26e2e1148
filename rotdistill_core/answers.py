"""Greedy answers by plain transformers generation, from a plain checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rotdistill_core.models import load_tokenizer


@torch.no_grad()
def greedy(
    folder: Path, prompts: Mapping[str, Sequence[int]], most: int, device: torch.device, dtype: torch.dtype, batch: int = 40
) -> dict[str, list[int]]:
    """Return the greedy continuation of each prompt, up to `most` tokens, ending with the end-of-turn token where it came."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    model.to(device).eval()
    ends = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else tokenizer.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends)
    stops.add(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops))
    model.generation_config = settings
    answers: dict[str, list[int]] = {}
    names = sorted(prompts, key=lambda name: len(prompts[name]))
    for k in range(0, len(names), batch):
        some = names[k : k + batch]
        longest = max(len(prompts[name]) for name in some)
        ids = torch.tensor([[pad] * (longest - len(prompts[name])) + list(prompts[name]) for name in some], device=device)
        mask = torch.tensor([[0] * (longest - len(prompts[name])) + [1] * len(prompts[name]) for name in some], device=device)
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
        for name, tokens in zip(some, made, strict=True):
            end = next((j for j, token in enumerate(tokens) if token in stops), None)
            answers[name] = tokens if end is None else tokens[: end + 1]
    return answers
