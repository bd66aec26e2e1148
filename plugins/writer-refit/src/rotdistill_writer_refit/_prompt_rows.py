"""Give the rows that a template always writes the states of a system prompt's rows, in closed form.

What a system prompt gives a token is read by attention from the prompt's rows. A student without
the prompt still has n rows that are the same in every conversation: those of its chat template. At
each boundary they take the states of n rows of the teacher's prompt, `S [n, d]`. Which: those that
the tokens after the prompt attend to most (Zhang et al., H2O, arXiv:2306.14048).

Let `A [n, f]` be the inputs of a layer's down projection `W [d, f]` on the template's rows, `X [n,
d]` the stream after the layer, and `C [f, f]` the mean of `a aᵀ / rms(x)²` over the rows of all
texts. All other rows should stay as they are:

    min_Δ tr(Δᵀ (C + λI) Δ)  subject to  A Δ = S - X,     W ← W + Δᵀ

    Δ = K (A K)⁻¹ (S - X),   K = (C + λI)⁻¹ Aᵀ   [f, n]

as MEMIT writes facts into a model (Meng et al., arXiv:2210.07229), here in every layer and on the
rows of the student as edited so far. Rows that both models begin with have `S = X`: they are
constraints too, and stay as they are, the attention sink among them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.pairing import common_ends
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError, SingularError
from rotdistill_core.evaluation.acceptance import (
    TextScores,
    accept_if_better,
    paired_final_states,
    scored_rows,
    scores_by_text,
)
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.activations import massive_activation_mask, mean_square
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import widened
from rotdistill_core.linalg.solvers import ridge

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_writer_refit.step import PromptRows

NEURONS = "neurons"
KEPT = -1
"""Stands for no row of the prompt: the template's row stays as it is."""
JITTER = 1e-9
"""Of the mean diagonal of `A K`, added to it: two rows may be nearly the same."""


class LayerRows(NamedTuple):
    """What an edit of the open layer needs."""

    inputs: Tensor
    """`A [n, f]`: inputs of the writer on the template's rows, float64."""
    stream: Tensor
    """`X [n, d]`: the stream after the layer there, float64."""
    others: Moments
    """Moments of the inputs of all rows."""


def fold_prompt(
    step: PromptRows,
    weights: Weights,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the edited student, or `weights` where the edit does not lower the validation KL.

    Raises:
        RecipeError: the options do not fit the models or the texts.
        SetupError: teacher and student have different tokenizers.
    """
    prompt = prompt_of(step, weights, pair, samples)
    shared_vocabulary(pair)  # raises before the work
    own = samples.layout.tokens[: samples.layout.prefix].tolist()
    asked = samples.teacher.select(Split.FIT).where(lambda text: not text.plain)
    attended = attention_on_prompt(
        pair.teacher, asked.of(asked.texts[: step.texts]), samples.teacher.prefix
    )
    states = prompt_states(pair.teacher, prompt)
    massive = torch.stack([massive_activation_mask(S) for S in states]).any(0)
    rows = chosen_rows(own, prompt, attended.masked_fill(massive, -torch.inf))
    out.notes["rows of the prompt"] = rows.tolist()

    layout = samples.layout.select(Split.FIT)
    student = pair.student
    forward = LayerwiseForward(weights, layout, student.device, student.dtype)
    edited: dict[str, Tensor] = {}
    for i in forward:
        if i >= step.first:
            name = _writer(weights, i)
            seen = observe_layer(forward, len(rows))
            wanted = states[weights.lineage.depths[i + 1]][rows]
            targets = torch.where((rows == KEPT)[:, None], seen.stream, wanted)
            delta = constrained_edit(seen, targets, step.ridge, f"prompt-rows: {name}")
            tensor = (weights[name].to("cpu").double() + delta.T).to(forward.dtype)
            edited[name] = tensor
            forward.replace(name, tensor)
        forward.run()
        progress(i + 1, weights.depth, "edited neurons")
    score = partial(split_scores, pair, samples, out, progress)
    return accept_if_better(weights, weights.edit(edited), score, step.guard, out)


def prompt_of(step: PromptRows, weights: Weights, pair: Pair, samples: Samples) -> list[int]:
    """Return the tokens with which all conversations begin as the teacher reads them.

    Raises:
        RecipeError: the options do not fit the models or the texts.
    """
    if not samples.baked or samples.theirs is None:
        raise RecipeError(
            "prompt-rows: the student reads the system prompt too, so there is nothing to bake in; "
            "set samples.bake_prompt = true."
        )
    if not pair.same or weights.lineage.basis is not None:
        raise RecipeError(
            "prompt-rows: the student's stream must have the teacher's basis; let one model be "
            "both, and put this step before one that changes the basis."
        )
    if NEURONS not in weights.adapter.writers:
        raise RecipeError(
            f"prompt-rows: in a {weights.config['model_type']} model a norm stands between "
            "writers and stream."
        )
    if step.guard and not samples.layout.select(Split.GUARD_VALIDATION).texts:
        raise RecipeError(
            "prompt-rows: guard needs texts outside the domain; name them as samples.guard."
        )
    prompt: list[int] = samples.theirs.tokens[: samples.theirs.prefix].tolist()
    own = samples.layout.tokens[: samples.layout.prefix].tolist()
    first, last = common_ends(own, prompt)
    if first + last == len(own):
        raise RecipeError(
            f"prompt-rows: without a system prompt all conversations share {len(own)} rows, none "
            "of which could stand for one of the prompt; use prompt-kl."
        )
    return prompt


def attention_on_prompt(teacher: Model, texts: PackedTexts, prefix: int) -> Tensor:
    """Return the attention that each row of the prompt gets `[prefix]`, summed over all heads.

    Each head of each layer counts 1, shared out over the rows but the first, the attention sink.

    Args:
        teacher: the teacher, which is held in memory as a whole.
        texts: conversations as it reads them.
        prefix: number of rows of the prompt.
    """
    model: Any = whole_model(teacher.weights, teacher.device, teacher.dtype)
    model.set_attn_implementation("eager")  # the only kernel that returns its weights
    received = torch.zeros(teacher.depth, teacher.adapter.heads(teacher.config).query, prefix)
    with torch.no_grad():
        for text in texts.texts:
            tokens = torch.tensor([text.tokens], device=teacher.device)
            layers = model(tokens, output_attentions=True, use_cache=False).attentions
            received += torch.stack([w[0, :, prefix:, :prefix].sum(1) for w in layers]).cpu()
    received[..., 0] = 0
    return (received / received.sum(-1, keepdim=True).clamp_min(1e-12)).sum((0, 1))


def chosen_rows(own: list[int], prompt: list[int], attended: Tensor) -> Tensor:
    """Return which row of the prompt each row of the template stands for `[n]`.

    Rows at both ends that are the same tokens stand for each other. Between them come the rows that
    are attended to most, in order. Where the template has more rows, its first ones there stay as
    they are: `KEPT`. A row of massive activations is a sink, as the first row is: it has nothing to
    say, and a row that becomes one would take all others with it.

    Args:
        own: tokens of the template.
        prompt: tokens of the prompt, the template around it included.
        attended: attention to each row of the prompt; -inf for one that is not to be chosen.
    """
    first, last = common_ends(own, prompt)
    room = len(own) - first - last
    between = attended[first : len(prompt) - last]
    count = min(room, int(between.isfinite().sum()))
    taken = between.topk(count).indices.sort().values + first
    kept = torch.full((room - len(taken),), KEPT)
    tail = torch.arange(len(prompt) - last, len(prompt))
    return torch.cat([torch.arange(first), kept, taken, tail])


def prompt_states(teacher: Model, prompt: list[int]) -> list[Tensor]:
    """Return the teacher's stream on the prompt at each boundary `[rows, d]`, float64."""
    text = Text("prompt", "", Split.FIT, tuple(prompt), len(prompt), plain=True)
    forward = LayerwiseForward(
        teacher.weights, PackedTexts((text,), 0), teacher.device, teacher.dtype
    )
    states = [forward.states.cpu().double()]
    for _ in forward:
        forward.run()
        states.append(forward.states.cpu().double())
    return states


def observe_layer(forward: LayerwiseForward, rows: int) -> LayerRows:
    """Return the writer's inputs and the stream on the first rows, and the moments of all rows.

    All rows go through the open layer; the states stay where they are, for a second visit.
    """
    weights = forward.weights
    width = weights.entries[_writer(weights, forward.boundary)].shape[1]
    multiplier = weights.adapter.residual_multiplier(weights.config)
    inputs = torch.zeros(rows, width, dtype=torch.float64)
    stream = torch.zeros(rows, weights.width, dtype=torch.float64)
    moments = Moments(width, 1)
    pending: list[Tensor] = []

    def keep_inputs(_: Tensor, A: Tensor) -> None:
        pending.append(multiplier * widened(A))

    # A layer's output comes after the site's activations, batch by batch.
    def add_batch(numbers: Tensor, X: Tensor) -> None:
        A, X = pending.pop(), widened(X)
        moments.add(A, torch.zeros_like(A[:, :1]), 1 / mean_square(X).clamp_min(1e-12))
        constant = (numbers < rows).nonzero().flatten()
        here = constant.to(X.device)
        inputs[numbers[constant]] = A[here].cpu().double()
        stream[numbers[constant]] = X[here].cpu().double()

    forward.run({NEURONS: keep_inputs, "output": add_batch}, advance=False)
    return LayerRows(inputs, stream, moments)


def constrained_edit(seen: LayerRows, targets: Tensor, strength: float, where: str) -> Tensor:
    """Return `Δ [f, d]`, the least change for all rows that takes the first ones to `targets`.

    Args:
        seen: the open layer's rows.
        targets: `S [n, d]`, float64.
        strength: λ as a multiple of the mean diagonal of C.
        where: names the writer in errors.

    Raises:
        SingularError: the rows' inputs are not finite, or one of them is zero.
    """
    A = seen.inputs
    scale = max(seen.others.weight, 1e-30)
    K = ridge(seen.others.xx / scale, A.T.contiguous(), strength, where)
    gram = (A @ K).numpy()
    gram[range(len(A)), range(len(A))] += JITTER * float(gram.diagonal().mean())
    try:
        shares = scipy.linalg.solve(gram, (targets - seen.stream).numpy(), assume_a="pos")
    except scipy.linalg.LinAlgError as error:
        raise SingularError(
            f"{where}: two rows of the chat template are the same here, so they cannot become "
            "different ones; begin at a later layer (first)."
        ) from error
    return K @ torch.from_numpy(shares)


def split_scores(
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    view: Weights,
    split: str,
) -> TextScores:
    """Return the KL of a view to the teacher, in nats, on the answers in the texts of a split."""
    layout = samples.layout.select(split)
    T = paired_final_states(pair.teacher, samples, layout, out, progress)
    forward = LayerwiseForward(view, layout, pair.student.device, pair.student.dtype)
    for _ in forward:
        forward.run()
    scored = scored_rows(layout, samples, split)
    compared = compare_logits(
        pair.teacher.weights,
        T[scored.rows],
        view,
        forward.states_of(scored.rows),
        scored.targets,
        shared_vocabulary(pair),
    )
    return scores_by_text(compared.kl, scored.text)


def _writer(weights: Weights, layer: int) -> str:
    """Return the name of a layer's down projection."""
    return weights.adapter.writers[NEURONS].replace("{i}", str(layer))
