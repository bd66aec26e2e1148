"""The merge methods: each is coefficients of the parts, and a kernel that combines them.

With x the student, x_i the ingredients and w_i their weights:

- `uniform`, `greedy`: `Σ w_i x_i / Σ w_i`. (Wortsman et al., Model Soups, arXiv:2203.05482.)
- `fisher`: `Σ w_i F_i x_i / Σ w_i F_i`. (Matena and Raffel, arXiv:2111.09832.)
- `task-arithmetic`: `x + λ Σ w_i (x_i - x)`. (Ilharco et al., arXiv:2212.04089.)
- `ties`: trimmed differences of one elected sign, averaged. (Yadav et al., arXiv:2306.01708.)
- `slerp`: along the arc between two. (Shoemake, Animating Rotation with Quaternion Curves, 1985.)
- `lora`: one part, the student plus the sum of all adapters, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_soups._mixture import (
    Ingredient,
    Kernel,
    Mixture,
    Rows,
    along_rows,
    blocks,
    rows_of,
    upcast,
)

STUDENT = "student"
"""What a recipe calls the student as the earlier steps left it."""
FISHER_FLOOR = 1e-30
"""Added to every Fisher information, so that a parameter without any gets the plain mean."""
PARALLEL = 0.9995
"""Cosine beyond which slerp goes along the straight line (mergekit's default)."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How a merge is made."""

    method: str = "uniform"
    """A key of `METHODS`."""
    weights: Callable[[str], Sequence[float]]
    """Parameter -> the weight of each ingredient."""
    scaling: float = 1.0
    """λ, the factor of differences from the student."""
    density: float = 0.2
    """Share of each difference that TIES keeps."""
    fisher: Sequence[Mapping[str, LazyTensor]] = ()
    """For each ingredient: parameter -> its diagonal Fisher information."""


class Parameter(NamedTuple):
    """One parameter of a merge."""

    name: str
    student: Ingredient
    ingredients: Sequence[Ingredient]
    options: MergeOptions

    @property
    def weights(self) -> list[float]:
        """The weight of each ingredient."""
        return list(self.options.weights(self.name))


class Method(NamedTuple):
    """A merge method."""

    coefficients: Callable[[Parameter], list[float]]
    """Returns one for the student and one for each ingredient."""
    kernel: Callable[[Parameter], Kernel]
    is_mean: bool
    """See `Mixture.is_mean`."""


def merge(
    base: Weights,
    ingredients: Sequence[Ingredient],
    options: MergeOptions,
    names: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Return the student with parameters that are merged when they are read.

    Args:
        base: the student, in the form that the ingredients have.
        ingredients: what is merged.
        options: the method, and the weights of the ingredients.
        names: the parameters that are merged; all without it.
        dtype: what sums are rounded to, block by block; without it float32, or float64 where the
            student is that.
    """
    method = METHODS[options.method]
    student = Ingredient(STUDENT, base, {})
    table = base.adapter.expand(base.config)
    dtype = dtype or torch.promote_types(base.dtype, torch.float32)
    merged: dict[str, LazyTensor] = {}
    for name in base.entries if names is None else names:
        parameter = Parameter(name, student, ingredients, options)
        mixture = Mixture(
            name=name,
            parts=[student, *ingredients],
            coefficients=torch.tensor(method.coefficients(parameter), dtype=torch.float64),
            is_mean=method.is_mean,
            kernel=method.kernel(parameter),
        )
        vocabulary = table[name].axes[0] == VOCAB
        merged[name] = mixture.lazily(base.entries[name].shape, dtype, vocabulary)
    return base.edit(merged)


# Coefficients: the student's, then one for each ingredient.


def weights_as_given(parameter: Parameter) -> list[float]:
    """Return the weights as they are, and nothing for the student."""
    return [0.0, *parameter.weights]


def shares_of_a_mean(parameter: Parameter) -> list[float]:
    """Return `w_i / Σ w`, and nothing for the student."""
    weights = parameter.weights
    total = sum(weights)
    return [0.0, *(w / total for w in weights)]


def task_coefficients(parameter: Parameter) -> list[float]:
    """Return `λ w_i`, and `1 - λ Σ w` for the student: `x + λ Σ w_i (x_i - x)`."""
    scaled = [parameter.options.scaling * w for w in parameter.weights]
    return [1.0 - sum(scaled), *scaled]


def slerp_coefficients(parameter: Parameter) -> list[float]:
    """Return `sin((1 - t) φ) / sin φ` and `sin(t φ) / sin φ`, t the share of the second.

    φ is the angle between the two ingredients' parameters, seen as vectors. Nearly parallel ones
    are mixed along the straight line.
    """
    one, two = (part.open(parameter.name) for part in parameter.ingredients)
    t = shares_of_a_mean(parameter)[2]
    dot = a2 = b2 = 0.0
    for a, b in blocks(parameter.ingredients[0].view.entries[parameter.name].shape):
        x, y = (upcast(rows(a, b)).flatten() for rows in (one, two))
        dot += float(x @ y)
        a2 += float(x @ x)
        b2 += float(y @ y)
    cosine = max(-1.0, min(1.0, dot / max(math.sqrt(a2 * b2), 1e-30)))
    if abs(cosine) > PARALLEL:
        return [0.0, 1.0 - t, t]
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return [0.0, math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]


# Kernels: rows [a, b) of the merged parameter.


def linear_kernel(_: Parameter) -> Kernel:
    """Return the kernel `Σ c_i x_i`."""
    return linear_combination


def linear_combination(opened: Sequence[Rows], a: int, b: int, coefficients: Tensor) -> Tensor:
    """Return `Σ c_i x_i` of rows [a, b). A part whose coefficients are all 0 is not read."""
    total: Tensor | None = None
    for rows, coefficient in zip(opened, coefficients, strict=True):
        if not bool(coefficient.any()):
            continue
        X = rows(a, b)
        if total is None:
            total = upcast(X) * along_rows(coefficient, upcast(X[:0]))
        elif len(coefficient) == 1:
            total = total.add_(X, alpha=float(coefficient))
        else:
            total = total.addcmul_(upcast(X), along_rows(coefficient, total))
    return upcast(opened[0](a, b)) if total is None else total


def fisher_kernel(parameter: Parameter) -> Kernel:
    """Return the kernel `Σ c_i F_i x_i / Σ c_i F_i`; the student's information counts as 0."""
    files = [fisher[parameter.name].read() for fisher in parameter.options.fisher]
    none_of_the_student = rows_of(torch.zeros(()).expand_as(files[0]))
    return fisher_mean([none_of_the_student, *(rows_of(F) for F in files)])


def fisher_mean(information: Sequence[Rows]) -> Kernel:
    """Return the kernel `Σ c_i F_i x_i / Σ c_i F_i` for diagonal informations F_i by part.

    Where no part has any information it is the plain mean.
    """

    def kernel(opened: Sequence[Rows], a: int, b: int, coefficients: Tensor) -> Tensor:
        weights: list[Tensor] = []
        weighted: list[Tensor] = []
        for rows, fisher, coefficient in zip(opened, information, coefficients, strict=True):
            if bool(coefficient.any()):
                X = upcast(rows(a, b))
                W = along_rows(coefficient, X) * (fisher(a, b).to(X) + FISHER_FLOOR)
                weights.append(W)
                weighted.append(W * X)
        return torch.stack(weighted).sum(0) / torch.stack(weights).sum(0)

    return kernel


def ties_kernel(parameter: Parameter) -> Kernel:
    """Return the kernel of TIES, trimmed parameter by parameter."""
    density = parameter.options.density
    thresholds = [
        trim_threshold(parameter.name, parameter.student, part, density)
        for part in parameter.ingredients
    ]
    return ties_election(thresholds, parameter.options.scaling)


def trim_threshold(name: str, base: Ingredient, part: Ingredient, density: float) -> float:
    """Return the magnitude from which on a share `density` of `part - base` is kept, exactly.

    It takes two passes and no sorting. Floats of one sign are ordered as their bits are, so a
    histogram of the upper 16 bits finds the bin, and one of the lower 16 bits the value.
    """
    shape = base.view.entries[name].shape
    S, X = base.open(name), part.open(name)
    wanted = max(1, int(density * math.prod(shape)))
    pattern = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for a, b in blocks(shape):
            bits = (X(a, b).float() - S(a, b).float()).abs_().flatten().view(torch.int32)
            if shift == 0:
                bits = bits[bits >> 16 == pattern >> 16]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        in_or_above = counts.flip(0).cumsum(0).flip(0)
        bin_ = int((in_or_above >= wanted).nonzero().max())
        wanted -= int(in_or_above[bin_] - counts[bin_])
        pattern |= bin_ << shift
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))


def ties_election(thresholds: Sequence[float], scaling: float) -> Kernel:
    """Return the kernel of TIES for the trim threshold of each ingredient.

    Each difference from the student is trimmed. Every entry elects the sign of the weighted sum,
    and the differences of that sign are averaged.
    """

    def kernel(opened: Sequence[Rows], a: int, b: int, coefficients: Tensor) -> Tensor:
        start = upcast(opened[0](a, b))
        deltas: list[tuple[Tensor, Tensor]] = []
        for rows, coefficient, least in zip(opened[1:], coefficients[1:], thresholds, strict=True):
            delta = upcast(rows(a, b)) - start
            trimmed = delta.masked_fill_(delta.abs() < least, 0.0)
            deltas.append((along_rows(coefficient, delta), trimmed))
        sign = torch.stack([c * delta for c, delta in deltas]).sum(0) >= 0
        total, weight = torch.zeros_like(start), torch.zeros_like(start)
        for c, delta in deltas:
            agree = ((c * delta > 0) & sign) | ((c * delta < 0) & ~sign)
            total.addcmul_(delta * agree, c)
            weight.addcmul_(agree.to(start), c)
        return start + scaling * total / torch.where(weight != 0, weight, 1.0)

    return kernel


METHODS: Mapping[str, Method] = {
    "uniform": Method(shares_of_a_mean, linear_kernel, is_mean=True),
    "greedy": Method(shares_of_a_mean, linear_kernel, is_mean=True),
    "fisher": Method(shares_of_a_mean, fisher_kernel, is_mean=True),
    "task-arithmetic": Method(task_coefficients, linear_kernel, is_mean=False),
    "ties": Method(weights_as_given, ties_kernel, is_mean=False),
    "slerp": Method(slerp_coefficients, linear_kernel, is_mean=False),
    "lora": Method(weights_as_given, linear_kernel, is_mean=False),
}
