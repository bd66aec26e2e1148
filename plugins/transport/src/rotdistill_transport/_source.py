"""The fine-tune as changes of parameters, before they are carried anywhere.

A reader of the residual stream counts with the norm gain before it, `W diag(g)`: then a change of
the gain is a change of its readers, and models whose norms were folded compare with those whose
norms were not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Param
from rotdistill_core.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from rotdistill_core.checkpoint.config_differences import config_differences, listed
from rotdistill_core.checkpoint.headers import read_header
from rotdistill_core.checkpoint.lora import ADAPTER_WEIGHTS, Factors, read_lora
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import locate_model, open_model
from rotdistill_core.checkpoint.references import is_adapter, reference_of
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout

if TYPE_CHECKING:
    from rotdistill_transport.step import Transport


@dataclass(frozen=True, kw_only=True)
class Source:
    """A fine-tune of a model."""

    name: str
    """As the recipe names it."""
    base: Model
    """The model that it started from."""
    weights: Weights
    """Its weights; the head is a tensor of its own where the fine-tune changed it."""
    changes: Mapping[str, Callable[[], Factors]]
    """Matrix of the base -> its change, with the norm gain absorbed, as factors `B A`."""
    vectors: Mapping[str, Callable[[], Tensor]]
    """Bias, or a gain that no reader absorbs -> its change `[n]`."""
    low_rank: bool
    """Whether the factors have a low rank: it is a LoRA."""

    @property
    def table(self) -> dict[str, Param]:
        """The parameters of the base."""
        return self.base.adapter.expand(self.base.config)


def open_source(step: Transport, pair: Pair) -> Source:
    """Open the fine-tune that a recipe names, and its base.

    Raises:
        RecipeError: the base is not known, or another kind of model than the fine-tune.
        SetupError: a model is missing or torn, or the LoRA is none that can be carried.
    """
    if step.source == "student":
        raise RecipeError(
            'transport: source = "student" is the model that the fine-tune is carried to. Name '
            'a LoRA or a fine-tuned model, or "teacher".'
        )
    folder = None if step.source == "teacher" else locate_model(reference_of(step.source))
    if folder is not None and is_adapter(folder):
        config = read_adapter_config(folder)
        return _adapter(step.source, folder, _base(step, pair, config))
    model = pair.teacher if folder is None else open_model(reference_of(step.source))
    base = _base(step, pair, None)
    _require_kin(step.source, model, base)
    return _whole(step.source, model, base)


def base_that_is_here(source: str) -> str:
    """Return the folder that a LoRA names as its base, where there is one; empty otherwise.

    Raises:
        SetupError: there is no such fine-tune.
    """
    folder = locate_model(reference_of(source))
    named = read_adapter_config(folder).base if is_adapter(folder) else ""
    return named if _is_here(named) else ""


def _is_here(name: str) -> bool:
    return bool(name) and (Path(name).expanduser() / RunLayout.CONFIG).is_file()


def _base(step: Transport, pair: Pair, config: AdapterConfig | None) -> Model:
    """Return the model that the fine-tune started from.

    Nothing is downloaded because an adapter says so: its own word counts where it names a model of
    the recipe, or a folder that is here.
    """
    own = {"teacher": pair.teacher, "student": pair.student}
    if step.base in own:
        return own[step.base]
    if step.base:
        return open_model(reference_of(step.base))
    named = config.base if config else ""
    for model in (pair.student, pair.teacher):
        if named and named == model.ref.model:
            return model
    if _is_here(named):
        return open_model(ModelRef(model=named))
    says = f"names {named}, which is not here" if named else "does not say which"
    what = f"the LoRA {says}" if config else "a whole model does not say which"
    raise RecipeError(
        f"transport: {step.source} was trained on some model, and {what}. Only the change from "
        'that model can be carried: name it as `base`, "student" or "teacher" where it is one of '
        "the recipe's own, or a folder or another reference."
    )


def _require_kin(name: str, model: Model, base: Model) -> None:
    """Refuse a whole model that is no fine-tune of its base."""
    problem = ""
    one, two = _sizes(model), _sizes(base)
    if model.config["model_type"] != base.config["model_type"]:
        problem = f"a {model.config['model_type']} model, and a {base.config['model_type']} model"
    elif one != two:
        size = next(size for size in {**one, **two} if one.get(size) != two.get(size))
        problem = f"of another shape ({size} is {one.get(size)}, and {two.get(size)} in the base)"
    else:
        differences = config_differences(model.config, base.config, name)
        problem = listed(differences, "the base") if differences else ""
    if problem:
        raise RecipeError(
            f"transport: {name} is no fine-tune of its base {base.ref.model}: it is {problem}. "
            "Name the model that it was trained from as `base`."
        )


def _sizes(model: Model) -> dict[str, object]:
    heads = tuple(model.adapter.heads(model.config))
    return {"layers": model.depth, "heads": heads, **model.adapter.sizes(model.config)}


def _adapter(name: str, folder: Path, base: Model) -> Source:
    weights = base.weights
    if _edits_head(folder, weights):
        weights = weights.untie()
    lora = read_lora(folder, weights, [base.weights])
    table = base.adapter.expand(base.config)
    changes = {
        parameter: partial(_with_gain, factors, table[parameter], weights)
        for parameter, factors in lora.factors.items()
    }
    return Source(name=name, base=base, weights=weights, changes=changes, vectors={}, low_rank=True)


def _edits_head(folder: Path, weights: Weights) -> bool:
    """Return whether a LoRA changes the head or the embedding: a tied head is then no longer."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return False  # which `read_lora` refuses
    ends = [
        f".{name.removesuffix('.weight')}.lora_"
        for name in (weights.adapter.head, weights.adapter.embedding)
    ]
    return any(end in f".{key}" for key in read_header(path) for end in ends)


def _with_gain(factors: Factors, param: Param, weights: Weights) -> Factors:
    """Return the change of `W diag(g)`."""
    B, A = factors
    return Factors(B, A * weights.gain(param.gain) if param.gain else A)


def _whole(name: str, model: Model, base: Model) -> Source:
    """Return all parameters that differ, a tied head as a tensor of its own."""
    new, old = model.weights.untie(), base.weights.untie()
    absorbed = set(base.adapter.gains(base.config).absorbed)
    changes: dict[str, Callable[[], Factors]] = {}
    vectors: dict[str, Callable[[], Tensor]] = {}
    for parameter, param in base.adapter.expand(base.config).items():
        if parameter not in old.entries or parameter not in new.entries or parameter in absorbed:
            continue
        delta = partial(_difference, new, old, parameter, param)
        if not bool(delta().any()):
            continue
        if len(param.axes) == 2:
            changes[parameter] = partial(_as_factors, delta)
        else:
            vectors[parameter] = delta
    return Source(
        name=name, base=base, weights=old, changes=changes, vectors=vectors, low_rank=False
    )


def _difference(new: Weights, old: Weights, name: str, param: Param) -> Tensor:
    """Return the change of a parameter, float64; of a matrix with its gain."""
    W, V = new[name].double(), old[name].double()
    if param.gain and W.ndim == 2:
        W, V = W * new.gain(param.gain), V * old.gain(param.gain)
    return W - V


def _as_factors(delta: Callable[[], Tensor]) -> Factors:
    """Return a whole change as factors, one of which is the identity: that of the shorter side."""
    D = delta()
    out, inner = D.shape
    if out >= inner:
        return Factors(D, torch.eye(inner, dtype=D.dtype))
    return Factors(torch.eye(out, dtype=D.dtype), D)
