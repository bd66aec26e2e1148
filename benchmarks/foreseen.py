"""What `plan` foresees beside what a run then takes: anonymous memory at its worst, and bytes written.

    python benchmarks/foreseen.py RECIPE [KEY=VALUE ...]
    python benchmarks/foreseen.py --small

`--small` makes random models with the vocabulary of real ones, and three recipes for them, in a folder of its own. Mapped pages of
weight files are not counted: they go again where memory is short.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.execution.executor import Executor
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.plugin.markers import hookimpl
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder, pico_texts, save_folder

TEXTS = {"index": "index.tsv", "style": "style.md", "heldout": "heldout.tsv", "guard": "guard.tsv"}
SECONDS = 0.02
"""Between two looks at the memory."""


class Watch(SilentObserver):
    """Looks at this process's memory while a run goes on, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peaks = "teacher's answers", dict[str, int]()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            found = process.memory_info()
            self.peaks[self.now] = max(self.peaks.get(self.now, 0), found.rss - found.shared)
            time.sleep(SECONDS)

    @hookimpl
    def before_step(self, step_id: str, variant: str) -> None:
        """See `Specs.before_step`."""
        self.now = f"{step_id} {variant}"

    @hookimpl
    def after_step(self, step_id: str, variant: str) -> None:
        """See `Specs.after_step`."""
        self.now = f"behind {step_id} {variant}"


def disk(folder: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def small(folder: Path) -> list[Path]:
    """Write three recipes: a cut student in float32, the same in bfloat16, and two models of different widths."""
    pico_texts(folder / "texts", blurbs=60, questions=6)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab_size": 49152,
    }
    wide = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 65536,
    }
    thin = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 65536,
    }
    for name, size in (("a", sizes), ("b", wide), ("c", thin)):
        pico_folder(folder / name, "llama", 0, **size)
    model = open_model(ModelRef(model=str(folder / "a")))
    save_folder(model.weights, model.folder, folder / "h", torch.bfloat16)
    steps = ['use = "residuals"', 'id = "head"\nuse = "lm-head-ridge"', 'use = "fidelity"']
    basis = [
        'id = "basis"\nuse = "procrustes"',
        'id = "fold"\nuse = "basis-fold"\nmode = "canonical"',
        'id = "refit"\nuse = "writer-refit"',
    ]
    cut = ['use = "chop"\nlayers = 4', steps[0], *basis, *steps[1:], 'use = "answers"']
    made = []
    for name, teacher, student, chain, full in (
        ("cut", "a", "a", cut, ["basis", "fold", "refit", "head", "answers"]),
        ("cut-bfloat16", "h", "h", cut, ["basis", "fold", "refit", "head", "answers"]),
        ("two-widths", "b", "c", steps, ["head"]),
    ):
        models = (
            f'[teacher]\nmodel = "{folder / teacher}"\n[student]\nmodel = "{folder / student}"\n'
        )
        texts = "".join(f'{key} = "texts/{file}"\n' for key, file in TEXTS.items())
        body = "".join(f"[[step]]\n{step}\n" for step in chain)
        made.append(folder / f"{name}.toml")
        head = f'name = "{name}"\nobservers = []\n{models}[samples]\nanswer_tokens = 8\n{texts}'
        made[-1].write_text(f"{head}{body}[variants]\nbase = []\nfull = {full}\n", encoding="utf-8")
    return made


def compare_estimates(path: Path, sets: list[str], root: Path) -> None:
    """Plan a recipe, carry it out in a folder of runs, and print both."""
    loaded = load_recipe(path, sets)
    planned: Plan = build_plan(loaded, root, this_machine(root))
    watch, before = Watch(), disk(root)
    Executor(loaded, root, watch, lambda *_: None).go()
    told: dict[str, Any] = {
        f"{line.id} {' '.join(line.variants[:1])}".strip(): line for line in planned.todo
    }
    print(f"{path.stem:<28} {'foreseen, GB':>13} {'measured, GB':>13}")
    for name, peak in watch.peaks.items():
        if name in told:
            print(
                f"{name:<28} {(told[name].ram_bytes + planned.around) / 1e9:13.2f} {peak / 1e9:13.2f}"
            )
    for what, one, two in (
        ("peak memory", planned.peak["ram_bytes"], max(watch.peaks.values())),
        ("disk", planned.peak["disk_bytes"], disk(root) - before),
    ):
        print(f"{what:<28} {one / 1e9:13.2f} {two / 1e9:13.2f}   {one / two - 1:+.0%}", flush=True)


def main() -> None:
    """Compare for one recipe, or for the three small ones, each in a process of its own: memory that one has had stays its own."""
    if sys.argv[1:] != ["--small"]:
        compare_estimates(Path(sys.argv[1]), sys.argv[2:], Path("runs"))
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in small(Path(folder)):
            subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), str(path)], cwd=folder, check=True
            )


if __name__ == "__main__":
    main()
