"""What is new to a student in a question: its topic, its form, or both.

    python benchmarks/novelty.py recipes/tour_guide.toml CHECKPOINT ... [--questions 20]

Checkpoints are students of the recipe's teacher that were fitted with lessons. English questions
are made from topics of the index or other places, in forms that lessons have or in others. The
teacher answers each greedily under the system prompt. The table has the KL of a student to the
teacher over the tokens of these answers, nats per token. The other forms are those of English
held-out questions, so do not choose options by this table. No held-out place is among the topics.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
LESSON_FORMS = 6
"""The first forms of a language: students of fewer forms have had lessons in them, too."""
OTHER_FORMS = (
    "Why is {topic} so famous?",
    "What should I know about {topic} before I go?",
    "What is the story behind {topic}?",
    "Can you tell me about {topic}?",
)
"""Forms that no lesson has: those of held-out questions."""
ANSWER_TOKENS = 64


def main() -> None:
    """Print a line for each kind of question, with a column for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=20, help="of each kind")
    options = parser.parse_args()

    teacher = open_model(load_recipe(options.recipe).recipe.teacher)
    loaded = whole_model(teacher.weights, teacher.device, teacher.dtype)
    students = []
    for path in options.checkpoints:
        student = open_model(ModelRef(model=str(path)))
        students.append(whole_model(student.weights, student.device, student.dtype))

    print("| questions | " + " | ".join(str(path) for path in options.checkpoints) + " |")
    print("|---" * (len(students) + 1) + "|")
    for kind, questions in kinds_of_questions(options.questions).items():
        answers = [answer(teacher, loaded, question) for question in questions]
        means = [mean_kl(loaded, student, answers) for student in students]
        print(f"| {kind} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


def kinds_of_questions(count: int) -> dict[str, list[str]]:
    """Return questions by what is new in them."""
    index = [row for row in table("index.tsv") if row["language"] == "en"]
    known = {row["place"] for row in [*table("index.tsv"), *table("heldout.tsv")]}
    other = [row["topic"] for row in table("places.tsv") if row["topic"] not in known]
    forms = [row["form"] for row in table("forms.tsv") if row["language"] == "en"][:LESSON_FORMS]
    draw = random.Random(3)  # noqa: S311
    topics = {
        "topic of the index": draw.sample(sorted({row["place"] for row in index}), count),
        "other topic": draw.sample(other, count),
    }
    kinds = {
        f"{topic}, {form}": [draw.choice(choices).format(topic=name) for name in names]
        for topic, names in topics.items()
        for form, choices in (("form of lessons", forms), ("other form", OTHER_FORMS))
    }
    return kinds | {"of the index": [row["question"] for row in draw.sample(index, count)]}


def table(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of samples."""
    with (SAMPLES / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def answer(teacher: Model, loaded: Any, question: str) -> tuple[list[int], int]:
    """Return the ids of a question with the teacher's answer, and where the answer begins."""
    system = (SAMPLES / "tour_guide.md").read_text(encoding="utf-8").strip()
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    asked = teacher.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = loaded.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return made[0].tolist(), asked["input_ids"].shape[1]


@torch.no_grad()
def mean_kl(teacher: Any, student: Any, answers: Sequence[tuple[list[int], int]]) -> float:
    """Return the mean KL over the tokens of all answers."""

    def predictions(model: Any, ids: list[int], start: int) -> Tensor:
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        return torch.as_tensor(logits.float().log_softmax(-1))

    values = []
    for ids, start in answers:
        P, Q = predictions(teacher, ids, start), predictions(student, ids, start)
        values.append((P.exp() * (P - Q)).sum(-1))
    return float(torch.cat(values).mean())


if __name__ == "__main__":
    main()
