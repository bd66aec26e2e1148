"""A leaderboard of transfer: our ways from a teacher to a student, and those of peers.

    pip install trl peft        # into an environment of its own, whose Python is PEERS
    python benchmarks/transfer.py benchmarks/transfer.toml --peers PEERS --seconds 1200
    python benchmarks/transfer.py --only-table

Carries out the recipe, whose variants are our rows. Each peer (`peers.py`) then trains for the same
time, from the checkpoint of the variant `--start`, on the same texts: the teacher's answers and the
lessons of the run. Its learning rate is the one of `--rates` with the least KL on validation texts
after `--search-seconds`. The steps of our recipe score our rows; another one
(`--scores`) scores any other Hugging Face folder, by the same steps on the same texts. What is done
already, in `--out`, is not done again; the table is written into `--page`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory
from rotdistill_report._data import with_interval

from rotdistill_core import hookimpl, load_recipe, run
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.intervals import estimates
from rotdistill_core.evaluation.rows import MetricRow, row_from_json, rows_as_json
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.recipe.resolved import ResolvedRecipe

HERE = Path(__file__).resolve().parent
METRICS = ("kl", "guard_kl", "top1", "answer_chrf")
"""The metrics of the table, in the order of its columns."""
TITLES = {
    "base": "the cut student",
    "published": "ReplaceMe, the published form",
    "refit": "refit",
    "trained": "refit, then prompt-kl",
    "gkd": "refit, then TRL's GKD",
    "sft": "refit, then TRL's SFT",
}
"""Name of a row -> what the table calls it; other rows go by their names."""
HEADER = (
    "| row | held-out KL | its change against {against} | guard KL | top-1 | chrF to the teacher | "
    "minutes | peak memory, GB |"
)
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"
"""Between them the page has what this script writes."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    model: str
    """The checkpoint."""
    seconds: float | None = None
    """Wall time of all that made it from the cut student on; None for a model that was there."""
    memory: int | None = None
    """Peak anonymous memory of that, bytes; None where it was not measured."""
    training: dict[str, Any] = field(default_factory=dict)
    """What a peer says of its training."""
    search: dict[str, float] = field(default_factory=dict)
    """Learning rate -> validation KL after the search."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Metric rows as in results.jsonl, overall and of each text."""


def main() -> None:
    """Make the rows that are missing, and write the table."""
    options = _options()
    out = options.out
    scored = out / "rows.jsonl"
    if not options.only_table:
        out.mkdir(parents=True, exist_ok=True)
        ours = our_rows(options)
        rows = [*ours, *(Row(*pair.split("=", 1)) for pair in options.also)]
        if options.peers:
            start = next(row for row in ours if row.name == options.start)
            rows += [peer_row(options, trainer, start) for trainer in options.trainers]
        known = {(row.name, row.model) for row in read(scored)}
        for row in rows:
            if (row.name, row.model) not in known:
                with scored.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(with_figures(row, options))) + "\n")
    rows = read(scored)
    text = "\n\n".join([table(rows, options.against), *searches(rows)])
    print(text)
    if options.page:
        options.page.write_text(
            page_with(options.page.read_text(encoding="utf-8"), text), encoding="utf-8"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=HERE / "transfer.toml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--scores", type=Path, default=HERE / "transfer_scores.toml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--page", type=Path, help="such as benchmarks/transfer.md")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with trl and peft")
    parser.add_argument("--trainers", nargs="+", default=["gkd", "sft"])
    parser.add_argument("--start", default="refit", help="variant from which peers train")
    parser.add_argument("--against", default="trained", help="row that others are compared with")
    parser.add_argument("--seconds", type=float, default=1200.0, help="of a peer's training")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--rates", nargs="+", default=["2e-4", "5e-4", "1e-3"])
    parser.add_argument("--search-seconds", type=float, default=60.0, help="for each rate")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=MODEL")
    parser.add_argument("--only-table", action="store_true")
    return parser.parse_args()


# Our rows.


class StepMemory:
    """Notes the peak anonymous memory of each step that a run makes.

    Args:
        path: a JSON file of step id -> bytes; earlier runs may have written it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.peaks: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        self._watching: dict[str, PeakMemory] = {}

    def log(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stderr, flush=True)

    def progress(self, *_: object) -> None:
        """Show no progress inside a step."""

    @hookimpl
    def before_step(self, step_id: str) -> None:
        """Begin to watch."""
        self._watching[step_id] = PeakMemory().__enter__()

    @hookimpl
    def after_step(self, step_id: str, reused: bool) -> None:
        """Keep the peak; that of a step which was found says nothing."""
        memory = self._watching.pop(step_id, None)
        if memory is None:
            return
        memory.__exit__(None, None, None)
        if not reused:
            self.peaks[step_id] = memory.bytes
            self.path.write_text(json.dumps(self.peaks), encoding="utf-8")


def our_rows(options: argparse.Namespace) -> list[Row]:
    """Return a row for each variant of the recipe; write what peers learn from."""
    kept = options.out / "ours.jsonl"
    if kept.is_file():
        return read(kept)
    recipe = load_recipe(options.recipe, options.set)
    memory = StepMemory(options.out / "peaks.json")
    result = run(recipe, runs=options.runs, observer=memory)
    rows = []
    for variant, folder in result.checkpoints.items():
        steps = edits(recipe, variant)
        peaks = [memory.peaks.get(step) for step in steps]
        rows.append(
            Row(
                variant,
                str(folder),
                seconds=sum(result.steps[variant, step].seconds for step in steps),
                memory=None if None in peaks else max(filter(None, peaks)),
                figures=figures_of(result, variant, variant),
            )
        )
    executor = Executor(recipe, options.runs, memory, memory.progress)
    write_texts(executor.samples(), options.out / "texts.jsonl")
    teacher = executor.pair.teacher
    model = whole_model(teacher.weights, teacher.device, teacher.dtype)
    model.save_pretrained(options.out / "teacher")
    kept.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return rows


def edits(recipe: ResolvedRecipe, variant: str) -> list[str]:
    """Return the steps that make a variant; a cut alone needs no capture."""
    steps = [step for step in recipe.chain(variant) if step.stage != "evaluate"]
    if all(step.stage == "capture" or step.id == "chop" for step in steps):
        steps = [step for step in steps if step.stage != "capture"]
    return [step.id for step in steps]


def write_texts(samples: Samples, path: Path) -> None:
    """Write the texts that `prompt-kl` trains on and validates by, a line of JSON for each."""
    answered = samples.teacher_answered()
    with path.open("w", encoding="utf-8") as stream:
        for text in samples.teacher.texts:
            if text.id in answered and text.split != Split.HELDOUT:
                line = {
                    "id": text.id,
                    "split": text.split.value,
                    "tokens": text.tokens,
                    "answer": text.answer,
                }
                stream.write(json.dumps(line) + "\n")


# Rows of peers.


def peer_row(options: argparse.Namespace, trainer: str, start: Row) -> Row:
    """Return the row of a peer, which trains with the best of some learning rates."""
    search = {
        rate: float(
            trained(options, trainer, start, rate, f"search/{trainer}-{rate}")["validation KL"]
        )
        for rate in options.rates
    }
    rate = min(search, key=search.__getitem__)
    training = trained(options, trainer, start, rate, trainer)
    memory = None if start.memory is None else max(start.memory, training["memory"])
    return Row(
        trainer,
        str(options.out / trainer),
        seconds=(start.seconds or 0.0) + training["seconds"]["wall"],
        memory=memory,
        training=training,
        search=search,
    )


def trained(
    options: argparse.Namespace, trainer: str, start: Row, rate: str, name: str
) -> dict[str, Any]:
    """Return what a peer says of a training, of the search or of a row, which it may do now."""
    folder = options.out / name
    searching = name.startswith("search/")
    if not (folder / "peer.json").is_file():
        command = [
            *(options.peers, str(HERE / "peers.py"), trainer),
            *("--teacher", str(options.out / "teacher")),
            *("--student", start.model),
            *("--texts", str(options.out / "texts.jsonl")),
            *("--rate", rate),
            *("--seconds", str(options.search_seconds if searching else options.seconds)),
            *("--clock", options.clock),
            *("--out", str(folder)),
        ]
        subprocess.run([*command, "--no-model"] if searching else command, check=True)
    return dict(json.loads((folder / "peer.json").read_text(encoding="utf-8")))


# Scores and the table.


def with_figures(row: Row, options: argparse.Namespace) -> Row:
    """Return a row with the metrics of its model; ours have them from the run that made them."""
    if row.figures:
        return row
    model = Path(row.model)
    ref = str(model.resolve()) if model.exists() else row.model
    memory = StepMemory(options.out / "peaks_of_scores.json")
    result = run(options.scores, set={"student.model": ref}, runs=options.runs, observer=memory)
    [variant] = result.checkpoints
    return replace(row, figures=figures_of(result, variant, row.name))


def figures_of(result: RunResult, variant: str, name: str) -> list[dict[str, Any]]:
    """Return what the table needs of a variant's metrics, under the name of a row."""
    return rows_as_json(
        [
            each._replace(variant=name)
            for each in result.rows
            if each.variant == variant
            and each.metric in METRICS
            and (each.is_overall or each.text is not None)
        ]
    )


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none where there is no file."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[Row], against: str) -> str:
    """Return the table in Markdown, figures with their 95 % intervals over texts.

    Args:
        rows: the rows, scored.
        against: the row that the others are compared with, on the texts that both have.
    """
    figures = [row_from_json(each) for row in rows for each in row.figures]
    found = estimates(figures, against)
    overall = {(each.variant, each.metric): each for each in figures if each.is_overall}
    lines = [HEADER.format(against=TITLES.get(against, against))]
    lines.append("|" + "---|" * lines[0].count(" | ") + "---|")
    for row in rows:
        own = {metric: _cell(row.name, metric, found, overall) for metric in METRICS}
        change = found["kl"][row.name].change
        cells = [
            TITLES.get(row.name, row.name),
            own.pop("kl"),
            with_interval(change, "kl", "+") if change else "",
            *own.values(),
            "" if row.seconds is None else f"{row.seconds / 60:.1f}",
            "" if row.memory is None else f"{row.memory / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(
    name: str,
    metric: str,
    found: Mapping[str, Mapping[str, Any]],
    overall: Mapping[tuple[str, str], MetricRow],
) -> str:
    """Return a figure with its interval, or alone where no single texts were measured."""
    if estimate := found.get(metric, {}).get(name):
        return with_interval(estimate.own, metric)
    return f"{overall[name, metric].value:.3f}" if (name, metric) in overall else ""


def searches(rows: Iterable[Row]) -> Iterable[str]:
    """Yield a line for each peer: how its learning rate was found, and what it saw."""
    for row in rows:
        if not row.training:
            continue
        tried = ", ".join(f"{rate}: {kl:.4f}" for rate, kl in row.search.items())
        about, taken = row.training, row.training["seconds"]
        versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        yield (
            f"- {TITLES.get(row.name, row.name)}: validation KL by learning rate, after the search "
            f"({tried}); then {about['rate']:g} for {taken['wall']:.0f} s of wall time, "
            f"{taken['processor']:.0f} s of processor time ({about['threads']} threads): "
            f"{about['steps']} steps, {about['texts']:,} texts of {about['fit texts']:,}; "
            f"validation KL {about['validation KL']:.4f}; {about['memory'] / 1e9:.2f} GB; "
            f"{versions}."
        )


def page_with(page: str, text: str) -> str:
    """Return the page with other rows."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    main()
