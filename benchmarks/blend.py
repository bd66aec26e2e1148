"""What the teacher's own neurons do in the student, in the shared basis: KL of blends, in nats.

    python benchmarks/blend.py RECIPE [--set ID.FIELD=VALUE ...] [--runs DIR] [--share 0.02 0.05 0.1 0.3]

One rotation per boundary (`procrustes`) carries the teacher's layers to the student's stream, an assignment (`hungarian-permute`) finds
a neuron of the teacher for each of the student's, and the student's gate, up and down become `(1 - a) W_s + a W_t`, each neuron of the
teacher's at the length of the student's. Layers and a are chosen on validation rows; what a run under DIR captured is reused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from head_curve import asked
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit._targets import kl_on
from torch import Tensor

from rotdistill_core.alignment.assignment import (
    assign,
    layer_rows,
    teacher_layers,
    unit_rows,
    weight_scores,
)
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.execution.executor import Executor
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.store.output import StepOutput


def blend_candidates(weights: Weights, run: Executor, maps: Maps, layer: int) -> dict[str, Tensor]:
    """Return the teacher's neurons for the student's of a layer, in its basis and at its lengths: gate and up `[f, d]`, down `[f, d]`."""
    teacher = run.pair.teacher
    reader, writer = (maps[f"residual.{boundary}"] for boundary in (layer, layer + 1))
    assert isinstance(reader, Rotation)
    assert isinstance(writer, Rotation)
    S, T = (
        layer_rows(weights, layer, {}),
        layer_rows(teacher.weights, teacher_layers(weights, run.pair)[layer], {}),
    )
    back = {
        role: (writer if role in ("down", "o") else reader).matrix.T for role in T
    }  # [d_t, d_s]
    d = weights.width
    T = {
        role: torch.cat([X[:, : len(back[role])] @ back[role], X[:, len(back[role]) :]], 1)
        for role, X in T.items()
    }
    heads = (weights.adapter.heads(weights.config), teacher.adapter.heads(teacher.config))
    of = assign(
        weight_scores(S, T, *heads)[1].T.contiguous()
    )  # for each neuron of the student one of the teacher's
    found = {role: T[role][of][:, :d] for role in ("gate", "up", "down")}
    signs = (
        (found["up"] * S["up"][:, :d]).sum(1).sign()
    )  # a neuron's up and down may both be turned round
    found["up"], found["down"] = found["up"] * signs[:, None], found["down"] * signs[:, None]
    return {
        role: unit_rows(X) * S[role][:, :d].norm(dim=1, keepdim=True) for role, X in found.items()
    }


def blended(
    weights: Weights, mine: dict[int, dict[str, Tensor]], layers: Sequence[int], share: float
) -> Weights:
    """Return the student with a share of the teacher's neurons in some layers."""
    made: dict[str, Tensor] = {}
    for layer in layers:
        for template, general in weights.adapter.params.items():
            if "neurons.{i}" not in general.axes or len(general.axes) != 2:
                continue
            name, param = template.replace("{i}", str(layer)), general.at(layer)
            W = weights[name].double()
            role = (
                "down"
                if general.axes[-1] == "neurons.{i}"
                else "up"
                if general.gauge.startswith("up")
                else "gate"
            )
            T = (
                mine[layer][role].T
                if role == "down"
                else mine[layer][role] / (weights.gain(param.gain) if param.gain else 1.0)
            )
            made[name] = ((1 - share) * W + share * T).to(weights[name].dtype)
    return weights.edit(made)


def main() -> None:
    """Print the table."""
    (run, shares), quiet = asked(__doc__, "--share", [0.02, 0.05, 0.1, 0.3]), lambda *_: None
    samples, pair, start = run.samples(), run.pair, run.pair.student.weights
    out = StepOutput(run.store, run.ledger, "blend", "residuals")
    activations = Residuals(student_texts=48).capture(pair, start, samples, out, quiet)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, quiet)
    depth = start.depth
    mine: dict[int, dict[str, Tensor]] = {}
    tried: dict[float, Weights] = {
        kl_on("validation", start, None, activations, pair, samples).mean: start
    }
    print(
        f"base: validation {next(iter(tried)):.4f}\n| layers | share | validation |\n|---|---|---|",
        flush=True,
    )
    for first, last in ((depth - 1, depth), (depth - 4, depth), (depth // 2, depth), (0, depth)):
        mine |= {
            layer: blend_candidates(start, run, maps, layer)
            for layer in range(first, last)
            if layer not in mine
        }
        for share in shares:
            view = blended(start, mine, range(first, last), share)
            kl = kl_on("validation", view, None, activations, pair, samples).mean
            tried[kl] = view
            print(f"| {first} to {last - 1} | {share:g} | {kl:.4f} |", flush=True)
    best = kl_on("heldout", tried[min(tried)], None, activations, pair, samples).mean
    print(
        f"best on validation: held-out {best:.4f}, base {kl_on('heldout', start, None, activations, pair, samples).mean:.4f}"
    )


if __name__ == "__main__":
    main()
