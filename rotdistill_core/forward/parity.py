"""Parity: whether the layerwise forward computes what transformers computes, on real texts.

transformers' side is its own complete model: its embedding, masks, rotary tables, layers, norms,
head, multipliers and caps. Its weights are read module by module, so memory holds the largest
module and the activations of one text, whatever the model's size.

Both sides compute in float32, whatever the run computes in. There a fault and rounding lie far
apart; in bfloat16 rounding alone moves a logit by a hundredth of their spread.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.checkpoint.lazy import LazyTensor, StoredTensor, open_tensors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.head import final_norm, head_for, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.rope import forget_lengths, transformers_config
from rotdistill_core.forward.whole import empty_model
from rotdistill_core.store.results import Parity

ALLOWED = 1e-4
"""Largest difference of a logit, relative to the spread of a text's logits.

Rounding in float32 makes 1e-6 of it in a SmolLM2 of 30 layers and 5e-7 in a pico model, and grows
with the root of the depth. The faults that were seen (a multiplier, a cap, a rotary table of
another length, a window) make 1e-2 and more. A difference of 1e-4 is a KL of some 1e-6 nats.
"""
POSITIONS = 16
"""Positions of a text at which logits are compared, the first and the last among them."""
ALIKE = 0.999
"""Least cosine of what a layer adds to the stream and of what its writer writes."""
FACTOR_TOLERANCE = 1e-3
"""Relative tolerance of the factor between both. Rounding in float32 makes 1e-6 of it."""
SHOWN_SETTINGS = 6
AT_ONCE = 1 << 62
"""Padded tokens of a batch: all texts of one table go together."""

Logits = Callable[[Text, Tensor], Tensor]
"""A text and positions [n] -> transformers' logits there `[n, vocab]`, float32, on the host."""


def parity_texts(layout: PackedTexts, without_prefix: bool) -> PackedTexts:
    """Return the texts on which logits are compared: the shortest and the longest.

    They go through the layers in one batch. With `without_prefix` each of them comes again without
    the shared prefix, and so does a plain text that is longer still.
    """
    chats = sorted((t for t in layout.texts if not t.plain), key=lambda text: len(text.tokens))
    chosen = dict.fromkeys([*chats[:1], *chats[-1:]])
    if not without_prefix and chats:
        return PackedTexts(tuple(chosen), layout.prefix)
    alone = {replace(text, plain=True): None for text in chosen if layout.prefix}
    plain = sorted((t for t in layout.texts if t.plain), key=lambda text: len(text.tokens))
    longest = max((len(text.tokens) for text in chosen), default=0)
    alone |= {text: None for text in plain[-1:] if len(text.tokens) > longest}
    return PackedTexts((*chosen, *alone), layout.prefix if chosen else 0)


@torch.no_grad()
def compare_with_transformers(
    weights: Weights, logits: Logits, layout: PackedTexts, device: torch.device
) -> Parity:
    """Compare the layerwise forward with transformers on texts.

    Args:
        weights: the model.
        logits: the same model in transformers; see `logits_of_folder` and `logits_of_view`.
        layout: the texts, all of which are compared.
        device: where the layerwise forward computes.
    """
    forward = LayerwiseForward(weights, layout, device, torch.float32, AT_ONCE)
    for _ in forward:
        forward.run()
    head = head_for(weights, forward.states_of(torch.zeros(0, dtype=torch.long)))
    expected: dict[tuple[int, ...], Tensor] = {}
    worst = 0.0
    where = ""
    for k, text in enumerate(layout.texts):
        positions = _positions(len(text.tokens))
        if text.tokens not in expected:
            expected[text.tokens] = logits(text, positions)
        # Rows of the prefix belong to all texts; those of the text itself are compared.
        prefix = layout.prefix_length(text)
        own = positions >= prefix
        rows = positions[own] - prefix + layout.starts[k]
        states = final_norm(weights, forward.states_of(rows))
        found = head_logits(weights, states, head).cpu()
        difference = _relative_difference(found, expected[text.tokens][own])
        if not difference <= worst:  # a NaN is worse than any number
            worst, where = difference, text.id
    return Parity(
        difference=worst,
        allowed=ALLOWED,
        text=where,
        texts=tuple(dict.fromkeys(text.id for text in layout.texts)),
        tokens=tuple(sorted({len(text.tokens) for text in layout.texts})),
    )


def _positions(length: int) -> Tensor:
    """Return up to `POSITIONS` positions of a text, evenly spaced, with its last one."""
    return torch.linspace(0, length - 1, min(length, POSITIONS)).round().long()


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two logits, relative to the spread of all of them."""
    spread = (expected.max() - expected.min()).clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / spread)


def parity_fault(parity: Parity, weights: Weights) -> str:
    """Return why a comparison does not hold, and what may be the cause; empty if it holds."""
    if parity.holds:
        return ""
    difference = (
        f"is not computed as transformers computes it: on text {parity.text} logits differ by "
        f"{parity.difference:.1e} of their spread, more than {parity.allowed:.0e}"
    )
    model_type = weights.config.get("model_type")
    named = unnamed_settings(weights.config, weights.adapter)
    if not named:
        return (
            f"{difference}. No setting of config.json stands out: the table of the adapter for "
            f"{model_type} may be wrong, or transformers reads something else in the folder."
        )
    return (
        f"{difference}. The table of the adapter for {model_type} does not name these settings of "
        f"config.json, which are not at their defaults: {', '.join(named[:SHOWN_SETTINGS])}. "
        "Install an adapter whose table covers them, or take a model without them."
    )


# What a layer adds to the stream.


@torch.no_grad()
def branch_fault(weights: Weights, layout: PackedTexts, device: torch.device) -> str:
    """Return what the table has wrong of what the first layer adds to the stream; else nothing.

    Logits do not show it, for layers are transformers' own. But steps refit what attention and the
    MLP write, so they have to know what it is multiplied by.

    Args:
        weights: the model.
        layout: texts; some rows of them are compared.
        device: where to compute.
    """
    adapter = weights.adapter
    forward = LayerwiseForward(weights, layout, device, torch.float32, AT_ONCE)
    rows = _positions(layout.rows)
    start = forward.states_of(rows).cpu().double()
    seen: dict[str, Tensor] = {}

    def note(site: str, these: Tensor, values: Tensor) -> None:
        found = seen.setdefault(site, torch.zeros(len(rows), values.shape[1], dtype=torch.float64))
        order = {row: k for k, row in enumerate(these.tolist())}
        for k, row in enumerate(rows.tolist()):
            if row in order:
                found[k] = values[order[row]].cpu().double()

    sites = [site for site in ("mid", "mlp", *adapter.writers) if site in adapter.sites]
    for _ in forward:
        forward.run({site: partial(note, site) for site in sites})
        break
    if "mid" not in seen:
        return ""
    branches = (seen["mid"] - start, forward.states_of(rows).cpu().double() - seen["mid"])
    written = {"": seen["mlp"]} if "mlp" in seen else {}
    for site, template in adapter.writers.items():
        name = template.replace("{i}", "0")
        bias = weights.entries.get(f"{name.removesuffix('weight')}bias")
        added = 0.0 if bias is None else bias.read().cpu().double()
        written[name] = seen[site] @ weights[name].cpu().double().T + added
    expected = adapter.residual_multiplier(weights.config)
    for name, rows_written in written.items():
        problem = _branch_problem(weights, name, rows_written, branches, expected)
        if problem:
            return problem
    return ""


def _branch_problem(
    weights: Weights, name: str, written: Tensor, branches: Sequence[Tensor], expected: float
) -> str:
    """Return what is wrong if none of the branches is what was written, times what is expected."""
    likeness = [
        float(nn.functional.cosine_similarity(b.flatten(), written.flatten(), dim=0))
        for b in branches
    ]
    best = max(range(len(branches)), key=lambda k: abs(likeness[k]))
    size = float(written.square().sum())
    added = float(branches[best].square().sum())
    if not (size > 0 and added > 0):  # nothing is added, or nothing finite, so nothing is seen
        return ""
    model_type = weights.config.get("model_type")
    if abs(likeness[best]) < ALIKE:
        what = f"{name} makes of the activations at its site" if name else "the MLP writes"
        return (
            f"the table of the adapter for {model_type} is wrong: the first layer adds something "
            f"else to the stream than what {what}."
        )
    factor = float((branches[best] * written).sum()) / size
    if abs(factor - expected) <= FACTOR_TOLERANCE * abs(factor):
        return ""
    given = transformers_config(weights.config).to_dict()
    keys = [
        f"{key} = {value!r}"
        for key, value in given.items()
        if isinstance(value, float) and abs(value - factor) <= FACTOR_TOLERANCE * abs(factor)
    ]
    cause = f" In its config.json is {' and '.join(keys)}." if keys else ""
    return (
        f"a layer multiplies what attention and the MLP write by {factor:.4g} before it adds that "
        f"to the stream, and the table of the adapter for {model_type} takes {expected:.4g} for "
        f"it, so refits would be wrong.{cause} Name the key in the table "
        "(`residual_multiplier_key`), or install an adapter whose table does."
    )


# What may be the cause.


class _ReadKeys(Mapping[str, Any]):
    """A config that notes which of its keys are read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.config)

    def __len__(self) -> int:
        return len(self.config)


def named_settings(config: Mapping[str, Any], adapter: Adapter) -> set[str]:
    """Return the config keys that a table names: those that it reads, requires or refuses."""
    noted = _ReadKeys(config)
    adapter.expand(noted)
    adapter.sizes(noted)
    adapter.heads(noted)
    keys = {value for name, value in vars(adapter).items() if name.endswith("_key")}
    return {*noted.read, *keys, *adapter.refuses, *adapter.requires}


def unnamed_settings(config: Mapping[str, Any], adapter: Adapter) -> list[str]:
    """Return what a config sets, its class has another default for, and the table does not name.

    Numbers come first: a multiplier, a divisor or a cap is the likely cause of a difference. Keys
    that every config has, such as ids of tokens, are left out.
    """
    given = transformers_config(config)
    defaults = type(given)().to_dict()
    known = {
        *named_settings(config, adapter),
        *PreTrainedConfig().to_dict(),
        *_WITHOUT_EFFECT,
    }
    found = {
        key: value
        for key, value in given.to_dict().items()
        if key in defaults
        and key not in known
        and not key.endswith("_token_id")
        and isinstance(value, bool | int | float | str)
        and value != defaults[key]
    }
    return [
        f"{key} = {value!r} (default {defaults[key]!r})"
        for key, value in sorted(found.items(), key=lambda item: not _is_number(item[1]))
    ]


_WITHOUT_EFFECT = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "initializer_range",
    "max_position_embeddings",
    "pretraining_tp",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "tie_word_embeddings",
    "use_cache",
)
"""Keys with which logits do not change, that only transformers' own layers read, or that everything
here knows."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# transformers' side.


def logits_of_folder(folder: Path, device: torch.device) -> Logits:
    """Return the forward of a folder as transformers opens it.

    transformers itself finds the tensors; they are read when a module needs them.

    Raises:
        SetupError: transformers cannot open it, or finds other tensors there than the model has.
    """
    with reading(folder, "the model, as transformers opens it,"), quiet_transformers():
        config = AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            return_dict=True,
            output_attentions=False,
            output_hidden_states=False,
        )
        # Which kernel computes is no property of a model, and not every machine has it.
        config._attn_implementation_internal = None
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            device_map={"": "disk"},
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    lost = {
        key.replace("_", " "): sorted(map(str, info[key]))
        for key in ("missing_keys", "mismatched_keys")
        if info[key]
    }
    for what, names in lost.items():
        raise SetupError(
            f"{folder}: transformers opens it with {what}, which it fills with random numbers: "
            f"{_few(names)}."
        )
    stored = {
        name: StoredTensor(Path(entry["safetensors_file"]), entry["weight_name"])
        for name, entry in _disk_index(model).items()
    }
    files = {path: open_tensors(path) for path in {tensor.file for tensor in stored.values()}}
    tensors = {name: files[tensor.file][tensor.name] for name, tensor in stored.items()}
    # Its own hooks open a file for each tensor, and compute on the CPU.
    remove_hook_from_submodules(model)
    forget_lengths(model)
    _read_when_called(model.eval(), tensors, device)
    return _logits_of(model, device)


def _disk_index(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Return where transformers found each tensor of a model that it left on disk."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        states = getattr(hook, "weights_map", None)
        if isinstance(states, PrefixedDataset):
            index: Mapping[str, Mapping[str, str]] = states.dataset.index
            return index
    return {}


def logits_of_view(weights: Weights, device: torch.device) -> Logits:
    """Return transformers' forward of a view of weights that is not saved."""
    model = empty_model(weights, torch.float32)
    tensors = weights.files
    if weights.tied:
        tensors[weights.adapter.head] = tensors[weights.adapter.embedding]
    _read_when_called(model, tensors, device)
    return _logits_of(model, device)


def _read_when_called(
    model: nn.Module, tensors: Mapping[str, LazyTensor], device: torch.device
) -> None:
    """Let each module of a model read its parameters when it is called, and drop them then.

    Args:
        model: its parameters are on the meta device.
        tensors: the parameters by name.
        device: where modules compute. Buffers stay there.
    """
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if own:
            place = f"{prefix}." if prefix else ""
            hooks = _ParameterHooks(own, {key: tensors[place + key] for key in own}, device)
            module.register_forward_pre_hook(hooks.read)
            module.register_forward_hook(hooks.drop)


@dataclass(frozen=True)
class _ParameterHooks:
    """Reads the parameters of a module before it is called, and drops them afterwards."""

    empty: Mapping[str, nn.Parameter]
    """Parameter -> what stands for it meanwhile, on the meta device."""
    tensors: Mapping[str, LazyTensor]
    device: torch.device

    def read(self, module: nn.Module, _: object) -> None:
        for key, empty in self.empty.items():
            value = self.tensors[key].read().to(self.device, empty.dtype)
            setattr(module, key, nn.Parameter(value, requires_grad=False))

    def drop(self, module: nn.Module, _: object, __: object) -> None:
        for key, empty in self.empty.items():
            setattr(module, key, empty)


def _logits_of(model: Any, device: torch.device) -> Logits:
    """Return the forward of a transformers model, for one text at a time and without a cache."""
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def logits(text: Text, positions: Tensor) -> Tensor:
        ids = torch.tensor([text.tokens], device=device)
        positions = positions.to(device)
        if selects:
            # All rows of a long text times a large vocabulary would not fit.
            found = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
        else:
            found = model(input_ids=ids, use_cache=False).logits[0, positions]
        return torch.as_tensor(found, dtype=torch.float32, device="cpu")

    return logits


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, warnings, and notes on where weights lie from the
    terminal."""
    verbosity = transformers_logging.get_verbosity()
    accelerate = logging.getLogger("accelerate.big_modeling")
    level = accelerate.level
    transformers_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    has_bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if has_bars:
            enable_progress_bar()


def _few(names: Iterable[str], shown: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
