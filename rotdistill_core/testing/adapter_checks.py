"""TODO: rotdistill_core.testing.adapter_checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.headers import folder_headers, read_config
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Map, Rotation
from rotdistill_core.testing.pico import (
    gauges,
    logits,
    max_difference,
    pico_samples,
    plain_transformers,
    random_rotation,
    save_folder,
    scramble,
    whole_permutations,
)

# The checks of an adapter: each takes a table and a folder with a pico checkpoint, and says what is wrong with the table.

EXACT, PLAIN = 1e-9, 1e-5


def _opened(adapter: Adapter, folder: Path) -> tuple[Weights, PackedTexts]:
    config = adapter.completed(read_config(folder))
    return open_folder(folder, config, adapter), pico_samples(
        int(adapter.sizes(config)["vocab"]), texts=4
    ).layout


def _report(problems: Sequence[str]) -> None:
    if problems:
        raise AssertionError("the table is wrong:\n" + "\n".join(problems))


def every_tensor_is_claimed_once(adapter: Adapter, folder: Path) -> None:
    """Compare every tensor of the checkpoint with the table, axis by axis."""
    config, found, problems = adapter.completed(read_config(folder)), folder_headers(folder), []
    table, sizes, (query, groups, width) = (
        adapter.expand(config),
        adapter.sizes(config),
        adapter.heads(config),
    )
    if (query * width, groups * width) != (sizes["q.0"], sizes["kv.0"]) or query % groups:
        problems.append(
            f"heads: {query} and {groups} of {width} do not make up q.0 ({sizes['q.0']}) and kv.0 ({sizes['kv.0']})"
        )
    shapes = adapter.unfused(config, {name: header.shape for name, header in found.items()})
    for name, shape in shapes.items():
        templates = [
            t for t in adapter.params if re.fullmatch(re.escape(t).replace(r"\{i\}", r"\d+"), name)
        ]
        if len(templates) != 1 or name not in table:
            problems.append(f"{name} is claimed {len(templates)} times: {templates}")
        elif len(shape) != len(table[name].axes):
            problems.append(f"{name} has {len(shape)} axes, declared are {list(table[name].axes)}")
        else:
            for axis, (size, space) in enumerate(zip(shape, table[name].axes, strict=True)):
                if sizes.get(space) != size:
                    like = [other for other, n in sizes.items() if n == size]
                    problems.append(
                        f'{name}: axis {axis} is declared "{space}" ({sizes.get(space)}), it has {size} like {like}'
                    )
    for name, param in table.items():
        if (
            name not in shapes
            and not param.optional
            and not (param.tied and config.get("tie_word_embeddings"))
        ):
            problems.append(f"{name} is declared, the checkpoint does not have it")
        if param.gain and not (param.gain in table and table[param.gain].is_gain):
            problems.append(f"{name} absorbs {param.gain}, which is not declared as a gain")
    _report(problems)


def defaults_are_those_of_the_config_class(adapter: Adapter, folder: Path) -> None:
    """Leave one key after the other out of config.json and compare what the table and transformers take instead."""
    from transformers import AutoConfig

    whole, problems = read_config(folder), []
    for key in adapter.defaults(whole):
        config = {k: v for k, v in whole.items() if k not in (key, "dtype")}
        theirs, ours = getattr(AutoConfig.for_model(**config), key), adapter.defaults(config)[key]
        if theirs != ours:
            problems.append(f'defaults: "{key}" is {ours!r}, transformers takes {theirs!r}')
    _report(problems)


def the_layerwise_forward_computes_what_transformers_computes(
    adapter: Adapter, folder: Path
) -> None:
    """Compare every boundary of the stream, and the logits, in float64."""
    weights, layout = _opened(adapter, folder)
    states, expected = plain_transformers(adapter, folder, layout)
    other = replace(adapter, gain_offset=1.0 - adapter.gain_offset)
    if (
        max_difference(logits(weights, layout), expected)
        > PLAIN
        >= max_difference(logits(replace(weights, adapter=other), layout), expected)
    ):
        _report(
            [
                f"gain_offset is {adapter.gain_offset}, the norms of this model behave as with {other.gain_offset}"
            ]
        )
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), torch.float64)
    far = [max_difference(walk.states, states[0])]
    for i in walk:
        walk.states = states[i].clone()
        walk.run()
        far.append(max_difference(walk.states, states[i + 1]))
    names = ["the embeddings", *(f"layer {i}" for i in range(weights.depth))]
    problems = [
        f"the stream behind {n} differs from transformers by {x:.1e}"
        for n, x in zip(names, far, strict=True)
        if x > PLAIN
    ]
    made = head_logits(weights, final_norm(weights, states[-1]), weights.head().double())
    if max_difference(made, expected) > PLAIN:
        problems.append(
            f"logits differ by {max_difference(made, expected):.1e}: look at norm, head, eps_key, gain_offset and softcap_key"
        )
    _report(problems)


def every_gain_is_absorbed_by_its_readers(adapter: Adapter, folder: Path) -> None:
    """Fuse one norm gain after the other into the readers that name it; where that changes logits, find the reader to blame."""
    weights, layout = _opened(adapter, folder)
    weights, problems = weights.untie(), []
    before, table = logits(weights, layout), adapter.expand(weights.config)
    matrices = [
        n
        for n, p in table.items()
        if n in weights.entries and p.axes[1:] == ("residual",) and n != adapter.embedding
    ]
    layer_of = re.compile(r"\.\d+\.").findall

    def change(gain: str, readers: list[str]) -> float:
        factor = weights.gain(gain)
        fused = {name: weights[name].double() * factor for name in readers}
        return max_difference(
            logits(
                weights.edit({gain: torch.full_like(factor, 1.0 - adapter.gain_offset), **fused}),
                layout,
            ),
            before,
        )

    missing, wrong = (
        "reads behind {} and does not name it as its gain",
        "names {} as its gain and does not read behind it",
    )
    for gain in (n for n, p in table.items() if p.is_gain and p.axes == ("residual",)):
        readers = [name for name in matrices if table[name].gain == gain]
        if readers and change(gain, readers) <= EXACT:
            continue
        orphans = [
            name
            for name in matrices
            if table[name].gain is None and layer_of(name) == layer_of(gain)
        ]
        if orphans and change(gain, [*readers, *orphans]) <= EXACT:
            problems += [f"{name}: axis 1 {missing.format(gain)}" for name in orphans]
        elif readers:  # a norm on what a branch writes has none, and needs none
            blamed = [n for n in matrices if change(gain, sorted({n} ^ set(readers))) <= EXACT]
            problems += [
                f"{n}: axis 1 {(wrong if n in readers else missing).format(gain)}" for n in blamed
            ]
            problems += (
                [] if blamed else [f"{gain} is not absorbed by the readers that name it: {readers}"]
            )
    _report(problems)


def _blame(
    weights: Weights, maps: Mapping[str, Map], layout: PackedTexts, wanted: Tensor
) -> Iterator[str]:
    """Yield the single axes of the table whose being carried or not explains that a fold changes the logits."""
    table, sizes = weights.adapter.expand(weights.config), weights.adapter.sizes(weights.config)
    for name, param in table.items():
        for axis, space in enumerate(param.axes):
            for other in (
                ("none of them",)
                if space in maps
                else tuple(s for s in maps if sizes[s] == sizes[space])
            ):
                axes = (*param.axes[:axis], other, *param.axes[axis + 1 :])
                changed = replace(
                    weights.adapter, params={**table, name: replace(param, axes=axes)}
                )
                if (
                    name in weights.entries
                    and max_difference(
                        logits(replace(weights, adapter=changed).fold(maps), layout), wanted
                    )
                    <= EXACT
                ):
                    yield f'{name}: axis {axis} is declared "{space}"; of {", ".join(maps)} it is {other}'


def _compare_fold(
    weights: Weights, maps: Mapping[str, Map], layout: PackedTexts, wanted: Tensor, what: str
) -> list[str]:
    change = max_difference(logits(weights.fold(maps), layout), wanted)
    if change <= EXACT:
        return []
    names = [n for n, p in weights.adapter.expand(weights.config).items() if {*p.axes} & {*maps}]
    doubt = f"{what} changes logits by {change:.1e}: `heads`, an axis, or the order in `fused` is wrong, of {', '.join(names)}"
    return list(_blame(weights, maps, layout, wanted)) or [doubt]


def a_rotation_of_the_stream_is_exact_or_refused(adapter: Adapter, folder: Path) -> None:
    """Fold a random rotation: logits stay, or the table has norms behind writers and the fold says so."""
    weights, layout = _opened(adapter, folder)
    width = weights.width
    if stuck := adapter.gains(weights.config)[1]:
        try:
            weights.fold({"residual": Rotation(random_rotation(width, 1))})
        except RecipeError as told:
            assert stuck[0] in str(told), told
            return
        raise AssertionError(f"{stuck[0]} has no reader behind it, yet the rotation was folded")
    fused = logits(
        weights.fold({"residual": Rotation(torch.eye(width, dtype=torch.float64))}), layout
    )
    _report(
        _compare_fold(
            weights,
            {"residual": Rotation(random_rotation(width, 1))},
            layout,
            fused,
            "a rotation of the stream",
        )
    )


def permutations_are_exact(adapter: Adapter, folder: Path) -> None:
    """Permute the neurons and the heads of each layer, and the channels of the stream: logits stay."""
    weights, layout = _opened(adapter, folder)
    before = logits(weights, layout)
    for what, maps in whole_permutations(weights).items():
        _report(_compare_fold(weights, maps, layout, before, f"permuting {what}"))


def gauges_are_exact(adapter: Adapter, folder: Path) -> None:
    """Put one random gauge after the other into the heads and neurons of each layer: logits stay."""
    weights, layout = _opened(adapter, folder)
    before = logits(weights, layout)
    folds = {
        space: weights.fold({space: found})
        for space, found in gauges(weights, invertible=True).items()
    }
    changes = {
        space: max_difference(logits(folded, layout), before) for space, folded in folds.items()
    }
    on = {
        space: [
            n
            for n, p in weights.adapter.expand(weights.config).items()
            if p.gauge.removesuffix("*") == space
        ]
        for space in changes
    }
    _report(
        [
            f'"{s}" is declared a gauge and changes logits by {x:.1e}, on {", ".join(on[s])}'
            for s, x in changes.items()
            if x > EXACT
        ]
    )


def unfolding_gives_the_weights_back(adapter: Adapter, folder: Path) -> None:
    """Fold everything that may be folded, and take it back."""
    weights, _ = _opened(adapter, folder)
    back = (folded := scramble(weights)[0]).unfold(folded.undo)  # type: ignore[arg-type]  # a fold can be undone
    problems = [
        f"{name} is there only before or only after"
        for name in set(weights.entries) ^ set(back.entries)
    ]
    changes = {
        name: max_difference(weights[name].double(), back[name].double())
        for name in set(weights.entries) & set(back.entries)
    }
    problems += [
        f"{name} comes back changed by {change:.1e}"
        for name, change in changes.items()
        if change > 1e-12
    ]
    _report(problems)


def a_saved_fold_reloads_in_transformers(adapter: Adapter, folder: Path) -> None:
    """Save the folded model and compare what plain transformers computes from both folders."""
    weights, layout = _opened(adapter, folder)
    there = folder.with_name(f"{folder.name}-folded")
    save_folder(scramble(weights)[0], folder, there, torch.float64)
    _opened(adapter, there)
    one, two = (plain_transformers(adapter, path, layout)[1] for path in (folder, there))
    _report(
        [f"a saved fold has other logits in transformers, by {max_difference(one, two):.1e}"]
        if max_difference(one, two) > PLAIN
        else []
    )


def sites_are_found(adapter: Adapter, folder: Path) -> None:
    """Observe every site: `mid` and `mlp` add up to the stream behind a layer, writers carry their sites into it."""
    weights, layout = _opened(adapter, folder)
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), torch.float64)
    problems: list[str] = []
    for i in walk:
        lost = [
            s
            for s, site in adapter.sites.items()
            if site.module not in dict(walk.layer.named_modules())
        ]
        _report([f'site "{s}": a layer has no module "{adapter.sites[s].module}"' for s in lost])
        seen: dict[str, Tensor] = {}

        def note(site: str, rows: Tensor, X: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen.setdefault(site, torch.full((layout.rows, X.shape[1]), torch.nan, dtype=X.dtype))[
                rows
            ] = X

        start = walk.states.clone()
        walk.run(
            {
                site: lambda rows, X, site=site, note=note: note(site, rows, X)
                for site in adapter.sites
            }
        )  # type: ignore[misc]
        problems += [
            f'site "{s}" sees only some rows' for s, X in seen.items() if bool(X.isnan().any())
        ]
        if {"mid", "mlp"} <= seen.keys() and not max_difference(
            seen["mid"] + seen["mlp"], walk.states
        ) <= EXACT:
            problems.append(f'sites "mid" and "mlp" do not add up to the stream behind layer {i}')
        branches = (
            {"attention": seen["mid"] - start, "the MLP": walk.states - seen["mid"]}
            if "mid" in seen
            else {}
        )
        for site, template in adapter.writers.items():
            name = template.replace("{i}", str(i))
            bias = f"{name.removesuffix('weight')}bias"
            W, b = (
                weights[name].double(),
                weights[bias].double() if bias in weights.entries else 0.0,
            )
            if seen[site].shape[1] != W.shape[1]:
                problems.append(
                    f'site "{site}" is {seen[site].shape[1]} wide, its writer {name} reads {W.shape[1]}'
                )
            elif branches and not any(
                max_difference(seen[site] @ W.T + b, X) <= EXACT for X in branches.values()
            ):
                problems.append(
                    f'{name} does not carry the site "{site}" into what {" or ".join(branches)} adds to the stream'
                )
    _report(problems)


ADAPTER_CHECKS: tuple[Callable[[Adapter, Path], None], ...] = (
    every_tensor_is_claimed_once, defaults_are_those_of_the_config_class, the_layerwise_forward_computes_what_transformers_computes,
    every_gain_is_absorbed_by_its_readers, a_rotation_of_the_stream_is_exact_or_refused, permutations_are_exact, gauges_are_exact,
    unfolding_gives_the_weights_back, a_saved_fold_reloads_in_transformers, sites_are_found,
)  # fmt: skip
"""What every adapter must pass, on a pico checkpoint of each variant of its architecture: `check(adapter, folder)`."""
