"""Merge five checkpoints, compared with mergekit in a throwaway environment: time, memory, error.

    python benchmarks/soups.py MODEL [--rounds 3] [--work FOLDER]

MODEL is a checkpoint folder in bfloat16. The five are MODEL with a little noise on every matrix.
Both tools read the same files, memory-mapped and warm, and write one folder of bfloat16. Ours also
hashes and syncs it (`ours`); a second run leaves both out (`unsynced`), as mergekit does. Times are
of the merge itself, from opened Python to written folder. Memory is anonymous, above what the
imports hold. Errors are those of the saved weights against float64, in units of bfloat16's half
step (1: rounded right).
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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.files import Blocks, write_file
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import pico_output

NOISE = 1e-2
COUNT = 5
DENSITY = 0.2
T = 0.3
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
options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
run_merge(config, sys.argv[2], options)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)
"""


def log(text: str) -> None:
    """Report progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def environment(folder: Path) -> Path:
    """Return a Python that has mergekit, and all else from the environment that runs this."""
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "ours.pth").write_text("\n".join(packages))
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "mergekit"], check=True)
    return python


def make_checkpoints(model: Path, work: Path) -> list[Path]:
    """Write the checkpoints and return their folders."""
    weights = open_model(ModelRef(model=str(model))).weights
    folders = []
    for k in range(COUNT):
        generator = torch.Generator().manual_seed(k)
        noisy = {
            name: LazyTensor(entry.shape, torch.bfloat16, partial(_noisy, entry, generator))
            for name, entry in weights.entries.items()
        }
        folder = work / f"model-{k}"
        weights.edit(noisy).save(partial(_write_synced, folder), torch.bfloat16)
        folders.append(folder)
    return folders


def _noisy(entry: LazyTensor, generator: torch.Generator) -> Tensor:
    W = entry.read().float()
    return (W + NOISE * W.std() * torch.randn(W.shape, generator=generator)).bfloat16()


def _write_synced(folder: Path, name: str, blocks: Blocks) -> None:
    write_file(folder / name, blocks)


def _write_plainly(folder: Path, name: str, blocks: Blocks) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("wb") as stream:
        for block in blocks:
            stream.write(block)
            del block  # before the next one is made


def mergekit_config(method: str, base: Path, folders: Sequence[Path]) -> str:
    """Return mergekit's configuration, as YAML (which JSON is)."""
    if method == "slerp":
        return json.dumps(
            {
                "merge_method": method,
                "models": [{"model": str(folder)} for folder in folders[:2]],
                "base_model": str(folders[0]),
                "parameters": {"t": T},
            }
        )
    weight = {"weight": 1.0 / len(folders)}
    models = [{"model": str(folder), "parameters": weight} for folder in folders]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if method == "ties":  # in bfloat16 its differences would be rounded before they are trimmed
        config |= {
            "base_model": str(base),
            "parameters": {"density": DENSITY},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    return json.dumps(config)


def merge_with_ours(
    method: str, base: Path, folders: Sequence[Path], out: Path, synced: bool
) -> None:
    """Merge once, in a process of its own."""
    # Imports are not timed.
    from rotdistill_soups._ingredient_set import bring_together  # noqa: PLC0415
    from rotdistill_soups._ingredients import open_ingredients  # noqa: PLC0415
    from rotdistill_soups._merge import merge  # noqa: PLC0415
    from rotdistill_soups._method import merge_options  # noqa: PLC0415
    from rotdistill_soups.step import Soups  # noqa: PLC0415

    names = tuple(str(folder) for folder in (folders[:2] if method == "slerp" else folders))
    step = Soups(
        ingredients=names,
        method="uniform" if method == "linear" else method,  # type: ignore[arg-type]
        weights=(1 - T, T) if method == "slerp" else (),
        density=DENSITY,
        require_improvement=False,
    )
    print("ready", flush=True)
    sys.stdin.readline()
    started, cpu = time.perf_counter(), time.process_time()
    student = open_model(ModelRef(model=str(base)))
    output = pico_output(out.parent / "runs")
    opened = open_ingredients(names, student.weights, Pair(student, student), output)
    together = bring_together(opened, step.same_basis, None, output, lambda *_: None)
    merged = merge(
        together.base,
        together.ingredients,
        merge_options(step, len(names)),
        dtype=torch.bfloat16,
    )
    write = _write_synced if synced else _write_plainly
    merged.save(partial(write, out), torch.bfloat16)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)


def run(command: Sequence[str]) -> dict[str, float]:
    """Run one merge and return its seconds on the clock and of the processor, and its memory.

    `before` is the anonymous memory when it was ready, `peak` the most above that, in bytes.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin
    assert child.stdout
    process = psutil.Process(child.pid)
    if child.stdout.readline().strip() != "ready":
        raise SystemExit(f"{command} does not start")
    before = _anonymous_bytes(process)
    peaks = [0]

    def watch() -> None:
        while child.poll() is None:
            try:
                peaks.append(_anonymous_bytes(process))
            except psutil.Error:
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = child.communicate("\n")[0].strip().splitlines()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{command} failed with {child.returncode}")
    return {**json.loads(lines[-1]), "peak": float(max(peaks) - before), "before": float(before)}


def _anonymous_bytes(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return int(info.rss - info.shared)


def reference(
    method: str, base: Weights, views: Sequence[Weights], name: str
) -> tuple[Tensor, Tensor]:
    """Return a parameter of the merge in float64, and the mask of entries that are determined.

    In TIES, entries of equal magnitude may be trimmed or kept.
    """
    X = [view[name].double() for view in views]
    everywhere = torch.ones(X[0].shape, dtype=torch.bool)
    if method == "linear":
        return sum(X[1:], X[0]) / len(X), everywhere
    if method == "slerp":
        return _slerp(X[0], X[1]), everywhere
    return _ties(base[name].double(), X)


def _slerp(A: Tensor, B: Tensor) -> Tensor:
    cosine = (A * B).sum() / A.norm() / B.norm()
    if abs(float(cosine)) > 0.9995:
        return (1 - T) * A + T * B
    angle = torch.acos(cosine.clamp(-1, 1))
    return (torch.sin((1 - T) * angle) * A + torch.sin(T * angle) * B) / torch.sin(angle)


def _ties(S: Tensor, X: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    determined = torch.ones(S.shape, dtype=torch.bool)
    deltas = []
    for x in X:
        size = (x - S).abs()
        kept = max(1, int(DENSITY * size.numel()))
        least = size.flatten().kthvalue(size.numel() - kept + 1).values
        determined &= size != least
        deltas.append(torch.where(size >= least, x - S, 0.0))
    sign = torch.where(sum(deltas[1:], deltas[0]) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(S), torch.zeros_like(S)
    for delta in deltas:
        agree = delta.sign() == sign
        total += delta * agree
        count += agree.double()
    return S + total / count.clamp_min(1), determined


def errors(
    method: str, base: Weights, views: Sequence[Weights], merged: Mapping[str, Weights]
) -> dict[str, dict[str, float]]:
    """Return the largest error of each tool, and the share of entries that are rounded wrong."""
    found = {
        tool: {"largest": 0.0, "in half steps": 0.0, "not rounded right": 0.0} for tool in merged
    }
    total = 0
    for name in list(base.entries)[::EVERY]:
        wanted, determined = reference(method, base, views, name)
        total += int(determined.sum())
        # bfloat16 keeps 8 bits. Entries that are nearly 0 do not matter.
        half_step = torch.exp2(wanted.abs().clamp_min(1e-6).log2().floor() - 8)
        for tool, view in merged.items():
            off = (view[name].double() - wanted).abs() * determined
            wrong = (view[name] != wanted.bfloat16())[determined]
            of_tool = found[tool]
            of_tool["largest"] = max(of_tool["largest"], float(off.max()))
            of_tool["in half steps"] = max(of_tool["in half steps"], float((off / half_step).max()))
            of_tool["not rounded right"] += int(wrong.sum())
    for of_tool in found.values():
        of_tool["not rounded right"] /= total
    return found


def measure(
    method: str,
    base: Path,
    folders: Sequence[Path],
    work: Path,
    commands: Mapping[str, Sequence[str]],
    rounds: int,
) -> dict[str, Any]:
    """Merge in turns and compare."""
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in commands}
    for _ in range(rounds):
        for tool, command in commands.items():
            subprocess.run(["rm", "-rf", str(work / tool)], check=True)
            last = run(command)
            runs[tool].append(last)
            log(
                f"{method}: {tool} {last['seconds']:.1f} s, {last['cpu']:.1f} of the processor, "
                f"{last['peak'] / 1e6:.0f} MB"
            )
    figures = {tool: _figures(each) for tool, each in runs.items()}
    used = folders[:2] if method == "slerp" else folders
    views = [open_model(ModelRef(model=str(folder))).weights for folder in used]
    start = open_model(ModelRef(model=str(base))).weights
    merged = {
        tool: open_model(ModelRef(model=str(work / tool))).weights for tool in ("ours", "mergekit")
    }
    return {"method": method, **figures, "errors": errors(method, start, views, merged)}


def _figures(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        "best seconds": min(each["seconds"] for each in runs),
        "median seconds": statistics.median(each["seconds"] for each in runs),
        "processor seconds": min(each["cpu"] for each in runs),
        "peak MB": max(each["peak"] for each in runs) / 1e6,
        "imports MB": max(each["before"] for each in runs) / 1e6,
    }


def merge_commands(method: str, base: Path, work: Path, python: Path) -> dict[str, list[str]]:
    """Return the command of each tool; `python` has mergekit."""
    worker = [sys.executable, __file__, str(base), "--worker", method, "--work", str(work)]
    config = work / f"{method}.yaml"
    return {
        "ours": [*worker, "--out", str(work / "ours")],
        "unsynced": [*worker, "--out", str(work / "unsynced"), "--unsynced"],
        "mergekit": [str(python), "-c", MERGEKIT, str(config), str(work / "mergekit")],
    }


def ratios(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures that should be at most 1, and the memory that should be at most 0.25."""
    for tool in ("ours", "unsynced"):
        for key in ("best seconds", "median seconds", "processor seconds"):
            yield f"{tool} / mergekit, {key}", round(found[tool][key] / found["mergekit"][key], 3)
    yield "peak memory", round(found["ours"]["peak MB"] / found["mergekit"]["peak MB"], 3)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
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
    return parser.parse_args()


def main() -> None:
    """Run everything and print one JSON document."""
    options = parse_arguments()
    if options.worker:
        folders = [options.work / f"model-{k}" for k in range(COUNT)]
        synced = not options.unsynced
        merge_with_ours(options.worker, options.model, folders, options.out, synced)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        python = environment(Path(temporary) / "env")
        folders = [work / f"model-{k}" for k in range(COUNT)]
        if not all((folder / RunLayout.CONFIG).is_file() for folder in folders):
            log("making the checkpoints")
            folders = make_checkpoints(options.model, work)
        results = []
        for method in options.method or METHODS:
            config = mergekit_config(method, options.model, folders)
            (work / f"{method}.yaml").write_text(config)
            commands = merge_commands(method, options.model, work, python)
            found = measure(method, options.model, folders, work, commands, options.rounds)
            results.append({**found, "ratios": dict(ratios(found))})
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
