"""What two configs of one architecture and shape say differently about what weights mean.

Weights of one shape mean something else under another rope base, another eps or another activation.
So configs are compared key by key, apart from keys that change no logit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from rotdistill_core.architecture.table import Config
from rotdistill_core.errors import SetupError

HARMLESS_KEYS = frozenset(
    {
        # How it is stored, who stored it, and how it is run.
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "dtype",
        "torch_dtype",
        "model_type",
        "transformers_version",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        "use_cache",
        "cache_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        # Training, and heads that a causal model does not have.
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "id2label",
        "label2id",
        "problem_type",
        # Generation.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        # Sizes and the tie, which are compared by shapes.
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
    }
)
"""Keys that change no logit of a model of one shape."""
DERIVED_KEYS = ("max_window_layers", "use_sliding_window", "_sliding_window_pattern")
"""Keys that say nothing beside the list of layer types that a config class makes from them."""
LENGTH_KEYS = ("max_position_embeddings", "original_max_position_embeddings")
"""Keys that matter to rope types that look at the length for which a model was trained."""
ROPE_WITHOUT_LENGTH = frozenset({"default", "linear", "llama3"})
"""Rope types that do not look at it. `llama3` has the length among its own parameters."""
PLAIN_ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")
"""Rope parameters that the type `default` reads."""
CLOSE = 1e-6
"""Relative difference of numbers that are the same in float32."""


class Difference(NamedTuple):
    """One key that two configs have with different values; a missing key is None."""

    key: str
    one: Any
    two: Any


def config_differences(one: Config, two: Config, name: str) -> list[Difference]:
    """Return the keys by which two configs give the same weights another meaning.

    Both are completed by the config class first, so a default may be written out or not.

    Args:
        one, two: the configs, of one architecture.
        name: whose config `one` is, for the error.

    Raises:
        SetupError: the config class does not take one of them.
    """
    a, b = (_meaning(_completed(config, name)) for config in (one, two))
    if _rope_types(a) | _rope_types(b) <= ROPE_WITHOUT_LENGTH:
        for found in (a, b):
            for key in LENGTH_KEYS:
                found.pop(key, None)
    differences = [Difference(key, a.get(key), b.get(key)) for key in sorted({*a, *b})]
    return [found for found in differences if not _alike(found.one, found.two)]


def listed(differences: list[Difference], other: str) -> str:
    """Return differences as text; `other` is whose config the second is."""
    return "; ".join(f"{d.key} is {d.one!r}, and {d.two!r} in {other}" for d in differences)


def _completed(config: Config, name: str) -> dict[str, Any]:
    settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    try:
        # The config class writes into the values that it is given.
        made = AutoConfig.for_model(**copy.deepcopy(settings))
        completed: dict[str, Any] = made.to_dict()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise SetupError(f"{name}: transformers does not take its config: {why}.") from error
    return completed


def _meaning(config: Config) -> dict[str, Any]:
    """Return what a completed config says about the meaning of weights, by dotted key."""
    kept = {key: value for key, value in config.items() if key not in HARMLESS_KEYS}
    layers = kept.get("layer_types")
    if layers is not None:
        kept = {key: value for key, value in kept.items() if key not in DERIVED_KEYS}
        if not any(kind == "sliding_attention" for kind in layers):
            kept.pop("sliding_window", None)
    return dict(_flattened(kept, ""))


def _flattened(config: Config, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flattened(_without_idle_rope_keys(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_idle_rope_keys(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a nested table; of rope parameters without the keys that their type does not read."""
    if "rope_type" not in table:
        return table
    if table["rope_type"] == "default":
        table = {key: table[key] for key in PLAIN_ROPE_KEYS if key in table}
    # `type` is the old name of `rope_type`, which the config class has set.
    idle = {"type": table.get("type"), "partial_rotary_factor": 1.0}
    return {k: v for k, v in table.items() if k not in idle or v != idle[k]}


def _rope_types(meaning: Mapping[str, Any]) -> set[Any]:
    return {value for key, value in meaning.items() if key.endswith("rope_type")}


def _alike(one: Any, two: Any) -> bool:
    """Return whether two values say the same; None, False and a missing key say nothing."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_alike, one, two))
    if isinstance(one, float) or isinstance(two, float):
        numbers = isinstance(one, (int, float)) and isinstance(two, (int, float))
        # Some formats keep float32, where 1e-5 is 9.9999997e-06.
        return numbers and math.isclose(one, two, rel_tol=CLOSE)
    return bool(one == two) or (one in (None, False) and two in (None, False))
