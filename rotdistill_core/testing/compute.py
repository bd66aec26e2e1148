"""What a model computes, by this program and by plain transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.models import tokenizer_contents
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.store.files import Blocks, write_file
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_text


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: more of them only wait for each other on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def max_difference(one: Tensor, two: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return float((one - two).abs().max())


def final_states(
    weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the stream after the last layer `[rows, d]`."""
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), dtype)
    for _ in walk:
        walk.run()
    return walk.states


def logits(weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return all logits `[rows, vocab]`."""
    states = final_norm(weights, final_states(weights, layout, dtype))
    return head_logits(weights, states, weights.head().to(dtype))


@torch.no_grad()
def plain_transformers(
    adapter: Adapter,
    folder: Path,
    layout: PackedTexts,
    dtype: torch.dtype = torch.float64,
    without: Collection[int] = (),
) -> tuple[list[Tensor], Tensor]:
    """Return what transformers computes, one text at a time.

    The layers `without` pass the stream on as it is. All others stay what they were: a layer's
    number, mask and rotary table are those of the whole model.

    Its norms drop to float32 whatever the dtype, so float64 agrees with the layerwise forward to
    about 1e-6.

    Returns:
        The stream at every boundary `[rows, d]`, and the logits `[rows, vocab]`; row for row as the
        layerwise forward has them.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    lost = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]
    }
    assert not lost, f"{folder}: transformers does not find its own tensors there: {lost}"
    model.eval()
    for i in without:
        layer = model.get_submodule(f"{adapter.layers}.{i}")
        layer.forward = lambda states, *_, **__: states
    seen: list[Tensor] = []
    norm = model.get_submodule(adapter.norm.removesuffix(".weight"))
    for module in (*model.get_submodule(adapter.layers), norm):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    parts: list[list[Tensor]] = []
    for k, text in enumerate(layout.texts):
        seen.clear()
        # A copy, for rotary tables may depend on the lengths of the texts that a model has seen.
        output = copy.deepcopy(model)(torch.tensor([text.tokens])).logits[0]
        # Rows of the shared prefix come once, from the first text.
        skipped = layout.prefix_length(text) if k else 0
        parts.append([rows[skipped:] for rows in (*seen, output)])
    *states, all_logits = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return states, all_logits


def save_folder(
    weights: Weights, like: Path, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Save a view as a plain folder with the tokenizer of the folder `like`."""

    def write(name: str, blocks: Blocks) -> None:
        write_file(folder / name, blocks)

    for name, content in tokenizer_contents(like).items():
        write(name, [content])
    weights.save(write, dtype)


def reopen(folder: Path, like: Weights) -> Weights:
    """Open a saved folder as a view with the adapter of another view."""
    config = json.loads(read_text(folder / RunLayout.CONFIG))
    return open_folder(folder, config, like.adapter)
