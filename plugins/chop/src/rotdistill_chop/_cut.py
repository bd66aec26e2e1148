"""The cut itself, once it is known how large the student shall be and which layers stay."""

from __future__ import annotations

from collections.abc import Callable

from rotdistill_chop._blocks import prune_layers
from rotdistill_chop._size import Size
from rotdistill_chop._stream import narrow_stream
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress


def cut_to_size(
    weights: Weights,
    layers: list[int],
    size: Size,
    forward_of: Callable[[Weights], LayerwiseForward],
    progress: Progress,
) -> Weights:
    """Return a view of a model at a size: layers are cut first, then the stream, then blocks.

    Args:
        weights: the model.
        layers: which layers stay, rising.
        size: the size to cut to.
        forward_of: starts a forward pass of a model over the rows that are fitted.
        progress: called after each layer.
    """
    cut = weights.cut(layers)
    whole = Size.of(weights)
    if size.width < whole.width:
        cut = narrow_stream(cut, forward_of, size.width, progress)
    if (size.neurons, size.kv_heads) != (whole.neurons, whole.kv_heads):
        cut = prune_layers(cut, forward_of(cut), size.neurons, size.kv_heads, progress)
    return cut
