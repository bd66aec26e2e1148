"""What every adapter must pass of names: config keys, modules, and the sizes that the keys set.

Steps cut a model by writing other numbers under the keys of its table. A wrong key does no harm
before that, so each is given another number here, and transformers makes a model of the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rotdistill_core.architecture.spaces import KEY_VALUE, NEURONS, QUERY, RESIDUAL, kind_of
from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint.headers import read_config
from rotdistill_core.checkpoint.layer_lists import DTYPE_KEYS
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import suggest
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.testing.adapter_checks import PLAIN, opened, report
from rotdistill_core.testing.compute import logits, max_difference, plain_transformers, save_folder

HEAD_WIDTH_KEY = "head_dim"
"""Key under which a cut states the width of its heads, which its other sizes no longer give."""
HEAD_WIDTH = "head_dim"
"""Space of the coordinates of one head."""
NEEDED = ("depth_key", "width_key", "eps_key", "neurons_key", "groups_key", "query_key")
"""Keys that no table does without."""


def every_name_of_the_table_is_found(adapter: Adapter, folder: Path) -> None:
    """Look every config key up in the config class, and every module and tensor in the model."""
    config = read_config(folder)
    config_class = CONFIG_MAPPING[config["model_type"]]
    known = {*config, *(field.name for field in dataclasses.fields(config_class))}
    problems = []
    for field in (field.name for field in dataclasses.fields(Adapter)):
        key = getattr(adapter, field)
        if not field.endswith("_key") or (not key and field not in NEEDED):
            continue
        if key not in known:
            problems.append(
                f'{field} is "{key}", and {config_class.__name__} has no such key.'
                f"{suggest(key, known)}"
            )
    model = _empty_model(config)
    modules = [name for name, _ in model.named_modules()]
    tensors = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for field in ("body", "layers"):
        name = getattr(adapter, field)
        if name not in modules:
            hint = suggest(name, modules)
            problems.append(f'{field} is "{name}", and the model has no such module.{hint}')
    for field in ("embedding", "norm", "head"):
        name = getattr(adapter, field)
        if name not in tensors:
            hint = suggest(name, tensors)
            problems.append(f'{field} is "{name}", and the model has no such tensor.{hint}')
        elif name not in adapter.params:
            problems.append(f'{field} is "{name}", which is not among the `params` of the table')
        elif adapter.params[name].is_gain is not (field == "norm"):
            what = "no norm gain" if field == "norm" else "a norm gain"
            problems.append(f'{field} is "{name}", which is {what} in `params`')
    report(problems)


def _empty_model(config: Config) -> Any:
    """Return transformers' model of a config without values."""
    settings = {key: value for key, value in config.items() if key not in DTYPE_KEYS}
    with init_empty_weights(), no_init_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


class SizeKey(NamedTuple):
    """A config key, and what another number under it makes of a model."""

    field: str
    """The field of the table that names it."""
    value: int
    meaning: str
    """What the number counts, in words."""
    sizes: Mapping[str, int]
    """Space -> its size under the number."""


def the_depth_key_sets_the_depth(adapter: Adapter, folder: Path) -> None:
    """Write another depth under its key; transformers makes a model that has as many layers."""
    config = adapter.completed(read_config(folder))
    depth = adapter.depth(config) + 1
    # Lists with a value for each layer are left out; the class makes others.
    plain = {key: value for key, value in config.items() if not isinstance(value, list)}

    def sets(key: str) -> bool | None:
        model = _model_or_none({**plain, key: depth})
        return None if model is None else len(model.get_submodule(adapter.layers)) == depth

    report(
        _key_problems(
            config,
            adapter.depth_key,
            sets,
            f'depth_key is "{adapter.depth_key}": with {depth} there, transformers does not make a '
            f"model of {depth} layers",
        )
    )


def every_size_key_sets_its_size(adapter: Adapter, folder: Path) -> None:
    """Write another number under each key of a size; transformers makes a model of that size."""
    config = adapter.completed(read_config(folder))
    problems: list[str] = []
    for changed in _size_keys(adapter, config):
        problems += _size_problems(adapter, config, changed)
    report(problems)


def _size_keys(adapter: Adapter, config: Config) -> Iterator[SizeKey]:
    """Yield each key with another number, and the sizes of the model that it makes."""
    sizes = adapter.sizes(config)
    query, groups, width = adapter.heads(config)
    stated = states_head_width(adapter, config)

    def of_heads(query: int, groups: int, stream: int) -> dict[str, int]:
        # A class without a key for it divides the stream among the heads.
        head = width if stated else stream // query
        return {QUERY: query * head, KEY_VALUE: groups * head, HEAD_WIDTH: head}

    stream, neurons = sizes[RESIDUAL], sizes["neurons.0"]
    yield SizeKey("neurons_key", neurons + 8, "neurons", {NEURONS: neurons + 8})
    wide = {RESIDUAL: 2 * stream, **of_heads(query, groups, 2 * stream)}
    yield SizeKey("width_key", 2 * stream, "channels of the stream", wide)
    more = of_heads(2 * query, groups, stream)
    yield SizeKey("query_key", 2 * query, "query heads", more)
    others = query if groups < query else 1
    if others != groups:
        yield SizeKey("groups_key", others, "key/value heads", of_heads(query, others, stream))


def _size_problems(adapter: Adapter, config: Config, changed: SizeKey) -> Iterator[str]:
    """Yield what is wrong with a key of a size, or with what the table makes of its number."""
    key = getattr(adapter, changed.field)
    stated = {**config, HEAD_WIDTH_KEY: adapter.heads(config).width}
    sizes = {
        space: changed.sizes.get(kind_of(space), size)
        for space, size in adapter.sizes(config).items()
    }
    wanted = _shapes_in_files(adapter, config, sizes)

    def sets(key: str) -> bool | None:
        """Return whether a key makes a model of the wanted sizes; None if there is no model."""
        model = _model_or_none({**stated, key: changed.value})
        if model is None:
            return None
        found = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return all(wanted.get(name, shape) == shape for name, shape in found.items())

    problems = _key_problems(
        config,
        key,
        sets,
        f'{changed.field} is "{key}": with {changed.value} there, transformers does not make a '
        f"model of {changed.value} {changed.meaning}",
    )
    yield from problems
    if not problems:
        table = adapter.sizes({**stated, key: changed.value})
        wrong = [space for space, size in sizes.items() if table.get(space) != size]
        if wrong:
            yield (
                f'`dims` or `heads`: with {key} = {changed.value}, "{wrong[0]}" is '
                f"{table.get(wrong[0])} in the table and {sizes[wrong[0]]} in transformers' model"
            )


def _key_problems(
    config: Config, key: str, sets: Callable[[str], bool | None], problem: str
) -> list[str]:
    """Return a problem with the key that is right, if a key does not do what it should.

    Args:
        config: the config.
        key: the key that the table names.
        sets: whether a key does what it should; None where transformers makes no model.
        problem: what is wrong, if it is.
    """
    does = sets(key)
    if does:
        return []
    right = [other for other in _counts(config) if sets(other)]
    # A class may refuse a number that does not go with others, under the right key too.
    if does is None and not right:
        return []
    return [f"{problem}; {' and '.join(right)} does" if right else problem]


def _counts(config: Config) -> list[str]:
    """Return the keys of a config that hold counts, and no tokens."""
    return [
        key
        for key, value in config.items()
        if isinstance(value, int) and not isinstance(value, bool) and "token" not in key
    ]


def _model_or_none(config: Config) -> Any:
    """Return transformers' empty model of a config; None if it makes none."""
    try:
        return _empty_model(config)
    except Exception:  # a class may raise anything at numbers that do not go together
        return None


def _shapes_in_files(
    adapter: Adapter, config: Config, sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a checkpoint, fused ones whole, at sizes of spaces."""
    shapes = {
        name: tuple(sizes[axis] for axis in param.axes)
        for name, param in adapter.expand(config).items()
    }
    for whole, names in adapter.parts(config).items():
        parts = [shapes.pop(name) for name in names]
        shapes[whole] = (sum(part[0] for part in parts), *parts[0][1:])
    return shapes


def states_head_width(adapter: Adapter, config: Config) -> bool:
    """Return whether transformers takes the width of a head from the config, and not from the
    stream and the number of heads alone."""
    width = 2 * adapter.heads(config).width
    one, two = (
        _model_or_none({**config, HEAD_WIDTH_KEY: value})
        for value in (adapter.heads(config).width, width)
    )
    if one is None or two is None:
        return False
    shapes = ({name: p.shape for name, p in model.named_parameters()} for model in (one, two))
    return next(shapes) != next(shapes)


def a_cut_of_sizes_computes_what_transformers_computes(adapter: Adapter, folder: Path) -> None:
    """Cut neurons, heads and channels, and change the config by the table's keys; transformers
    computes from the files what the layerwise forward does, and what the whole model does without
    the neurons and heads."""
    weights, layout = opened(adapter, folder)
    inner = _kept_inside(weights)
    half = _selected(weights, inner)
    problems = []
    difference = max_difference(logits(half, layout), logits(_masked(weights, inner), layout))
    if difference > PLAIN:
        problems.append(
            "a cut to the first half of all neurons and heads, its config changed by neurons_key, "
            f"groups_key and query_key, has other logits than the whole model without the others, "
            f"by {difference:.1e}"
        )
    if states_head_width(adapter, weights.config):
        channels = torch.arange(3 * weights.width // 4)
        half = _selected(weights, {**inner, RESIDUAL: channels})
    cut = folder.with_name(f"{folder.name}-sizes")
    save_folder(half, folder, cut, torch.float64)
    _, expected = plain_transformers(adapter, cut, layout)
    difference = max_difference(logits(half, layout), expected)
    if difference > PLAIN:
        problems.append(
            "of a cut of neurons, heads and channels, its config changed by the keys of the table, "
            f"the layerwise forward has other logits than transformers, by {difference:.1e}"
        )
    report(problems)


def a_narrower_stream_has_the_same_embeddings(adapter: Adapter, folder: Path) -> None:
    """Leave channels of the stream out; the others begin with the numbers that they had.

    A class may multiply its embeddings by a function of the width. Then a cut or a wider stream
    would have another sum of embeddings and branches. A stream that cannot be rotated never
    changes its width.
    """
    weights, layout = opened(adapter, folder)
    if adapter.gains(weights.config).stuck or not states_head_width(adapter, weights.config):
        return
    channels = torch.arange(3 * weights.width // 4)
    narrow = _selected(weights, {RESIDUAL: channels})
    whole, cut = (
        LayerwiseForward(view, layout, torch.device("cpu"), torch.float64).states
        for view in (weights, narrow)
    )
    factor = float((cut / whole[:, channels]).median())
    if max_difference(cut, whole[:, channels]) > PLAIN:
        report(
            [
                f"the class multiplies embeddings by a function of {adapter.width_key}: with "
                f"{len(channels)} channels of {weights.width} they are {factor:.3g} times as "
                "large, so no step could change the width of the stream. A table cannot say that"
            ]
        )


def _kept_inside(weights: Weights) -> dict[str, Tensor]:
    """Return the coordinates of the first half of all neurons and heads, by space.

    Heads stay where the class takes no width of heads, and under norms over all of them.
    """
    adapter, config = weights.adapter, weights.config
    sizes = adapter.sizes(config)
    query, groups, width = adapter.heads(config)
    normed = {kind_of(p.axes[0]) for p in adapter.params.values() if p.is_gain}
    cuts_heads = not normed & {QUERY, KEY_VALUE} and states_head_width(adapter, config)
    kept_groups = math.ceil(groups / 2) if cuts_heads else groups
    kept: dict[str, Tensor] = {}
    for i in range(weights.depth):
        kept[f"{NEURONS}.{i}"] = torch.arange(sizes[f"{NEURONS}.{i}"] // 2)
        if kept_groups < groups:
            kept[f"{KEY_VALUE}.{i}"] = torch.arange(kept_groups * width)
            kept[f"{QUERY}.{i}"] = torch.arange(kept_groups * (query // groups) * width)
    return kept


def _selected(weights: Weights, kept: Mapping[str, Tensor]) -> Weights:
    """Return a view with only some coordinates of spaces, its config changed by the table's
    keys."""
    adapter, config = weights.adapter, weights.config
    query, groups, width = adapter.heads(config)
    edited: dict[str, Tensor] = {}
    for name, param in adapter.expand(config).items():
        if name in weights.entries and kept.keys() & {*param.axes}:
            tensor = weights[name]
            for axis, space in enumerate(param.axes):
                tensor = tensor.index_select(axis, kept[space]) if space in kept else tensor
            edited[name] = tensor
    sizes = {}
    if f"{NEURONS}.0" in kept:
        sizes[adapter.neurons_key] = len(kept[f"{NEURONS}.0"])
    if f"{KEY_VALUE}.0" in kept:
        left = len(kept[f"{KEY_VALUE}.0"]) // width
        sizes |= {adapter.groups_key: left, adapter.query_key: left * (query // groups)}
    if RESIDUAL in kept:
        sizes[adapter.width_key] = len(kept[RESIDUAL])
    stated = states_head_width(adapter, config)
    return weights.edit(edited, **sizes, **({HEAD_WIDTH_KEY: width} if stated else {}))


def _masked(weights: Weights, kept: Mapping[str, Tensor]) -> Weights:
    """Return a view of the whole model with zeros for all other coordinates of spaces."""
    edited: dict[str, Tensor] = {}
    for name, param in weights.adapter.expand(weights.config).items():
        if name not in weights.entries:
            continue
        for axis, space in enumerate(param.axes):
            if space in kept:
                tensor = edited.get(name, weights[name]).clone()
                first = len(kept[space])
                tensor.narrow(axis, first, tensor.shape[axis] - first).zero_()
                edited[name] = tensor
    return weights.edit(edited)


KEY_CHECKS = (
    every_name_of_the_table_is_found,
    the_depth_key_sets_the_depth,
    every_size_key_sets_its_size,
    a_narrower_stream_has_the_same_embeddings,
    a_cut_of_sizes_computes_what_transformers_computes,
)
"""What every adapter must pass of names and keys: `check(adapter, folder)`."""
