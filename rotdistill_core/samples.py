"""The texts of a run: read, split, tokenised, and laid out as rows. torch loads when rows are made of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe import Recipe, SamplesRef, digest

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.maps import Maps
    from rotdistill_core.models import Pair
    from rotdistill_core.weights import Weights

INDEX_COLUMNS = ("id", "language", "place", "country", "question", "blurb")
GUARD_COLUMNS = ("id", "language", "kind", "text")
HELDOUT_COLUMNS = ("id", "language", "place", "country", "question", "facts", "falsehoods")


class Row(NamedTuple):
    """One result: the value of a metric for a variant."""

    variant: str
    metric: str
    value: float
    split: str | None = None
    layer: int | None = None
    language: str | None = None
    n: int | None = None
    text: str | None = None
    """The text that it is about: its share of the figure over all texts, with weight `n`. Its language is given too."""


@dataclass(frozen=True)
class Variant:
    """A saved variant, as evaluators see it."""

    name: str
    weights: Weights
    """The checkpoint as saved."""
    maps: Maps
    seconds: float
    folder: Path
    """Where the checkpoint lies: a plain Hugging Face folder."""


class Claim(NamedTuple):
    """A statement, in English, and phrases in a question's language of which one in an answer is a sign that it makes the statement."""

    what: str
    any: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One line of the samples: a question, and its answer where the answer is known; a text of the guard has no question."""

    id: str
    language: str
    split: str
    question: str
    answer: str | None
    place: str = ""
    facts: tuple[Claim, ...] = ()
    falsehoods: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Text:
    """One tokenised conversation; `answer` is the index of the first answer token."""

    id: str
    language: str
    split: str
    tokens: tuple[int, ...]
    answer: int
    plain: bool = False
    """It does not begin with the prefix that the others share."""


@dataclass(frozen=True)
class Layout:
    """Which row of a `[rows, d]` matrix holds which token. The prefix that all texts but plain ones share comes first, once."""

    texts: tuple[Text, ...]
    prefix: int

    @cached_property
    def starts(self) -> list[int]:
        """First row of each text's own tokens, and the number of rows at the end."""
        starts = [self.prefix]
        for text in self.texts:
            starts.append(starts[-1] + len(text.tokens) - self.skipped(text))
        return starts

    def skipped(self, text: Text) -> int:
        """Return how many leading tokens of a text have their rows in the prefix."""
        return 0 if text.plain else self.prefix

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.starts[-1]

    @cached_property
    def tokens(self) -> Tensor:
        """Token id of each row [rows]."""
        import torch

        own = [t for text in self.texts for t in text.tokens[self.skipped(text) :]]
        return torch.tensor([*next((t.tokens[: self.prefix] for t in self.texts if not t.plain), ()), *own])

    def split(self, *splits: str) -> Tensor:
        """Return the mask [rows] of rows in these splits; prefix rows count as `fit`."""
        import torch

        mask = torch.zeros(self.rows, dtype=torch.bool)
        mask[: self.prefix] = "fit" in splits
        for k, text in enumerate(self.texts):
            if text.split in splits:
                mask[self.starts[k] : self.starts[k + 1]] = True
        return mask

    def predicting(self, split: str) -> tuple[Tensor, Tensor, list[Text]]:
        """Return the rows that predict answer tokens, those tokens, and the text of each, one per row."""
        import torch

        rows: list[int] = []
        targets: list[int] = []
        texts: list[Text] = []
        for k, text in enumerate(self.texts):
            if text.split == split:
                own = range(text.answer - 1, len(text.tokens) - 1)
                skipped = self.skipped(text)
                rows += [self.starts[k] + p - skipped if p >= skipped else p for p in own]
                targets += [text.tokens[p + 1] for p in own]
                texts += [text] * len(own)
        return torch.tensor(rows, dtype=torch.long), torch.tensor(targets, dtype=torch.long), texts

    def select(self, *splits: str, most: int | None = None) -> Layout:
        """Return the layout of the texts in these splits (the first `most` of them), with the prefix where any of them has it."""
        texts = tuple(t for t in self.texts if t.split in splits)[:most]
        return Layout(texts, 0 if texts and all(t.plain for t in texts) else self.prefix)

    def rows_in(self, full: Layout) -> Tensor:
        """Return, for each row here, its row in the layout that this one was selected from."""
        import torch

        where = {text.id: k for k, text in enumerate(full.texts)}
        parts = [torch.arange(self.prefix)]
        parts += [torch.arange(full.starts[where[t.id]], full.starts[where[t.id] + 1]) for t in self.texts]
        return torch.cat(parts)

    def batches(self, budget: int = 1536) -> list[list[int]]:
        """Return text indices in batches of about `budget` padded tokens, texts of like length together, plain ones by themselves."""
        batches: list[list[int]] = []
        for k in sorted(range(len(self.texts)), key=lambda k: (self.texts[k].plain, -len(self.texts[k].tokens))):
            first = self.texts[batches[-1][0] if batches else k]
            room = (len(batches[-1]) + 1) * (len(first.tokens) - self.skipped(first)) <= budget if batches else False
            if room and first.plain == self.texts[k].plain:
                batches[-1].append(k)
            else:
                batches.append([k])
        return batches

    def digest(self) -> str:
        """Return the sha256 of ids, splits and tokens."""
        value = [self.prefix, [[t.id, t.split, t.answer, t.tokens, t.plain] for t in self.texts]]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Samples:
    """All texts of a run, tokenised."""

    layout: Layout
    """As the student reads them."""
    questions: tuple[Question, ...]
    style: str
    theirs: Layout | None = None
    """As the teacher reads them, where it has another tokenizer."""

    @property
    def teacher(self) -> Layout:
        """The texts as the teacher reads them."""
        return self.theirs or self.layout

    def digest(self) -> str:
        """Return the sha256 of all tokens."""
        return self.layout.digest() + (self.theirs.digest() if self.theirs else "")


def read_questions(ref: SamplesRef, base: Path) -> tuple[tuple[Question, ...], str]:
    """Read blurbs, held-out questions and system prompt.

    Raises:
        RecipeError: naming file, line and column of everything that is wrong.
    """
    problems: list[str] = []
    blurbs = _table(base / ref.index, INDEX_COLUMNS, problems)
    heldout = _table(base / ref.heldout, HELDOUT_COLUMNS, problems)
    guard = _table(base / ref.guard, GUARD_COLUMNS, problems) if ref.guard else []
    style = ""
    try:
        style = (base / ref.style).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        problems.append(f"{base / ref.style}: the system prompt cannot be read: {error.args[-1]}. samples.style names it.")
    ids, places = {row["id"] for row in blurbs}, {row["place"].casefold() for row in blurbs}
    for row in heldout:
        if row["id"] in ids:
            problems.append(f"{base / ref.heldout}: the id {row['id']} is also in the blurbs.")
        if row["place"].casefold() in places:
            problems.append(f"{base / ref.heldout}: {row['id']}: {row['place']} is also in the blurbs.")
    ids |= {row["id"] for row in heldout}
    problems += [f"{ref.guard}: the id {row['id']} is also in another file." for row in guard if row["id"] in ids]
    claims = {r["id"]: [_claims(r, column, base / ref.heldout, problems) for column in HELDOUT_COLUMNS[-2:]] for r in heldout}
    if problems:
        raise RecipeError(*problems)
    fit = sorted(blurbs, key=_shuffled)[: ref.limit]
    said = list(dict.fromkeys((row["question"], row["blurb"]) for row in fit))  # copies on one side: what was fitted must not judge
    judges = set(said[: round(len(said) * ref.validation)])
    part = {row["id"]: "validation" if (row["question"], row["blurb"]) in judges else "fit" for row in fit}
    questions = [Question(r["id"], r["language"], part[r["id"]], r["question"], r["blurb"], r["place"]) for r in blurbs if r["id"] in part]
    if ref.own_answers:  # the teacher answers these, each question once
        asked = {q.question: q for q in sorted(questions, key=lambda q: q.split, reverse=True)}
        questions += [replace(q, id=f"{q.id}.own", answer=None) for q in questions if asked[q.question] is q]
    questions += [Question(r["id"], r["language"], "heldout", r["question"], None, "", *claims[r["id"]]) for r in heldout]
    for k, r in enumerate(sorted(guard, key=_shuffled)):  # half to choose by, half to report
        questions.append(Question(r["id"], r["language"], "guard-validation" if k % 2 else "guard", "", r["text"].replace("\\n", "\n")))
    if lost := {"fit", "validation", "heldout"} - {q.split for q in questions}:
        where = base / (ref.heldout if lost == {"heldout"} else ref.index)
        raise RecipeError(f"{where}: too few different texts: {', '.join(sorted(lost))} has none.")
    return tuple(questions), style


def inputs(recipe: Recipe, pair: Pair, questions: Sequence[Question], style: str) -> dict[str, str]:
    """Return what a run starts from, by name: hashes that need no tokenizer and hardly a byte of the weights."""
    texts = [
        [vars(replace(q, facts=(), falsehoods=())) for q in questions],
        style,
        recipe.samples.model_dump(include={"max_tokens", "answer_tokens", "own_answers"}),
    ]
    models = {role: model.glance for role in ("teacher", "student", "anchor") if (model := getattr(pair, role))}
    refs = (recipe.teacher, recipe.student)
    return {**models, "texts": digest(texts), "seed": str(recipe.seed), "compute": " ".join(f"{ref.dtype} {ref.device}" for ref in refs)}


def claimed(questions: Sequence[Question]) -> str:
    """Return the hash of what answers are scored against: facts and falsehoods, which nothing but an evaluator sees."""
    return digest([q.facts + q.falsehoods for q in questions])


def _claims(row: Mapping[str, str], column: str, path: Path, problems: list[str]) -> tuple[Claim, ...]:
    try:
        return TypeAdapter(tuple[Claim, ...]).validate_json(row[column])
    except ValidationError as error:
        problems.append(f"{path}: {row['id']}: {column}: must be a JSON list of objects with `what` and `any`: {error.errors()[0]['msg']}.")
        return ()


def _shuffled(row: Mapping[str, str]) -> str:
    return hashlib.sha256(row["id"].encode()).hexdigest()


def _table(path: Path, columns: Sequence[str], problems: list[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path}: cannot be read: {error.args[-1]}. The recipe names it under [samples].")
        return []
    if not rows or tuple(rows[0]) != tuple(columns):
        problems.append(f"{path}: line 1: the columns must be {', '.join(columns)}.")
        return []
    found: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) != len(columns) or not all(cell.strip() for cell in cells):
            filled = sum(bool(cell.strip()) for cell in cells)
            problems.append(f"{path}: line {number}: needs {len(columns)} non-empty cells, has {filled}.")
        elif cells[0] in found:
            problems.append(f"{path}: line {number}: the id {cells[0]} is already used.")
        else:
            found[cells[0]] = dict(zip(columns, cells, strict=True))
    return list(found.values())


def conversation(style: str, question: str) -> list[dict[str, str]]:
    """Return the chat in front of an answer."""
    return [{"role": "system", "content": style}, {"role": "user", "content": question}]


def tokenize(tokenizer: Any, questions: Sequence[Question], answers: dict[str, list[int]], style: str, max_tokens: int) -> Samples:
    """Tokenise all texts with their chat template and lay them out.

    `answers` holds the teacher's own tokens for held-out questions.

    Raises:
        SetupError: the tokenizer has no chat template, or a text leaves no room for its answer.
    """
    if not tokenizer.chat_template:
        raise SetupError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model.")
    texts = []
    for q in questions:
        if q.split.startswith("guard"):  # as it stands, without the chat around it
            texts.append(Text(q.id, q.language, q.split, tuple(tokenizer(q.answer)["input_ids"]), 1, plain=True))
            continue
        prompt = prompt_tokens(tokenizer, style, q.question)
        if q.answer is None:
            answer = answers[q.id]
        else:
            chat = [*conversation(style, q.question), {"role": "assistant", "content": q.answer}]
            whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
            answer = list(whole[len(prompt) :]) if list(whole[: len(prompt)]) == prompt else plain(tokenizer, q.answer)
        tokens = tuple([*prompt, *answer][: None if q.split == "heldout" else max_tokens])  # an option of the fit moves no score
        if len(tokens) <= len(prompt):
            raise SetupError(f"text {q.id}: its prompt alone has {len(prompt)} tokens; raise samples.max_tokens above {max_tokens}.")
        texts.append(Text(q.id, q.language, q.split, tokens, len(prompt)))
    return Samples(
        Layout(tuple(texts), shared_start([text.tokens[: text.answer] for text in texts if not text.plain])), tuple(questions), style
    )


def tokenize_both(student: Any, teacher: Any, questions: Sequence[Question], answers: dict[str, list[int]], *about: Any) -> Samples:
    """Tokenise for two tokenizers; the teacher's answers are read as text, and that is what the student is given."""
    questions = [q for q in questions if not q.split.startswith("guard")]  # only probabilities are compared on those
    theirs = tokenize(teacher, questions, answers, *about).layout
    said = {name: plain(student, spoken(teacher, tokens)) for name, tokens in answers.items()}
    return replace(tokenize(student, questions, said, *about), theirs=theirs)


def spoken(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens, up to the first special token or broken character."""
    plainly = list(takewhile(lambda token: token not in tokenizer.all_special_ids, tokens))
    text: str = tokenizer.decode(plainly)
    return text.partition("\ufffd")[0].strip()


def prompt_tokens(tokenizer: Any, style: str, question: str) -> list[int]:
    """Return the tokens of system prompt and question, up to where the answer starts."""
    chat = conversation(style, question)
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])


def plain(tokenizer: Any, answer: str) -> list[int]:
    """Tokenise an answer by itself, for templates whose generation prompt is not a prefix of the whole chat."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving each at least one of its own (it predicts the answer)."""
    most = min(len(prompt) for prompt in prompts) - 1
    return next((k for k in range(most) if len({prompt[k] for prompt in prompts}) > 1), most)
