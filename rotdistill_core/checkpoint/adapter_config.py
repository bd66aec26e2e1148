"""adapter_config.json of a LoRA, by a list of what is understood.

peft gains keys with every version, and many of them change what the two matrices mean. So the list
has the keys that are understood; any other key that says something is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from rotdistill_core.errors import SetupError
from rotdistill_core.store.plain import read_text

ADAPTER_CONFIG = "adapter_config.json"
PATTERN_SECONDS = 2
"""Time in which a pattern has to match one name."""
ALL_LINEAR = "all-linear"
"""A value of `target_modules`: every linear layer but the head."""
MAX_BYTES = 1 << 20
"""Size of a config beyond which it is none."""
MAX_ALPHA = 1e6
"""An alpha beyond it is a slip of the pen, and would spoil every weight."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Names of inits that leave the base as it is; true and false do, too."""
ONLY_PLAIN = "only a plain LoRA, W + s B A on linear layers and embeddings, can be merged"
MERGE = "Merge it with peft (merge_and_unload), and name the merged model in its place"
OTHER_BASE = (
    "Such an adapter belongs to a base from which its first B A was subtracted, or that was "
    "quantised. Save it again as a plain LoRA, with peft's "
    "path_initial_model_for_weight_conversion, or merge it with peft and name the merged model"
)

READ_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "base_model_name_or_path",
        "revision",
    }
)
"""Keys whose value is read here."""
IDLE_KEYS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "runtime_config",
        # Parts of features that have a switch of their own.
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    }
)
"""Keys that change nothing in `W + s B A`, whatever their value."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "task_type": (None, "", "CAUSAL_LM"),
    "bias": (None, "none"),
}
"""Keys with values under which it is `W + s B A`, where those are more than null and false."""
REMEDIES: Mapping[str, str] = {
    "init_lora_weights": OTHER_BASE,
    "alora_invocation_tokens": (
        "An activated LoRA changes only the tokens after its invocation, so no weights are equal "
        "to it. Leave it out"
    ),
    "layer_replication": "The adapter belongs to a model with repeated layers. Leave it out",
}
"""Key -> what to do, where peft cannot simply merge it."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the config of a plain LoRA says."""

    folder: Path
    rank: int
    alpha: float
    stabilised: bool
    """The scale is `alpha / sqrt(r)`, not `alpha / r`. (Kalajdzievski, arXiv:2312.03732.)"""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    """Pattern of a module's name -> its own rank or alpha."""
    targets: Sequence[str] | str | None
    """Names or ends of names of the modules that are changed, or a pattern of whole names."""
    excluded: Sequence[str] | str
    layers: Sequence[int]
    """Layers that are changed; all where it is empty."""
    layers_patterns: Sequence[str]
    base: str
    """The model that it was trained on, as it was called there; may be empty."""
    revision: str

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor s of `W + s B A` of a module."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def is_target(self, module: str) -> bool:
        """Return whether peft changes a module: the rules of its `check_target_module_exists`."""
        if _matches(self.excluded, module):
            return False
        if self.targets is None:
            return True  # peft has a list for each architecture; the tensors say as much
        if isinstance(self.targets, str):
            return _matches(self.targets, module)
        return _matches(self.targets, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        # The first number that follows a name, or that follows a named list of layers.
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*"]:
            match = _match(rf"{pattern}\.(\d+)\..*", module)
            if match:
                return int(match[1]) in self.layers
        return False


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the config of a LoRA.

    Raises:
        SetupError: no valid config, or one that says something that is not understood.
    """
    config = _read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise _refusal(folder, "peft_type", config.get("peft_type"))
    for key, value in config.items():
        if not _is_understood(key, value):
            raise _refusal(folder, key, value)
    init = config.get("init_lora_weights")
    if not _is_plain_init(init):
        raise _refusal(folder, "init_lora_weights", init)
    found = _Reader(folder, config)
    return AdapterConfig(
        folder=folder,
        rank=found.rank("r", config.get("r", 8)),
        alpha=found.alpha("lora_alpha", config.get("lora_alpha", 8)),
        stabilised=found.flag("use_rslora"),
        rank_pattern={k: found.rank("rank_pattern", v) for k, v in found.table("rank_pattern")},
        alpha_pattern={k: found.alpha("alpha_pattern", v) for k, v in found.table("alpha_pattern")},
        targets=found.names("target_modules") if config.get("target_modules") else None,
        excluded=found.names("exclude_modules"),
        layers=found.layers(),
        layers_patterns=found.name_list("layers_pattern"),
        base=found.text("base_model_name_or_path"),
        revision=found.text("revision"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"{path}: is no valid JSON file: {error}.") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path}: must hold one JSON object.")
    return config


def _is_understood(key: str, value: Any) -> bool:
    if key in READ_KEYS or key in IDLE_KEYS:
        return True
    if key in NEUTRAL:
        return value in NEUTRAL[key]
    # Whatever a key switches on, these switch it off.
    empty = isinstance(value, (str, list, dict)) and not value
    return value is None or value is False or empty


def _is_plain_init(init: Any) -> bool:
    return init is None or isinstance(init, bool) or init in PLAIN_INITS


def _refusal(folder: Path, key: str, value: Any) -> SetupError:
    return _fault(folder, key, value, f"{ONLY_PLAIN}. {REMEDIES.get(key, MERGE)}")


def _fault(folder: Path, key: str, value: Any, why: str) -> SetupError:
    return SetupError(f"{folder}: its {ADAPTER_CONFIG} has {key} = {value!r:.80}; {why}.")


@dataclass(frozen=True)
class _Reader:
    """Reads the values of a config, and refuses those of another type by their key."""

    folder: Path
    config: Mapping[str, Any]

    def rank(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._malformed(key, "a rank is a whole number from 1 on")
        return value

    def alpha(self, key: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= MAX_ALPHA:  # and no NaN
            raise self._malformed(key, f"alpha is a positive number up to {MAX_ALPHA:,.0f}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._malformed(key, "it is true or false")
        return bool(value)

    def text(self, key: str) -> str:
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            raise self._malformed(key, "it is text")
        return value or ""

    def names(self, key: str) -> list[str] | str:
        value = self.config.get(key) or []
        if isinstance(value, str):
            return self._pattern(key, value)
        return self.name_list(key)

    def name_list(self, key: str) -> list[str]:
        value = self.config.get(key) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._malformed(key, "it is a list of names")
        return [self._pattern(key, name) for name in names] if key == "layers_pattern" else names

    def layers(self) -> list[int]:
        value = self.config.get("layers_to_transform")
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(k, int) and not isinstance(k, bool) for k in layers):
            raise self._malformed("layers_to_transform", "it is a list of numbers of layers")
        return layers

    def table(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self._malformed(key, "it is a table of patterns")
        return [(self._pattern(key, pattern), found) for pattern, found in value.items()]

    def _pattern(self, key: str, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise self._malformed(key, f"{pattern!r:.40} is no pattern ({error})") from error
        return pattern

    def _malformed(self, key: str, rule: str) -> SetupError:
        return _fault(self.folder, key, self.config.get(key), f"{rule}. Correct the file")


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that matches the end of a name, as peft's `get_pattern_key`."""
    for pattern in patterns:
        if _match(rf"(.*\.)?({pattern})", module):
            return pattern
    return module


def _matches(names: Sequence[str] | str, module: str) -> bool:
    """Return whether a name matches a pattern whole, or ends in one of some names."""
    if isinstance(names, str):
        return names == ALL_LINEAR or _match(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _match(pattern: str, module: str) -> regex.Match[str] | None:
    """Match a whole name. The pattern is somebody else's, and some patterns never end.

    Raises:
        SetupError: it took longer than `PATTERN_SECONDS`, or is valid only by itself.
    """
    try:
        return regex.fullmatch(pattern, module, timeout=PATTERN_SECONDS)
    except TimeoutError as error:
        raise SetupError(
            f"{ADAPTER_CONFIG}: its pattern {pattern!r:.80} takes more than {PATTERN_SECONDS} "
            f"seconds to look for in {module}. Write names in its place."
        ) from error
    except regex.error as error:
        raise SetupError(
            f"{ADAPTER_CONFIG}: {pattern!r:.80} is no pattern ({error}). Correct the file."
        ) from error
