"""`store = "moments"`: the sums and thresholds of the row store, from rows that nobody keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rotdistill_residuals import _method, _sums
from rotdistill_residuals.step import Residuals
from safetensors.torch import load_file

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data import packed
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore, restore_activations
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.paired_sums import RowSums
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    pico_baked,
    pico_model,
    pico_output,
    pico_samples,
)

NAMES = ("C_st", "C_st_shuffled", "C_ss", "C_tt", "student_sum", "teacher_sum", "student_energy")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 texts, and samples of 3, so that pico texts have several blocks."""
    monkeypatch.setattr(packed, "BLOCK_TEXTS", 5)
    monkeypatch.setattr(packed, "SAMPLE_TEXTS", {Split.FIT: 3, Split.VALIDATION: 3})


def in_float64(folder: Path, *args: object, **changes: object) -> Model:
    made = pico_model(folder, *args, **changes)  # type: ignore[arg-type]
    return open_model(ModelRef(model=str(made.folder), dtype="float64"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    wider = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6}
    teacher = in_float64(folder / "teacher", seed=9, **wider)
    return Pair(teacher, in_float64(folder / "student", "qwen2", seed=1))


class Killed(Exception):
    """Stands for a kill."""


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


def captured(pair: Pair, samples: Samples, runs: Path, step: Residuals) -> ActivationStore:
    return step.capture(pair, pair.student.weights, samples, pico_output(runs), quiet)


def assert_close(one: RowSums, two: RowSums) -> None:
    assert one.rows == two.rows > 0
    for name in NAMES:
        a, b = getattr(one, name), getattr(two, name)
        assert float((a - b).norm()) <= 1e-12 * float(b.norm()), name


def both_stores(
    pair: Pair, samples: Samples, folder: Path, **options: object
) -> tuple[ActivationStore, ActivationStore]:
    rows = captured(pair, samples, folder / "rows", Residuals(**options))  # type: ignore[arg-type]
    step = Residuals(store="moments", **options)  # type: ignore[arg-type]
    return rows, captured(pair, samples, folder / "sums", step)


def layouts_of(kind: str) -> Samples:
    samples = pico_samples(texts=40, guard=4)
    if kind == "a baked prompt":
        return pico_baked(samples)
    if kind == "no prefix":
        return pico_samples(texts=40, prefix=0)
    return samples


@pytest.mark.parametrize("kind", ["a shared prompt", "a baked prompt", "no prefix"])
@pytest.mark.parametrize("options", [{}, {"student_texts": 11, "layer_map": "match"}])
def test_sums_are_those_of_the_row_store(
    pair: Pair, tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    rows, sums = both_stores(pair, layouts_of(kind), tmp_path, **options)
    assert rows.teacher_boundaries == sums.teacher_boundaries
    assert not rows.summed
    for boundary in range(3):
        assert rows.thresholds(boundary) == sums.thresholds(boundary)
        expected = rows.sums(boundary, squares=True)
        assert_close(sums.sums(boundary, squares=True), expected)
        assert not sums.sums(boundary, squares=False).C_tt.any()
        raw = sums.raw_sums(boundary)
        assert_close(raw, rows.raw_sums(boundary))
        assert not raw.C_ss.any()


def test_the_row_store_sums_what_its_rows_say(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=40)
    rows = captured(pair, samples, tmp_path, Residuals())
    layout = rows.layouts[Side.STUDENT]
    S, T = rows.paired(layout, 2)
    fit = layout.split(Split.FIT) & rows.thresholds(2).usable(S, T)
    fit[0] = False
    raw = rows.raw_sums(2)
    assert raw.rows == int(fit.sum())
    torch.testing.assert_close(raw.C_st, S[fit].T @ T[fit], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(raw.student_energy, S[fit].pow(2).sum(), rtol=1e-12, atol=0)
    X = S[fit] / S[fit].pow(2).mean(-1, keepdim=True).sqrt()
    found = rows.sums(2, squares=True)
    torch.testing.assert_close(found.C_ss, X.T @ X, rtol=1e-11, atol=1e-11)
    # The null pairs rows with others.
    assert float((found.C_st - found.C_st_shuffled).norm()) > 0.1 * float(found.C_st.norm())


def test_an_anchor_has_sums_of_its_own(pair: Pair, tmp_path: Path) -> None:
    anchored = Pair(pair.teacher, pair.student, in_float64(tmp_path / "anchor", "qwen2", seed=5))
    rows, sums = both_stores(anchored, pico_samples(texts=20), tmp_path)
    assert set(sums.summed) == {Side.TEACHER, Side.ANCHOR}
    for boundary in range(3):
        seen = sums.for_alignment.sums(boundary, squares=True)
        assert_close(seen, rows.for_alignment.sums(boundary, squares=True))
        assert_close(sums.raw_sums(boundary), rows.raw_sums(boundary))
        assert seen.C_tt.shape == (32, 32)


def test_rows_of_a_sample_and_of_scored_texts_are_kept(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=40, guard=4)
    rows, sums = both_stores(pair, samples, tmp_path)
    kept = sums.layouts[Side.TEACHER]
    counts = {split: len(kept.select(split).texts) for split in Split}
    assert counts == {
        Split.FIT: 3,
        Split.VALIDATION: 3,
        Split.HELDOUT: 8,
        Split.GUARD: 2,
        Split.GUARD_VALIDATION: 2,
    }
    assert sums.sample == rows.sample == sums.layouts[Side.STUDENT]
    scored = samples.layout.select(Split.HELDOUT, Split.GUARD)
    torch.testing.assert_close(sums.teacher_states(scored, 2), rows.teacher_states(scored, 2))
    heldout = samples.layout.select(Split.HELDOUT)
    torch.testing.assert_close(sums.teacher_states(heldout, 1), rows.teacher_states(heldout, 1))
    assert sums.holds(Side.TEACHER, scored)
    assert not sums.holds(Side.TEACHER, samples.layout)


def test_rows_that_are_not_kept_say_what_to_do(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=40)
    sums = captured(pair, samples, tmp_path, Residuals(store="moments"))
    with pytest.raises(RecipeError, match=r'rows of 21 texts .* "t5"\. Set store = "rows"'):
        sums.teacher_states(samples.layout.select(Split.FIT), 1)


@pytest.mark.parametrize("kind", ["a shared prompt", "a baked prompt", "no prefix"])
def test_of_texts_beyond_the_students_the_final_states_are_kept(
    pair: Pair, tmp_path: Path, kind: str
) -> None:
    samples = layouts_of(kind)
    rows = captured(pair, samples, tmp_path / "rows", Residuals())
    few = captured(pair, samples, tmp_path / "few", Residuals(student_texts=11))
    layout, fitted = samples.layout, (Split.FIT, Split.VALIDATION)
    last = pair.student.depth
    assert few.holds(Side.TEACHER, samples.teacher)
    torch.testing.assert_close(few.teacher_states(layout, last), rows.teacher_states(layout, last))
    first = layout.select(*fitted, limit=11)
    assert few.layouts[Side.STUDENT] == first
    for read in (first, layout.select(Split.HELDOUT)):
        torch.testing.assert_close(few.teacher_states(read, 1), rows.teacher_states(read, 1))
    beyond = layout.of(layout.select(*fitted).texts[14:])
    with pytest.raises(RecipeError, match=r"at boundary 1 .* last boundary only.* student_texts"):
        few.teacher_rows(beyond, 1)
    sizes = [len(few.rows(Side.TEACHER, boundary)) for boundary in range(4)]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3] == samples.teacher.rows
    assert restore_activations(few.info(samples), few.root, samples) == few


def test_a_control_keeps_the_rows_of_all_texts(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=40, guard=4)
    step = Residuals(student_texts=11, control="shuffled")
    assert step.keeps_all_rows
    assert not Residuals(student_texts=11).keeps_all_rows
    found = captured(pair, samples, tmp_path, step)
    sizes = {len(found.rows(Side.TEACHER, boundary)) for boundary in range(4)}
    assert sizes == {samples.layout.rows}


@pytest.mark.parametrize("store", ["rows", "moments"])
@pytest.mark.parametrize("killed_in", range(1, 6))
def test_a_killed_capture_of_some_rows_goes_on_where_states_were_saved(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int, store: str
) -> None:
    monkeypatch.setattr(_method, "SAVED_LAYERS", 2)
    samples = pico_samples(texts=40, guard=4)
    step = Residuals(student_texts=11, store=store)  # type: ignore[arg-type]
    whole = captured(pair, samples, tmp_path / "whole", step)
    layers: list[int] = []
    real = LayerwiseForward.run

    def noted(forward: LayerwiseForward, *args: Any, **kwargs: Any) -> None:
        layers.append(forward.boundary)
        real(forward, *args, **kwargs)

    def killed(forward: LayerwiseForward, *args: Any, **kwargs: Any) -> None:
        if len(layers) == killed_in - 1:
            raise Killed
        noted(forward, *args, **kwargs)

    monkeypatch.setattr(LayerwiseForward, "run", killed)
    with pytest.raises(Killed):
        captured(pair, samples, tmp_path / "runs", step)
    layers.clear()
    monkeypatch.setattr(LayerwiseForward, "run", noted)
    resumed = captured(pair, samples, tmp_path / "runs", step)
    # Three layers of the teacher, of which a kill in the third one leaves two; then two of the
    # student, whose shards hold all rows. Sums walk once more.
    expected = {1: [0, 1, 2, 0, 1], 2: [0, 1, 2, 0, 1], 3: [2, 0, 1], 4: [0, 1], 5: [1]}[killed_in]
    assert layers[: len(expected)] == expected
    if store == "rows":
        assert len(layers) == len(expected)
    begun = resumed.root / "run/shards/teacher/residual/begun.safetensors"
    assert load_file(begun)["states"].shape == (0, 48)
    for side, names in whole.shards.items():
        for one, two in zip(names, resumed.shards[side], strict=True):
            assert (whole.root / one).read_bytes() == (resumed.root / two).read_bytes()


def test_states_of_a_capture_that_ended_otherwise_take_no_room(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_method, "SAVED_LAYERS", 2)
    samples, step = pico_samples(texts=40), Residuals(student_texts=11)
    with monkeypatch.context() as patch:
        patch.setattr(_method.Stream, "_clear_saved", lambda _: None)
        captured(pair, samples, tmp_path, step)
    [begun] = tmp_path.rglob("begun.safetensors")
    assert load_file(begun)["states"].shape == (samples.layout.rows, 48)
    captured(pair, samples, tmp_path, step)
    assert load_file(begun)["states"].shape == (0, 48)
    size = begun.stat().st_mtime_ns
    captured(pair, samples, tmp_path, step)
    assert begun.stat().st_mtime_ns == size


def test_a_capture_in_another_dtype_goes_on_where_states_were_saved(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_method, "SAVED_LAYERS", 2)
    samples, step = pico_samples(texts=20), Residuals(dtype="bfloat16")
    whole = captured(pair, samples, tmp_path / "whole", step)

    def kill(done: int, *_: object) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        step.capture(pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), kill)
    # The last shard is not written yet.
    started: list[int] = []
    real = LayerwiseForward.start_at

    def noted(forward: LayerwiseForward, boundary: int, states: Any) -> None:
        started.append(boundary)
        real(forward, boundary, states)

    monkeypatch.setattr(LayerwiseForward, "start_at", noted)
    for shard in (tmp_path / "runs").rglob("00003.*"):
        shard.unlink()
    resumed = captured(pair, samples, tmp_path / "runs", step)
    assert started == [2]
    for one, two in zip(whole.shards[Side.TEACHER], resumed.shards[Side.TEACHER], strict=True):
        assert (whole.root / one).read_bytes() == (resumed.root / two).read_bytes()


@pytest.mark.parametrize("kind", ["a shared prompt", "a baked prompt"])
def test_inner_states_of_texts_outside_the_domain_are_not_kept(
    pair: Pair, tmp_path: Path, kind: str
) -> None:
    samples = layouts_of(kind)
    rows, sums = both_stores(pair, samples, tmp_path)
    kept = sums.layouts[Side.TEACHER]
    inner = kept.select(Split.FIT, Split.VALIDATION, Split.HELDOUT).rows
    sizes = [len(sums.rows(Side.TEACHER, boundary)) for boundary in range(4)]
    assert sizes == [inner, inner, inner, kept.rows]
    assert inner < kept.rows
    guard = samples.layout.select(Split.GUARD)
    with pytest.raises(RecipeError, match=r"at boundary 2 .* last boundary only\. Set store ="):
        sums.teacher_rows(guard, 2)
    assert len(rows.teacher_rows(guard, 2)) == guard.rows


def test_the_store_is_restored_from_json_and_hashes_its_sums(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=20)
    sums = captured(pair, samples, tmp_path, Residuals(store="moments"))
    assert restore_activations(sums.info(samples), sums.root, samples) == sums
    path = sums.root / sums.summed[Side.TEACHER][1]
    before = sums.digest()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert sums.digest() != before


@pytest.fixture
def blocks_walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of texts of each block that is walked; sums are committed after 2 blocks."""
    walked: list[int] = []
    real = _sums.side_by_side

    def noted(student: LayerwiseForward, *others: Any) -> Iterator[int]:
        walked.append(len(student.layout.texts))
        return real(student, *others)

    monkeypatch.setattr(_sums, "side_by_side", noted)
    monkeypatch.setattr(_sums, "COMMIT_BLOCKS", 2)
    yield walked


@pytest.mark.parametrize("killed_in", [1, 3, 4, 5])
def test_a_killed_capture_goes_on_after_the_last_committed_block(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks_walked: list[int],
    killed_in: int,
) -> None:
    samples = pico_samples(texts=40)  # 24 to fit on: 5 blocks
    whole = captured(pair, samples, tmp_path / "whole", Residuals(store="moments"))
    assert blocks_walked == [5, 5, 5, 5, 4]
    blocks_walked.clear()

    def kill(_: int, __: int, text: str) -> None:
        if "sums" in text and len(blocks_walked) == killed_in:
            raise Killed

    step = Residuals(store="moments")
    with pytest.raises(Killed):
        step.capture(pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), kill)
    blocks_walked.clear()
    resumed = captured(pair, samples, tmp_path / "runs", step)
    committed = (killed_in - 1) // 2 * 2
    assert len(blocks_walked) == 5 - committed
    for name in whole.summed[Side.TEACHER]:
        assert (whole.root / name).read_bytes() == (resumed.root / name).read_bytes()
    # What was begun takes no room.
    begun = load_file(resumed.root / "run/sums/teacher/begun.safetensors")
    assert set(begun) == {"blocks"}
    blocks_walked.clear()
    captured(pair, samples, tmp_path / "runs", step)
    assert blocks_walked == []


def test_a_control_of_sums_is_refused_with_the_recipe() -> None:
    with pytest.raises(ValidationError, match='store = "moments" does not keep; set store'):
        validator_of(Residuals).validate_python({"store": "moments", "control": "shuffled"})
