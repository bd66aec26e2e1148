"""Rows of texts are counted before they are tokenised."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError
from rotdistill_core.planning.text_counts import (
    QUESTION_TOKENS,
    TEMPLATE_TOKENS,
    TextCounts,
    TokenCounter,
    count_texts,
    lengths_above,
    token_counter,
    upper_bounds,
)
from rotdistill_core.recipe.document import Lessons, SamplesRef
from rotdistill_core.testing import pico_tokenizer

SETTINGS = SamplesRef(max_tokens=40, answer_tokens=30, own_answers=10)


def words(text: str) -> int:
    return len(text.split())


def question(split: str, answer: str | None, text: str = "one two three") -> Conversation:
    return Conversation("id", "en", Split(split), text, answer)


def counts(*questions: Conversation) -> TextCounts:
    return count_texts(questions, "a b", SETTINGS, words)


def test_the_shared_prompt_counts_once() -> None:
    found = counts(question("fit", "x y"), question("fit", "x y"))
    one = 3 + TEMPLATE_TOKENS + 2 + 1  # question, template, answer, and the token that ends it
    assert found.prefix == 2 + TEMPLATE_TOKENS
    assert found.rows == {"fit": 2 * one}
    assert found.total == found.prefix + 2 * one


def test_a_baked_prompt_is_read_by_the_teacher_alone() -> None:
    baked = SETTINGS.model_copy(update={"bake_prompt": True})
    questions = [question("fit", "x y"), question("fit", "x y")]
    found, alike = count_texts(questions, "a b", baked, words), counts(*questions)
    assert found.rows == alike.rows
    assert found.prefix == TEMPLATE_TOKENS
    assert found.as_teacher_reads.total == alike.total
    assert alike.as_teacher_reads is alike


def test_an_answer_that_the_teacher_writes_counts_in_full() -> None:
    found = counts(question("heldout", None), question("fit", None))
    assert (found.questions_asked, found.answer_tokens) == (2, 30 + 10)
    assert found.rows["heldout"] == 3 + TEMPLATE_TOKENS + 30
    assert found.rows["fit"] == 3 + TEMPLATE_TOKENS + 10


@pytest.mark.parametrize(
    ("options", "texts", "proposed"),
    [
        ({"general": 0.0}, 0, 0),
        ({"general": 0.2}, 2, 2),
        ({"general": 0.2, "general_from": "questions"}, 0, 2),
        ({"general": 0.2, "from": "teacher"}, 2, 10),
    ],
)
def test_lessons_are_fit_texts_that_the_teacher_writes(
    options: dict[str, Any], texts: int, proposed: int
) -> None:
    lessons = Lessons.model_validate({"count": 10, "tokens": 7, **options})
    plain = counts(question("fit", "x y"))
    found = count_texts([question("fit", "x y")], "a b", SETTINGS, words, lessons)
    row = min(QUESTION_TOKENS + TEMPLATE_TOKENS + 7, SETTINGS.max_tokens - plain.prefix)
    assert found.rows["fit"] - plain.rows["fit"] == (10 - texts) * row + texts * (7 + 1)
    assert found.texts["fit"] == 11
    assert found.lessons == 10
    assert found.lesson_tokens == (10 - texts) * 7 + proposed * QUESTION_TOKENS
    assert found.questions_asked == plain.questions_asked


def test_no_lessons_change_nothing() -> None:
    found = count_texts([question("fit", "x y")], "a b", SETTINGS, words, Lessons(general=0.5))
    assert found == counts(question("fit", "x y"))


def test_long_texts_are_cut_and_heldout_ones_are_not() -> None:
    long = "x " * 200
    found = counts(question("fit", long), question("heldout", long))
    assert found.prefix + found.rows["fit"] == 40
    assert found.rows["heldout"] > 200


def test_texts_outside_the_domain_are_plain() -> None:
    found = counts(question("guard", "x y z", text=""), question("guard-validation", "x", text=""))
    assert found.rows == {"guard": 3, "guard-validation": 1}
    assert found.questions_asked == 0


def test_a_limit_counts_texts_at_their_mean_length() -> None:
    found = TextCounts(10, {"fit": 100, "validation": 20}, {"fit": 8, "validation": 2}, 0, 0)
    assert found.rows_of("fit") == 110
    assert found.rows_of("fit", "validation", limit=5) == 10 + 60
    assert found.rows_of("fit", "validation", limit=50) == 130
    assert found.rows_of("heldout") == 10


def test_the_tokenizer_of_the_folder_counts(tmp_path: Path) -> None:
    pico_tokenizer(64).save_pretrained(tmp_path)
    assert token_counter(tmp_path, 64)("w1 w2 w3") == 3


@pytest.mark.parametrize(
    "kept",
    [
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0}},
        {"truncation": {"max_length": 2, "strategy": "LongestFirst", "direction": "Right"}},
    ],
)
def test_padding_and_truncation_in_a_tokenizers_file_count_in_no_plan(
    tmp_path: Path, kept: dict[str, dict[str, object]]
) -> None:
    pico_tokenizer(64).save_pretrained(tmp_path)
    plain = token_counter(tmp_path, 64)("w1 w2 w3 w4")
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    more = {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "w0", "stride": 0}
    for key, settings in kept.items():
        document[key] = {**settings, **more}
    path.write_text(json.dumps(document))
    assert token_counter(tmp_path, 64)("w1 w2 w3 w4") == plain == 4


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "unk_token": "<nope>", "vocab": {"w1": 0}},
        {"type": "WordPiece", "unk_token": "<nope>", "vocab": {"w1": 0}},
        {"type": "BPE", "unk_token": "<nope>", "vocab": {"w": 0}, "merges": []},
        {"type": "Unigram", "unk_id": None, "vocab": [["w1", 0.0]]},
    ],
    ids=lambda model: str(model["type"]),
)
def test_a_tokenizer_without_its_unknown_token_is_refused(
    tmp_path: Path, model: dict[str, object]
) -> None:
    pico_tokenizer(64).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": model}))
    with pytest.raises(SetupError, match=r"tokenizer\.json"):
        token_counter(tmp_path, 64)("w1 other words")


@pytest.mark.parametrize(("vocabulary", "tokens"), [(32_000, 14), (150_000, 10)])
def test_bytes_count_without_a_tokenizer(vocabulary: int, tokens: int) -> None:
    assert token_counter(None, vocabulary)("x" * 35) == tokens


# Tokenizers that read bytes: their texts may be counted in parts.

SPECIALS = ("<|begin|>", "<|end|>", "<|en")
WORDS = (
    "hello",
    "world",
    " ",
    "\n\n",
    "e\u0301",
    "\u0958",
    "日本",
    "wörld",
    "'s",
    "123",
    *SPECIALS,
)


def byte_tokenizer(folder: Path, **options: Any) -> Tokenizer:
    """Write a small BPE over bytes, and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=options.get("add_prefix_space", False)
    )
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[AddedToken(name, special=True) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello wörld's"] * 9, trainer)
    if options.get("lstrip"):
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("options", [{}, {"add_prefix_space": True}, {"lstrip": True}])
def test_parts_of_a_text_add_up_to_its_tokens(tmp_path: Path, options: dict[str, bool]) -> None:
    tokenizer = byte_tokenizer(tmp_path, **options)
    count = token_counter(tmp_path, tokenizer.get_vocab_size())
    assert count.takes_every_text == (not options)
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices(WORDS, k=chance.randrange(90)))
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert count(text) == tokens <= count.most(text)
        bounds = upper_bounds({"a": text}, count)
        assert lengths_above({"a": text}, bounds, count, 20) == (
            {"a": tokens} if tokens > 20 else {}
        )


def test_a_shared_prompt_is_counted_once_and_short_questions_only_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = byte_tokenizer(tmp_path).get_vocab_size()
    count = token_counter(tmp_path, size)
    assert isinstance(count, TokenCounter)
    read: list[str] = []
    encode = count._part.__wrapped__
    monkeypatch.setattr(count, "_part", lru_cache(lambda part: read.append(part) or encode(part)))
    texts = {str(k): f"<|begin|>{'hello ' * 99}<|end|>world {k}<|end|>" for k in range(50)}
    bounds = upper_bounds(texts, count)
    assert lengths_above(texts, bounds, count, 600) == {}
    assert len(read) == 1
    assert len(lengths_above(texts, bounds, count, 100)) == 50
    assert len(read) <= 50 + 3


def test_a_tokenizer_with_more_tokens_than_the_model_has_to_read_every_text(tmp_path: Path) -> None:
    size = byte_tokenizer(tmp_path).get_vocab_size()
    assert not token_counter(tmp_path, size - 1).takes_every_text
    with pytest.raises(SetupError, match="The tokenizer belongs to another"):
        token_counter(tmp_path, 3)("hello")


def test_some_of_many_texts_tell_the_rows_of_all() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text.split())

    many = [question("fit", "word " * (k % 17 + 1), f"one {k} of") for k in range(3000)]
    many += [question("fit", None, f"own {k}") for k in range(900)]
    few = [question("heldout", None) for _ in range(5)]
    every = count_texts([*many, *few], "a b", SETTINGS, count)
    counted.clear()
    some = count_texts([*many, *few], "a b", SETTINGS, count, None, 300)
    assert len(counted) < 1500
    assert some.rows["fit"] == pytest.approx(every.rows["fit"], rel=0.02)
    assert some.rows["heldout"] == every.rows["heldout"]
    assert (some.texts, some.answer_tokens) == (every.texts, every.answer_tokens)
    assert (some.estimated, every.estimated) == (True, False)
    assert not count_texts(many, "a b", SETTINGS, count, None, 4000).estimated


def test_a_shard_has_its_share_of_the_texts_to_fit_on_and_all_others() -> None:
    rows, texts = {"fit": 400, "validation": 50, "heldout": 80}, {"fit": 40, "validation": 10}
    found = TextCounts(
        12, rows, {**texts, "heldout": 5}, questions_asked=25, answer_tokens=9, lessons=20
    ).with_fit_share(0.25)
    assert found.rows == {"fit": 100, "validation": 50, "heldout": 80}
    assert found.texts == {"fit": 10, "validation": 10, "heldout": 5}
    assert found.lessons == 5
    # Of the 20 questions that are not held out, two thirds are to fit on: 13, of which 10 go.
    assert found.questions_asked == 15
