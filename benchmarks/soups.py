"""Merging five checkpoints beside mergekit, which is installed into a throwaway environment for it: time, memory, error.

    python benchmarks/soups.py MODEL [--rounds 3] [--work FOLDER]        MODEL: a checkpoint folder in bfloat16

The five are MODEL with a little noise on every matrix. Both tools read the same files, memory-mapped and warm, and write one folder of
bfloat16; ours also hashes and syncs it (`ours`), and once more with hash and sync left out (`unsynced`), as mergekit does neither. Times
are of the merge itself, from opened Python to written folder; memory is anonymous, above what the imports hold. Errors are those of the
saved weights against float64, in units of bfloat16's half step (1: rounded right).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.files import Blocks, write_file
from rotdistill_core.testing import pico_output

NOISE, COUNT, DENSITY, T = 1e-2, 5, 0.2, 0.3
EVERY = 4
"""Errors are those of every fourth parameter, from the first."""
METHODS = ("linear", "slerp", "ties")
MERGEKIT = """
import json, sys, time, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
print("ready", flush=True); sys.stdin.readline()
started, cpu = time.perf_counter(), time.process_time()
run_merge(config, sys.argv[2], MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}), flush=True)
"""


def log(text: str) -> None:
    """Tell what is going on, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def environment(folder: Path) -> Path:
    """Return a Python that has mergekit, and everything else from the environment that runs this: same torch, same safetensors."""
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    python = folder / "bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "mergekit"],
        check=True,
    )
    return python


def make(model: Path, work: Path) -> list[Path]:
    """Write the checkpoints and return their folders."""
    weights = open_model(ModelRef(model=str(model))).weights
    folders = []
    for k in range(COUNT):
        maker = torch.Generator().manual_seed(k)

        def noisy(name: str, maker: torch.Generator = maker) -> Tensor:
            W = weights[name].float()
            return (W + NOISE * W.std() * torch.randn(W.shape, generator=maker)).bfloat16()

        folder = work / f"model-{k}"
        made = weights.edit({n: _lazy(weights, n, noisy) for n in weights.entries})
        made.save(
            lambda name, blocks, folder=folder: write_file(folder / name, blocks), torch.bfloat16
        )  # type: ignore[misc]
        folders.append(folder)
    return folders


def _lazy(weights: Weights, name: str, made: Callable[[str], Tensor]) -> Any:
    from rotdistill_core.checkpoint.lazy import LazyTensor

    return LazyTensor(weights.entries[name].shape, torch.bfloat16, lambda: made(name))


def mergekit_config(method: str, base: Path, folders: list[Path]) -> str:
    """Return mergekit's configuration, as YAML (which JSON is)."""
    some = folders[:2] if method == "slerp" else folders
    models = [
        {
            "model": str(f),
            **({} if method == "slerp" else {"parameters": {"weight": 1.0 / len(some)}}),
        }
        for f in some
    ]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if method == "slerp":
        config |= {"base_model": str(some[0]), "parameters": {"t": T}}
    if method == "ties":  # in bfloat16 its differences would be rounded before they are trimmed
        config |= {
            "base_model": str(base),
            "parameters": {"density": DENSITY},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    return json.dumps(config)


def ours(method: str, base: Path, folders: list[Path], out: Path, synced: bool) -> None:
    """Merge once, in a process of its own."""
    from rotdistill_soups import _kl_scorer as rotdistill_soup_judge  # noqa: F401  (imports are not what is timed)
    from rotdistill_soups._ingredient_set import IngredientSet
    from rotdistill_soups.step import Soups

    some = [str(f) for f in (folders[:2] if method == "slerp" else folders)]
    shares = (1 - T, T) if method == "slerp" else ()
    about: Any = {
        "method": "uniform" if method == "linear" else method,
        "weights": shares,
        "density": DENSITY,
    }
    step = Soups(ingredients=tuple(some), only_better=False, **about)
    print("ready", flush=True)
    sys.stdin.readline()
    started, cpu = time.perf_counter(), time.process_time()
    student = open_model(ModelRef(model=str(base)))
    gathering = IngredientSet(
        some,
        student.weights,
        Pair(student, student),
        pico_output(out.parent / "runs"),
        lambda *_: None,
    )
    parts = gathering.all(step.same_basis, None)
    made = step.merged(gathering.base, parts, dtype=torch.bfloat16)

    def plainly(name: str, blocks: Blocks) -> None:
        out.mkdir(exist_ok=True)
        with (out / name).open("wb") as stream:
            for block in blocks:
                stream.write(block)
                del block  # before the next one is made

    made.save(
        (lambda name, blocks: write_file(out / name, blocks)) if synced else plainly, torch.bfloat16
    )
    print(
        json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}),
        flush=True,
    )


def run(command: list[str]) -> dict[str, float]:
    """Run one merge: its seconds on the clock and of the processor, and its peak anonymous bytes above those it had when ready."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin
    assert child.stdout
    watched, peak = psutil.Process(child.pid), [0]
    if child.stdout.readline().strip() != "ready":
        raise SystemExit(f"{command} does not start")

    def anonymous() -> int:
        info = watched.memory_full_info()
        return int(info.rss - info.shared)

    before = anonymous()

    def watch() -> None:
        while child.poll() is None:
            try:
                peak[0] = max(peak[0], anonymous())
            except psutil.Error:
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    told = child.communicate("\n")[0].strip().splitlines()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{command} failed with {child.returncode}")
    return {**json.loads(told[-1]), "peak": float(peak[0] - before), "before": float(before)}


def reference(method: str, base: Weights, views: list[Weights], name: str) -> tuple[Tensor, Tensor]:
    """Return a parameter of the merge in float64, and the mask of entries that are not a matter of taste (equal magnitudes in ties)."""
    X = [view[name].double() for view in (views[:2] if method == "slerp" else views)]
    sure = torch.ones(X[0].shape, dtype=torch.bool)
    if method == "linear":
        return sum(X[1:], X[0]) / len(X), sure
    if method == "slerp":
        cosine = (X[0] * X[1]).sum() / X[0].norm() / X[1].norm()
        angle = torch.acos(cosine.clamp(-1, 1))
        if abs(float(cosine)) > 0.9995:
            return (1 - T) * X[0] + T * X[1], sure
        return (torch.sin((1 - T) * angle) * X[0] + torch.sin(T * angle) * X[1]) / torch.sin(
            angle
        ), sure
    S, deltas = base[name].double(), []
    for x in X:
        size = (x - S).abs()
        k = max(1, int(DENSITY * size.numel()))
        least = size.flatten().kthvalue(size.numel() - k + 1).values
        sure &= size != least
        deltas.append(torch.where(size >= least, x - S, 0.0))
    sign = torch.where(sum(deltas[1:], deltas[0]) >= 0, 1.0, -1.0)
    agree = [d.sign() == sign for d in deltas]
    count = sum((a.double() for a in agree[1:]), agree[0].double())
    return S + sum(
        (d * a for d, a in zip(deltas[1:], agree[1:], strict=True)), deltas[0] * agree[0]
    ) / count.clamp_min(1), sure


def errors(
    method: str, base: Weights, views: list[Weights], made: dict[str, Weights]
) -> dict[str, dict[str, float]]:
    """Return the largest error of each tool and the share of entries that are not the rounded reference."""
    worst: dict[str, list[float]] = {tool: [0.0, 0.0, 0.0] for tool in made}
    total = 0
    for name in list(base.entries)[::EVERY]:
        wanted, sure = reference(method, base, views, name)
        half = torch.exp2(
            wanted.abs().clamp_min(1e-6).log2().floor() - 8
        )  # bfloat16 keeps 8 bits; nearly 0 is no matter
        total += int(sure.sum())
        for tool, view in made.items():
            off = (view[name].double() - wanted).abs() * sure
            worst[tool][0] = max(worst[tool][0], float(off.max()))
            worst[tool][1] = max(worst[tool][1], float((off / half).max()))
            worst[tool][2] += int((view[name] != wanted.bfloat16())[sure].sum())
    return {
        tool: {"largest": w[0], "in half steps": w[1], "not rounded right": w[2] / total}
        for tool, w in worst.items()
    }


def measured(
    method: str, base: Path, folders: list[Path], work: Path, python: Path, rounds: int
) -> dict[str, Any]:
    """Merge in turns and compare."""
    config = work / f"{method}.yaml"
    config.write_text(mergekit_config(method, base, folders))
    worker = [sys.executable, __file__, str(base), "--worker", method, "--work", str(work)]
    commands = {
        "ours": [*worker, "--out", str(work / "ours")],
        "unsynced": [*worker, "--out", str(work / "unsynced"), "--unsynced"],
        "mergekit": [str(python), "-c", MERGEKIT, str(config), str(work / "mergekit")],
    }
    seen: dict[str, list[dict[str, float]]] = {tool: [] for tool in commands}
    for _ in range(rounds):
        for tool, command in commands.items():
            subprocess.run(["rm", "-rf", str(work / tool)], check=True)
            seen[tool].append(run(command))
            last = seen[tool][-1]
            log(
                f"{method}: {tool} {last['seconds']:.1f} s, {last['cpu']:.1f} of the processor, {last['peak'] / 1e6:.0f} MB"
            )
    result = {
        tool: {
            "best seconds": min(r["seconds"] for r in each), "median seconds": statistics.median(r["seconds"] for r in each),
            "processor seconds": min(r["cpu"] for r in each),
            "peak MB": max(r["peak"] for r in each) / 1e6, "imports MB": max(r["before"] for r in each) / 1e6,
        }
        for tool, each in seen.items()
    }  # fmt: skip
    views = [open_model(ModelRef(model=str(f))).weights for f in folders]
    start = open_model(ModelRef(model=str(base))).weights
    made = {
        tool: open_model(ModelRef(model=str(work / tool))).weights for tool in ("ours", "mergekit")
    }
    return {"method": method, **result, "errors": errors(method, start, views, made)}


def ratios(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what is to be at most 1, or a quarter."""
    for tool in ("ours", "unsynced"):
        for key in ("best seconds", "median seconds", "processor seconds"):
            yield f"{tool} / mergekit, {key}", round(found[tool][key] / found["mergekit"][key], 3)
    yield "peak memory", round(found["ours"]["peak MB"] / found["mergekit"]["peak MB"], 3)


def main() -> None:
    """Run everything and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument(
        "--work",
        type=Path,
        help="where the checkpoints are made, and kept; default a temporary folder",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--unsynced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folders = [options.work / f"model-{k}" for k in range(COUNT)]
        ours(options.worker, options.model, folders, options.out, not options.unsynced)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        python = environment(Path(temporary) / "env")
        folders = [work / f"model-{k}" for k in range(COUNT)]
        if not all((folder / "config.json").is_file() for folder in folders):
            log("making the checkpoints")
            folders = make(options.model, work)
        results = []
        for method in options.method or METHODS:
            found = measured(method, options.model, folders, work, python, options.rounds)
            results.append({**found, "ratios": dict(ratios(found))})
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
