"""Narrower layers and a narrower stream, each with a refit in closed form that makes up for what goes.

A writer `D [d, n]` reads activations of moments `C = AᵀwA + λI [n, n]`. A block b of its columns costs, the others refitted,
`tr(D_b [(C⁻¹)_bb]⁻¹ D_bᵀ)` (Hassibi and Stork, Optimal Brain Surgeon, 1993). The cheapest blocks go in rounds; the rest becomes
`D_s - D_b [(C⁻¹)_bb]⁻¹ (C⁻¹)_bs = D_s + D_b C_bs (C_ss)⁻¹`, a ridge regression towards what stood there.

The stream is cut in its principal basis (Ashkboos et al., SliceGPT, arXiv:2401.15024), one for all layers, and its readers are
refitted to read what went out of what stays. The mean square over k of D coordinates is up to D/k of what it was over all, so gains
become `sqrt(D/k)` and eps becomes `eps D/k`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.forward.row_weights import clip_sinks, row_weights
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import require_finite, ridge

STRENGTH = 1e-3
"""λ of all refits here, as a multiple of the mean diagonal of the moments."""
ROUNDS = 16
PROMPT, SINKS = 30.0, 1000.0
"""How often a row of the shared prompt and an attention sink count, as in `writer-refit`."""


def leaving(C: Tensor, D: Tensor, size: int, stay: int, where: str) -> tuple[Tensor, Tensor]:
    """Return which blocks of `size` columns of a writer `D [d, n]` stay [stay], rising, and the refitted writer `[d, stay * size]`."""
    require_finite(C, where)
    left = torch.arange(len(C) // size)
    each = -(-(len(left) - stay) // ROUNDS)
    diagonal = C.diagonal().mean().clamp_min(1e-30)
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(C + STRENGTH * diagonal * torch.eye(len(C), dtype=C.dtype))
    )
    while len(left) > stay:
        own = (
            inverse.reshape(len(left), size, len(left), size)
            .diagonal(dim1=0, dim2=2)
            .permute(2, 0, 1)
        )
        parts = D.reshape(len(D), len(left), size).permute(1, 0, 2)
        cost = (parts @ torch.linalg.inv(own) * parts).sum((1, 2))
        goes = torch.zeros(len(left), dtype=torch.bool)
        goes[cost.topk(min(each, len(left) - stay), largest=False).indices] = True
        b, s = (blocks(mask.nonzero().flatten(), size) for mask in (goes, ~goes))
        X = torch.linalg.solve(inverse[b][:, b], inverse[b][:, s])
        D, inverse = D[:, s] - D[:, b] @ X, inverse[s][:, s] - inverse[s][:, b] @ X
        left = left[~goes]
    return left, D


def blocks(kept: Tensor, size: int) -> Tensor:
    """Return the coordinates of blocks of `size`."""
    return (kept[:, None] * size + torch.arange(size)).flatten()


def weight_of(walk: LayerwiseForward) -> Tensor:
    """Return what each row counts at the boundary where the walk stands [rows]."""
    often = row_weights(walk.states, walk.layout, PROMPT, SINKS, 1.0, frozenset())
    return often / clip_sinks(walk.states).double().pow(2).mean(-1).clamp_min(1e-12)


def slimmer(
    weights: Weights, walk: LayerwiseForward, neurons: int, groups: int, progress: Progress
) -> Weights:
    """Return a view with `neurons` in each MLP and `groups` key/value groups, with their query heads, in each attention.

    Which go is chosen layer by layer on the rows of `walk`, which stands at the start; what writes the rest is refitted to them.
    """
    adapter, heads = weights.adapter, weights.adapter.heads(weights.config)
    share, sizes = heads.query // heads.groups, adapter.sizes(weights.config)
    made: dict[str, Tensor | LazyTensor] = {}
    for i in walk:
        plans = {
            "heads": (f"q.{i}", share * heads.width, groups),
            "neurons": (f"neurons.{i}", 1, neurons),
        }
        plans = {site: plan for site, plan in plans.items() if plan[1] * plan[2] < sizes[plan[0]]}
        for site, C in _moments(
            walk, {site: sizes[plan[0]] for site, plan in plans.items()}
        ).items():
            space, size, stay = plans[site]
            name = next(
                n
                for n, p in adapter.expand(weights.config).items()
                if p.axes == ("residual", space)
            )
            left, D = leaving(C, weights[name].to("cpu").double(), size, stay, f"chop: {name}")
            kept = {space: blocks(left, size)} | (
                {f"kv.{i}": blocks(left, heads.width)} if site == "heads" else {}
            )
            made |= sliced(weights, kept) | {name: D.to(weights.dtype)}
        progress(i + 1, weights.depth, f"{neurons} neurons, {groups} key/value groups")
    config = {
        adapter.neurons_key: neurons,
        adapter.groups_key: groups,
        adapter.query_key: share * groups,
    }
    return weights.edit(made, **config, head_dim=heads.width)


def _moments(walk: LayerwiseForward, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Send all rows through the open layer and return the moments of what stands in front of its writers."""
    found = {site: Moments(n, 1) for site, n in widths.items()}
    weight = weight_of(walk)
    walk.run(
        {site: lambda rows, A, m=m: m.add(A, A[:, :1], weight[rows]) for site, m in found.items()}
    )  # type: ignore[misc]
    return {site: moments.xx for site, moments in found.items()}


def sliced(weights: Weights, keep: Mapping[str, Tensor]) -> dict[str, Tensor | LazyTensor]:
    """Return the parameters that have one of these spaces, with only the coordinates that are kept."""
    made: dict[str, Tensor | LazyTensor] = {}
    for name, param in weights.adapter.expand(weights.config).items():
        if name not in weights.entries or not keep.keys() & set(param.axes):
            continue
        entry = weights.entries[name]

        def read(entry: LazyTensor = entry, axes: tuple[str, ...] = param.axes) -> Tensor:
            tensor = entry.read()
            for axis, space in enumerate(axes):
                tensor = tensor.index_select(axis, keep[space]) if space in keep else tensor
            return tensor

        shape = tuple(
            len(keep[space]) if space in keep else n
            for space, n in zip(param.axes, entry.shape, strict=True)
        )
        made[name] = LazyTensor(shape, entry.dtype, read)
    return made


def narrower(
    weights: Weights, walk: Callable[[], LayerwiseForward], width: int, progress: Progress
) -> Weights:
    """Return a view whose stream is `width` principal directions of what its readers see, readers refitted; the head is untied.

    `walk` makes walks of `weights` that stand at the start. The new stream is the old one times a basis `[D, width]`, see the lineage.

    Raises:
        RecipeError: norms stand behind attention or MLP, so the stream cannot be rotated.
    """
    adapter, size = weights.adapter, weights.width
    eps, ratio = float(weights.config[adapter.eps_key]), size / width
    turned = weights.fold(
        {"residual": Rotation(torch.eye(size, dtype=torch.float64))}
    )  # refuses before the work
    total = torch.zeros(size, size, dtype=torch.float64)
    for _, X, weight in _read(
        walk(), lambda k: progress(k, 2 * weights.depth, "principal directions")
    ):
        Z = _seen(X.double(), size, eps) * weight[:, None].sqrt()
        total += Z.T @ Z
    Q = torch.linalg.eigh(total)[1].flip(1)
    turned = weights.fold({"residual": Rotation(Q)})
    made = sliced(turned, {"residual": torch.arange(width)})
    for gain, X, weight in _read(
        walk(), lambda k: progress(weights.depth + k, 2 * weights.depth, "readers")
    ):
        Y = X.double() @ Q
        Z, moments = _seen(Y[:, :width], size, eps), Moments(width, size)
        moments.add(Z, _seen(Y, size, eps) - torch.nn.functional.pad(Z, (0, size - width)), weight)
        M = torch.eye(width, size, dtype=torch.float64) + ridge(
            moments.xx, moments.xy, STRENGTH, f"chop: readers behind {gain}"
        )
        for name, param in adapter.expand(weights.config).items():
            if param.gain == gain and len(param.axes) == 2:
                shape = (turned.entries[name].shape[0], width)
                made[name] = LazyTensor(
                    shape, torch.float64, lambda name=name, M=M: turned[name] @ M.T
                )  # type: ignore[misc]
    made |= {
        name: torch.full((width,), math.sqrt(ratio) - adapter.gain_offset)
        for name in adapter.gains(weights.config)[0]
    }
    shared = any(
        p.is_gain and "residual" not in p.axes for p in adapter.params.values()
    )  # norms of other spaces keep their eps
    config = {
        adapter.width_key: width,
        adapter.eps_key: eps if shared else eps * ratio,
        "head_dim": adapter.heads(weights.config).width,
    }
    cut = turned.edit(made, **config)
    return replace(
        cut,
        lineage=replace(
            cut.lineage,
            basis=Q[:, :width] if (old := weights.lineage.basis) is None else old @ Q[:, :width],
        ),
    )


def _seen(X: Tensor, size: int, eps: float) -> Tensor:
    """Return rows `[n, k]` behind a norm of gain 1, or `sqrt(size / k)` over `k` of `size` coordinates."""
    return X * torch.rsqrt(X.pow(2).sum(-1, keepdim=True) / size + eps)


def _read(
    walk: LayerwiseForward, tell: Callable[[int], None]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what stands in front of each norm on the way: the norm's gain, rows `[rows, d]` and what each row counts [rows]."""
    adapter, config = walk.weights.adapter, walk.weights.config
    for i in walk:
        layer = f"{adapter.layers}.{i}."
        between = f"{layer}{adapter.sites['mid'].module}.weight"
        before = next(
            name for name in adapter.gains(config)[0] if name.startswith(layer) and name != between
        )
        mid = torch.empty_like(walk.states)
        weight = row_weights(walk.states, walk.layout, PROMPT, SINKS, 1.0, frozenset())
        yield before, walk.states, weight

        def see(rows: Tensor, X: Tensor, mid: Tensor = mid) -> None:
            mid[rows] = X.to(mid)

        walk.run({"mid": see})
        yield between, mid, weight
        tell(i + 1)
    yield (
        adapter.norm,
        walk.states,
        row_weights(walk.states, walk.layout, PROMPT, SINKS, 1.0, frozenset()),
    )
