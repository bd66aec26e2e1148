"""TODO: rotdistill_core.testing.step_checks."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RotdistillError
from rotdistill_core.evaluation.rows import Variant
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Rotation, tensor_of
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.step import options_of, stage_of, validator_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing.adapter_checks import ADAPTER_CHECKS
from rotdistill_core.testing.pico import (
    captured_activations,
    max_difference,
    pico_folder,
    pico_model,
    pico_output,
    pico_samples,
    reopen,
    rotated_twin,
    save_folder,
)


def _tried(
    cls: type, options: Mapping[str, Any], folder: Path, **size: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a step on a pico model and its twin in another basis; return what it gave and what it was given, as tensors by name."""
    student = pico_model(folder / "student", **size)
    if size:  # a channel that is always 0
        table = {
            n: p
            for n, p in student.adapter.expand(student.config).items()
            if n in student.weights.entries
        }
        axes = {
            n: p.axes.index("residual")
            for n, p in table.items()
            if "residual" in p.axes and not p.gain and not p.is_gain
        }
        dead = student.weights.edit(
            {
                n: student.weights[n].index_fill(axis, torch.tensor(0), 0.0)
                for n, axis in axes.items()
            }
        )
        save_folder(dead, student.folder, folder / "dead")
        student = open_model(ModelRef(model=str(folder / "dead")))
    teacher, Q = rotated_twin(student, folder / "teacher")
    pair, samples, out = (
        Pair(teacher, student),
        pico_samples(texts=5 if size else 40, guard=2),
        pico_output(folder / "runs"),
    )
    activations = captured_activations(pair, student.weights, samples, out)
    maps = Maps(
        {f"residual.{b}": Rotation(Q) for b in range(student.depth + 1)}
        if stage_of(cls) != "align"
        else {}
    )
    given = {"pair": pair, "samples": samples, "out": out, "activations": activations, "maps": maps, "weights": student.weights,
             "variant": Variant("base", student.weights, maps, 0.0, student.folder), "progress": lambda *_: None}  # fmt: skip
    hook = getattr(validator_of(cls).validate_json(json.dumps(options), strict=True), stage_of(cls))
    torch.seed()  # what a step draws must come from its own seed
    made = hook(**{name: given[name] for name in inspect.signature(hook).parameters})
    return _tensors(made), {
        **_tensors(maps),
        **_tensors(activations),
        **_tensors(reopen(student.folder, student.weights)),
        "Q": Q,
    }


def _tensors(made: Any) -> dict[str, Any]:
    """Return what a stage gives by name: maps, weights, captured rows, or result rows."""
    if isinstance(made, ActivationStore):
        return {
            f"{side} {b}": made.rows(side, b).clone()
            for side, shards in made.shards.items()
            for b in range(len(shards))
        }
    if isinstance(made, Weights):
        return {name: made[name].clone() for name in made.entries}
    assert made is not None, "the hook gave None"
    return (
        {f"map {space}": tensor_of(found) for space, found in made.items()}
        if isinstance(made, Maps)
        else {"rows": list(made)}
    )


def the_hook_is_as_specified(cls: type, _: Mapping[str, Any], __: Path) -> None:
    """Compare the arguments of the one stage hook, and their annotations, with its specification."""
    mine, theirs = (inspect.signature(getattr(of, stage_of(cls))) for of in (cls, HookSpecs))
    wrong = [
        p
        for n, p in mine.parameters.items()
        if n != "self" and str(p) != str(theirs.parameters.get(n))
    ]
    assert not wrong and mine.return_annotation == theirs.return_annotation, (
        f"{wrong} or the result differ from {theirs}"
    )


def options_survive_toml_and_json(cls: type, options: Mapping[str, Any], _: Path) -> None:
    """Write the options as a recipe does and read them again; each has a description."""
    read: Any = validator_of(cls).validate_json
    told = options_of(read(json.dumps(options), strict=True))
    text = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in told.items() if value is not None
    )
    assert options_of(read(json.dumps(tomllib.loads(text)), strict=True)) == told
    bare = [
        n
        for n, about in validator_of(cls).json_schema()["properties"].items()
        if n != "use" and not about.get("description")
    ]
    assert not bare, f"no text under {bare}: it is what a recipe's author reads"


def it_does_the_same_again_and_changes_no_input(
    cls: type, options: Mapping[str, Any], folder: Path
) -> None:
    """Run it twice on the same inputs, and compare what it gives, and the inputs with fresh ones."""
    (made, seen), (again, fresh) = (_tried(cls, options, folder / name) for name in ("one", "two"))
    for what, one, two in (("result", made, again), ("input", seen, fresh)):
        differ = [
            k
            for k in one
            if not (torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k])
        ]
        assert one.keys() == two.keys() and not differ, (
            f"the {what} differs: {differ or one.keys() ^ two.keys()}"
        )


def hard_inputs_are_solved_or_refused(cls: type, options: Mapping[str, Any], folder: Path) -> None:
    """Run it where there are fewer rows than channels, and one channel is always 0: finite, or an error that says why."""
    with suppress(RotdistillError):
        made, _ = _tried(cls, options, folder, hidden_size=128, num_attention_heads=4)
        bad = [
            k
            for k, value in made.items()
            if isinstance(value, Tensor) and not bool(value.double().isfinite().all())
        ]
        assert not bad, f"not finite: {bad}"


def a_planted_rotation_is_found(cls: type, options: Mapping[str, Any], folder: Path) -> None:
    """Align a model with its twin in another basis: the map is the planted rotation. For solvers of rotations."""
    made, given = _tried(cls, options, folder)
    far = {
        k: max_difference(value.double(), given["Q"])
        for k, value in made.items()
        if k.startswith("map residual")
    }
    assert far and max(far.values()) < 1e-4, f"off the planted rotation by {far}"


STEP_CHECKS: tuple[Callable[[type, Mapping[str, Any], Path], None], ...] = (
    the_hook_is_as_specified, options_survive_toml_and_json, it_does_the_same_again_and_changes_no_input, hard_inputs_are_solved_or_refused,
)  # fmt: skip
"""What every step must pass: `check(class, options, empty folder)`. Solvers of rotations add `a_planted_rotation_is_found`."""


def parametrize_with_checks(
    subject: Adapter | type, *cases: Mapping[str, Any], checks: Sequence[Any] = ()
) -> Any:
    """Let a test run every check of an adapter (cases: changes of the pico config) or a step class (cases: its options).

    `@parametrize_with_checks(TABLE, {"head_dim": 12})` before `def test_it_conforms(check, tmp_path): check(tmp_path)`.
    """
    import pytest

    def bound(check: Any, case: Mapping[str, Any]) -> Callable[[Path], None]:
        if not isinstance(subject, Adapter):
            return lambda folder: check(subject, case, folder)
        return lambda folder: check(
            subject, pico_folder(folder / "model", subject.model_types[0], **case)
        )

    chosen = checks or (ADAPTER_CHECKS if isinstance(subject, Adapter) else STEP_CHECKS)
    some = [
        pytest.param(bound(c, case), id=" ".join([c.__name__, *case]))
        for case in cases or ({},)
        for c in chosen
    ]
    return pytest.mark.parametrize("check", some)
