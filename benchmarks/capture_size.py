"""Disk and peak memory of whole runs on pico models, by number of texts and by what is captured.

    python benchmarks/capture_size.py [--texts 200 2000] [--width 256]

Each run is a process of its own: capture, procrustes, basis-fold and fidelity, from blurbs of 20
words and three held-out questions. The teacher has 3 layers, and the student 2 of half its width.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rotdistill_core import run
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.testing import pico_folder, pico_head, pico_texts

WORDS = 50
"""Words that blurbs are made of."""
STEPS = """
[[step]]
use = "residuals"
store = "{store}"

[[step]]
id = "basis"
use = "procrustes"
whiten = "full"
ridge = 0.1

[[step]]
id = "fold"
use = "basis-fold"
mode = "canonical"

[[step]]
use = "fidelity"

[variants]
base = []
rotated = ["basis", "fold"]
"""
COLUMNS = ("texts", "store", "captured, MB", "planned, MB", "whole run, MB", "peak memory, MB")


def main() -> None:
    """Run each setting in a process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--width", type=int, default=256, help="of the teacher")
    parser.add_argument("--one", nargs=2, metavar=("TEXTS", "STORE"), help="run this setting here")
    options = parser.parse_args()
    if options.one:
        print(measured(int(options.one[0]), options.one[1], options.width))
        return
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for store in ("rows", "moments"):
        for texts in options.texts:
            one = ["--one", str(texts), store, "--width", str(options.width)]
            done = subprocess.run(
                [sys.executable, __file__, *one], check=True, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout.splitlines()[-1], flush=True)


def measured(texts: int, store: str, width: int) -> str:
    """Carry out one run; return its line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts", texts)
        pico_folder(
            folder / "teacher",
            seed=9,
            num_hidden_layers=3,
            hidden_size=width,
            num_attention_heads=8,
        )
        pico_folder(folder / "student", seed=1, hidden_size=width // 2)
        head = pico_head(teacher=folder / "teacher", student=folder / "student")
        recipe = folder / "recipe.toml"
        recipe.write_text(head + STEPS.format(store=store), encoding="utf-8")
        os.chdir(folder)
        loaded = load_recipe(recipe)
        planned = build_plan(loaded, RUNS_FOLDER, this_machine(RUNS_FOLDER), False, lambda _: None)
        [capture] = [line for line in planned.lines if line.use == "residuals"]
        ended = run(loaded)
        captured = sum(bytes_below(ended.folder / part) for part in ("shards", "sums"))
        whole = bytes_below(ended.folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = (captured, capture.disk_bytes, whole, peak)
    return f"| {texts} | {store} | {' | '.join(f'{size / 1e6:.1f}' for size in sizes)} |"


def write_texts(folder: Path, count: int) -> None:
    """Write so many different blurbs to the index of a pico run."""
    pico_texts(folder)
    draw = random.Random(0)  # noqa: S311  texts, no secrets

    def sentence(words: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(words))

    lines = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    for k in range(count):
        lines.append(f"en-{k}\ten\tplace {k}\tland\t{sentence(6)}\t{sentence(14)}")
    (folder / "index.tsv").write_text("\n".join([*lines, ""]), encoding="utf-8")


def bytes_below(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
