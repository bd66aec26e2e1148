"""Time of a teacher's answers: with slots that are filled again, and in lockstep as before.

    python benchmarks/answers.py RECIPE [--questions N] [--tokens T] [--pairs K]

The questions are those of the recipe's texts, the model is its teacher. "Lockstep" is
`model.generate` of transformers in batches of 64, short prompts first, with the keys and values of
the shared system prompt computed once: how answers were made before there were slots. The two take
turns, and the last line has the ratio of the best times and the median of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.tokenization import prompt_tokens, shared_prefix_length
from rotdistill_core.forward.generate import (
    AnsweringModel,
    AnswerWriter,
    greedy_settings,
    unconfirmed_token,
)
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.recipe.load import load_recipe

AT_ONCE = 64
Prompts = Mapping[str, Sequence[int]]
Answers = dict[str, list[int]]


class Lockstep:
    """Answers in batches, each until its longest answer ends."""

    def __init__(self, model: AnsweringModel, tokens: int) -> None:
        self.model = model
        self.loaded: Any = whole_model(model.weights, model.device, model.dtype)
        self.settings = greedy_settings(model.tokenizer, model.stops, tokens)
        self.loaded.generation_config = self.settings

    @torch.no_grad()
    def answers(self, prompts: Prompts) -> Answers:
        """Return the answer to each prompt."""
        shared = shared_prefix_length(list(prompts.values()))
        prefix = torch.tensor([list(next(iter(prompts.values())))[:shared]])
        cache = self.loaded(prefix.to(self.model.device), use_cache=True).past_key_values
        names = sorted(prompts, key=lambda name: len(prompts[name]))
        answers: Answers = {}
        for k in range(0, len(names), AT_ONCE):
            batch = names[k : k + AT_ONCE]
            ids, mask = self._padded([prompts[name] for name in batch], shared)
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(batch))
            made = self.loaded.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                past_key_values=own,
                generation_config=self.settings,
            )
            rows = made[:, ids.shape[1] :].tolist()
            answers |= {name: self._ended(row) for name, row in zip(batch, rows, strict=True)}
        return answers

    def _padded(self, prompts: Sequence[Sequence[int]], shared: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, S], with padding between the shared prefix and the rest."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.settings.pad_token_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor(list(prompt))
            rest = longest - len(prompt) + shared
            ids[row, :shared] = tokens[:shared]
            ids[row, rest:] = tokens[shared:]
            mask[row, :shared] = 1
            mask[row, rest:] = 1
        return ids, mask

    def _ended(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self.model.stops]
        return row[: ends[0] + 1] if ends else row


def by_slots(writer: AnswerWriter, prompts: Prompts, tokens: int) -> Answers:
    """Return the answer to each prompt, as runs make them."""
    asked = {name: Asked(tuple(prompt), tokens) for name, prompt in prompts.items()}
    answers: Answers = {}
    for names in writer.chunks(asked):
        for name, answer in writer.answers({name: asked[name] for name in names}):
            answers[name] = list(answer.tokens)
    return answers


def timed(work: Callable[[], Answers]) -> tuple[Answers, float, float]:
    """Return what a call returns, its wall time and its processor time in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    answers = work()
    return answers, time.perf_counter() - wall, time.process_time() - processor


def prompts_of(recipe: Path, count: int) -> tuple[AnsweringModel, Answers]:
    """Return the teacher of a recipe, and the prompts of its first questions by id."""
    loaded = load_recipe(recipe)
    teacher = open_model(loaded.recipe.teacher)
    conversations, style = read_conversations(loaded.recipe.samples, recipe.parent)
    asked = [each for each in conversations if not each.split.outside_domain][:count]
    chat = ChatFormat.of(teacher.tokenizer, "2025-07-01")
    prompts = prompt_tokens(teacher.tokenizer, style, asked, chat)
    return AnsweringModel.of(teacher), prompts


def main() -> None:
    """Print a line for each pair, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    model, prompts = prompts_of(options.recipe, options.questions)
    lockstep, writer = Lockstep(model, options.tokens), AnswerWriter(model, print)
    first = dict(list(prompts.items())[:1])
    lockstep.answers(first)  # both have loaded and computed once
    by_slots(writer, first, options.tokens)
    walls: list[tuple[float, float]] = []
    for _ in range(options.pairs):
        old, old_wall, old_processor = timed(lambda: lockstep.answers(prompts))
        new, new_wall, new_processor = timed(lambda: by_slots(writer, prompts, options.tokens))
        walls.append((old_wall, new_wall))
        print(
            f"lockstep {old_wall:.1f} s (processor {old_processor:.1f}), "
            f"slots {new_wall:.1f} s (processor {new_processor:.1f})",
            flush=True,
        )
    others = [name for name in prompts if old[name] != new[name]]
    unconfirmed = [
        name for name in others if unconfirmed_token(lockstep.loaded, prompts[name], new[name])
    ]
    tokens = sum(map(len, new.values()))
    best = min(wall for _, wall in walls) / min(wall for wall, _ in walls)
    median = statistics.median(new_wall / old_wall for old_wall, new_wall in walls)
    print(
        f"{len(prompts)} answers, {tokens} tokens; {len(others)} differ, "
        f"{len(unconfirmed)} of them by more than rounding; ratio {best:.2f}, median {median:.2f}"
    )


if __name__ == "__main__":
    main()
