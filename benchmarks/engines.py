"""Answers of a recipe's engine beside those of transformers: time, and how far they agree.

    python benchmarks/engines.py RECIPE [--set engine.KEY=VALUE ...] [--questions N] [--tokens T]

The questions are the recipe's first, the prompts those of its teacher. Agreement is the share of
answers that are equal, and the mean share of an answer's tokens before the first other one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from answers import by_slots, prompts_of

from rotdistill_core.forward.generate import AnsweringModel, AnswerWriter
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.plugin.registry import connected_engine
from rotdistill_core.recipe.load import load_recipe


def common(one: Sequence[int], two: Sequence[int]) -> float:
    """Return the share of the longer answer's tokens before the first that differs."""
    longest = max(len(one), len(two))
    differing = (k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differing, min(len(one), len(two))) / longest


def report(
    model: AnsweringModel, mine: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]
) -> None:
    """Print how far two engines agree, and the first answers that differ."""
    shares = {name: common(mine[name], theirs[name]) for name in mine}
    equal = sum(share == 1 for share in shares.values())
    mean = sum(shares.values()) / len(shares)
    print(f"equal answers {equal} of {len(shares)}; tokens before the first other one {mean:.0%}")
    for name in [name for name, share in shares.items() if share < 1][:2]:
        print(f"{name}\n  transformers: {model.tokenizer.decode(list(mine[name]))!r}")
        print(f"  engine:       {model.tokenizer.decode(list(theirs[name]))!r}")


def main() -> None:
    """Print the times of both engines, and how far they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    loaded = load_recipe(options.recipe, options.set)
    model, prompts = prompts_of(options.recipe, options.questions)
    asked = {name: Asked(tuple(prompt), options.tokens) for name, prompt in prompts.items()}
    writer = AnswerWriter(model, print)
    by_slots(writer, dict(list(prompts.items())[:1]), 1)  # loads the model
    started = time.perf_counter()
    mine = by_slots(writer, prompts, options.tokens)
    between = time.perf_counter()
    engine = connected_engine(loaded.engine, model, print)
    theirs = {name: answer.tokens for name, answer in engine.answers(asked)}
    ended = time.perf_counter()
    print(f"transformers {between - started:.1f} s, {engine.about} {ended - between:.1f} s")
    report(model, mine, theirs)


if __name__ == "__main__":
    main()
