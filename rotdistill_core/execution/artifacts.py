"""A step's result on disk: committed as files and a reference, and read back from the reference.

Every result is read back from disk before the next step sees it, whether it was made just now or
found. So a fresh run and a resumed one compute from the same bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rotdistill_core.checkpoint.weights import Weights, restore_weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.outcome import VariantState
from rotdistill_core.forward.activations import ActivationStore, restore_activations
from rotdistill_core.linalg.maps import Maps, restore_maps, store_maps
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.records import ActivationsRef, MapsRef, StepResultRef, WeightsRef


def store_result(
    result: ActivationStore | Maps | Weights,
    samples: Samples,
    out: StepOutput,
    dtype: torch.dtype,
) -> StepResultRef:
    """Commit what a step returned; weights are stored in `dtype`."""
    if isinstance(result, ActivationStore):
        return ActivationsRef(**result.info(samples))
    if isinstance(result, Maps):
        return MapsRef(**store_maps(result, out))
    return WeightsRef(**result.store(out, dtype))


def restore_result(
    run: RunContext, result: StepResultRef, state: VariantState, samples: Samples
) -> VariantState:
    """Return the state after a step whose result is committed; an evaluator's changes nothing."""
    root = run.store.root
    if isinstance(result, ActivationsRef):
        activations = restore_activations(result.as_dict(), root, samples, state.weights)
        return replace(state, activations=activations)
    if isinstance(result, MapsRef):
        return replace(state, maps=restore_maps(result.as_dict(), root))
    if isinstance(result, WeightsRef):
        student = run.pair.student.weights
        return replace(state, weights=restore_weights(result.as_dict(), student, root))
    return state
