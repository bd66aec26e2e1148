"""Mistakes that only a GPU shows are shown by the pretended device, with their line.

Each bug replaces a snippet in the source of one function, for one run. When the function changes,
change the snippet here.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_chop._depth import run_angles
from rotdistill_hungarian_permute._activations import _record_layer
from rotdistill_lm_head_ridge._method import next_token_log_probs
from rotdistill_lm_head_ridge._reading import NormedRows
from rotdistill_prompt_kl._lora import lora_products
from rotdistill_prompt_kl._targets import DistillationTargets
from rotdistill_soups._fisher import _log_likelihood
from rotdistill_writer_refit._targets import TeacherTargets

from rotdistill_core.evaluation.divergence import compare_logits
from rotdistill_core.forward.certificate import _compare
from rotdistill_core.forward.generate import unconfirmed_token
from rotdistill_core.forward.growth import Growth
from rotdistill_core.forward.head import final_norm, widened_like
from rotdistill_core.forward.layerwise import LayerwiseForward, _Batch
from rotdistill_core.forward.slots import Slots
from rotdistill_core.forward.whole import computable
from rotdistill_core.forward.writer_moments import _add_own_rows
from rotdistill_core.testing import (
    PRETENDED,
    DeviceError,
    count_within,
    pico_model,
    pico_samples,
    pretended_device,
)

Devices = Any

CAPTURE = 'step = [{ use = "residuals" }]'
FOLD = """
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "basis-fold", mode = "widen" },
]
"""
REFIT = """
step = [
    { use = "chop", layers = [0, 2] },
    { use = "residuals" },
    { use = "writer-refit", layers = "cut", ridge = [1.0] },
]
"""
CUT = 'step = [{ use = "chop", layers = 2 }]'
NEURONS = """
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "hungarian-permute", criterion = "activations", max_texts = 2 },
]
"""
HEAD = """
step = [
    { use = "residuals" },
    { use = "lm-head-ridge", ridge = [1.0], objective = "next-token", max_iter = 2 },
]
"""
STYLE = 'step = [{ use = "prompt-kl", prompts_from = ["questions"], max_epochs = 1 }]'
FISHER = """
step = [
    { use = "soups", ingredients = ["student", "student"], method = "fisher", fisher_texts = 1 },
]
"""
SCORES = 'step = [{ use = "residuals" }, { use = "fidelity", per_layer = false }]'
PAIR = {"teacher": "teacher", "student": "student"}
SAME = {"teacher": "deep", "student": "deep"}
FULL = {"free_bytes": 0}
"""A device without room for the states, which then stay on the host."""
SLOW_FLOAT64 = {"capability": (8, 9)}
WITHOUT_FLOAT64 = {"float64": False, "capability": (0, 0)}


@dataclass(frozen=True)
class Bug:
    """A mistake in one function."""

    function: Callable[..., Any]
    snippet: str
    mistake: str
    steps: str
    """A recipe that runs into it."""
    models: Mapping[str, str] = field(default_factory=lambda: PAIR)
    device: Mapping[str, Any] = field(default_factory=dict)
    """What the device is like."""
    shown_in: str = ""
    """The file that the error names; the function's, if empty."""

    @property
    def file(self) -> str:
        own = inspect.getfile(inspect.unwrap(self.function)).rpartition("/")[2]
        return self.shown_in or own


BUGS = {
    "states of a batch": Bug(
        _Batch.gather, "batch.to(self.device, non_blocking=True)", "batch", CAPTURE, device=FULL
    ),
    "states after a layer": Bug(
        _Batch.scatter, "values.to(states)", "values", CAPTURE, device=FULL
    ),
    "weights of a layer": Bug(
        computable, "read().to(device, dtype)", "read().to(dtype)", CAPTURE, shown_in="layerwise.py"
    ),
    "inputs of the body": Bug(
        LayerwiseForward._record_call, ", device=self.device)[None]", ")[None]", CAPTURE
    ),
    "a refitted writer": Bug(
        LayerwiseForward.replace, "self.device, self.dtype", "self.dtype", REFIT, SAME
    ),
    "final norm": Bug(final_norm, "X.device, X.dtype", "X.dtype", FOLD),
    "head": Bug(widened_like, "states.device, ", "", FOLD),
    "certificate": Bug(
        _compare, "float64_device(A.device)", "A.device", FOLD, device=WITHOUT_FLOAT64
    ),
    "divergence": Bug(compare_logits, "targets.to(S.device)", "targets", SCORES),
    "moments of a writer": Bug(
        _add_own_rows, "[forward.rows].to(forward.device, ", "[forward.rows].to(", REFIT, SAME
    ),
    "targets of a batch": Bug(
        _add_own_rows, "targets(rows).to(X)", "targets(rows)", REFIT, SAME, SLOW_FLOAT64
    ),
    "targets of a refit": Bug(
        TeacherTargets.reached_by_student, "states.to(target)", "states", REFIT, SAME, SLOW_FLOAT64
    ),
    "angles of a cut": Bug(
        run_angles, "recent[-1].to(place, ", "recent[-1].to(", CUT, SAME, SLOW_FLOAT64
    ),
    "rows of a head": Bug(NormedRows.normed, "self.device, ", "", HEAD),
    "next tokens": Bug(next_token_log_probs, "[rows + 1].to(device)", "[rows + 1]", HEAD),
    "questions": Bug(Growth._logits, "ids.to(self.model.device)", "ids", CAPTURE),
    "columns of questions": Bug(
        Growth._read_prompts, "columns.to(self.model.device)", "columns", CAPTURE
    ),
    "columns of answers": Bug(Growth._grow, "columns.to(self.model.device)", "columns", CAPTURE),
    "prefix of the questions": Bug(
        Slots.begin_shared, ", device=device", "", CAPTURE, shown_in="growth.py"
    ),
    "what a question may see": Bug(
        Slots.hidden_columns, ", device=self.positions.device", "", CAPTURE
    ),
    "confirmed answers": Bug(unconfirmed_token, ", device=model.device", "", CAPTURE),
    "texts of the training": Bug(
        DistillationTargets._losses, "batch.ids.to(device)", "batch.ids", STYLE
    ),
    "teacher of the training": Bug(
        DistillationTargets._losses,
        "[batch.rows].to(device)",
        "[batch.rows]",
        STYLE,
        shown_in="divergence.py",
    ),
    "product of a LoRA": Bug(lora_products, "A.detach().cpu()", "A.detach()", STYLE),
    "labels of the Fisher": Bug(_log_likelihood, "labels.to(logs.device)", "labels", FISHER),
    "draws of the Fisher": Bug(_log_likelihood, ".exp().cpu()", ".exp()", FISHER),
    "texts of the Fisher": Bug(_log_likelihood, "ids.to(model.device)", "ids", FISHER),
    "numpy of a map": Bug(_record_layer, "[0].float().cpu()", "[0].numpy()", NEURONS),
    "numpy of a score": Bug(
        _record_layer, "X.float().cpu()", "X.float()", NEURONS, shown_in="assignment.py"
    ),
}


def plant(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], snippet: str, mistake: str
) -> None:
    """Let a function run with a snippet of its source replaced, wherever it was imported.

    Lines keep their numbers.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    assert source.count(snippet) == 1, f"{function.__qualname__} has no longer: {snippet}"
    wrong_source = "\n" * (first - 1) + source.replace(snippet, mistake)
    code = compile(wrong_source, inspect.getfile(function), "exec")
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    wrong_function = made[function.__name__]
    wrong_function = getattr(wrong_function, "func", wrong_function)  # of a cached property
    monkeypatch.setattr(function, "__code__", inspect.unwrap(wrong_function).__code__)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_shown_with_its_line(
    own_devices: Devices, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bug = BUGS[name]
    plant(monkeypatch, bug.function, bug.snippet, bug.mistake)
    with pytest.raises(DeviceError, match=rf"{bug.file}:\d+: a GPU refuses"):
        own_devices.run(bug.steps, **bug.models, **bug.device)


def test_waiting_for_each_batch_is_shown_by_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_model(tmp_path / "model")

    def waits() -> int:
        with pretended_device() as counters:
            walk = LayerwiseForward(
                model.weights, pico_samples().layout, torch.device(PRETENDED), torch.float32
            )
            for _ in walk:
                walk.run()
        return count_within(counters.synchronisations, _Batch.take)

    assert waits() == 0
    plant(monkeypatch, _Batch.take, "[self.real]", "[self.real[self.real >= 0]]")
    assert waits() > 0
