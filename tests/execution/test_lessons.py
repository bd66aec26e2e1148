"""Lessons are written once, in one order, and fitted on; what is held out is in none of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.lessons import _Writer
from rotdistill_core.forward.generate import AnswerWriter
from rotdistill_core.plugin.engine import Answer, Asked
from rotdistill_core.plugin.registry import connected_engine
from rotdistill_core.store.layout import RunLayout

FORMS = "language\tform\nen\tw1 {topic} w2\nen\tw3 w4 {topic}\n"


@pytest.fixture(autouse=True)
def forms(work: Path) -> None:
    (work / "forms.tsv").write_text(FORMS, encoding="utf-8")


def sets(count: int, **options: object) -> list[str]:
    given = {"count": count, "tokens": 6, "forms": "forms.tsv", **options}
    return [f"lessons.{key}={value}" for key, value in given.items()]


def lesson_rows(folder: Path) -> list[list[str]]:
    lines = RunLayout(folder).texts.read_text(encoding="utf-8").splitlines()
    return [cells for line in lines if (cells := line.split("\t"))[0].endswith(".lesson")]


def test_lessons_are_fit_texts_listed_and_summed_up(executor: Callable[..., Executor]) -> None:
    plain = executor("run").samples()
    run = executor("run", *sets(20, general=0.2))
    samples = run.samples()
    lessons = samples.layout.texts[len(plain.layout.texts) :]
    assert samples.layout.texts[: len(plain.layout.texts)] == plain.layout.texts
    assert {text.split for text in lessons} == {Split.FIT}
    assert samples.layout.prefix == plain.layout.prefix
    assert [row[0] for row in lesson_rows(run.folder)] == [text.id for text in lessons]
    assert samples.teacher_answered() >= {text.id for text in lessons}
    summary = json.loads(RunLayout(run.folder).lessons.read_text(encoding="utf-8"))
    assert summary["written"] == len(lessons) == 20
    assert sum(summary["kinds"].values()) == 20
    assert len(summary["examples"]) == 10


def test_a_longer_run_begins_with_the_lessons_of_a_shorter_one(
    executor: Callable[..., Executor],
) -> None:
    short = executor("short", *sets(8)).samples().layout.texts
    long = executor("long", *sets(16)).samples().layout.texts
    assert long[: len(short)] == short


def test_lessons_are_found_again_and_follow_the_seed(
    executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = executor("one", *sets(8, general=0.5)).samples()
    other = executor("other", *sets(8, general=0.5), "seed=1").samples()
    assert other.digest() != made.digest()

    def write_again(*_: object) -> None:
        raise AssertionError("the teacher has written these lessons")

    monkeypatch.setattr(AnswerWriter, "answers", write_again)
    assert executor("two", *sets(8, general=0.5)).samples().digest() == made.digest()


def test_the_engine_is_connected_once_for_all_blocks(
    executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotdistill_core.execution.lessons.LESSONS_PER_BLOCK", 4)
    run = executor("run", *sets(12, general=0.5))
    writer = _Writer(run.context, 512)
    made: list[object] = []

    def connected(*arguments: Any) -> Any:
        made.append(connected_engine(*arguments))
        return made[-1]

    monkeypatch.setattr("rotdistill_core.execution.engines.connected_engine", connected)
    lessons = writer.lessons()
    assert len(lessons) == 12
    assert writer.made >= 12
    assert len(made) == 1


def test_progress_counts_the_lessons_of_all_blocks(
    executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block has two series of answers, and a user waits for all lessons."""
    monkeypatch.setattr("rotdistill_core.execution.lessons.LESSONS_PER_BLOCK", 4)
    told: list[tuple[int, int, str]] = []
    run = executor("run", *sets(12, general=0.5))
    told_run = replace(run.context, progress=lambda *report: told.append(report))
    assert len(_Writer(told_run, 512).lessons()) == 12
    assert {(total, what) for _, total, what in told} == {(12, "lessons are written")}
    counts = [done for done, *_ in told]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert len(set(counts)) > 6


def test_settings_of_lessons_count_only_with_lessons(
    executor: Callable[..., Executor], work: Path
) -> None:
    def texts(*given: str) -> str:
        run = executor("run", *given)
        return run._start(run.samples()).key

    plain = texts()
    assert texts(*sets(0, general=0.5)) == plain
    assert texts(*sets(4)) != plain


END = 2
"""The token that ends an answer of a pico model."""


def words(*numbers: int) -> list[int]:
    return [6 + number for number in numbers]


Write = Callable[[str, Asked], list[int]]


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[[Write], list[Asked]]:
    """Let the teacher write what a function says; return the function that sets it."""

    def replace(write: Write) -> list[Asked]:
        heard: list[Asked] = []

        def answers(_: AnswerWriter, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
            for name, each in asked.items():
                heard.append(each)
                tokens = write(name, each)
                yield name, Answer(tokens, "stop" if tokens[-1] == END else "length")

        monkeypatch.setattr(AnswerWriter, "answers", answers)
        return heard

    return replace


def own(name: str) -> list[int]:
    """Return three words that differ from name to name."""
    digits = int("".join(filter(str.isdigit, name)) or 0)
    return words(10 + digits % 9, 20 + digits // 9 % 9, 30 + digits // 81 % 9)


@pytest.mark.parametrize("general", ["texts", "questions"])
def test_the_teacher_proposes_questions_and_answers_them(
    executor: Callable[..., Executor], teacher: Callable[[Write], list[Asked]], general: str
) -> None:
    heard = teacher(lambda name, _: [*own(name), END])
    run = executor("run", *sets(12, general=0.5, general_from=general), "lessons.from=teacher")
    samples = run.samples()
    lessons = [each for each in samples.conversations if each.id.endswith(".lesson")]
    assert len(lessons) == 12
    system = words(1, 2, 3, 4)
    proposals = [each for each in heard if each.temperature]
    texts = sum(lesson.is_plain for lesson in lessons)
    drawn = Counter(each.temperature for each in proposals)
    assert (drawn[1.0], drawn[0.7]) == (texts, len(proposals) - texts)
    assert len({each.seed for each in proposals}) == len(proposals) >= 12
    by_id = {text.id: text for text in samples.layout.texts}
    for lesson in lessons:
        text = by_id[lesson.id]
        if lesson.is_plain:
            assert text.plain and text.tokens[1:] == tuple(own(lesson.id))
        else:
            assert text.plain == (lesson.system == "")
            assert (tuple(system) == text.tokens[1:5]) == (lesson.system is None)
            assert text.tokens[text.answer :] == (*own(lesson.id), END)
    # A question of the domain comes after the system prompt and two examples with their answers.
    longest = max(proposals, key=lambda each: len(each.prompt)).prompt
    assert list(longest[1:5]) == system
    assert list(longest).count(4) == 3  # <user>
    assert list(longest).count(5) == 2  # <assistant>
    assert longest[-1] == 4


def test_no_lesson_names_what_is_held_out(
    executor: Callable[..., Executor],
    teacher: Callable[[Write], list[Asked]],
    work: Path,
) -> None:
    texts = work / "texts" / "heldout.tsv"
    content = texts.read_text(encoding="utf-8").replace("other 0", "w57")
    texts.write_text(content, encoding="utf-8")

    def write(name: str, _: Asked) -> list[int]:
        return words(57, 3) if name.endswith(".lesson") and int(name[:6]) % 2 else words(3, 4)

    teacher(write)
    run = executor("run", *sets(12, general=0.0))
    lessons = [each for each in run.samples().layout.texts if each.id.endswith(".lesson")]
    assert len(lessons) == 12
    for text in lessons:
        assert words(57)[0] not in text.tokens[text.answer :]
    summary = json.loads(RunLayout(run.folder).lessons.read_text(encoding="utf-8"))
    assert summary["dropped"]["the answer names a held-out topic"]["count"] >= 11


def test_too_few_questions_are_told_once_with_their_number(
    executor: Callable[..., Executor], recorder: Any
) -> None:
    run = executor("run", *sets(1000, general=0.0), observer=recorder)
    found = [text for text in run.samples().layout.texts if text.id.endswith(".lesson")]
    (line,) = [line for line in recorder.lines if line.startswith("lessons: the teacher wrote")]
    assert f"wrote {len(found)} of the 1000" in line
    assert 0 < len(found) < 1000


def test_long_questions_leave_no_room_and_are_dropped(
    executor: Callable[..., Executor], work: Path
) -> None:
    long = " ".join(["w5"] * 40)
    (work / "forms.tsv").write_text(f"en\t{long} {{topic}}\nen\tw1 {{topic}}\n", encoding="utf-8")
    run = executor("run", *sets(10, general=0.0), "samples.max_tokens=40", "lessons.from=topics")
    found = [text for text in run.samples().layout.texts if text.id.endswith(".lesson")]
    assert found
    assert all(len(text.tokens) <= 40 for text in found)
    summary = json.loads(RunLayout(run.folder).lessons.read_text(encoding="utf-8"))
    (reason,) = [reason for reason in summary["dropped"] if "no room" in reason]
    assert summary["dropped"][reason]["count"] > 0


def test_a_template_that_changes_questions_lets_nobody_propose(
    executor: Callable[..., Executor], work: Path
) -> None:
    path = work / "model" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("m.content", "m.content | upper"))
    run = executor("run", *sets(4), "lessons.from=teacher")
    with pytest.raises(SetupError, match="does not write a question as it is"):
        run.samples()


def test_lessons_are_fitted_on(executor: Callable[..., Executor]) -> None:
    plain, taught = executor("plain").go(), executor("taught", *sets(12, general=0.3)).go()
    keys = [outcome.steps["full", "refit"].key for outcome in (plain, taught)]
    assert keys[0] != keys[1]
    assert {row.metric for row in taught.rows} == {row.metric for row in plain.rows}


def test_questions_in_another_language_are_dropped(
    executor: Callable[..., Executor],
    teacher: Callable[[Write], list[Asked]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(texts: Mapping[str, str], _: object) -> dict[str, str]:
        return {name: "fr" if int(name[:6]) % 2 else "en" for name in texts}

    monkeypatch.setattr("rotdistill_core.execution.lessons.told_languages", told)
    teacher(lambda name, _: [*own(name), END])
    run = executor("run", *sets(12, general=0.0), "lessons.from=teacher")
    lessons = [each.id for each in run.samples().layout.texts if each.id.endswith(".lesson")]
    assert len(lessons) == 12
    assert not any(int(name[:6]) % 2 for name in lessons)
    summary = json.loads(RunLayout(run.folder).lessons.read_text(encoding="utf-8"))
    assert "the question is in another language" in summary["dropped"]


def test_a_language_that_cannot_be_told_drops_no_question(
    executor: Callable[..., Executor],
    teacher: Callable[[Write], list[Asked]],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = work / "texts" / "index.tsv"
    text = index.read_text(encoding="utf-8").replace("\ten\t", "\teng\t")
    assert "\teng\t" in text
    index.write_text(text, encoding="utf-8")
    monkeypatch.setattr(
        "rotdistill_core.execution.lessons.told_languages",
        lambda texts, _: dict.fromkeys(texts, "en"),
    )
    teacher(lambda name, _: [*own(name), END])
    run = executor("run", *sets(12, general=0.0), "lessons.from=teacher")
    lessons = [each for each in run.samples().layout.texts if each.id.endswith(".lesson")]
    assert [each.language for each in lessons] == ["eng"] * 12


def test_a_base_model_without_a_template_proposes_questions_too(
    executor: Callable[..., Executor],
    teacher: Callable[[Write], list[Asked]],
    work: Path,
) -> None:
    (work / "model" / "chat_template.jinja").unlink()
    heard = teacher(lambda name, _: [*own(name), END])
    samples = executor("run", *sets(6, general=0.5), "lessons.from=teacher").samples()
    lessons = [text for text in samples.layout.texts if text.id.endswith(".lesson")]
    assert len(lessons) == 6
    assert all(each.prompt for each in heard)
