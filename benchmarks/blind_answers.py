"""Which of two variants answers better, judged by a reader who does not know which is which.

    python benchmarks/blind_answers.py sheet runs/NAME sheet.md --variants base full
    python benchmarks/blind_answers.py score runs/NAME sheet.md --variants base full

`sheet` writes the held-out questions of a run, the teacher's answer to each, and those of two
variants as A and B, in an order that is drawn for each question. The reader writes A, B or = behind
`better:`. `score` finds out which was which, and prints how often each variant was preferred, with
the two-sided sign test over the questions where one was. The order follows from the seed, so the
sheet holds no key.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from rotdistill_core.store.layout import RunLayout

CHOICE = re.compile(r"^better:\s*([AB=]?)\s*$", re.MULTILINE)
INTRODUCTION = """# Which answer is better?

For each question read the first answer, which is that of the model that the others should be like.
Then write A, B or = behind `better:`, for the answer that serves the person who asked best: right,
in the language of the question, to the point, and written well.
"""


@dataclass(frozen=True)
class Question:
    """A held-out question with its answers."""

    text: str
    teacher: str
    answers: Mapping[str, str]
    """Variant -> its answer, in the order of the sheet: A, then B."""


def questions(run: Path, variants: tuple[str, str], seed: int) -> Iterator[Question]:
    """Yield the questions that both variants answered, with their answers in the order drawn.

    Raises:
        SystemExit: the run's report lacks the answers of a variant.
    """
    report = json.loads((run / RunLayout.REPORT_JSON).read_text(encoding="utf-8"))
    answers = report["answers"]
    missing = [variant for variant in variants if variant not in answers]
    if missing:
        raise SystemExit(
            f"{run}: no answers of {', '.join(missing)}; it has those of {', '.join(answers)}. "
            "Add the step `answers` to the variant."
        )
    draw = random.Random(seed)  # noqa: S311
    one, other = variants
    for key in sorted(answers[one].keys() & answers[other].keys()):
        first = answers[one][key]
        order = draw.sample(variants, 2)
        yield Question(
            first["question"],
            first["teacher"],
            {variant: answers[variant][key]["student"] for variant in order},
        )


def written(asked: list[Question]) -> str:
    """Return the sheet."""
    parts = [INTRODUCTION]
    for number, question in enumerate(asked, 1):
        parts.append(f"## {number}. {question.text}\n\n{_quoted(question.teacher)}\n")
        for letter, answer in zip("AB", question.answers.values(), strict=True):
            parts.append(f"**{letter}**\n\n{_quoted(answer)}\n")
        parts.append("better: \n")
    return "\n".join(parts)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def preferred(sheet: str, asked: list[Question]) -> Counter[str]:
    """Return variant -> how often it was preferred; "neither" for =.

    Raises:
        SystemExit: the sheet has another number of choices, or some are empty.
    """
    choices = CHOICE.findall(sheet)
    if len(choices) != len(asked) or "" in choices:
        made = sum(bool(choice) for choice in choices)
        raise SystemExit(f"{made} of {len(asked)} lines `better:` have A, B or =.")
    found: Counter[str] = Counter()
    for choice, question in zip(choices, asked, strict=True):
        names = dict(zip("AB", question.answers, strict=True))
        found[names.get(choice, "neither")] += 1
    return found


def main() -> None:
    """Write a sheet, or score one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["sheet", "score"])
    parser.add_argument("run", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--variants", nargs=2, default=("base", "full"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    one, other = options.variants
    asked = list(questions(options.run, (one, other), options.seed))
    if options.what == "sheet":
        options.sheet.write_text(written(asked), encoding="utf-8")
        print(f"{options.sheet}: {len(asked)} questions")
        return
    found = preferred(options.sheet.read_text(encoding="utf-8"), asked)
    decided = found[one] + found[other]
    chance = binomtest(found[other], decided).pvalue if decided else 1.0
    print(
        f"{other} {found[other]}, {one} {found[one]}, neither {found['neither']}; p = {chance:.2g}"
    )


if __name__ == "__main__":
    main()
