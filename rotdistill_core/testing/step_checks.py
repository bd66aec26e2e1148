"""What every step must pass: each check takes a step class, its options, and an empty folder.

A step is run on a pico model (the student) and the same model in another basis (the teacher), with
captured activations and, unless it is an aligner, the maps between the two.
"""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.evaluation.rows import Variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.linalg.maps import Maps, Rotation, tensor_of
from rotdistill_core.planning.cost import Cost, CostContext, context_after, step_cost
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.step import options_of, stage_of, validator_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing.compute import max_difference, reopen, save_folder
from rotdistill_core.testing.pico import captured_activations, pico_model, pico_output, pico_samples
from rotdistill_core.testing.planted import rotated_twin

Options = Mapping[str, Any]
Tensors = dict[str, Any]
"""Name -> tensor, or for evaluators a list of metric rows."""


class Trial(NamedTuple):
    """What a step returned and what it was given, as tensors by name."""

    result: Tensors
    inputs: Tensors
    planted: Tensor
    """The rotation `Q [d, d]` between student and teacher."""


def _try_step(cls: type, options: Options, folder: Path, *, hard: bool = False) -> Trial:
    """Run a step on a pico model and its twin in another basis.

    Args:
        cls: the step class.
        options: its options.
        folder: an empty one.
        hard: fewer texts than channels, and one channel that is always 0.
    """
    student = _with_dead_channel(folder) if hard else pico_model(folder / "student")
    teacher, planted = rotated_twin(student, folder / "teacher")
    pair = Pair(teacher, student)
    samples = pico_samples(texts=5 if hard else 40, guard=2)
    out = pico_output(folder / "runs")
    activations = captured_activations(pair, student.weights, samples, out)
    known = {f"residual.{b}": Rotation(planted) for b in range(student.depth + 1)}
    maps = Maps({} if stage_of(cls) == "align" else known)
    arguments = {
        "pair": pair,
        "samples": samples,
        "out": out,
        "activations": activations,
        "maps": maps,
        "weights": student.weights,
        "variant": Variant("base", student.weights, maps, 0.0, student.folder),
        "progress": lambda *_: None,
        "ranks": ALONE,
    }
    step: Any = validator_of(cls).validate_json(json.dumps(options), strict=True)
    hook = getattr(step, stage_of(cls))
    torch.seed()  # what a step draws must come from its own seed
    result = hook(**{name: arguments[name] for name in inspect.signature(hook).parameters})
    inputs = _tensors(maps) | _tensors(activations)
    inputs |= _tensors(reopen(student.folder, student.weights))
    return Trial(_tensors(result), inputs, planted)


def _with_dead_channel(folder: Path) -> Model:
    """Return a pico model that is wider than its texts have rows, and whose first channel is always
    0."""
    model = pico_model(folder / "student", hidden_size=128, num_attention_heads=4)
    edited = {}
    for name, param in model.adapter.expand(model.config).items():
        writes = "residual" in param.axes and not param.gain and not param.is_gain
        if writes and name in model.weights.entries:
            axis = param.axes.index("residual")
            edited[name] = model.weights[name].index_fill(axis, torch.tensor(0), 0.0)
    save_folder(model.weights.edit(edited), model.folder, folder / "dead")
    return open_model(ModelRef(model=str(folder / "dead")))


def _tensors(result: Any) -> Tensors:
    """Return what a stage returns by name: maps, weights, captured rows, or metric rows."""
    assert result is not None, "the hook gave None"
    if isinstance(result, ActivationStore):
        return {
            f"{side} {boundary}": result.rows(side, boundary).clone()
            for side, shards in result.shards.items()
            for boundary in range(len(shards))
        }
    if isinstance(result, Weights):
        return {name: result[name].clone() for name in result.entries}
    if isinstance(result, Maps):
        return {f"map {space}": tensor_of(found) for space, found in result.items()}
    return {"rows": list(result)}


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


def the_hook_is_as_specified(cls: type, _options: Options, _folder: Path) -> None:
    """Compare arguments and annotations of the one stage hook with its specification.

    An argument that the step can do without has the default None, and says so in its annotation.
    """
    hook = inspect.signature(getattr(cls, stage_of(cls)))
    specified = inspect.signature(getattr(HookSpecs, stage_of(cls)))
    wrong = [
        parameter
        for name, parameter in hook.parameters.items()
        if name != "self"
        and str(parameter).replace(" | None' = None", "'") != str(specified.parameters.get(name))
    ]
    assert not wrong and hook.return_annotation == specified.return_annotation, (
        f"{wrong} or the result differ from {specified}"
    )


def options_survive_toml_and_json(cls: type, options: Options, _folder: Path) -> None:
    """Write the options as a recipe does and read them again; each has a description."""
    read: Any = validator_of(cls).validate_json
    values = options_of(read(json.dumps(options), strict=True))
    text = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None
    )
    assert options_of(read(json.dumps(tomllib.loads(text)), strict=True)) == values
    properties = validator_of(cls).json_schema()["properties"]
    bare = [
        name for name in properties if name != "use" and not properties[name].get("description")
    ]
    assert not bare, f"no text under {bare}: it is what a recipe's author reads"


def the_cost_is_stated_in_numbers(cls: type, options: Options, folder: Path) -> None:
    """Ask for the cost on a pico context: every figure is finite and not negative; so is the
    context after it."""
    step: Any = validator_of(cls).validate_json(json.dumps(options), strict=True)
    model = pico_model(folder / "student")
    context = pico_cost_context(model, pico_samples())
    with suppress(RecipeError):  # options that this model has no room for
        after = context_after(step, context)
        assert isinstance(after, CostContext), "context_after must return a CostContext"
        assert after.student.parameters() > 0
    cost = step_cost(step, context)
    assert isinstance(cost, Cost), "cost must return a Cost"
    others = ("shared_files", "added_up", "gathered", "kernels", "less_disk")
    figures = {f.name: getattr(cost, f.name) for f in fields(cost) if f.name not in others}
    figures |= {f"added_up.{k}": each.size * each.times for k, each in enumerate(cost.added_up)}
    figures |= {f"gathered.{k}": each.size for k, each in enumerate(cost.gathered)}
    figures |= {str(key): size for key, size in cost.shared_files.items()}
    figures |= {f"kernels.{kernel}": each for kernel, each in cost.kernels.items()}
    bad = {name: value for name, value in figures.items() if not 0 <= value < math.inf}
    assert not bad, f"no number of bytes or operations: {bad}"


def pico_cost_context(model: Model, samples: Samples) -> CostContext:
    """Return the context of a plan whose teacher and student are one pico model."""
    shape = ModelShape(model.adapter, model.config, "float32")
    layout: PackedTexts = samples.layout
    rows: dict[str, int] = {}
    texts: dict[str, int] = {}
    for text in layout.texts:
        own = len(text.tokens) - layout.prefix_length(text)
        rows[text.split] = rows.get(text.split, 0) + own
        texts[text.split] = texts.get(text.split, 0) + 1
    counts = TextCounts(
        prefix=layout.prefix,
        rows=rows,
        texts=texts,
        questions_asked=texts.get("heldout", 0),
        answer_tokens=4 * texts.get("heldout", 0),
    )
    return CostContext(
        teacher=shape,
        student=shape,
        texts=counts,
        teacher_bytes=4,
        student_bytes=4,
        same=True,
    )


def it_does_the_same_again_and_changes_no_input(cls: type, options: Options, folder: Path) -> None:
    """Run it twice on the same inputs: the results are equal, and the inputs are as fresh ones."""
    first = _try_step(cls, options, folder / "one")
    second = _try_step(cls, options, folder / "two")
    both = {
        "result": (first.result, second.result),
        "input": (first.inputs, second.inputs),
    }
    for what, (one, two) in both.items():
        differ = [name for name in one.keys() & two.keys() if not _equal(one[name], two[name])]
        missing = one.keys() ^ two.keys()
        assert not missing and not differ, f"the {what} differs: {sorted(differ) or missing}"


def hard_inputs_are_solved_or_refused(cls: type, options: Options, folder: Path) -> None:
    """Run it with fewer rows than channels and a channel that is 0: a finite result, or a clear
    error."""
    with suppress(RotdistillError):
        result = _try_step(cls, options, folder, hard=True).result
        bad = [
            name
            for name, value in result.items()
            if isinstance(value, Tensor) and not bool(value.double().isfinite().all())
        ]
        assert not bad, f"not finite: {bad}"


def a_planted_rotation_is_found(cls: type, options: Options, folder: Path) -> None:
    """Align a model with its twin in another basis: the map is the planted rotation. For solvers of
    rotations."""
    trial = _try_step(cls, options, folder)
    errors = {
        name: max_difference(value.double(), trial.planted)
        for name, value in trial.result.items()
        if name.startswith("map residual")
    }
    assert errors and max(errors.values()) < 1e-4, f"off the planted rotation by {errors}"


STEP_CHECKS: tuple[Callable[[type, Options, Path], None], ...] = (
    the_hook_is_as_specified,
    options_survive_toml_and_json,
    the_cost_is_stated_in_numbers,
    it_does_the_same_again_and_changes_no_input,
    hard_inputs_are_solved_or_refused,
)
"""What every step must pass: `check(class, options, empty folder)`.

Solvers of rotations add `a_planted_rotation_is_found`.
"""
