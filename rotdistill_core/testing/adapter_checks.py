"""What every adapter must pass: each check takes a table and a folder with a pico checkpoint.

A check that fails names the entry of the table that is wrong: it tries what would explain the
difference, and reports the tensor and axis whose change makes the model right again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.architecture.table import Adapter, bias_hint
from rotdistill_core.checkpoint.headers import folder_headers, read_config
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Map, Rotation
from rotdistill_core.testing.compute import logits, max_difference, plain_transformers, save_folder
from rotdistill_core.testing.pico import pico_samples
from rotdistill_core.testing.planted import gauges, random_rotation, scramble, whole_permutations

EXACT = 1e-9
"""Largest logit change of an exact edit in float64."""
PLAIN = 1e-5
"""Largest difference from transformers, whose norms drop to float32."""


def opened(adapter: Adapter, folder: Path) -> tuple[Weights, PackedTexts]:
    """Return a pico checkpoint as a view, and texts of its vocabulary."""
    config = adapter.completed(read_config(folder))
    vocabulary = int(adapter.sizes(config)[VOCAB])
    return open_folder(folder, config, adapter), pico_samples(vocabulary, texts=4).layout


class WrongTableError(AssertionError):
    """A table is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("the table is wrong:\n" + "\n".join(problems))
        self.problems = list(problems)


def report(problems: Sequence[str]) -> None:
    """Fail with a list of problems, if there are any."""
    if problems:
        raise WrongTableError(problems)


def every_tensor_is_claimed_once(adapter: Adapter, folder: Path) -> None:
    """Compare every tensor of the checkpoint with the table, axis by axis."""
    config = adapter.completed(read_config(folder))
    table = adapter.expand(config)
    shapes = {name: header.shape for name, header in folder_headers(folder).items()}
    shapes = adapter.unfused(config, shapes)
    problems = list(_head_problems(adapter, config))
    for name, shape in shapes.items():
        problems += _tensor_problems(adapter, config, name, shape)
    tied = config.get("tie_word_embeddings")
    for name, param in table.items():
        absent_by_right = param.optional or (param.tied and tied)
        if name not in shapes and not absent_by_right:
            problems.append(f"{name} is declared, the checkpoint does not have it")
        if param.gain and not (param.gain in table and table[param.gain].is_gain):
            problems.append(f"{name} absorbs {param.gain}, which is not declared as a gain")
    report(problems)


def _head_problems(adapter: Adapter, config: Mapping[str, object]) -> Iterator[str]:
    """Yield where the head layout contradicts the sizes of the spaces."""
    sizes = adapter.sizes(config)
    heads = adapter.heads(config)
    products = (heads.query * heads.width, heads.groups * heads.width)
    if products != (sizes["q.0"], sizes["kv.0"]) or heads.query % heads.groups:
        yield (
            f"heads: {heads.query} and {heads.groups} of {heads.width} do not make up "
            f"q.0 ({sizes['q.0']}) and kv.0 ({sizes['kv.0']})"
        )


def _tensor_problems(
    adapter: Adapter, config: Mapping[str, object], name: str, shape: tuple[int, ...]
) -> Iterator[str]:
    """Yield where the table contradicts one tensor of the checkpoint."""
    table = adapter.expand(config)
    sizes = adapter.sizes(config)
    templates = [
        template
        for template in adapter.params
        if re.fullmatch(re.escape(template).replace(r"\{i\}", r"\d+"), name)
    ]
    if not templates:
        yield f"{name} has no entry in the table{bias_hint(name, table)}"
        return
    if len(templates) > 1 or name not in table:
        yield f"{name} is claimed by several entries of the table: {', '.join(templates)}"
        return
    axes = table[name].axes
    if len(shape) != len(axes):
        yield f"{name} has {len(shape)} axes, declared are {list(axes)}"
        return
    for axis, (size, space) in enumerate(zip(shape, axes, strict=True)):
        if sizes.get(space) != size:
            here = (_layer_of(name), None)
            alike = [
                other
                for other, number in sizes.items()
                if number == size and _layer_of(other) in here
            ]
            yield (
                f'{name}: axis {axis} is declared "{space}" ({sizes.get(space)}), '
                f"it has {size} like {alike}"
            )


def _layer_of(name: str) -> str | None:
    """Return the number in the name of a tensor or space of a layer."""
    found = re.search(r"\.(\d+)(\.|$)", name)
    return found and found[1]


def defaults_are_those_of_the_config_class(adapter: Adapter, folder: Path) -> None:
    """Leave one key after the other out of config.json; table and transformers take the same
    instead."""
    whole = read_config(folder)
    problems = []
    for key in adapter.defaults(whole):
        config = {name: value for name, value in whole.items() if name not in (key, "dtype")}
        expected = getattr(AutoConfig.for_model(**config), key)
        default = adapter.defaults(config)[key]
        if default != expected:
            problems.append(f'defaults: "{key}" is {default!r}, transformers takes {expected!r}')
    report(problems)


def the_layerwise_forward_computes_what_transformers_computes(
    adapter: Adapter, folder: Path
) -> None:
    """Compare every boundary of the stream, and the logits, in float64."""
    weights, layout = opened(adapter, folder)
    states, expected = plain_transformers(adapter, folder, layout)
    report(_offset_problems(weights, layout, expected))
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), torch.float64)
    differences = {"the embeddings": max_difference(walk.states, states[0])}
    for i in walk:
        # Each layer starts from the right states, so that a difference is its own.
        walk.states = states[i].clone()
        walk.run()
        differences[f"layer {i}"] = max_difference(walk.states, states[i + 1])
    problems = [
        f"the stream after {place} differs from transformers by {difference:.1e}"
        + ("; look at embedding and embedding_multiplier_key" if place == "the embeddings" else "")
        for place, difference in differences.items()
        if difference > PLAIN
    ]
    final = final_norm(weights, states[-1])
    difference = max_difference(head_logits(weights, final, weights.head().double()), expected)
    if difference > PLAIN:
        problems.append(
            f"logits differ by {difference:.1e}: "
            "look at norm, head, eps_key, gain_offset, softcap_key and logits_scaling_key"
        )
    report(problems)


def _offset_problems(weights: Weights, layout: PackedTexts, expected: Tensor) -> list[str]:
    """Return whether the other of the two common gain offsets would explain wrong logits."""
    adapter = weights.adapter
    if max_difference(logits(weights, layout), expected) <= PLAIN:
        return []
    other = replace(adapter, gain_offset=1.0 - adapter.gain_offset)
    if max_difference(logits(replace(weights, adapter=other), layout), expected) > PLAIN:
        return []
    return [
        f"gain_offset is {adapter.gain_offset}, "
        f"the norms of this model behave as with {other.gain_offset}"
    ]


def every_gain_is_absorbed_by_its_readers(adapter: Adapter, folder: Path) -> None:
    """Fuse one norm gain after the other into the readers that name it; logits do not change."""
    weights, layout = opened(adapter, folder)
    weights = weights.untie()
    before = logits(weights, layout)
    table = adapter.expand(weights.config)
    problems: list[str] = []
    for gain, param in table.items():
        if param.is_gain and param.axes == ("residual",):
            problems += _gain_problems(weights, layout, gain, before)
    report(problems)


def _gain_problems(weights: Weights, layout: PackedTexts, gain: str, before: Tensor) -> list[str]:
    """Return which readers name a gain wrongly, or do not name it and should."""
    adapter = weights.adapter
    table = adapter.expand(weights.config)
    matrices = [
        name
        for name, param in table.items()
        if name in weights.entries and param.axes[1:] == ("residual",) and name != adapter.embedding
    ]

    def change(readers: Sequence[str]) -> float:
        """Return the logit change when these readers absorb the gain."""
        factor = weights.gain(gain)
        fused = {name: weights[name].double() * factor for name in readers}
        neutral = torch.full_like(factor, 1.0 - adapter.gain_offset)
        return max_difference(logits(weights.edit({gain: neutral, **fused}), layout), before)

    readers = [name for name in matrices if table[name].gain == gain]
    if readers and change(readers) <= EXACT:
        return []
    layer_of = re.compile(r"\.\d+\.").findall
    orphans = [
        name for name in matrices if table[name].gain is None and layer_of(name) == layer_of(gain)
    ]
    if orphans and change([*readers, *orphans]) <= EXACT:
        return [
            f"{name}: axis 1 reads after {gain} and does not name it as its gain"
            for name in orphans
        ]
    if not readers:  # a norm on what a branch writes has no readers, and needs none
        return []
    blamed = [name for name in matrices if change(sorted({name} ^ set(readers))) <= EXACT]
    if not blamed:
        return [f"{gain} is not absorbed by the readers that name it: {readers}"]
    return [
        f"{name}: axis 1 names {gain} as its gain and does not read after it"
        if name in readers
        else f"{name}: axis 1 reads after {gain} and does not name it as its gain"
        for name in blamed
    ]


def _axes_to_blame(
    weights: Weights, maps: Mapping[str, Map], layout: PackedTexts, wanted: Tensor
) -> Iterator[str]:
    """Yield the single axes of the table whose other space would make a fold exact."""
    table = weights.adapter.expand(weights.config)
    sizes = weights.adapter.sizes(weights.config)
    for name, param in table.items():
        if name not in weights.entries:
            continue
        for axis, space in enumerate(param.axes):
            others = tuple(other for other in maps if sizes[other] == sizes[space])
            for other in ("none of them",) if space in maps else others:
                axes = (*param.axes[:axis], other, *param.axes[axis + 1 :])
                changed = {**table, name: replace(param, axes=axes)}
                view = replace(weights, adapter=replace(weights.adapter, params=changed))
                if max_difference(logits(view.fold(maps), layout), wanted) <= EXACT:
                    yield (
                        f'{name}: axis {axis} is declared "{space}"; '
                        f"of {', '.join(maps)} it is {other}"
                    )


def _fold_problems(
    weights: Weights, maps: Mapping[str, Map], layout: PackedTexts, wanted: Tensor, *, what: str
) -> list[str]:
    """Return what is wrong with the table if folding `maps` changes the logits."""
    change = max_difference(logits(weights.fold(maps), layout), wanted)
    if change <= EXACT:
        return []
    blamed = list(_axes_to_blame(weights, maps, layout, wanted))
    table = weights.adapter.expand(weights.config)
    names = [name for name, param in table.items() if {*param.axes} & {*maps}]
    return blamed or [
        f"{what} changes logits by {change:.1e}: `heads`, an axis, or the order in `fused` "
        f"is wrong, of {', '.join(names)}"
    ]


def a_rotation_of_the_stream_is_exact_or_refused(adapter: Adapter, folder: Path) -> None:
    """Fold a random rotation: logits stay, or the table has norms after writers and the fold says
    so."""
    weights, layout = opened(adapter, folder)
    rotation = Rotation(random_rotation(weights.width, 1))
    stuck = adapter.gains(weights.config)[1]
    if stuck:
        try:
            weights.fold({"residual": rotation})
        except RecipeError as error:
            assert stuck[0] in str(error), error
            return
        raise AssertionError(f"{stuck[0]} has no reader, yet the rotation was folded")
    identity = Rotation(torch.eye(weights.width, dtype=torch.float64))
    fused = logits(weights.fold({"residual": identity}), layout)
    report(
        _fold_problems(
            weights, {"residual": rotation}, layout, fused, what="a rotation of the stream"
        )
    )


def permutations_are_exact(adapter: Adapter, folder: Path) -> None:
    """Permute neurons and heads of each layer, and channels of the stream: logits stay."""
    weights, layout = opened(adapter, folder)
    before = logits(weights, layout)
    for what, maps in whole_permutations(weights).items():
        report(_fold_problems(weights, maps, layout, before, what=f"permuting {what}"))


def gauges_are_exact(adapter: Adapter, folder: Path) -> None:
    """Put random gauges into heads and neurons of each layer, one by one: logits stay."""
    weights, layout = opened(adapter, folder)
    before = logits(weights, layout)
    table = adapter.expand(weights.config)
    problems = []
    for space, gauge in gauges(weights, invertible=True).items():
        change = max_difference(logits(weights.fold({space: gauge}), layout), before)
        if change > EXACT:
            names = [
                name for name, param in table.items() if param.gauge.removesuffix("*") == space
            ]
            problems.append(
                f'"{space}" is declared a gauge and changes logits by {change:.1e}, '
                f"on {', '.join(names)}"
            )
    report(problems)


def unfolding_gives_the_weights_back(adapter: Adapter, folder: Path) -> None:
    """Fold everything that may be folded, and take it back."""
    weights, _ = opened(adapter, folder)
    folded = scramble(weights)[0]
    assert folded.undo is not None
    back = folded.unfold(folded.undo)
    problems = [
        f"{name} is there only before or only after"
        for name in set(weights.entries) ^ set(back.entries)
    ]
    for name in set(weights.entries) & set(back.entries):
        change = max_difference(weights[name].double(), back[name].double())
        if change > 1e-12:
            problems.append(f"{name} comes back changed by {change:.1e}")
    report(problems)


def a_saved_fold_reloads_in_transformers(adapter: Adapter, folder: Path) -> None:
    """Save the folded model; plain transformers computes the same from both folders."""
    weights, layout = opened(adapter, folder)
    copy = folder.with_name(f"{folder.name}-folded")
    save_folder(scramble(weights)[0], folder, copy, torch.float64)
    opened(adapter, copy)
    before = plain_transformers(adapter, folder, layout)[1]
    after = plain_transformers(adapter, copy, layout)[1]
    change = max_difference(before, after)
    if change > PLAIN:
        report([f"a saved fold has other logits in transformers, by {change:.1e}"])


def sites_are_found(adapter: Adapter, folder: Path) -> None:
    """Observe every site: `mid` and `mlp` add up to the stream after a layer, writers carry their
    sites; each times what a layer multiplies its branches by."""
    weights, layout = opened(adapter, folder)
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), torch.float64)
    problems: list[str] = []
    for i in walk:
        modules = dict(walk.layer.named_modules())
        report(
            [
                f'site "{name}": a layer has no module "{site.module}"'
                for name, site in adapter.sites.items()
                if site.module not in modules
            ]
        )
        start = walk.states.clone()
        observed: dict[str, Tensor] = {}
        walk.run({site: partial(_note, observed, layout.rows, site) for site in adapter.sites})
        problems += _site_problems(weights, i, start, walk.states, observed)
    report(problems)


def _note(observed: dict[str, Tensor], count: int, site: str, rows: Tensor, values: Tensor) -> None:
    """Keep the values `[n, width]` of rows `[n]` of a site; rows that are never seen stay NaN."""
    if site not in observed:
        observed[site] = torch.full((count, values.shape[1]), torch.nan, dtype=values.dtype)
    observed[site][rows] = values


def _site_problems(
    weights: Weights, layer: int, start: Tensor, end: Tensor, observed: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield what does not fit together of the sites of one layer, whose stream goes from `start` to
    `end`."""
    multiplier = weights.adapter.residual_multiplier(weights.config)
    for site, values in observed.items():
        if bool(values.isnan().any()):
            yield f'site "{site}" sees only some rows'
    if {"mid", "mlp"} <= observed.keys():
        total = observed["mid"] + multiplier * observed["mlp"]
        if not max_difference(total, end) <= EXACT:
            yield (
                f'sites "mid" and "mlp" do not add up to the stream after layer {layer}; look at '
                "`sites` and residual_multiplier_key"
            )
    branches: dict[str, Tensor] = {}
    if "mid" in observed:
        branches = {"attention": observed["mid"] - start, "the MLP": end - observed["mid"]}
    for site, template in weights.adapter.writers.items():
        name = template.replace("{i}", str(layer))
        bias_name = f"{name.removesuffix('weight')}bias"
        matrix = weights[name].double()
        bias = weights[bias_name].double() if bias_name in weights.entries else 0.0
        if observed[site].shape[1] != matrix.shape[1]:
            width = observed[site].shape[1]
            yield f'site "{site}" is {width} wide, its writer {name} reads {matrix.shape[1]}'
            continue
        written = multiplier * (observed[site] @ matrix.T + bias)
        matches = [max_difference(written, branch) <= EXACT for branch in branches.values()]
        if branches and not any(matches):
            yield (
                f'`writers`: {name} times the activations at the site "{site}" is not what '
                f"{' or '.join(branches)} adds to the stream; look at `writers`, `sites` and "
                "residual_multiplier_key"
            )


TABLE_CHECKS: tuple[Callable[[Adapter, Path], None], ...] = (
    every_tensor_is_claimed_once,
    defaults_are_those_of_the_config_class,
    the_layerwise_forward_computes_what_transformers_computes,
    every_gain_is_absorbed_by_its_readers,
    a_rotation_of_the_stream_is_exact_or_refused,
    permutations_are_exact,
    gauges_are_exact,
    unfolding_gives_the_weights_back,
    a_saved_fold_reloads_in_transformers,
    sites_are_found,
)
"""What every adapter must pass on one config: `check(adapter, folder)`.

`config_checks` adds what it must pass beyond it.
"""
