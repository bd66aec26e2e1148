"""The size of a capture: with sums it does not grow with the texts, and `cost` states it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import pytest
from rotdistill_residuals.step import Residuals

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data import packed
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.planning import text_counts
from rotdistill_core.planning.cost import CostContext, alignment_cost
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.testing import pico_model, pico_output, pico_samples

SAMPLE = {Split.FIT: 8, Split.VALIDATION: 8}


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SAMPLE_TEXTS", SAMPLE)
    monkeypatch.setattr(text_counts, "SAMPLE_TEXTS", SAMPLE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    return Pair(pico_model(folder / "teacher", seed=9), pico_model(folder / "student", seed=1))


def texts(count: int) -> Samples:
    """Texts of 25 tokens, of which 5 are held out, and a fifth of the others for validation."""
    samples = pico_samples(texts=count)

    def of(k: int) -> Split:
        if k < 5:
            return Split.HELDOUT
        return Split.VALIDATION if k % 5 == 0 else Split.FIT

    made = (
        replace(text, split=of(k), tokens=(text.tokens + text.tokens)[:25])
        for k, text in enumerate(samples.layout.texts)
    )
    return replace(samples, layout=PackedTexts(tuple(made), samples.layout.prefix))


def counted(samples: Samples) -> TextCounts:
    layout = samples.layout
    parts = {split: layout.select(split) for split in Split}
    return TextCounts(
        prefix=layout.prefix,
        rows={split: part.rows - layout.prefix for split, part in parts.items() if part.texts},
        texts={split: len(part.texts) for split, part in parts.items()},
        questions_asked=0,
        answer_tokens=0,
    )


def context(pair: Pair, samples: Samples) -> CostContext:
    def shape(model: Model) -> ModelShape:
        return ModelShape(model.adapter, model.config, "float32")

    return CostContext(
        teacher=shape(pair.teacher),
        student=shape(pair.student),
        texts=counted(samples),
        teacher_bytes=4,
        student_bytes=4,
        same=False,
    )


def files_of(pair: Pair, samples: Samples, runs: Path, step: Residuals) -> int:
    """Return the bytes of all tensors that a capture leaves."""
    step.capture(pair, pair.student.weights, samples, pico_output(runs), lambda *_: None)
    return sum(path.stat().st_size for path in runs.rglob("*.safetensors"))


def test_disk_does_not_grow_with_texts_and_is_what_the_cost_says(
    pair: Pair, tmp_path: Path
) -> None:
    sums, rows = Residuals(store="moments"), Residuals()
    few, many = texts(60), texts(400)
    of_few = files_of(pair, few, tmp_path / "few", sums)
    of_many = files_of(pair, many, tmp_path / "many", sums)
    assert of_many == pytest.approx(of_few, rel=0.05)
    assert files_of(pair, many, tmp_path / "rows", rows) > 4 * of_many

    cost = sums.cost(context(pair, many))
    stated = cost.disk_bytes + sum(cost.shared_files.values())
    assert stated == pytest.approx(of_many, rel=0.05)
    assert stated < rows.cost(context(pair, many)).disk_bytes + sum(
        rows.cost(context(pair, many)).shared_files.values()
    )


@pytest.mark.parametrize(
    "step",
    [Residuals(student_texts=20), Residuals(student_texts=3), Residuals(student_texts=1000)],
    ids=lambda step: f"{step.student_texts} texts",
)
def test_inner_rows_are_kept_of_the_texts_of_the_student(
    pair: Pair, tmp_path: Path, step: Residuals
) -> None:
    many = texts(400)
    found = files_of(pair, many, tmp_path, step)
    cost = step.cost(context(pair, many))
    assert found == pytest.approx(cost.disk_bytes + sum(cost.shared_files.values()), rel=0.05)
    inner = min(step.student_texts or 0, 395)
    # Two boundaries of the teacher inside, and three of the student, of 32 numbers of 4 bytes; a
    # text has 19 rows after the prefix. The teacher's last boundary has all.
    teacher = 400 + 2 * (max(inner, 16) + 5)
    assert found == pytest.approx(32 * 4 * 19 * (teacher + 3 * inner), rel=0.1)


def test_a_capture_names_the_options_with_which_it_writes_less(pair: Pair) -> None:
    def less(step: Residuals, count: int) -> str:
        return step.cost(context(pair, texts(count))).less_disk

    assert less(Residuals(), 400) == 'student_texts = 48 or store = "moments"'
    # Sums are larger than the rows of few texts.
    assert less(Residuals(), 25) == less(Residuals(student_texts=48), 25) == ""
    assert less(Residuals(student_texts=48), 4000) == 'store = "moments"'
    assert less(Residuals(control="shuffled"), 400) == less(Residuals(store="moments"), 400) == ""


def test_captures_that_share_files_count_them_once(pair: Pair) -> None:
    def files(step: Residuals) -> set[Hashable]:
        return {*step.cost(context(pair, texts(400))).shared_files}

    assert files(Residuals()) == files(Residuals(control="shuffled", student_texts=48))
    assert files(Residuals()) != files(Residuals(student_texts=1))
    # Both keep the sample's rows inside, which are more.
    assert files(Residuals(student_texts=1)) == files(Residuals(student_texts=3))
    sums = [Residuals(store="moments", student_texts=count) for count in (3, 48)]
    assert files(sums[0]) == files(sums[1]) != files(Residuals(student_texts=48))


def test_states_that_are_saved_take_disk_and_are_gathered(pair: Pair) -> None:
    step = Residuals(student_texts=48)
    here = context(pair, texts(4000))
    deep = replace(here, teacher=here.teacher.changed(num_hidden_layers=9))
    flat = replace(here, teacher=here.teacher.changed(num_hidden_layers=4))
    saved = here.texts.total * 32 * 4
    assert step.cost(deep).disk_bytes - step.cost(flat).disk_bytes == saved
    sizes = [sum(each.size for each in step.cost(model).gathered) for model in (deep, flat)]
    shards = [sum(step.cost(model).shared_files.values()) for model in (deep, flat)]
    beside = here.texts.total - 53 * 19  # 48 texts, and five held-out ones
    assert sizes[0] - sizes[1] - (shards[0] - shards[1]) == pytest.approx(
        2 * beside * 32 * 4, rel=0.01
    )


def test_states_saved_beside_shards_of_another_dtype_take_disk(pair: Pair) -> None:
    step = Residuals(dtype="bfloat16")
    here = context(pair, texts(400))

    def deeper(side: str) -> CostContext:
        return replace(here, **{side: getattr(here, side).changed(num_hidden_layers=9)})  # type: ignore[arg-type]

    teacher, student = (step.cost(deeper(side)) for side in ("teacher", "student"))
    flat = step.cost(here)
    # Its shards are no states to go on from, so those of all rows are saved in float32.
    saved = here.texts.total * 32 * 4
    assert teacher.disk_bytes - flat.disk_bytes == saved
    # The student has seven more shards of two bytes, and reads no held-out texts.
    rows = here.texts.rows_of(Split.FIT, Split.VALIDATION)
    assert student.disk_bytes - flat.disk_bytes == rows * 32 * (4 + 7 * 2)
    # One stream after the other is captured, so the larger of two saved states counts.
    deep = step.cost(replace(deeper("teacher"), student=deeper("student").student))
    assert deep.disk_bytes - student.disk_bytes == saved - rows * 32 * 4
    anchored = replace(here, anchor=deeper("student").student)
    assert step.cost(anchored).disk_bytes - flat.disk_bytes == rows * 32 * 4
    # What is gathered is as it was computed, whatever the shards' dtype.
    for cost in (teacher, student):
        plain = Residuals().cost(deeper("teacher" if cost is teacher else "student"))
        assert [each.size for each in cost.gathered] == [each.size for each in plain.gathered]


def test_what_was_begun_is_stated_where_it_is_committed(pair: Pair) -> None:
    step = Residuals(store="moments")
    few, many = (step.cost(context(pair, texts(count))).disk_bytes for count in (600, 700))
    # Three boundaries: three products, and triangles of both squares, as integers of two limbs.
    entries = 3 * (3 * 32 * 32 + 2 * 32 * 33 // 2)
    assert many - few == pytest.approx(2 * 8 * entries, rel=0.01)


def test_memory_and_disk_are_stated_the_same_for_any_number_of_texts(pair: Pair) -> None:
    step = Residuals(store="moments")
    few, many = (step.cost(context(pair, texts(count))) for count in (700, 2800))
    assert many.host_bytes == pytest.approx(few.host_bytes, rel=0.01)
    assert many.disk_bytes == pytest.approx(few.disk_bytes, rel=0.01)
    assert many.operations > 3 * few.operations
    grown = Residuals().cost(context(pair, texts(2800)))
    assert grown.host_bytes > 3 * Residuals().cost(context(pair, texts(700))).host_bytes


def test_an_aligner_after_it_reads_sums_and_no_rows(pair: Pair) -> None:
    of_rows = context(pair, texts(800))
    of_sums = Residuals(store="moments").context_after(of_rows)
    assert of_sums.sums
    assert not Residuals().context_after(of_sums).sums
    fewer = Residuals(store="moments").context_after(context(pair, texts(200)))
    assert alignment_cost(of_sums).host_bytes < alignment_cost(of_rows).host_bytes
    assert alignment_cost(of_sums).operations < alignment_cost(of_rows).operations
    assert alignment_cost(of_sums).read_bytes == alignment_cost(fewer).read_bytes
