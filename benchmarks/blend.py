"""How much the teacher's own neurons help the student: KL of blends in the shared basis, nats.

    python benchmarks/blend.py RECIPE [--set ID.FIELD=VALUE ...] [--runs DIR]
        [--share 0.02 0.05 0.1 0.3]

One rotation per boundary (`procrustes`) carries the teacher's layers to the student's stream. An
assignment (`hungarian-permute`) finds a neuron of the teacher for each neuron of the student. The
student's gate, up and down become `(1 - a) W_s + a W_t`, with each teacher neuron at the length of
the student's. Layers and a are chosen on validation rows. A capture of a run under DIR is reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from head_curve import asked
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit import score_split
from torch import Tensor

from rotdistill_core.alignment.assignment import (
    assign,
    layer_rows,
    teacher_layers,
    unit_rows,
    weight_scores,
)
from rotdistill_core.architecture.table import Param
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.splits import Split
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.store.output import StepOutput

SHARES = [0.02, 0.05, 0.1, 0.3]
NEURONS = "neurons.{i}"

LayerNeurons = Mapping[str, Tensor]
"""Teacher neurons for the student's neurons of a layer: `gate`, `up` and `down`, each `[f, d]`."""


def silent(*_: object) -> None:
    """Report no progress."""


def matched_neurons(weights: Weights, pair: Pair, maps: Maps, layer: int) -> LayerNeurons:
    """Return a teacher neuron for each student neuron of a layer.

    They are in the student's basis, and as long as the student's neurons.
    """
    teacher = pair.teacher
    before, after = maps[f"residual.{layer}"], maps[f"residual.{layer + 1}"]
    assert isinstance(before, Rotation)
    assert isinstance(after, Rotation)
    S = layer_rows(weights, layer, {})
    T = layer_rows(teacher.weights, teacher_layers(weights, pair)[layer], {})

    # Carry the teacher's rows back: writers by the map after the layer, readers by that before.
    # A last column, where there is one, is the bias.
    for role, X in T.items():
        back = (after if role in ("down", "o") else before).matrix.T
        T[role] = torch.cat([X[:, : len(back)] @ back, X[:, len(back) :]], 1)

    # For each neuron of the student, one neuron of the teacher.
    student_heads = weights.adapter.heads(weights.config)
    teacher_heads = teacher.adapter.heads(teacher.config)
    _, scores = weight_scores(S, T, student_heads, teacher_heads)
    match = assign(scores.T.contiguous())
    d = weights.width
    matched = {role: T[role][match][:, :d] for role in ("gate", "up", "down")}

    # A neuron's up and down may both have the other sign.
    signs = (matched["up"] * S["up"][:, :d]).sum(1).sign()
    matched["up"] = matched["up"] * signs[:, None]
    matched["down"] = matched["down"] * signs[:, None]
    return {
        role: unit_rows(X) * S[role][:, :d].norm(dim=1, keepdim=True) for role, X in matched.items()
    }


def role_of(param: Param) -> str:
    """Return which matrix of an MLP a parameter is."""
    if param.axes[-1] == NEURONS:
        return "down"
    return "up" if param.gauge.startswith("up") else "gate"


def blended(
    weights: Weights, neurons: Mapping[int, LayerNeurons], layers: Sequence[int], share: float
) -> Weights:
    """Return the student with a share of the teacher's neurons in some layers."""
    edited: dict[str, Tensor] = {}
    for layer in layers:
        for template, param in weights.adapter.params.items():
            if NEURONS not in param.axes or len(param.axes) != 2:
                continue
            name = template.replace("{i}", str(layer))
            W_s = weights[name].double()
            role = role_of(param)
            W_t = neurons[layer][role]
            gain = param.at(layer).gain
            if role == "down":
                W_t = W_t.T
            elif gain:
                W_t = W_t / weights.gain(gain)
            edited[name] = ((1 - share) * W_s + share * W_t).to(weights[name].dtype)
    return weights.edit(edited)


def main() -> None:
    """Print the table."""
    run, shares = asked(__doc__, "--share", SHARES)
    samples, pair, start = run.samples(), run.pair, run.pair.student.weights
    out = StepOutput(run.store, run.ledger, "blend", "residuals")
    activations = Residuals(student_texts=48).capture(pair, start, samples, out, silent)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, silent)
    depth = start.depth

    def kl(split: Split, weights: Weights) -> float:
        return score_split(split, weights, activations, pair, samples).mean

    base = kl(Split.VALIDATION, start)
    print(
        f"base: validation {base:.4f}\n| layers | share | validation |\n|---|---|---|", flush=True
    )
    neurons: dict[int, LayerNeurons] = {}
    candidates = {base: start}
    for first, last in ((depth - 1, depth), (depth - 4, depth), (depth // 2, depth), (0, depth)):
        for layer in range(first, last):
            if layer not in neurons:
                neurons[layer] = matched_neurons(start, pair, maps, layer)
        for share in shares:
            view = blended(start, neurons, range(first, last), share)
            score = kl(Split.VALIDATION, view)
            candidates[score] = view
            print(f"| {first} to {last - 1} | {share:g} | {score:.4f} |", flush=True)
    best = kl(Split.HELDOUT, candidates[min(candidates)])
    print(f"best on validation: held-out {best:.4f}, base {kl(Split.HELDOUT, start):.4f}")


if __name__ == "__main__":
    main()
