"""Merging the real fine-tunes of recipes/ingredients.toml in the wrong basis and in the right one.

    python benchmarks/merging.py [--only scrambled] [--only fisher] [--texts 16]

Where `rotdistill run recipes/ingredients.toml` was run, in the same folder. `scrambled`: the second fine-tune is put into a random basis
of everything that is free in it; its merge is refused, and aligned first it must give the soup of the unscrambled three (KL between the
two soups on held-out answers). `fisher`: all three in one random basis of the stream, merged by the Fisher information measured there,
and by that measured before the fold; held-out KL to the teacher.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rotdistill_gathering import Gathering
from rotdistill_mixing import Ingredient, weighted
from rotdistill_predictions import compare
from rotdistill_soup_fisher import fisher
from rotdistill_soup_judge import Judge
from rotdistill_soups import Soups

from rotdistill_core.errors import RecipeError
from rotdistill_core.maps import Rotation
from rotdistill_core.models import Pair, open_model
from rotdistill_core.pipeline import Run
from rotdistill_core.recipe import ModelRef, load
from rotdistill_core.samples import Samples
from rotdistill_core.testing import Quiet, pico_out, random_rotation, save_folder, scramble
from rotdistill_core.walk import Walk
from rotdistill_core.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("run:ingredients/first", "run:ingredients/second", "run:ingredients/third")
CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def say(text: str) -> None:
    """Tell when something is done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def between(one: Weights, two: Weights, judge: Judge) -> float:
    """Return the KL from one model to another on the judged answers, nats per token."""
    states = []
    for view in (one, two):
        walk = Walk(view, judge.layout, CPU, torch.float32)
        for _ in walk:
            walk.run()
        states.append(walk.states[judge.rows])
    return float(compare(one, states[0], two, states[1], judge.targets, judge.tokens).kl.mean())


def scrambled(pair: Pair, judge: Judge, root: Path) -> dict[str, Any]:
    """Merge three fine-tunes of which the second stands in a random basis."""
    second = open_model(ModelRef(model=NAMES[1]))
    save_folder(scramble(second.weights, 3)[0], second.folder, root / "scrambled")
    names, base = (NAMES[0], str(root / "scrambled"), NAMES[2]), pair.student.weights
    try:
        Gathering(names, base, pair, pico_out(root / "runs", "refused"), quiet).all("require", None)
        told = "it was merged"
    except RecipeError as error:
        told = str(error).replace(str(root), "")
    say("refused")
    soups = {}
    for what, some in (("plain", NAMES), ("aligned", names), ("blind", names)):
        started, step = time.monotonic(), Soups(ingredients=some, only_better=False)
        gathering = Gathering(some, base, pair, pico_out(root / "runs", what), quiet)
        parts = gathering.all("align" if what == "aligned" else "ignore", None)
        soups[what] = step.merged(gathering.base, parts)
        say(f"{what}: {time.monotonic() - started:.0f} s")
    figures = {f"KL from the plain soup to the {what} one": between(soups["plain"], soups[what], judge) for what in ("aligned", "blind")}
    return {"refused": told, **figures}


def information(pair: Pair, samples: Samples, judge: Judge, root: Path, texts: int) -> dict[str, float]:
    """Merge by Fisher information that was measured in the basis of the merge, and in another."""
    models = [open_model(ModelRef(model=name)).weights for name in NAMES]
    here, there = (Rotation(Q) for Q in (random_rotation(pair.student.width), torch.eye(pair.student.width, dtype=torch.float64)))
    step = Soups(ingredients=NAMES, method="fisher", only_better=False)
    base = pair.student.weights.fold({"residual": here})
    parts = [Ingredient(name, model.fold({"residual": here}), {}) for name, model in zip(NAMES, models, strict=True)]
    found = {"uniform": judge(Soups(ingredients=NAMES, only_better=False).merged(base, parts)).mean}
    for what, basis in (("measured where it is merged", here), ("measured before the fold", there)):
        F = [
            fisher(model.fold({"residual": basis}), samples.layout, texts, True, 0, CPU, torch.float32, pico_out(root / "runs", what),
                   f"fisher_{k}", quiet)
            for k, model in enumerate(models)
        ]  # fmt: skip

        def mixer(name: str, F: list[Any] = F) -> Any:
            files = [each[name].read() for each in F]
            return weighted([lambda a, b: files[0][a:b] * 0, *(lambda a, b, each=each: each[a:b] for each in files)])

        found[f"Fisher {what}"] = judge(step.merged(base, parts, mixer)).mean
        say(f"Fisher {what}: {found[f'Fisher {what}']:.4f}")
    return found


def main() -> None:
    """Run what is asked for and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["scrambled", "fisher"], action="append")
    parser.add_argument("--texts", type=int, default=16, help="fit texts for the Fisher information")
    options = parser.parse_args()
    run = Run(load(ROOT / "recipes/soup.toml"), Path("runs"), Quiet(), quiet)
    pair, samples = run.pair, run.samples()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        judge, result = Judge(pair, samples, "heldout", pico_out(root / "runs", "judge"), quiet), dict[str, Any]()
        if "scrambled" in (options.only or ["scrambled"]):
            result["scrambled"] = scrambled(pair, judge, root)
        if "fisher" in (options.only or ["fisher"]):
            result["fisher, held-out KL"] = information(pair, samples, judge, root, options.texts)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
