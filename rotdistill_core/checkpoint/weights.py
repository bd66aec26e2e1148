"""A model's weights as a lazy view: read from safetensors when asked, edited without writing, saved one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter, Param
from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import (
    Map,
    Permutation,
    Rotation,
    map_of,
    tensor_of,
    transform_param,
)
from rotdistill_core.store.files import json_blocks, tensor_blocks
from rotdistill_core.store.output import StepOutput

SHARD_BYTES = 4 << 30
UNDO = "undo.safetensors"
WEAK = 3e-3
"""Gains below this share of the largest: dividing by them on the way back would magnify rounding beyond 1e-12."""


@dataclass(frozen=True)
class Lineage:
    """What happened to the stream since the student was opened."""

    depths: tuple[int, ...]
    """For each layer boundary 0..L, its boundary in the original student."""
    basis: Tensor | None = None
    """`Q [d, e]`, d <= e: the stream is the original stream times Q."""


@dataclass(frozen=True)
class Undo:
    """What takes a fold back."""

    maps: Mapping[str, Map]
    gains: Mapping[str, Tensor]
    """Norm weights that their readers absorbed, float64."""
    config: Mapping[str, Any]
    """The config before."""
    offset: float
    """What the norm adds to its weight."""
    columns: Mapping[str, Tensor]
    """Reader -> its columns behind gains so near zero that absorbing them erases the columns, `[out, k]`."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the config, to be stored."""
        found = {f"map.{space}": tensor_of(found) for space, found in self.maps.items()}
        found |= {f"gain.{name}": gain for name, gain in self.gains.items()}
        return found | {f"columns.{name}": columns for name, columns in self.columns.items()}

    def near_zero_gain(self, gain: str) -> Tensor:
        """Return which columns those are: |gain| below `WEAK` of the largest."""
        g = (self.gains[gain] + self.offset).abs()
        return (g <= WEAK * g.max()).nonzero().flatten()


@dataclass(frozen=True)
class Weights:
    """A checkpoint with pending edits. Editing returns a new view; nothing is written before `save` or `store`."""

    config: Mapping[str, Any]
    adapter: Adapter
    entries: Mapping[str, LazyTensor]
    lineage: Lineage
    undo: Undo | None = None
    """How to take back the last edit, when that was a fold."""

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding, which stands for the checkpoint's own."""
        return self.entries[self.adapter.embedding].dtype

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding."""
        return self.adapter.head not in self.entries

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())

    @property
    def files(self) -> dict[str, LazyTensor]:
        """The tensors as a checkpoint holds them: fused ones whole."""
        found = dict(self.entries)
        for whole, parts in self.adapter.parts(self.config).items():
            some = [found.pop(name) for name in parts]
            shape = (sum(entry.shape[0] for entry in some), *some[0].shape[1:])
            found[whole] = LazyTensor(
                shape, some[0].dtype, lambda some=some: torch.cat([entry.read() for entry in some])
            )  # type: ignore[misc]
        return found

    def head(self) -> Tensor:
        """Return the head `[vocab, d]`, tied or not."""
        return self[self.adapter.embedding if self.tied else self.adapter.head]

    def gain(self, name: str) -> Tensor:
        """Return the factor by which a norm multiplies, in float64."""
        return self[name].double() + self.adapter.gain_offset

    def edit(self, tensors: Mapping[str, Tensor | LazyTensor], **config: Any) -> Weights:
        """Return a view with some tensors replaced or added, and some config keys set."""
        new = {
            n: t
            if isinstance(t, LazyTensor)
            else LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t)
            for n, t in tensors.items()
        }  # type: ignore[misc]
        return replace(
            self, entries={**self.entries, **new}, config={**self.config, **config}, undo=None
        )

    def untie(self) -> Weights:
        """Return a view whose head is a tensor of its own."""
        if not self.tied:
            return self
        return self.edit(
            {self.adapter.head: self.entries[self.adapter.embedding]}, tie_word_embeddings=False
        )

    def cut(self, keep: list[int]) -> Weights:
        """Return a view with only the layers `keep`, renumbered."""
        config = {**self.config, self.adapter.depth_key: len(keep)}
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = [config["layer_types"][k] for k in keep]
        entries: dict[str, LazyTensor] = {}
        for template in self.adapter.params:
            for new, k in enumerate(keep):
                if (name := template.replace("{i}", str(k))) in self.entries:
                    entries[template.replace("{i}", str(new))] = self.entries[name]
        depths = tuple(self.lineage.depths[k] for k in [*keep, self.depth])
        return replace(
            self,
            config=config,
            entries=entries,
            lineage=replace(self.lineage, depths=depths),
            undo=None,
        )

    def fold(self, maps: Mapping[str, Map]) -> Weights:
        """Return a view in the new bases, in float64. Norm gains are absorbed by their readers first, because
        `RMSNorm(x Q) = RMSNorm(x) Q` holds only for gain 1; absorbing the final gain unties the head. A rectangular rotation
        `[d, e]` widens the stream: the mean square over e is d/e of that over d, so gains become `sqrt(d/e)` and eps `eps d/e`.

        Logits do not change. (Ashkboos et al., SliceGPT, arXiv:2401.15024, computational invariance.)
        A stream that norms write to cannot be rotated: that is a RecipeError.
        """
        gains = self._absorbed(maps)
        whole = self.untie() if gains else self
        fused: dict[str, LazyTensor] = {}
        wider = self._widened(maps)
        width = wider.get(self.adapter.width_key, self.width)
        for name, param in self.adapter.expand(self.config).items():
            if name in whole.entries:
                shape = tuple(
                    width if axis == "residual" else n
                    for axis, n in zip(param.axes, whole.entries[name].shape, strict=True)
                )
                fused[name] = LazyTensor(
                    shape, torch.float64, _folded(whole, name, param, maps, gains)
                )
        basis = self.lineage.basis
        if "residual" in maps:
            basis = maps["residual"].apply(
                torch.eye(self.width, dtype=torch.float64) if basis is None else basis, 1
            )
        return replace(
            whole.edit(fused, **wider),
            lineage=replace(self.lineage, basis=basis),
            undo=self._undo(maps, gains),
        )

    def _widened(self, maps: Mapping[str, Map]) -> dict[str, Any]:
        """Return what a rotation into a wider space changes in the config."""
        R = maps.get("residual")
        if not isinstance(R, Rotation) or R.square:
            return {}
        inner = [
            name
            for name, p in self.adapter.expand(self.config).items()
            if p.is_gain and "residual" not in p.axes
        ]
        if inner:
            raise RecipeError(
                f"a {self.config['model_type']} model cannot be widened: {inner[0]} shares its eps with norms that change."
            )
        (d, e), eps = R.matrix.shape, self.adapter.eps_key
        return {
            self.adapter.width_key: e,
            eps: float(self.config[eps]) * d / e,
            "head_dim": self.adapter.heads(self.config).width,
        }

    def _absorbed(self, maps: Mapping[str, Map]) -> list[str]:
        """Return the gains that readers have to absorb: permutations of the stream commute with gains, rotations do not."""
        if "residual" not in maps or isinstance(maps["residual"], Permutation):
            return []
        absorbed, stuck = self.adapter.gains(self.config)
        if stuck:
            raise RecipeError(
                f"the residual stream of a {self.config['model_type']} model cannot be rotated: {len(stuck)} norm gains, the first is "
                f"{stuck[0]}, act on what attention and MLP write. No reader stands behind them that could absorb them, and only "
                "permutations commute with them. Leave out the step that rotates; neurons, heads and channels can be permuted."
            )
        return absorbed

    def _undo(self, maps: Mapping[str, Map], gains: list[str]) -> Undo:
        undo = Undo(
            maps,
            {name: self[name].double() for name in gains},
            self.config,
            self.adapter.gain_offset,
            {},
        )
        columns = {
            name: self[name][:, near_zero_gain].clone()
            for name, param in self.adapter.expand(self.config).items()
            if name in self.entries
            and param.gain
            and param.gain in undo.gains
            and len(near_zero_gain := undo.near_zero_gain(param.gain))
        }
        return replace(undo, columns=columns)

    def unfold(self, undo: Undo) -> Weights:
        """Return the view before the fold that `undo` belongs to, in float64."""
        back = {space: m.invert() for space, m in undo.maps.items()}
        plain: dict[str, LazyTensor] = {}
        tied, width = (
            undo.config.get("tie_word_embeddings"),
            self.adapter.sizes(undo.config)["residual"],
        )
        for name, param in self.adapter.expand(self.config).items():
            if name in self.entries and not (tied and name == self.adapter.head):
                shape = tuple(
                    width if axis == "residual" else n
                    for axis, n in zip(param.axes, self.entries[name].shape, strict=True)
                )
                plain[name] = LazyTensor(
                    shape, torch.float64, _unfolded(self, name, param, back, undo)
                )
        basis = self.lineage.basis
        if basis is not None and "residual" in back:
            basis = back["residual"].apply(basis, 1)
        return Weights(undo.config, self.adapter, plain, replace(self.lineage, basis=basis))

    def save(self, write: Callable[[str, Any], object], dtype: torch.dtype) -> None:
        """Write a plain Hugging Face checkpoint through `write(file name, blocks)`: weights, index, config, in that order."""
        shards: list[dict[str, LazyTensor]] = [{}]
        room = SHARD_BYTES
        for name, entry in self.files.items():
            size = torch.Size(entry.shape).numel() * dtype.itemsize
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][name] = entry
            room -= size
        names = [
            f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
        ]
        names = ["model.safetensors"] if len(shards) == 1 else names
        for name, shard in zip(names, shards, strict=True):
            write(name, tensor_blocks({n: (e.shape, dtype, e.read) for n, e in shard.items()}))
        if len(shards) > 1:
            where = {
                tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            }
            total = sum(torch.Size(e.shape).numel() for e in self.files.values()) * dtype.itemsize
            write(
                "model.safetensors.index.json",
                json_blocks({"metadata": {"total_size": total}, "weight_map": where}),
            )
        config = {k: v for k, v in self.config.items() if k != "torch_dtype"}
        write("config.json", json_blocks({**config, "dtype": str(dtype).removeprefix("torch.")}))

    def store(self, out: StepOutput, dtype: torch.dtype) -> dict[str, Any]:
        """Commit what changed since the student was opened and return how to read it all again (see `restore`)."""
        changed = {n: (e.shape, dtype, e.read) for n, e in self.entries.items() if e.stored is None}
        name = f"weights/{out.step}/changed.safetensors"
        path = out.find(name) or out.write(name, tensor_blocks(changed))
        where = {n: [_under(path, out.store.root), n] for n in changed}
        where |= {
            n: [_under(e.stored[0], out.store.root), e.stored[1]]
            for n, e in self.entries.items()
            if e.stored
        }
        basis = None
        if self.lineage.basis is not None:
            name = f"weights/{out.step}/basis.safetensors"
            lineage = out.find(name) or out.tensors(name, {"Q": self.lineage.basis})
            basis = _under(lineage, out.store.root)
        return {
            "config": dict(self.config),
            "depths": list(self.lineage.depths),
            "basis": basis,
            "tensors": where,
        }


def _under(path: Path, root: Path) -> str:
    """Return a path relative to the folder of runs, or '' for the opened student itself."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else ""


def restore_weights(info: Mapping[str, Any], student: Weights, root: Path) -> Weights:
    """Return the view that `store` described."""
    opened: dict[str, dict[str, LazyTensor]] = {"": dict(student.entries)}
    for file, _ in info["tensors"].values():
        if file not in opened:
            opened[file] = open_tensors(root / file)
    entries = {name: opened[file][key] for name, (file, key) in info["tensors"].items()}
    basis = open_tensors(root / info["basis"])["Q"].read().clone() if info["basis"] else None
    return Weights(info["config"], student.adapter, entries, Lineage(tuple(info["depths"]), basis))


def restore_undo(path: Path, before: Weights) -> Undo:
    """Return what `Undo.tensors` gave, for the weights before the fold."""
    parts: dict[str, dict[str, Tensor]] = {"map": {}, "gain": {}, "columns": {}}
    for name, entry in open_tensors(path).items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = entry.read().clone()
    maps = {space: map_of(tensor) for space, tensor in parts["map"].items()}
    return Undo(maps, parts["gain"], before.config, before.adapter.gain_offset, parts["columns"])


def open_folder(folder: Path, config: Mapping[str, Any], adapter: Adapter) -> Weights:
    """Open a checkpoint folder after comparing its headers with the adapter's table.

    Raises:
        SetupError: the folder is torn or does not fit the table.
    """
    headers = folder_headers(folder)
    adapter.check(config, {n: h.shape for n, h in headers.items()}, str(folder))
    entries: dict[str, LazyTensor] = {}
    for path in sorted({h.file for h in headers.values()}):
        entries.update(open_tensors(path))
    for whole in adapter.parts(config).keys() & entries.keys():
        entry = entries.pop(whole)
        entries |= _split(entry, adapter.unfused(config, {whole: entry.shape}))
    if config.get(
        "tie_word_embeddings"
    ):  # some folders carry the tied head a second time; transformers ignores it, and so do we
        entries.pop(adapter.head, None)
    return Weights(dict(config), adapter, entries, Lineage(tuple(range(adapter.depth(config) + 1))))


def _split(whole: LazyTensor, parts: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Return the parameters of these shapes that a fused tensor holds, as entries of their own."""
    ends = accumulate(shape[0] for shape in parts.values())
    return {
        name: LazyTensor(shape, whole.dtype, lambda a=end - shape[0], b=end: whole.read()[a:b])  # type: ignore[misc]
        for (name, shape), end in zip(parts.items(), ends, strict=True)
    }


def _folded(
    whole: Weights, name: str, param: Param, maps: Mapping[str, Map], gains: list[str]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if name in gains:
            d, e = found.matrix.shape if isinstance(found := maps["residual"], Rotation) else (1, 1)
            return torch.full((e,), (d / e) ** 0.5 - whole.adapter.gain_offset, dtype=torch.float64)
        tensor = whole[name].double()
        if param.gain in gains:
            tensor = tensor * whole.gain(param.gain)
        return transform_param(tensor, param.axes, maps, param.gauge)

    return read


def _unfolded(
    folded: Weights, name: str, param: Param, back: Mapping[str, Map], undo: Undo
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if name in undo.gains:
            return undo.gains[name]
        tensor = transform_param(folded[name].double(), param.axes, back, param.gauge, back=True)
        if not param.gain or param.gain not in undo.gains:
            return tensor
        near_zero_gain = undo.near_zero_gain(param.gain)
        tensor = tensor / (undo.gains[param.gain] + undo.offset).index_fill(0, near_zero_gain, 1.0)
        return (
            tensor.index_copy(1, near_zero_gain, undo.columns[name].double())
            if name in undo.columns
            else tensor
        )

    return read
