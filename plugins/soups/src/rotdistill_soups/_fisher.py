"""The diagonal of the Fisher information of a model's parameters, on texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.layerwise import Progress, meta_model
from rotdistill_core.linalg.precision import widened
from rotdistill_core.store.files import tensor_blocks
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput


@dataclass(frozen=True, kw_only=True)
class FisherSettings:
    """How the information is estimated."""

    max_texts: int
    """Fit texts, evenly spread."""
    sampled: bool
    """Draw the labels from the model's predictions, instead of taking the texts' own tokens."""
    seed: int
    """Of the draws."""
    device: torch.device
    dtype: torch.dtype


def fisher_information(
    view: Weights,
    layout: PackedTexts,
    settings: FisherSettings,
    out: StepOutput,
    name: str,
    progress: Progress,
) -> Mapping[str, LazyTensor]:
    """Return `F_j = mean over answer tokens of (∂ log p(y) / ∂θ_j)²` of every parameter.

    It is committed as `name`, in bfloat16, and found again there. With y drawn from the model's
    prediction at every token it is the Fisher information. The gradient of one text is a sum of
    independent terms of mean zero, so its square is an unbiased estimate of the sum of their
    squares, and one backward pass per text is enough. With the text's own tokens as y it is the
    empirical Fisher, another quantity. (Kunstner, Balles and Hennig, Limitations of the Empirical
    Fisher Approximation, arXiv:1905.12558.)

    The diagonal belongs to the basis that the view is in, and cannot be carried to another.
    """
    file = RunLayout.weights(out.step, f"{name}.safetensors")
    path = out.find(file)
    if path is None:
        texts = _fit_texts(layout, settings.max_texts)
        squares = _summed_squares(view, texts, settings, progress, name.replace("_", " "))
        tokens = sum(len(text.tokens) - text.answer for text in texts)
        means = {
            n: (tuple(F.shape), torch.bfloat16, partial(torch.div, F, tokens))
            for n, F in squares.items()
        }
        path = out.write(file, tensor_blocks(means))
    return open_tensors(path)


def _fit_texts(layout: PackedTexts, limit: int) -> list[Text]:
    texts = [text for text in layout.texts if text.split == Split.FIT]
    return texts[:: max(1, len(texts) // limit)][:limit]


def _summed_squares(
    view: Weights,
    texts: list[Text],
    settings: FisherSettings,
    progress: Progress,
    label: str,
) -> dict[str, Tensor]:
    """Return the sum over texts of the squared gradient of every parameter."""
    model: Any = meta_model(view, settings.dtype)
    tensors = {n: view[n].to(settings.device, settings.dtype) for n in view.entries}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    generator = torch.Generator().manual_seed(settings.seed) if settings.sampled else None
    squares: dict[str, Tensor] = {}
    for done, text in enumerate(texts, 1):
        torch.autograd.backward(_log_likelihood(model, text, generator))
        for n, parameter in model.named_parameters():
            # A sum of many small squares in bfloat16 would stop growing.
            squares[n] = squares.get(n, 0.0) + widened(parameter.grad).square()
        model.zero_grad()
        progress(done, len(texts), f"{label} on texts")
    return squares


def _log_likelihood(model: Any, text: Text, generator: torch.Generator | None) -> Tensor:
    """Return the log probability of a text's answer.

    With a generator each token is drawn from the model's prediction, else it is the text's own.
    """
    ids = torch.tensor([text.tokens])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, text.answer - 1 : -1]
    logs = widened(logits).log_softmax(-1)
    labels = ids[0, text.answer :]
    if generator is not None:
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)[:, 0]
    total: Tensor = logs.gather(-1, labels.to(logs.device)[:, None]).sum()
    return total
