"""A model's weights as a lazy view: read from safetensors when asked, edited without writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint.fold import Undo as Undo
from rotdistill_core.checkpoint.fold import fold_tensors, unfold_tensors
from rotdistill_core.checkpoint.headers import folder_headers, settled_tie
from rotdistill_core.checkpoint.layer_lists import cut_config
from rotdistill_core.checkpoint.lazy import LazyTensor, open_tensors, split_rows, stack_rows
from rotdistill_core.checkpoint.save import commit_changes, relative_path, write_checkpoint
from rotdistill_core.linalg.maps import Map
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput


@dataclass(frozen=True)
class Lineage:
    """What happened to the residual stream since the student was opened."""

    depths: tuple[int, ...]
    """For each layer boundary 0..L, its boundary in the original student."""
    basis: Tensor | None = None
    """`Q [d, e]`, d <= e: the stream is the original one times Q. None: the original basis."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint with pending edits.

    An edit returns a new view. Nothing is written before `save` or `store`.
    """

    config: Config
    adapter: Adapter
    entries: Mapping[str, LazyTensor]
    """Parameter of the table -> its tensor. A tied head and absent biases are not there."""
    lineage: Lineage
    undo: Undo | None = None
    """What takes the last edit back, where that was a fold."""

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding, which stands for the checkpoint's."""
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
        tensors = dict(self.entries)
        for whole, names in self.adapter.parts(self.config).items():
            tensors[whole] = stack_rows([tensors.pop(name) for name in names])
        return tensors

    def head(self) -> Tensor:
        """Return the head `[vocab, d]`, tied or not."""
        return self[self.adapter.embedding if self.tied else self.adapter.head]

    def gain(self, name: str) -> Tensor:
        """Return the factor `[d]` by which a norm multiplies, float64."""
        return self[name].double() + self.adapter.gain_offset

    def edit(self, tensors: Mapping[str, Tensor | LazyTensor], **config: Any) -> Weights:
        """Return a view with some tensors replaced or added, and some config keys set."""
        new = {
            name: tensor if isinstance(tensor, LazyTensor) else LazyTensor.from_tensor(tensor)
            for name, tensor in tensors.items()
        }
        return replace(
            self, entries={**self.entries, **new}, config={**self.config, **config}, undo=None
        )

    def untie(self) -> Weights:
        """Return a view whose head is a tensor of its own."""
        if not self.tied:
            return self
        embedding = self.entries[self.adapter.embedding]
        return self.edit({self.adapter.head: embedding}, tie_word_embeddings=False)

    def cut(self, keep: Sequence[int]) -> Weights:
        """Return a view with only the layers `keep`, renumbered.

        Raises:
            RecipeError: the config says something of single layers that cannot be carried over.
        """
        config = cut_config(self.config, self.adapter.depth_key, keep)
        entries: dict[str, LazyTensor] = {}
        for template in self.adapter.params:
            for new, old in enumerate(keep):
                name = template.replace("{i}", str(old))
                if name in self.entries:
                    entries[template.replace("{i}", str(new))] = self.entries[name]
        depths = tuple(self.lineage.depths[boundary] for boundary in [*keep, self.depth])
        lineage = replace(self.lineage, depths=depths)
        return replace(self, config=config, entries=entries, lineage=lineage, undo=None)

    def fold(self, maps: Mapping[str, Map]) -> Weights:
        """Return a view in the new bases, in float64; the logits do not change.

        See `fold_tensors`. `undo` of the view takes the fold back.

        Raises:
            RecipeError: the architecture does not allow such a change of basis.
        """
        folded = fold_tensors(self.adapter, self.config, self.entries, maps)
        basis = self.lineage.basis
        if "residual" in maps:
            start = torch.eye(self.width, dtype=torch.float64) if basis is None else basis
            basis = maps["residual"].apply(start, 1)
        return replace(
            self,
            config=folded.config,
            entries=folded.tensors,
            lineage=replace(self.lineage, basis=basis),
            undo=folded.undo,
        )

    def unfold(self, undo: Undo) -> Weights:
        """Return the view before the fold that `undo` belongs to, in float64."""
        basis = self.lineage.basis
        if basis is not None and "residual" in undo.maps:
            basis = undo.maps["residual"].invert().apply(basis, 1)
        return Weights(
            config=undo.config,
            adapter=self.adapter,
            entries=unfold_tensors(self.adapter, self.entries, undo),
            lineage=replace(self.lineage, basis=basis),
        )

    def save(self, write: Callable[[str, Any], object], dtype: torch.dtype) -> None:
        """Write a plain Hugging Face checkpoint through `write(file name, blocks)`."""
        write_checkpoint(self.files, self.config, write, dtype)

    def store(self, out: StepOutput, dtype: torch.dtype) -> dict[str, Any]:
        """Commit the tensors that changed since the student was opened.

        Returns:
            What `restore_weights` needs to give the view back, as JSON values.
        """
        where = commit_changes(self.entries, out, dtype)
        basis_file = None
        if self.lineage.basis is not None:
            name = RunLayout.weights(out.step, RunLayout.BASIS)
            path = out.find(name) or out.tensors(name, {"Q": self.lineage.basis})
            basis_file = relative_path(path, out.store.root)
        return {
            "config": dict(self.config),
            "depths": list(self.lineage.depths),
            "basis": basis_file,
            "tensors": where,
        }


def open_folder(folder: Path, config: Config, adapter: Adapter) -> Weights:
    """Open a checkpoint folder after comparing its headers with the adapter's table.

    Raises:
        SetupError: the folder is torn or does not fit the table.
    """
    headers = folder_headers(folder, adapter.body)
    config = settled_tie(config, adapter, headers)
    adapter.check(config, {n: header.shape for n, header in headers.items()}, str(folder))
    entries: dict[str, LazyTensor] = {}
    for path in sorted({header.file for header in headers.values()}):
        for name, tensor in open_tensors(path).items():
            own = next((own for own in (name, f"{adapter.body}.{name}") if own in headers), None)
            if own and tensor.stored:
                entries[own] = replace(tensor, stored=tensor.stored._replace(name=own))
    for whole in adapter.parts(config):
        if whole in entries:
            fused = entries.pop(whole)
            entries |= split_rows(fused, adapter.unfused(config, {whole: fused.shape}))
    if config.get("tie_word_embeddings"):
        # Some folders hold a tied head a second time, equal to the embedding.
        entries.pop(adapter.head, None)
    return Weights(dict(config), adapter, entries, Lineage(tuple(range(adapter.depth(config) + 1))))


def restore_weights(info: Mapping[str, Any], student: Weights, root: Path) -> Weights:
    """Return the view that `Weights.store` described; `root` is the folder of runs."""
    files: dict[str, dict[str, LazyTensor]] = {"": dict(student.entries)}
    for file, _ in info["tensors"].values():
        if file not in files:
            files[file] = open_tensors(root / file)
    entries = {name: files[file][key] for name, (file, key) in info["tensors"].items()}
    basis = open_tensors(root / info["basis"])["Q"].read().clone() if info["basis"] else None
    return Weights(info["config"], student.adapter, entries, Lineage(tuple(info["depths"]), basis))


def restore_undo(path: Path, config_before: Config, adapter: Adapter) -> Undo:
    """Return the record that `Undo.tensors` described.

    Args:
        path: the file that holds the tensors.
        config_before: config.json of the model before the fold.
        adapter: the table of its architecture.
    """
    tensors = {name: entry.read().clone() for name, entry in open_tensors(path).items()}
    return Undo.from_tensors(tensors, config_before, adapter.gain_offset)
