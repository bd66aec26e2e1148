"""What a config says for each layer, and what is left of it in a cut.

Some config keys list one value for each layer (`layer_types`, `no_rope_layers`). A config.json may
leave such a list out: its config class then computes it from the number of a layer, and would
compute another one for the renumbered layers of a cut. So the lists of the whole model are asked
of transformers, cut, and written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rotdistill_core.architecture.table import Config
from rotdistill_core.errors import RecipeError, SetupError

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys without a meaning for the shape of a model."""


def cut_config(config: Config, depth_key: str, keep: Sequence[int]) -> dict[str, Any]:
    """Return the config of a model with only the layers `keep`, renumbered.

    Args:
        config: the config of the whole model.
        depth_key: the key of the number of layers.
        keep: numbers of the layers that stay.

    Raises:
        RecipeError: a key that numbers layers cannot be carried over; its config class makes
            another list for the cut, or it is not known what the list means.
        SetupError: transformers does not take the config.
    """
    cut = {**config, depth_key: len(keep)}
    depth = int(config[depth_key])
    if list(keep) == list(range(depth)):
        return cut
    lists = layer_lists(config, depth_key)
    cut |= {key: [values[old] for old in keep] for key, values in lists.items()}
    found = expanded_config(cut)
    for key in lists:
        if list(found.get(key) or ())[: len(keep)] != cut[key]:
            raise RecipeError(
                f"the layers of this {config.get('model_type')} model cannot be cut: of the layers "
                f"that stay, {key} would be {cut[key]}, and transformers makes "
                f"{found.get(key)} of it. Keep all layers, or cut neurons or heads instead."
            )
    return cut


def layer_lists(config: Config, depth_key: str) -> dict[str, list[Any]]:
    """Return the config keys with a value for each layer, those included that a class computes.

    A list belongs to the layers if its config class makes it as long as the model is deep. Keys
    that the class does not know are told by their names.

    Raises:
        RecipeError: a key of the class has as many values as there are layers, or names layers by
            number, and its meaning is not known.
        SetupError: transformers does not take the config.
    """
    depth = int(config[depth_key])
    whole = expanded_config(config)
    computed = _computed_lists(config, depth_key)
    lists: dict[str, list[Any]] = {}
    for key, values in whole.items():
        if not isinstance(values, list | tuple) or not values:
            continue
        fits = len(values) == depth
        if (key in computed and len(values) >= depth) or (_names_layers(key) and fits):
            lists[key] = list(values)
        elif _is_own_key(config, key) and (_names_layers(key) or fits):
            raise _unknown(config, key, len(values), depth)
    return lists


def expanded_config(config: Config) -> dict[str, Any]:
    """Return a config with everything that its class in transformers computes.

    A model type that transformers does not know has nothing but what is written.

    Raises:
        SetupError: the class does not take the config.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (takes seconds to load)

    settings = {key: value for key, value in config.items() if key not in DTYPE_KEYS}
    if _config_class(config) is None:
        return settings
    try:
        expanded: dict[str, Any] = AutoConfig.for_model(**settings).to_dict()
    except Exception as error:
        # A config class may raise anything; the last line of the cause is its reason.
        reason = str(error.__cause__ or error).strip().rpartition("\n")[2].strip()
        raise SetupError(
            f"transformers does not take this config of a {config['model_type']} model: {reason}"
        ) from error
    return expanded


def _config_class(config: Config) -> Any:
    """Return the config class of a model type; None if transformers has none."""
    from transformers.models.auto.configuration_auto import (  # noqa: PLC0415  (takes seconds)
        CONFIG_MAPPING,
    )

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        return None


def _computed_lists(config: Config, depth_key: str) -> set[str]:
    """Return the keys of lists that the config class itself makes as long as the model is deep.

    The class is asked for two deeper models, without any list that this config writes out.
    """
    depth = int(config[depth_key])
    silent = {key: value for key, value in config.items() if not isinstance(value, list)}
    found: list[Mapping[str, Any]] = []
    for more in (1, 2):
        try:
            found.append(expanded_config({**silent, depth_key: depth + more}))
        except SetupError:  # such a class does not fill the lists in
            return set()
    return {
        key
        for key, values in found[0].items()
        if isinstance(values, list)
        and len(values) == depth + 1
        and len(found[1].get(key) or ()) == depth + 2
    }


def _names_layers(key: str) -> bool:
    """Whether a list is one of layers, by its name."""
    return "layer" in key.lower()


def _is_own_key(config: Config, key: str) -> bool:
    """Whether a config class declares a key itself, for something that is no token."""
    from transformers import PreTrainedConfig  # noqa: PLC0415  (takes seconds to load)

    declared = getattr(_config_class(config), "__dataclass_fields__", {})
    if key in PreTrainedConfig.__dataclass_fields__ or key not in declared:
        return False
    return "token" not in key


def _unknown(config: Config, key: str, length: int, depth: int) -> RecipeError:
    return RecipeError(
        f"the layers of this {config.get('model_type')} model cannot be cut: {key} in its "
        f"config.json has {length} values for {depth} layers, and it is not known what becomes of "
        "them in a cut. Keep all layers, or cut neurons or heads instead."
    )
