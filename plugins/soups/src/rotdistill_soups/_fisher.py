"""The diagonal of the Fisher information of a model's parameters, on texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.forward.layerwise import Progress, meta_model
from rotdistill_core.store.files import tensor_blocks
from rotdistill_core.store.output import StepOutput
from rotdistill_soups._merge import Mixer, weighted


def fisher(view: Weights, layout: PackedTexts, most: int, sampled: bool, seed: int, device: torch.device, dtype: torch.dtype,
           out: StepOutput, name: str, progress: Progress) -> Mapping[str, LazyTensor]:  # fmt: skip
    """Return `F_j = mean over answer tokens of (∂ log p(y) / ∂θ_j)²` of every parameter, kept in bfloat16.

    With y drawn from the model's own prediction at every token this is the Fisher information: the gradient of one text is a sum of
    independent terms of mean zero, so its square is an unbiased estimate of the sum of theirs, and one backward pass per text will do.
    With the text's own tokens as y it is the empirical Fisher, which is another quantity. (Kunstner, Balles and Hennig, Limitations of
    the Empirical Fisher Approximation, arXiv:1905.12558.) It belongs to the basis that the view is in, and cannot be carried to another.
    """
    file = f"weights/{out.step}/{name}.safetensors"
    path = out.find(file)
    if path is None:
        texts = [text for text in layout.texts if text.split == "fit"]
        texts = texts[:: max(1, len(texts) // most)][:most]
        model: Any = meta_model(view, dtype)
        model.load_state_dict(
            {n: view[n].to(device, dtype) for n in view.entries}, strict=False, assign=True
        )
        model.tie_weights()
        maker = torch.Generator().manual_seed(seed)
        squares: dict[str, Tensor] = {}
        for done, text in enumerate(texts, 1):
            torch.autograd.backward(_likelihood(model, text, maker if sampled else None))
            for n, parameter in model.named_parameters():
                squares[n] = squares.get(n, 0.0) + parameter.grad.square()
            model.zero_grad()
            progress(done, len(texts), f"{name.replace('_', ' ')} on texts")
        tokens = sum(len(text.tokens) - text.answer for text in texts)
        made = {
            n: (tuple(F.shape), torch.bfloat16, lambda F=F: F / tokens) for n, F in squares.items()
        }
        path = out.write(file, tensor_blocks(made))
    return open_tensors(path)


def informed(found: Sequence[Mapping[str, LazyTensor]]) -> Callable[[str], Mixer]:
    """Return how each parameter is mixed by the Fisher informations of the ingredients; the student's own counts nothing."""

    def mixer(name: str) -> Mixer:
        files = [F[name].read() for F in found]
        return weighted(
            [
                lambda a, b: torch.zeros_like(files[0][a:b]),
                *(lambda a, b, F=F: F[a:b] for F in files),
            ]
        )

    return mixer


def _likelihood(model: Any, text: Text, maker: torch.Generator | None) -> Tensor:
    """Return the log probability of a text's answer: drawn token by token from the model's predictions, or its own."""
    ids = torch.tensor([text.tokens])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, text.answer - 1 : -1]
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    labels = ids[0, text.answer :]
    if maker is not None:
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=maker)[:, 0]
    total: Tensor = logs.gather(-1, labels.to(logs.device)[:, None]).sum()
    return total
