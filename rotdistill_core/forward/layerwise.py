"""The one way a model is run for capture, refit and evaluation: layers in the outer loop.

One layer's weights are read at a time, the next one's meanwhile, and all texts go through a layer
before the next one opens. So memory holds two layers and one `[rows, d]` matrix of states,
whatever the model's size. The shared prompt is computed once and lends its keys and values to
every text. Where rotary tables depend on the length of a text (see `rope`), texts of other tables
go through a layer in other batches, after a shared prompt that is computed with their tables.

Several processes (see `ranks`) deal the batches among them. Batches are made of all texts before
they are dealt, so a batch has the same shape, and its rows the same bits, wherever it is computed.
A process holds the rows of its own texts, and the shared prompt.

On a GPU the states stay there if they fit, and no row is copied. If not, they stay on the host. A
batch is then copied once each way, through pinned memory on its way in, and waited for once. States
on the host may lie in a file (see `states_file`): then memory does not grow with the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.batching import BATCH_TOKENS
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.errors import RotdistillError
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.forward.rope import tables_by_length
from rotdistill_core.forward.states_file import tensor_in_file
from rotdistill_core.forward.whole import computable, empty_model

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words on the work."""
Observer = Callable[[Tensor, Tensor], None]
"""Called for each batch with row numbers [n], on the host, and their values [n, width], on the
device."""
STATES_SHARE = 0.3
"""Share of a GPU's free memory that states may take. Two layers, a batch's activations and a copy
of the states need the rest."""
EMBEDDED_ROWS = 4096
"""Rows that are embedded at a time."""
Arguments = list[dict[str, Any]]
"""The keyword arguments of each layer."""


@dataclass(frozen=True)
class _Batch:
    """Texts that go through a layer together, padded on the right, where causal rows never look."""

    rows: Tensor
    """Row number of each token [B, S]; padding has row 0."""
    real: Tensor
    """Places of real tokens in the flattened batch [n], on the device."""
    real_rows: Tensor
    """Their row numbers [n], on the host."""
    past: int
    """Number of tokens before these whose keys and values are in the cache."""
    length: int
    """Number of tokens of its longest text, or of one that continues this prefix: it decides on
    the rotary tables."""
    device: torch.device
    """Where layers compute."""
    cache: Hashable = None
    """The rotary tables of the shared prefix that it is, or continues; None: no prefix."""
    aside: bool = False
    """Whether it is the prefix for other tables than those of its rows. Nobody observes it."""
    observed: bool = True
    """Whether observers see it. Of the processes that compute the prefix only one shows it."""

    @classmethod
    def of(cls, rows: Tensor, mask: Tensor, device: Any, **fields: Any) -> _Batch:
        """Return the batch of rows `[B, S]` of which those in `mask [B, S]` are real."""
        return cls(
            rows=rows,
            real=mask.flatten().nonzero().flatten().to(device),
            real_rows=rows[mask],
            device=device,
            **fields,
        )

    @property
    def shape(self) -> Hashable:
        """What the arguments of the layers depend on."""
        return *self.rows.shape, self.past, self.length

    @cached_property
    def rows_on_device(self) -> Tensor:
        """`rows`, on the device."""
        return self.rows.to(self.device)

    @cached_property
    def real_rows_on_device(self) -> Tensor:
        """`real_rows`, on the device."""
        return self.real_rows.to(self.device)

    def take(self, values: Tensor) -> Tensor:
        """Return the values `[n, width]` of the real tokens, of values `[B, S, width]`."""
        return values.flatten(0, 1)[self.real]

    def gather(self, states: Tensor) -> Tensor:
        """Return the states of the batch `[B, S, d]` on the device, of `states [rows, d]`."""
        if states.device == self.device:
            return states[self.rows_on_device]
        batch = states[self.rows]
        if self.device.type == "cuda":
            # Only a copy from pinned memory overlaps with the computation.
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def scatter(self, states: Tensor, values: Tensor) -> None:
        """Write the values `[n, d]` of the real tokens into `states [rows, d]`."""
        on_device = states.device == self.device
        rows = self.real_rows_on_device if on_device else self.real_rows
        states[rows] = values.to(states)


class Deal(NamedTuple):
    """All batches of some texts, and the process that each goes to."""

    batches: list[list[int]]
    """Indices of texts."""
    owners: list[int]

    @classmethod
    def of(
        cls,
        layout: PackedTexts,
        budget: int,
        apart: Callable[[Text], Hashable],
        ranks: Ranks,
        beside: Deal | None = None,
    ) -> Deal:
        """Deal the texts of `layout` in batches: the largest first, to whoever has the least yet.

        The first batch goes to the leading process. It continues the prefix if any batch does.

        Args:
            layout: the texts.
            budget: about how many padded tokens a batch may have.
            apart: texts for which it differs never share a batch.
            ranks: the processes.
            beside: another reading of the same texts. Each process gets the texts that it has
                there, in batches that do not depend on how many processes there are.
        """
        if beside is None:
            batches = layout.batches(budget, apart)
            return cls(batches, _evenly([layout.padded_tokens(b) for b in batches], ranks.count))
        found = cls([], [])
        for together, owner in zip(*beside, strict=True):
            part = layout.of(tuple(layout.texts[k] for k in together))
            for batch in part.batches(budget, apart):
                found.batches.append([together[k] for k in batch])
                found.owners.append(owner)
        return found


class Shares(NamedTuple):
    """The texts of one process, and who has the others."""

    layout: PackedTexts
    """The texts of this process. The prefix is in every layout whose texts continue it."""
    rows: Tensor
    """For each row of `layout`, its row in the whole [n]."""
    owner: Tensor
    """For each row of the whole, the process that has it [rows]; the leading one has the prefix."""
    batches: list[list[int]]
    """The batches of this process: indices of texts of `layout`."""

    @classmethod
    def of(cls, whole: PackedTexts, deal: Deal, ranks: Ranks) -> Shares:
        """Return what a process gets of the texts of `whole` that are dealt."""
        if ranks.count == 1:
            zeros = torch.zeros(whole.rows, dtype=torch.long)
            return cls(whole, torch.arange(whole.rows), zeros, deal.batches)
        owner = torch.zeros(whole.rows, dtype=torch.long)
        mine = []
        for batch, number in zip(*deal, strict=True):
            for k in batch:
                owner[whole.starts[k] : whole.starts[k + 1]] = number
            if number == ranks.number:
                mine.append(batch)
        texts = sorted(k for batch in mine for k in batch)
        layout = whole.of(tuple(whole.texts[k] for k in texts)) if texts else PackedTexts((), 0)
        place = {k: i for i, k in enumerate(texts)}
        own = [[place[k] for k in batch] for batch in mine]
        return cls(layout, layout.row_indices_in(whole), owner, own)


class _Recorder(nn.Module):
    """Replaces a decoder layer and records its keyword arguments.

    Masks and rotary tables differ from layer to layer, by these attributes.
    """

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
    """Keys and values of the shared prefix in one layer.

    The first call stores them, all later calls prepend them.
    """

    def __init__(self) -> None:
        self.prefix: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.prefix is None:
            self.prefix = keys, values
            return keys, values
        k, v = (tensor.expand(len(keys), -1, -1, -1) for tensor in self.prefix)
        return torch.cat([k, keys], 2), torch.cat([v, values], 2)


class LayerwiseForward:
    """All rows of packed texts on their way through a model, layer by layer.

    `layout` holds this process' share of the texts of `whole`; one process has them all. Its rows
    are rows `rows` of the whole. `states [rows, d]` is the stream at boundary `boundary` (0:
    embeddings). Iterate to open one layer after the other. Inside the loop `run()` moves the states
    to the next boundary, and `run(..., advance=False)` only lets observers look.
    """

    _current: _Batch
    """The batch that is in the open layer."""

    def __init__(
        self,
        weights: Weights,
        layout: PackedTexts,
        device: torch.device,
        dtype: torch.dtype,
        budget: int = BATCH_TOKENS,
        ranks: Ranks = ALONE,
        beside: LayerwiseForward | None = None,
        folder: Path | None = None,
    ) -> None:
        """Embed all texts.

        Args:
            weights: the model.
            layout: the texts.
            device: where layers compute.
            dtype: dtype of layers and states.
            budget: about how many padded tokens a batch may have.
            ranks: the processes that share the texts.
            beside: the pass of another model over the same texts, in its own reading. Each process
                gets the texts that it has there.
            folder: where states on the host lie in a file; without it they are in memory.

        Raises:
            SetupError: the disk refuses the file.
        """
        self.weights = weights
        self.whole = layout
        self.ranks = ranks
        # With its index: tensors on "cuda" say that they are on "cuda:0".
        self.device = torch.empty(0, device=device).device
        self.dtype = dtype
        self.boundary = 0
        self.layer = nn.Module()
        self._files = weights.files
        self._model = meta_model(weights, dtype)
        self._table_of = tables_by_length(self._model.config)
        self.deal: Deal = Deal.of(
            layout,
            budget,
            lambda text: self._table_of(len(text.tokens)),
            ranks,
            beside.deal if beside else None,
        )
        shares = Shares.of(layout, self.deal, ranks)
        self.layout = shares.layout
        self.rows = shares.rows
        self._owner = shares.owner
        self._batches = [*self._prefixes(), *map(self._pad, shares.batches)]
        self._layers = list(self._model.get_submodule(weights.adapter.layers).children())
        self._calls = self._record_calls()
        self.states = self._embed(folder)
        self._aside = {
            batch.cache: self.states[: self.layout.prefix].clone()
            for batch in self._batches
            if batch.aside
        }

    def _prefixes(self) -> Iterator[_Batch]:
        """Yield the shared prefix, once for all texts whose rotary tables are the same.

        Its rows are those of the first text, as everywhere. The others lie aside.
        """
        prefix = self.layout.prefix
        if not prefix:
            return
        lengths: dict[Hashable, int] = {}
        for text in self.whole.texts:
            if not text.plain:
                lengths.setdefault(self._table_of(len(text.tokens)), len(text.tokens))
        if not lengths:
            lengths[self._table_of(prefix)] = prefix
        for k, (tables, length) in enumerate(lengths.items()):
            yield _Batch.of(
                torch.arange(prefix)[None],
                torch.ones(1, prefix, dtype=torch.bool),
                self.device,
                past=0,
                length=length,
                cache=tables,
                aside=k > 0,
                observed=k == 0 and self.ranks.leads,
            )

    def _pad(self, texts: list[int]) -> _Batch:
        """Return the batch of the texts with these indices."""
        starts = self.layout.starts
        longest = max(starts[k + 1] - starts[k] for k in texts)
        rows = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for b, k in enumerate(texts):
            n = starts[k + 1] - starts[k]
            rows[b, :n] = torch.arange(starts[k], starts[k + 1])
            mask[b, :n] = True
        # Texts with and without the shared prefix, or with other tables, are never in one batch.
        past = self.layout.prefix_length(self.layout.texts[texts[0]])
        length = past + longest
        cache = self._table_of(length) if past else None
        return _Batch.of(rows, mask, self.device, past=past, length=length, cache=cache)

    def _embed(self, folder: Path | None) -> Tensor:
        name = self.weights.adapter.embedding
        table = self.weights[name]
        # The model's own scaling of embeddings (Gemma's sqrt(d)) is part of its embedding module.
        module = self._model.get_submodule(name.removesuffix(".weight"))
        scale = getattr(module, "embed_scale", torch.ones(()))
        # Granite's body does so, which is not run on the embeddings here.
        factor = self.weights.adapter.embedding_multiplier(self.weights.config)
        states = self._empty_states(table.shape[1], folder)
        for k in range(0, self.layout.rows, EMBEDDED_ROWS):
            rows = slice(k, k + EMBEDDED_ROWS)
            embedded = table[self.layout.tokens[rows]].to(self.dtype)
            embedded = embedded * scale.to(embedded)
            states[rows] = (embedded if factor == 1.0 else embedded * factor).to(states)
        return states

    def _empty_states(self, width: int, folder: Path | None) -> Tensor:
        """Return room for states `[rows, width]`: on the device, in memory, or in a file."""
        shape = (self.layout.rows, width)
        place = _place_of_states(math.prod(shape) * self.dtype.itemsize, self.device)
        if folder is not None and place.type == "cpu":
            return tensor_in_file(folder, shape, self.dtype)
        return torch.zeros(shape, dtype=self.dtype, device=place)

    def start_at(self, boundary: int, states: Callable[[Tensor], Tensor]) -> None:
        """Go on from the stream at a boundary.

        Args:
            boundary: where.
            states: rows of `layout` [n] -> their states `[n, d]`, wherever they lie.
        """
        for i in range(boundary if self._aside else 0):
            self.boundary = i
            self._open(i, self._read(i))
            aside = [(batch, call) for batch, call in self._at_boundary() if batch.aside]
            self._run(aside, None, advance=True)
            self.layer.to("meta")
        self.boundary = boundary
        for rows in self.blocks:
            self.states[rows.to(self.states.device)] = states(rows).to(self.states)

    def states_of(self, rows: Tensor) -> Tensor:
        """Return the states `[n, d]` of some rows [n], on the device on which layers compute."""
        return self.states[rows.to(self.states.device)].to(self.device)

    @property
    def blocks(self) -> list[Tensor]:
        """The rows of each batch, the prefix among them [n].

        A product of rows has the same bits for any number of processes if it is taken block by
        block: it may depend on how many rows there are.
        """
        return [batch.real_rows for batch in self._batches if not batch.aside]

    def collected(self, rows: Tensor | None = None, values: Tensor | None = None) -> Tensor | None:
        """Return the states of rows of the whole, on the host of the leading process.

        Args:
            rows: their numbers [n], in any order; all rows by default.
            values: take these in place of the states: a row for each row of `layout`.

        Returns:
            `[n, d]`; None in the other processes.
        """
        values = self.states if values is None else values
        if self.ranks.count == 1:
            if rows is None:
                return values.to("cpu", copy=True)
            return values[rows.to(values.device)].cpu()
        if rows is None:
            rows = torch.arange(self.whole.rows)
        owner = self._owner[rows]
        mine = owner == self.ranks.number
        part = values[self._place_of_own()[rows[mine]].to(values.device)]
        lengths = torch.bincount(owner, minlength=self.ranks.count).tolist()
        parts = self.ranks.collect(part, lengths)
        if parts is None:
            return None
        found = parts[0].new_empty(len(rows), *parts[0].shape[1:])
        for number, part in enumerate(parts):
            found[owner == number] = part
        return found

    def everywhere(self, rows: Tensor) -> Tensor:
        """Return the states of rows of the whole [n], in all processes, on the host.

        Returns:
            `[n, d]`.
        """
        own = self._place_of_own()[rows]
        mine = (own >= 0) & (self._owner[rows] == self.ranks.number)
        found = torch.zeros(len(rows), self.states.shape[1], dtype=self.dtype)
        found[mine] = self.states[own[mine].to(self.states.device)].cpu()
        # All but one of the values that are added up are zero, so the sum is exact.
        self.ranks.add_up(found)
        return found

    def _place_of_own(self) -> Tensor:
        """Return the row in `layout` of each row of the whole [rows]; -1 if it is not there."""
        places = torch.full((self.whole.rows,), -1)
        return places.index_copy(0, self.rows, torch.arange(len(self.rows)))

    def assembled(self, values: Tensor) -> Tensor:
        """Return one number for each row of the whole, in all processes, on the host.

        Args:
            values: one for each row of `layout` [n].
        """
        whole = torch.zeros(self.whole.rows, dtype=values.dtype)
        mine = self._owner[self.rows] == self.ranks.number
        whole[self.rows[mine]] = values.cpu()[mine]
        # All but one of the numbers that are added up are zero, so the sum is exact.
        self.ranks.add_up(whole)
        return whole

    def _record_calls(self) -> list[Arguments]:
        """Run the body once without its layers; return each layer's arguments [batch][layer].

        Batches of one shape share them.
        """
        adapter = self.weights.adapter
        recorders = [_Recorder(layer) for layer in self._layers]
        self._model.set_submodule(adapter.layers, nn.ModuleList(recorders))
        self._model.set_submodule(adapter.norm.removesuffix(".weight"), nn.Identity())
        body = self._model.get_submodule(adapter.body)
        found: dict[Hashable, Arguments] = {}
        for batch in self._batches:
            if batch.shape not in found:
                found[batch.shape] = self._record_call(batch, body, recorders)
        return [found[batch.shape] for batch in self._batches]

    def _record_call(self, batch: _Batch, body: nn.Module, recorders: list[_Recorder]) -> Arguments:
        """Run the body for a batch; return the arguments of each layer."""
        length = batch.rows.shape[1]
        states = torch.zeros(
            *batch.rows.shape, self.weights.width, dtype=self.dtype, device=self.device
        )
        positions = torch.arange(batch.past, batch.past + length, device=self.device)[None]
        if self._table_of(batch.past + length) != self._table_of(batch.length):
            # A second row with the last position of a text: the tables are made for that.
            states = states.expand(2, -1, -1)
            positions = torch.cat([positions, positions + batch.length - length])
        with torch.no_grad():
            body(
                inputs_embeds=states,
                position_ids=positions,
                past_key_values=_empty_cache(len(recorders), batch.past),
                use_cache=False,
            )
        return [_first_row(recorder.kwargs, len(states)) for recorder in recorders]

    def __iter__(self) -> Generator[int, None, None]:
        """Open layer after layer from `boundary` on, and read the next layer's weights meanwhile.

        Raises:
            RotdistillError: a layer was opened and the states were not moved on.
        """
        with ThreadPoolExecutor(1) as reader:
            next_tensors: Future[dict[str, Tensor]] = reader.submit(self._read, self.boundary)
            for i in range(self.boundary, len(self._layers)):
                tensors = next_tensors.result()
                if i + 1 < len(self._layers):
                    next_tensors = reader.submit(self._read, i + 1)
                self._open(i, tensors)
                del tensors
                yield i
                if self.boundary != i + 1:
                    raise RotdistillError(f"layer {i} was opened and the states were not moved on")
                self.layer.to("meta")

    def _read(self, i: int) -> dict[str, Tensor]:
        prefix = f"{self.weights.adapter.layers}.{i}."
        entries = {name: entry for name, entry in self._files.items() if name.startswith(prefix)}
        tensors = computable(entries, self.device, self.dtype)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _open(self, i: int, tensors: dict[str, Tensor]) -> None:
        self.layer = self._layers[i]
        self.layer.load_state_dict(tensors, strict=True, assign=True)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Give one parameter of the open layer a new value; `name` is that of the checkpoint."""
        inside = name.removeprefix(f"{self.weights.adapter.layers}.{self.boundary}.")
        self.layer.get_parameter(inside).data = tensor.to(self.device, self.dtype)

    @torch.no_grad()
    def run(self, observe: Mapping[str, Observer] | None = None, advance: bool = True) -> None:
        """Send all rows through the open layer.

        Args:
            observe: site -> observer. `output` is the stream after the layer, all other sites are
                the adapter's.
            advance: move the states to the next boundary; False leaves them, for a second visit.
        """
        observers = dict(observe or {})
        observe_output = observers.pop("output", None)
        hooks = [self._hook(site, observer) for site, observer in observers.items()]
        try:
            self._run(self._at_boundary(), observe_output, advance)
        finally:
            for hook in hooks:
                hook.remove()
        if advance:
            self.boundary += 1

    def _at_boundary(self) -> list[tuple[_Batch, dict[str, Any]]]:
        """Return each batch with the arguments of the layer after the boundary."""
        calls = (calls[self.boundary] for calls in self._calls)
        return list(zip(self._batches, calls, strict=True))

    def _run(
        self,
        batches: list[tuple[_Batch, dict[str, Any]]],
        observe_output: Observer | None,
        advance: bool,
    ) -> None:
        """Send batches through the open layer, prefixes before what continues them."""
        caches = {batch.cache: _PrefixCache() for batch, _ in batches if batch.cache is not None}
        for batch, arguments in batches:
            self._current = batch
            states = self._aside[batch.cache] if batch.aside else self.states
            cache = caches.get(batch.cache)
            output = self.layer(batch.gather(states), **{**arguments, "past_key_values": cache})
            output = batch.take(output[0] if isinstance(output, tuple) else output)
            if observe_output is not None and batch.observed:
                observe_output(batch.real_rows, output)
            if advance:
                batch.scatter(states, output)

    def _hook(self, site: str, observer: Observer) -> RemovableHandle:
        """Let an observer see the real rows of each batch at a site of the open layer."""

        def see(values: Tensor) -> None:
            if self._current.observed:
                observer(self._current.real_rows, self._current.take(values))

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(args[0])

        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            see(output)

        place = self.weights.adapter.sites[site]
        module = self.layer.get_submodule(place.module)
        if place.side == "input":
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)


def _evenly(sizes: list[int], count: int) -> list[int]:
    """Return the process of each batch, of so many, so that all have about the same work.

    Args:
        sizes: padded tokens of each batch.
        count: number of processes.
    """
    owners = [0] * len(sizes)
    loads = [0] * count
    for k in sorted(range(len(sizes)), key=lambda k: (k > 0, -sizes[k])):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += sizes[k]
    return owners


def _place_of_states(size: int, device: torch.device) -> torch.device:
    """Return where states of so many bytes stay: on the device if they fit, else on the host."""
    if device.type == "cpu":
        return device
    memory = getattr(torch.get_device_module(device), "mem_get_info", None)
    if memory is None:
        return device
    free, _ = memory(device)
    return device if size <= STATES_SHARE * free else torch.device("cpu")


def _first_row(arguments: Any, rows: int) -> Any:
    """Return a layer's arguments for the first of so many rows of a batch, at any depth."""
    if rows == 1:
        return arguments
    if isinstance(arguments, Tensor):
        return arguments[:1] if len(arguments) == rows else arguments
    if isinstance(arguments, dict):
        return {name: _first_row(value, rows) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_first_row(value, rows) for value in arguments)
    return arguments


def _empty_cache(layers: int, past: int) -> DynamicCache | None:
    """Return a cache that claims `past` tokens in each layer, for masks of the right width."""
    if not past:
        return None
    cache = DynamicCache()
    for i in range(layers):
        cache.update(torch.zeros(1, 1, past, 1), torch.zeros(1, 1, past, 1), i)
    return cache


class _RMSNorm(nn.Module):
    """RMS norm in the dtype of its input.

    The models' own norms drop to float32, which hides what is exact in float64.
    """

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.eps = eps
        self.offset = offset

    def forward(self, states: Tensor) -> Tensor:
        inverse_rms = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return states * inverse_rms * (self.offset + self.weight)


def meta_model(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Build the model with its parameters on the meta device; its buffers (rotary tables) are real.

    In float64 its norms are `_RMSNorm`.

    Raises:
        SetupError: see `empty_model`.
    """
    model: nn.Module = empty_model(weights, dtype)
    if dtype == torch.float64:
        eps = float(weights.config[weights.adapter.eps_key])
        for name, param in weights.adapter.expand(weights.config).items():
            if param.is_gain and name in weights.entries:
                norm = _RMSNorm(weights.entries[name].shape[0], eps, weights.adapter.gain_offset)
                model.set_submodule(name.removesuffix(".weight"), norm)
    return model
