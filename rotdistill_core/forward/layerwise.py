"""The one way a model is run for capture, refit and evaluation: layers in the outer loop.

Weights are read once, one layer at a time (the next one meanwhile), and all texts go through a layer before the next is
opened; so memory holds two layers and one `[rows, d]` matrix of states, whatever the model's size. The shared prompt is
computed once, its keys and values are lent to every text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import RotdistillError

Progress = Callable[[int, int, str], None]
Observer = Callable[[Tensor, Tensor], None]
"""Called with rows [n] and their values [n, width] for each batch; `output` sees the stream after the layer."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments it was called with (masks and rotary tables differ by layer)."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        for name in ("attention_type", "layer_type"):
            if hasattr(real, name):
                setattr(self, name, getattr(real, name))

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


class _PrefixCache:
    """Keys and values of the shared prefix in one layer: kept on the first call, put in front on the others."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            self.kept = keys, values
            return keys, values
        k, v = (t.expand(len(keys), -1, -1, -1) for t in self.kept)
        return torch.cat([k, keys], 2), torch.cat([v, values], 2)


class LayerwiseForward:
    """All rows of a layout, moving through a model layer by layer.

    `states [rows, d]` is the stream at boundary `boundary` (0: embeddings). Iterate to open one layer after the other; inside,
    `run()` moves the states on, and `run(keep=False)` only lets observers look.
    """

    def __init__(
        self,
        weights: Weights,
        layout: PackedTexts,
        device: torch.device,
        dtype: torch.dtype,
        budget: int = 1536,
    ) -> None:
        self.weights, self.layout, self.device, self.dtype = weights, layout, device, dtype
        self.boundary = 0
        self.layer, self._files = nn.Module(), weights.files
        self._batches = [
            (*self._batch(texts), layout.prefix_length(layout.texts[texts[0]]))
            for texts in layout.batches(budget)
        ]
        if layout.prefix:
            self._batches.insert(
                0,
                (
                    torch.arange(layout.prefix)[None],
                    torch.ones(1, layout.prefix, dtype=torch.bool),
                    0,
                ),
            )
        self._model = meta_model(weights, dtype)
        self._layers = list(self._model.get_submodule(weights.adapter.layers).children())
        self._calls = self._record()
        self.states = self._embed()

    def _batch(self, texts: list[int]) -> tuple[Tensor, Tensor]:
        """Return row numbers [B, S] and the mask of real ones; texts are padded on the right, where causal rows never look."""
        starts = self.layout.starts
        longest = max(starts[k + 1] - starts[k] for k in texts)
        rows = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for b, k in enumerate(texts):
            n = starts[k + 1] - starts[k]
            rows[b, :n], mask[b, :n] = torch.arange(starts[k], starts[k + 1]), True
        return rows, mask

    def _embed(self) -> Tensor:
        name = self.weights.adapter.embedding
        states = self.weights[name][self.layout.tokens].to(self.dtype)
        # The model's own scaling of embeddings (Gemma's sqrt(d)) is part of its embedding module.
        scale = getattr(
            self._model.get_submodule(name.removesuffix(".weight")), "embed_scale", torch.ones(())
        )
        return states * scale.to(states)

    def _record(self) -> list[list[dict[str, Any]]]:
        """Run the body once with every layer replaced by a recorder; return the call arguments [batch][layer]."""
        from transformers import DynamicCache

        recorders = [_Recorder(layer) for layer in self._layers]
        self._model.set_submodule(self.weights.adapter.layers, nn.ModuleList(recorders))
        self._model.set_submodule(self.weights.adapter.norm.removesuffix(".weight"), nn.Identity())
        body = self._model.get_submodule(self.weights.adapter.body)
        calls = []
        for rows, _, past in self._batches:
            cache = None
            if past:
                cache = DynamicCache()
                for i in range(len(recorders)):
                    cache.update(torch.zeros(1, 1, past, 1), torch.zeros(1, 1, past, 1), i)
            states = torch.zeros(
                *rows.shape, self.weights.width, dtype=self.dtype, device=self.device
            )
            positions = torch.arange(past, past + rows.shape[1], device=self.device)[None]
            with torch.no_grad():
                body(
                    inputs_embeds=states,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=False,
                )
            calls.append([recorder.kwargs for recorder in recorders])
        return calls

    def __iter__(self) -> Iterator[int]:
        """Open layer after layer from `boundary` on, reading the next one's weights meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[dict[str, Tensor]] = reader.submit(self._read, self.boundary)
            for i in range(self.boundary, len(self._layers)):
                tensors = ahead.result()
                if i + 1 < len(self._layers):
                    ahead = reader.submit(self._read, i + 1)
                self.layer = self._layers[i]
                self.layer.load_state_dict(tensors, strict=True, assign=True)
                del tensors
                yield i
                if self.boundary != i + 1:
                    raise RotdistillError(f"layer {i} was opened and the states were not moved on")
                self.layer.to("meta")

    def _read(self, i: int) -> dict[str, Tensor]:
        prefix = f"{self.weights.adapter.layers}.{i}."
        return {
            n.removeprefix(prefix): e.read().to(self.device, self.dtype)
            for n, e in self._files.items()
            if n.startswith(prefix)
        }

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put a new value of one parameter of the open layer in place."""
        inside = name.removeprefix(f"{self.weights.adapter.layers}.{self.boundary}.")
        self.layer.get_parameter(inside).data = tensor.to(self.device, self.dtype)

    @torch.no_grad()
    def run(self, observe: Mapping[str, Observer] | None = None, keep: bool = True) -> None:
        """Send all rows through the open layer.

        Args:
            observe: site -> observer; `output` is the stream behind the layer, other sites are the adapter's.
            keep: move the states on; False leaves them where they are, for a second visit.
        """
        observers = dict(observe or {})
        output = observers.pop("output", None)
        cache = _PrefixCache() if self.layout.prefix else None
        current: list[Tensor] = []
        hooks = [self._hook(site, see, current) for site, see in observers.items()]
        try:
            for (rows, mask, past), calls in zip(self._batches, self._calls, strict=True):
                current[:] = [rows[mask], mask]
                kwargs = {
                    **calls[self.boundary],
                    "past_key_values": cache if past or not int(rows[0, 0]) else None,
                }
                made = self.layer(self.states[rows].to(self.device), **kwargs)
                made = (made[0] if isinstance(made, tuple) else made)[mask.to(self.device)]
                if output is not None:
                    output(rows[mask], made)
                if keep:
                    self.states[rows[mask]] = made.to(self.states)
        finally:
            for hook in hooks:
                hook.remove()
        self.boundary += int(keep)

    def _hook(self, site: str, see: Observer, current: list[Tensor]) -> Any:
        where = self.weights.adapter.sites[site]
        module = self.layer.get_submodule(where.module)
        if where.side == "input":
            return module.register_forward_pre_hook(
                lambda _, args: see(current[0], args[0][current[1].to(args[0].device)])
            )
        return module.register_forward_hook(
            lambda _, __, made: see(current[0], made[current[1].to(made.device)])
        )


class _Norm(nn.Module):
    """RMS norm in the dtype of its input: the models' own drop to float32, which hides what is exact in float64."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.eps, self.offset = eps, offset

    def forward(self, states: Tensor) -> Tensor:
        return (
            states
            * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
            * (self.offset + self.weight)
        )


def meta_model(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Build the model with parameters on the meta device and its buffers (rotary tables) real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **{k: v for k, v in weights.config.items() if k not in ("dtype", "torch_dtype")}
    )
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    if dtype == torch.float64:
        eps = float(weights.config[weights.adapter.eps_key])
        for name, param in weights.adapter.expand(weights.config).items():
            if param.is_gain and name in weights.entries:
                norm = _Norm(weights.entries[name].shape[0], eps, weights.adapter.gain_offset)
                model.set_submodule(name.removesuffix(".weight"), norm)
    return model.eval()
