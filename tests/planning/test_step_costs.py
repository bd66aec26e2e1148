"""The costs of shipped steps follow their options, and contexts what a step does to the student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rotdistill_writer_refit.step import SCORED_ROWS

from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import (
    FLOAT32_BYTES,
    FLOAT64_BYTES,
    Cost,
    CostContext,
    Kernel,
    answer_rows,
    context_after,
    evaluation_cost,
    forward_cost,
    scoring_cost,
    step_cost,
)
from rotdistill_core.plugin.registry import step_class


@pytest.fixture
def deep(pico_context: CostContext) -> CostContext:
    """Return the context with a student of 8 layers, stored in bfloat16."""
    student = replace(pico_context.student.changed(num_hidden_layers=8), stored="bfloat16")
    return replace(pico_context, student=student, teacher=student)


def step_of(name: str, **options: Any) -> object:
    return step_class(name)[0](**options)


def cost_of(name: str, context: CostContext, **options: Any) -> Cost:
    return step_cost(step_of(name, **options), context)


def after(name: str, context: CostContext, **options: Any) -> CostContext:
    return context_after(step_of(name, **options), context)


def is_tied(context: CostContext) -> bool:
    return bool(context.student.config["tie_word_embeddings"])


def anchored(context: CostContext) -> CostContext:
    """Return the context with an anchor of the student's shape and a wider teacher."""
    teacher = context.teacher.changed(hidden_size=64, head_dim=16)
    return replace(context, teacher=teacher, anchor=context.student)


def test_steps_on_a_shard_count_its_texts(deep: CostContext) -> None:
    for name in ("writer-refit", "prompt-kl"):
        whole, rest, quarter = (
            cost_of(name, deep, shard=shard) for shard in ((1, 1), (-1, 4), (1, 4))
        )
        assert quarter.operations < rest.operations < whole.operations, name


@pytest.mark.parametrize("name", ["procrustes", "cca", "random-rotation"])
def test_an_aligner_stores_a_rotation_for_each_stage(name: str, deep: CostContext) -> None:
    one, each = cost_of(name, deep), cost_of(name, deep, tie=1)
    assert one.disk_bytes == 32 * 32 * FLOAT64_BYTES
    assert each.disk_bytes == 9 * one.disk_bytes
    assert each.operations > one.operations
    assert after(name, deep).stages == 1
    assert after(name, deep, tie=1).stages == 9


def test_householder_solves_the_stages_of_the_aligner_before_it(deep: CostContext) -> None:
    stages = after("procrustes", deep, tie=4)
    assert stages.stages == 3
    assert cost_of("householder", stages) == cost_of("procrustes", deep, tie=4)


def test_aligners_see_the_anchor_in_place_of_the_teacher(deep: CostContext) -> None:
    context = anchored(deep)
    for name in ("procrustes", "random-rotation", "hungarian-permute", "head-gauge"):
        assert cost_of(name, context) == cost_of(name, context.for_alignment), name
        assert cost_of(name, context) != cost_of(name, replace(context, anchor=None)), name


def test_a_capture_counts_the_anchor_and_its_shards(deep: CostContext) -> None:
    without, context = deep, replace(deep, anchor=deep.student)
    rows = deep.texts.rows_of("fit", "validation")
    one_pass = forward_cost(deep.student, rows, 4)
    difference = cost_of("residuals", context).operations - cost_of("residuals", without).operations
    assert difference == one_pass.operations
    shared = cost_of("residuals", context).shared_files
    new = {key: shared[key] for key in shared.keys() - cost_of("residuals", without).shared_files}
    assert list(new.values()) == [9 * rows * 32 * 4]


@pytest.mark.parametrize("options", [{}, {"mode": "canonical"}, {"mode": "widen"}])
def test_a_fold_of_a_rotation_unties_the_head(options: dict[str, Any], deep: CostContext) -> None:
    rotated = after("procrustes", deep)
    assert not is_tied(after("basis-fold", rotated, **options))
    assert cost_of("basis-fold", rotated, **options).disk_bytes > 0


def test_a_fold_of_permutations_and_gauges_leaves_the_head_tied(deep: CostContext) -> None:
    context = after("head-gauge", after("hungarian-permute", deep))
    assert is_tied(after("basis-fold", context))
    assert after("basis-fold", context).student.stored == "float32"


def test_a_blockwise_fold_leaves_the_head_tied_and_has_no_certificate(deep: CostContext) -> None:
    context = after("procrustes", deep, tie=1)
    assert is_tied(after("basis-fold", context, mode="block"))
    block, tied = cost_of("basis-fold", context, mode="block"), cost_of("basis-fold", context)
    assert block.operations < tied.operations
    assert block.disk_bytes == deep.student.parameters(inside=True) * 4


def test_a_canonical_fold_sums_moments_of_the_teachers_stream(deep: CostContext) -> None:
    context = after("procrustes", deep)
    canonical = cost_of("basis-fold", context, mode="canonical")
    tied = cost_of("basis-fold", context)
    assert canonical.operations - tied.operations > 2 * 9 * deep.texts.rows_of("fit") * 32**2


def test_a_search_by_kl_takes_passes_that_grow_with_the_cut(deep: CostContext) -> None:
    one = cost_of("chop", deep, layers=7, criterion="kl")
    four = cost_of("chop", deep, layers=4, criterion="kl")
    assert four.operations == pytest.approx(4 * one.operations)
    layer_pass = 2 * deep.student.layer_parameters * deep.texts.rows_of("validation")
    assert one.operations > 8**2 / 2 * layer_pass
    assert cost_of("chop", deep, layers=4).operations < four.operations


def test_fewer_rows_make_a_search_by_kl_cheaper(deep: CostContext) -> None:
    many = cost_of("chop", deep, layers=4, criterion="kl")
    few = cost_of("chop", deep, layers=4, criterion="kl", max_kl_rows=10)
    assert few.operations < many.operations
    assert few.host_bytes < many.host_bytes


def test_a_list_of_layers_costs_nothing(deep: CostContext) -> None:
    assert cost_of("chop", deep, layers=[0, 1, 7]) == Cost()


def test_only_a_cut_inside_layers_edits_weights(deep: CostContext) -> None:
    assert after("chop", deep, layers=4).student.stored == "bfloat16"
    for options in ({"neurons": 16}, {"kv_heads": 1}, {"width": 16}, {"keep_fraction": 0.5}):
        assert after("chop", deep, **options).student.stored == "float32", options


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ({"layers": [0, 1, 2]}, 1),
        ({"layers": [0, 2, 7]}, 2),
        ({"layers": 4}, 1),
        ({"layers": 6, "criterion": "kl"}, 2),
        ({"neurons": 16}, 0),
        ({"keep_fraction": 0.5}, 1),
    ],
)
def test_a_cut_counts_the_places_where_layers_went(
    options: dict[str, Any], cuts: int, deep: CostContext
) -> None:
    assert after("chop", deep, **options).cuts == cuts


def test_a_refit_of_cuts_alone_writes_one_writer_for_each_cut(deep: CostContext) -> None:
    context = after("chop", deep, layers=4)
    every, cut = (cost_of("writer-refit", context, layers=layers) for layers in ("all", "cut"))
    # Both have the states of student and teacher in files.
    files = 2 * deep.texts.rows_of("fit", "validation") * deep.student.width * FLOAT32_BYTES
    if not deep.same:
        files *= 1.5
    assert every.disk_bytes - files == 4 * (cut.disk_bytes - files) > 0
    assert cut.operations < every.operations


@pytest.mark.parametrize(
    ("options", "share"),
    [({"layers": 4}, 1 / 2), ({"layers": [0, 2, 7]}, 2 / 3), ({"layers": 4, "neurons": 16}, 1.0)],
)
def test_a_refit_works_on_the_layers_behind_the_first_cut(
    options: dict[str, Any], share: float, deep: CostContext
) -> None:
    """Those before it are the teacher's, unless neurons went too; cuts count as evenly spread."""
    cut = after("chop", replace(deep, same=True), **options)
    whole, part = (cost_of("writer-refit", each) for each in (replace(cut, cuts=0), cut))
    assert part.exact_terms == pytest.approx(share * whole.exact_terms)
    assert part.kernels[Kernel.SOLVES] == pytest.approx(share * whole.kernels[Kernel.SOLVES])
    walk = forward_cost(cut.student, cut.texts.rows_of("fit", "validation"), 4).operations
    saved = whole.operations - part.operations
    assert saved > 2 * (1 - share) * walk if share < 1 else saved == 0
    assert (part.host_bytes, part.disk_bytes) == (whole.host_bytes, whole.disk_bytes)


def test_a_refit_takes_a_pass_of_the_teacher_and_states_in_files(deep: CostContext) -> None:
    same = replace(deep, same=True)
    other, one = (cost_of("writer-refit", context) for context in (replace(deep, same=False), same))
    rows = deep.texts.rows_of("fit", "validation")
    walk = forward_cost(deep.student, rows, 4)
    # In another basis the student as captured walks along, too.
    assert other.operations - one.operations == walk.operations
    assert other.disk_bytes - one.disk_bytes == walk.host_bytes
    half = replace(same, teacher=deep.teacher.changed(num_hidden_layers=4))
    shorter = cost_of("writer-refit", half)
    assert one.operations - shorter.operations == walk.operations / 2
    assert shorter.disk_bytes == one.disk_bytes
    # A row takes some numbers in memory, and no states.
    longer = replace(
        same, texts=replace(deep.texts, rows={**deep.texts.rows, "fit": deep.texts.rows["fit"] * 9})
    )
    more = longer.texts.rows_of("fit", "validation") - rows
    grown = cost_of("writer-refit", longer).host_bytes - one.host_bytes
    assert grown <= more * 2 * 12 * FLOAT64_BYTES + 1536 * 3 * 32 * FLOAT64_BYTES


def test_a_refit_of_the_output_solves_for_the_width_alone(pico_context: CostContext) -> None:
    wide = pico_context.with_student(intermediate_size=256)
    activations = cost_of("writer-refit", wide)
    output = cost_of("writer-refit", wide, features="output")
    assert output.operations < activations.operations
    assert output.host_bytes < activations.host_bytes
    assert output.disk_bytes == activations.disk_bytes


def test_a_stage_of_two_layers_compares_twice_as_many_pairs(deep: CostContext) -> None:
    one, two = (cost_of("hungarian-permute", deep, within_stage=n) for n in (1, 2))
    assert two.operations == 2 * one.operations
    assert two.disk_bytes == one.disk_bytes


def test_activations_take_a_pass_of_both_models(deep: CostContext) -> None:
    many = cost_of("hungarian-permute", deep, criterion="activations")
    few = cost_of("hungarian-permute", deep, criterion="activations", max_texts=2)
    both = 4 * deep.student.parameters(inside=True) * deep.texts.rows_of("fit")
    assert many.operations > both > few.operations
    assert many.host_bytes > few.host_bytes


def test_weight_matching_takes_up_to_as_many_rounds_as_it_may(deep: CostContext) -> None:
    one, two, three = (cost_of("weight-matching", deep, max_rounds=n) for n in (1, 2, 3))
    assert three.operations - two.operations == pytest.approx(two.operations - one.operations)
    assert three.read_bytes > one.read_bytes
    assert after("weight-matching", deep).stages == 1


def test_a_gauge_alone_costs_less_than_all_three(deep: CostContext) -> None:
    every, up = cost_of("head-gauge", deep), cost_of("head-gauge", deep, gauges=["up"])
    assert up.operations < every.operations
    assert up.disk_bytes == 8 * 48 * FLOAT64_BYTES < every.disk_bytes


def test_a_longer_answer_costs_more(deep: CostContext) -> None:
    one, two = (cost_of("answers", deep, max_tokens=n) for n in (10, 20))
    # Prompts are read as before, and each further token takes a call of every layer.
    assert one.operations < two.operations < 2 * one.operations
    assert two.layer_calls == pytest.approx(2 * one.layer_calls)


def test_a_head_that_trains_is_untied_and_keeps_no_layers(deep: CostContext) -> None:
    assert is_tied(after("prompt-kl", deep))
    assert not is_tied(after("prompt-kl", deep, train="head"))
    lora, head = cost_of("prompt-kl", deep), cost_of("prompt-kl", deep, train="head")
    assert head.device_bytes < lora.device_bytes
    assert head.operations < lora.operations


def test_topics_need_the_whole_teacher_to_write(deep: CostContext) -> None:
    large = replace(deep, teacher=deep.teacher.changed(num_hidden_layers=800))
    whole = large.teacher.parameters() * large.teacher_bytes
    assert cost_of("prompt-kl", large).teacher_device_bytes > whole
    assert cost_of("prompt-kl", large, prompts_from=("questions",)).teacher_device_bytes < whole


def test_a_barrier_takes_a_pass_for_each_point_of_each_line(deep: CostContext) -> None:
    ends = ("variant", "one", "two")
    four, five, six = (
        cost_of("interpolation-barrier", deep, between=ends, points=n) for n in (4, 5, 6)
    )
    assert six.operations - five.operations == pytest.approx(five.operations - four.operations)
    two_ends = [
        cost_of("interpolation-barrier", deep, between=ends[:2], points=n).operations
        for n in (4, 5)
    ]
    # Three lines instead of one.
    more = five.operations - four.operations
    assert more == pytest.approx(3 * (two_ends[1] - two_ends[0]))


def test_a_barrier_reads_the_rows_of_its_split(deep: CostContext) -> None:
    guarded = replace(deep.texts, rows={**deep.texts.rows, "guard": 4000})
    ends = ("variant", "one")
    plain = cost_of("interpolation-barrier", deep, between=ends)
    assert cost_of("interpolation-barrier", replace(deep, texts=guarded), between=ends) == plain
    longer = cost_of("interpolation-barrier", deep, between=ends, split="validation")
    assert longer.operations > plain.operations


def test_a_merge_holds_one_parameter_whatever_the_number_of_parts(deep: CostContext) -> None:
    two, four = (
        cost_of("soups", deep, ingredients=("a", "b") * n, require_improvement=False)
        for n in (1, 2)
    )
    assert two.host_bytes == four.host_bytes < deep.student.parameters() * 4
    assert four.read_bytes > two.read_bytes


def test_a_greedy_soup_scores_every_trial(deep: CostContext) -> None:
    plain, greedy, unscored = (
        cost_of("soups", deep, ingredients=("a", "b", "c"), **options).operations
        for options in ({}, {"method": "greedy"}, {"require_improvement": False})
    )
    assert greedy > plain > unscored


def test_fisher_information_is_stored_for_each_ingredient(deep: CostContext) -> None:
    parts = ("a", "b", "c")
    plain, fisher = (
        cost_of("soups", deep, ingredients=parts, method=m) for m in ("uniform", "fisher")
    )
    assert fisher.disk_bytes - plain.disk_bytes == 3 * 2 * deep.student.parameters()
    assert fisher.device_bytes > 3 * deep.student.parameters() * 4


def test_a_transport_scores_every_strength(deep: CostContext) -> None:
    one, two, three = (
        cost_of("transport", deep, source="teacher", strengths=tuple(range(1, n + 1)))
        for n in (1, 2, 3)
    )
    assert three.operations - two.operations == pytest.approx(two.operations - one.operations)
    assert 0 < one.dealt_operations < one.operations
    unscored = cost_of(
        "transport", deep, source="teacher", strengths=(1.0,), require_improvement=False
    )
    assert unscored.operations < one.operations
    assert unscored.disk_bytes == one.disk_bytes


def test_a_whole_models_change_is_written_beside_the_weights(deep: CostContext) -> None:
    untied = replace(deep.student.changed(tie_word_embeddings=False), stored="float32")
    assert after("transport", deep, source="teacher").student == untied
    weights = untied.parameters() * FLOAT32_BYTES
    assert cost_of("transport", deep, source="teacher").disk_bytes == 2 * weights
    one, two = (cost_of("transport", deep, source="teacher", rank=n).disk_bytes for n in (1, 2))
    assert weights < one < two < 2 * weights


def test_captures_and_comparisons_are_dealt_and_answers_are_not(deep: CostContext) -> None:
    for options in ({}, {"store": "moments"}):
        capture = cost_of("residuals", deep, **options)
        assert capture.dealt_operations == pytest.approx(capture.operations)
        assert capture.gathered
    fidelity = cost_of("fidelity", deep)
    assert fidelity.dealt_operations == pytest.approx(fidelity.operations)
    assert cost_of("answers", deep).dealt_operations == 0


def test_sums_are_added_up_in_two_integers_for_each_entry(deep: CostContext) -> None:
    (added,) = cost_of("residuals", deep, store="moments").added_up
    width, boundaries = deep.student.width, deep.student.depth + 1
    kinds = 2 if deep.same else 3
    # Of the squares of both streams a triangle is kept.
    entries = kinds * width**2 + 2 * (width * (width + 1) // 2)
    assert added.size == boundaries * entries * 2 * FLOAT64_BYTES
    assert added.dealt
    assert cost_of("residuals", deep).added_up == ()


def test_a_lora_is_added_up_once_for_each_step_of_training(deep: CostContext) -> None:
    four, eight = (cost_of("prompt-kl", deep, batch_size=n) for n in (4, 8))
    (one,), (other,) = four.added_up, eight.added_up
    assert one.times == 2 * other.times > 0
    double = cost_of("prompt-kl", deep, rank=32).added_up[0]
    assert double.size == 2 * one.size
    assert 0 < four.dealt_operations < four.operations


def test_matrices_that_train_take_more_memory_and_disk_than_a_lora(deep: CostContext) -> None:
    inside = deep.student.parameters(inside=True)
    lora, full = (cost_of("prompt-kl", deep, rank=rank) for rank in (1, "full"))
    # Six copies in float32, and integers of sixteen bytes; of a LoRA of rank 1 there is little.
    more = full.device_bytes - lora.device_bytes
    assert 0.5 < more / (inside * (6 * FLOAT32_BYTES + 16)) < 1
    assert full.disk_bytes > lora.disk_bytes
    assert full.operations > lora.operations
    (added,) = full.added_up
    assert added.size == 2 * FLOAT64_BYTES * inside


def test_answers_of_the_student_take_a_second_student(deep: CostContext) -> None:
    plain, half, all_of_them = (cost_of("prompt-kl", deep, on_policy=n) for n in (0, 0.5, 1))
    whole = deep.student.parameters() * deep.student_bytes
    assert half.device_bytes > plain.device_bytes + whole
    assert plain.operations < half.operations < all_of_them.operations
    assert plain.disk_bytes < half.disk_bytes < all_of_them.disk_bytes


def test_texts_that_train_at_once_take_memory_together(deep: CostContext) -> None:
    one, four = (cost_of("prompt-kl", deep, micro_batch_size=n) for n in (1, 4))
    assert four.device_bytes > one.device_bytes
    assert four.operations == one.operations


def test_a_refit_adds_up_the_sums_of_two_splits_for_each_layer(deep: CostContext) -> None:
    cost = cost_of("writer-refit", deep, layers="all", writers=["neurons"])
    neurons, width = deep.student.neurons, deep.student.width
    added, scored = cost.added_up
    assert added.size == 2 * neurons * (neurons + width) * 2 * FLOAT64_BYTES
    assert (added.times, added.dealt) == (8, False)
    rows = min(answer_rows(deep, Split.VALIDATION), SCORED_ROWS)
    assert scored.size == rows * deep.teacher.width * deep.teacher_bytes
    assert 0 < cost.dealt_operations < cost.operations


def test_a_head_adds_up_one_sum_of_both_models_rows(deep: CostContext) -> None:
    cost = cost_of("lm-head-ridge", deep)
    student, teacher = deep.student.width, deep.teacher.width
    (added,) = cost.added_up
    assert added.size == student * (student + teacher) * 2 * FLOAT64_BYTES
    assert (added.times, added.dealt) == (1, False)
    assert 0 < cost.dealt_operations < cost.operations
    assert cost_of("lm-head-ridge", deep, objective="next-token").added_up == ()


@pytest.mark.parametrize("stored", [2, 4])
def test_both_heads_lie_on_the_gpu_in_float32(deep: CostContext, stored: int) -> None:
    """Whatever models compute in; so do the logits, and nothing there is memory-mapped."""
    context = replace(deep, student_bytes=stored, teacher_bytes=stored)
    heads = context.student.vocab * (context.student.width + context.teacher.width) * FLOAT32_BYTES
    logits = context.student.vocab * 100 * FLOAT32_BYTES
    assert scoring_cost(context, 100, 100).device_bytes > heads + logits
    assert evaluation_cost(context).device_bytes > heads
    own = context.student.vocab * context.student.width * FLOAT32_BYTES
    assert cost_of("lm-head-ridge", context).device_bytes > heads + 3 * own
    trained = cost_of("prompt-kl", context, prompts_from=("questions",))
    assert trained.device_bytes > context.student.parameters() * stored + heads - own


def test_a_head_that_is_fitted_to_the_kl_takes_longer(deep: CostContext) -> None:
    ridge, kl, longer = (
        cost_of("lm-head-ridge", deep, **options).operations
        for options in ({}, {"objective": "kl"}, {"objective": "kl", "max_iter": 240})
    )
    assert longer - ridge == pytest.approx(10 * (kl - ridge))
    assert kl > ridge
    outside = {
        "rows": {**deep.texts.rows, Split.GUARD_VALIDATION: 40},
        "texts": {**deep.texts.texts, Split.GUARD_VALIDATION: 4},
    }
    guarded = replace(deep, texts=replace(deep.texts, **outside))
    assert cost_of("lm-head-ridge", guarded).operations > ridge
    assert cost_of("lm-head-ridge", guarded, guard="off").operations == ridge
