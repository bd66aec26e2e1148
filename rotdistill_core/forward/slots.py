"""Keys and values of many answers that grow at once, each in a slot of its own.

An answer that ends makes room for the next prompt, so no row waits for the longest one. In a slot
token k of a text is in column k, without padding: positions and windows are those of the text
alone. The tokens that all prompts share lie outside the slots, once; each query attends to them
and to its own slot, and one softmax covers both.

transformers lets a name select the attention of a model (`AttentionInterface`); ours is `SLOTS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rotdistill_core.linalg.precision import widened

SLOTS = "rotdistill-slots"
"""Name of the attention function."""
SHARED_KINDS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose keys and values are all that they keep of a text."""


class Slots:
    """The cache of a model for transformers, with one row for each answer that grows.

    Before each forward pass `place` says which rows and columns its tokens belong to.

    Args:
        width: rows.
        columns: most tokens of a text after the shared ones.
    """

    is_compileable = False

    def __init__(self, width: int, columns: int) -> None:
        self.width = width
        self.spare = columns
        """A column that takes the padding of prompts and is never read."""
        self.shared: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> keys and values [heads, P, d] of the tokens that all texts begin with."""
        self.positions: Tensor
        """[B, S] columns of the queries."""
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> keys and values [width, heads, columns + 1, d]."""
        self._columns: Tensor
        self._first = self._longest = 0
        self.fills_shared = False
        """Whether the next forward pass is of the shared tokens."""

    def get_seq_length(self, _: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0

    def begin_shared(self, length: int, device: torch.device) -> None:
        """Let the next forward pass, of one row, fill in the tokens that all texts share."""
        self.fills_shared = True
        self._longest = length
        self.positions = torch.arange(length, device=device)[None]

    def place(self, first: int, columns: Tensor, longest: int) -> None:
        """State where the tokens of the next forward pass belong.

        Args:
            first: row of the first text; the others follow it.
            columns: column of each token [B, S]; `spare` for padding.
            longest: columns in use, of the longest of these texts.
        """
        self.fills_shared = False
        self._first, self._longest = first, longest
        self._columns = columns
        # Padding sees the first column, so that its softmax is finite.
        self.positions = columns.where(columns != self.spare, 0)

    def common(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Return keys and values [heads, P, d] of a layer's shared tokens; None without any."""
        layer: Any = module.layer_idx
        return None if self.fills_shared else self.shared.get(layer)

    def hidden_columns(self, window: int | None) -> Tensor:
        """Return which columns a query may not see [B, S, T]."""
        every = torch.arange(self._longest, device=self.positions.device)
        own = self.positions[:, :, None]
        hidden = every > own
        return hidden if window is None else hidden | (every <= own - window)

    def hidden_shared(self, window: int | None) -> Tensor | None:
        """Return which shared tokens a query may not see [B, S, P]; None if it sees all."""
        if window is None:
            return None
        length = self.shared[min(self.shared)][0].shape[1]
        every = torch.arange(length, device=self.positions.device)
        return every <= self.positions[:, :, None] + length - window

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, heads, S, d] of a layer, and return those to attend to."""
        if self.fills_shared:
            self.shared[layer] = (keys[0].clone(), values[0].clone())
            return keys, values
        if layer not in self._rows:
            self._rows[layer] = (self._empty(keys), self._empty(values))
        rows = slice(self._first, self._first + len(keys))
        found = []
        for stored, new in zip(self._rows[layer], (keys, values), strict=True):
            own = stored[rows]
            place = self._columns[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            own.scatter_(2, place, new)
            found.append(own[:, :, : self._longest])
        return found[0], found[1]

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        return like.new_zeros(self.width, heads, self.spare + 1, size)

    def move(self, row: int, to: int, length: int) -> None:
        """Move a text of so many columns into another row."""
        for pair in self._rows.values():
            for stored in pair:
                stored[to, :, :length] = stored[row, :, :length]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    slots: Slots,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the shared tokens and to slots, as transformers calls it.

    Args:
        module: the attention of a layer.
        query: [B, H, S, d].
        key, value: what `Slots.update` gave [B, heads, T, d].
        _mask: none; slots know it.
        slots: the cache.
        scaling: factor of the scores.
        sliding_window: how many tokens a query sees; None for all.

    Returns:
        [B, S, H, d].
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    # Scores are wide until the softmax. In some layers of Qwen2.5 they reach 383 to 12,746, where
    # neighbours in bfloat16 are 2 to 64 apart. Query heads that share keys are rows of one product.
    Q = (widened(query) * scaling).reshape(batch, groups, -1, size)
    common = slots.common(module)
    own = torch.matmul(Q, key.transpose(2, 3).to(Q))
    scores = _hide(own, slots.hidden_columns(sliding_window), length)
    if common is None:
        found = torch.matmul(scores.softmax(-1).to(value), value)
    else:
        keys, values = common
        shared = _hide(
            _products(Q, keys.transpose(1, 2).to(Q)), slots.hidden_shared(sliding_window), length
        )
        weights = torch.cat([shared, scores], dim=-1).softmax(-1).to(value)
        tokens = keys.shape[1]
        found = _products(weights[..., :tokens], values)
        found += torch.matmul(weights[..., tokens:], value)
    return found.reshape(batch, heads, length, -1).transpose(1, 2), None


def _products(X: Tensor, Y: Tensor) -> Tensor:
    """Return the products of the rows X [B, g, r, n] of all texts with Y [g, n, m]: [B, g, r, m].

    A head's rows of all texts make one product.
    """
    batch, groups, rows, size = X.shape
    stacked = X.transpose(0, 1).reshape(groups, batch * rows, size)
    return torch.matmul(stacked, Y).view(groups, batch, rows, -1).transpose(0, 1)


def _hide(scores: Tensor, hidden: Tensor | None, length: int) -> Tensor:
    """Return scores [B, g, r, T] with those at hidden [B, S, T] places at minus infinity."""
    if hidden is None:
        return scores
    batch, groups, rows, columns = scores.shape
    split = scores.reshape(batch, groups, rows // length, length, columns)
    masked = split.masked_fill(hidden[:, None, None], float("-inf"))
    return masked.view(batch, groups, rows, columns)


AttentionInterface.register(SLOTS, attend)


def fits_slots(model: Any) -> bool:
    """Return whether a model of transformers can answer with slots.

    Its attention must be selectable by name, without caps or sinks, and keys and values must be all
    that its layers keep of a text.
    """
    config = model.config
    kinds = {*(getattr(config, "layer_types", None) or ())}
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and kinds <= SHARED_KINDS
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "num_kv_shared_layers", 0)
        and not any(hasattr(module, "sinks") for module in model.modules())
    )


class OneDnnLinear(nn.Linear):
    """A linear map by oneDNN, which reads the weights where they are.

    For the few rows of answers that grow it is up to twice as fast as MKL, torch's choice.
    """

    def forward(self, X: Tensor) -> Tensor:
        """Return `X Wᵀ + b`."""
        return torch.ops.mkldnn._linear_pointwise(X, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def use_onednn(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let the linear maps of a model go through oneDNN, in float32 on a CPU that has it."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if there and device.type == "cpu" and dtype == torch.float32:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
