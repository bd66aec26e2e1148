"""A system prompt written into the rows of a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_writer_refit import _prompt_rows
from rotdistill_writer_refit._prompt_rows import (
    KEPT,
    LayerRows,
    attention_on_prompt,
    chosen_rows,
    constrained_edit,
    fold_prompt,
)
from rotdistill_writer_refit.step import PromptRows

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.tokenization import with_prompt
from rotdistill_core.errors import RecipeError, SingularError
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import parametrize_with_checks, pico_model, pico_output, pico_samples

PREFIX = 8
TEMPLATE = (3, 50, 51, 52, 53, 54, 55, 4)
"""What the student reads before a question."""
BEGINNING = pico_samples(prefix=PREFIX).layout.texts[0].tokens[:1]
"""A template of one row, with which the prompt begins too."""


@parametrize_with_checks(PromptRows, {}, {"first": 1, "ridge": 1.0})
def test_prompt_rows_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    try:
        check(tmp_path)
    except RecipeError as error:
        # In the texts of the kit there is nothing to bake in, and the step says so.
        assert "bake_prompt = true" in str(error)


def baked(texts: int = 60, template: tuple[int, ...] = TEMPLATE) -> Samples:
    """Return texts before which the teacher reads a random prompt, the student a template."""
    samples = pico_samples(texts=texts, prefix=PREFIX)
    student = tuple(
        with_prompt(text, (*template, *text.tokens[PREFIX : text.answer]))
        for text in samples.layout.texts
    )
    layout = PackedTexts(student, len(template))
    return replace(samples, layout=layout, theirs=samples.layout, baked=True)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Return a model with more neurons than rows of a prompt need."""
    return pico_model(tmp_path / "model", intermediate_size=512, num_hidden_layers=3)


def edited(model: Model, samples: Samples, folder: Path, **options: float) -> Weights:
    step = PromptRows(**options)  # type: ignore[arg-type]  # numbers of either kind
    return fold_prompt(
        step, model.weights, Pair(model, model), samples, pico_output(folder), lambda *_: None
    )


def prefix_states(weights: Weights, layout: PackedTexts) -> list[torch.Tensor]:
    """Return the stream on the shared prefix at each boundary."""
    forward = LayerwiseForward(weights, layout, torch.device("cpu"), torch.float32)
    states = [forward.states[: layout.prefix].clone()]
    for _ in forward:
        forward.run()
        states.append(forward.states[: layout.prefix].clone())
    return states


def test_prompt_rows_is_an_inexact_style() -> None:
    assert stage_of(PromptRows) == "style"
    assert not PromptRows.exact


def keep_all(_: Weights, after: Weights, *__: object) -> Weights:
    """Accept any edit: of random models none helps beyond chance."""
    return after


@pytest.mark.parametrize("first", [0, 1])
def test_the_template_becomes_the_prompt(
    model: Model, tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prompt_rows, "accept_if_better", keep_all)
    samples = baked()
    weights = edited(model, samples, tmp_path / "runs", first=first, ridge=0.01)
    again = edited(model, samples, tmp_path / "again", first=first, ridge=0.01)
    assert samples.theirs is not None
    wanted = prefix_states(model.weights, samples.theirs)
    before = prefix_states(model.weights, samples.layout)
    after = prefix_states(weights, samples.layout)
    assert all(map(torch.equal, after, prefix_states(again, samples.layout)))
    for boundary in range(1, 4):
        if boundary <= first:
            assert torch.equal(after[boundary], before[boundary])
        else:
            distance = (after[boundary] - wanted[boundary]).norm()
            assert distance < 1e-3 * (before[boundary] - wanted[boundary]).norm()


def test_an_edit_that_is_no_gain_beyond_chance_is_refused(model: Model, tmp_path: Path) -> None:
    out = pico_output(tmp_path / "runs")
    step = PromptRows(first=1)
    pair = Pair(model, model)
    kept = fold_prompt(step, model.weights, pair, baked(texts=5), out, lambda *_: None)
    assert kept is model.weights
    assert out.report.refused is not None
    assert "chance" in out.report.refused


def test_the_constraint_holds_and_no_smaller_change_exists() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    rows = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    rows *= torch.linspace(0.1, 3, 24)
    others = Moments(24, 1)
    others.add(rows, torch.zeros(200, 1))
    stream = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    delta = constrained_edit(LayerRows(A, stream, others), target, 1e-6, "here")
    torch.testing.assert_close(A @ delta, target - stream, rtol=1e-5, atol=1e-5)
    change = (rows @ delta).norm()
    # Any other solution differs by what A does not see.
    _, _, Vt = torch.linalg.svd(A)
    free = Vt[4:].T @ torch.randn(20, 6, generator=generator, dtype=torch.float64)
    for step in (-1e-2, 1e-2):
        assert (rows @ (delta + step * free)).norm() > change
    smallest = torch.linalg.pinv(A) @ (target - stream)
    assert (rows @ smallest).norm() > 1.2 * change


def test_a_row_that_is_zero_is_an_error_that_says_where() -> None:
    others = Moments(4, 1)
    others.add(torch.eye(4), torch.zeros(4, 1))
    seen = LayerRows(torch.zeros(2, 4).double(), torch.zeros(2, 3).double(), others)
    with pytest.raises(SingularError, match="layer 7"):
        constrained_edit(seen, torch.ones(2, 3).double(), 0.1, "layer 7")


def test_the_rows_that_are_read_most_are_chosen_in_order() -> None:
    attended = torch.tensor([9.0, 9.0, 1.0, 5.0, 2.0, 4.0, 0.5, 9.0])
    prompt = [1, 2, 10, 11, 12, 13, 14, 3]
    assert chosen_rows([1, 2, 20, 21, 3], prompt, attended).tolist() == [0, 1, 3, 5, 7]
    # A sink is not chosen; the row of the template before stays as it is.
    sinks = attended.index_fill(0, torch.tensor([2, 3, 4]), -torch.inf)
    assert chosen_rows([1, 2, 20, 21, 22, 3], prompt, sinks).tolist() == [0, 1, KEPT, 5, 6, 7]
    # A short prompt leaves the first rows of a long template to themselves.
    short = chosen_rows([1, 2, 20, 21, 22, 3], [1, 2, 10, 3], attended[:4])
    assert short.tolist() == [0, 1, KEPT, KEPT, 2, 3]


def test_attention_is_shared_out_over_all_rows_but_the_sink(model: Model) -> None:
    samples = pico_samples(texts=3, prefix=PREFIX)
    received = attention_on_prompt(model, samples.layout, PREFIX)
    assert received[0] == 0
    assert (received[1:] > 0).all()
    assert float(received.sum()) == pytest.approx(3 * 4)  # layers times heads


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (pico_samples(), "bake_prompt = true"),
        (baked(template=BEGINNING), "none of which"),
    ],
)
def test_texts_without_rows_to_edit_are_refused(
    model: Model, tmp_path: Path, samples: Samples, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        edited(model, samples, tmp_path / "runs")


def test_two_models_are_refused(model: Model, tmp_path: Path) -> None:
    other = pico_model(tmp_path / "other", seed=1)
    pair = Pair(model, other)
    out = pico_output(tmp_path / "runs")
    with pytest.raises(RecipeError, match="the teacher's basis"):
        fold_prompt(PromptRows(), other.weights, pair, baked(), out, lambda *_: None)


def test_a_guard_needs_texts(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"samples\.guard"):
        edited(model, baked(), tmp_path / "runs", guard=1.1)
