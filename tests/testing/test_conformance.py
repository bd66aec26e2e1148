"""The checks of an adapter tell which entry of a broken table is wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from rotdistill_core import hookimpl, step
from rotdistill_core.architecture.table import Adapter, HeadLayout, Param, Site
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.registry import STEPS, adapter_for, installed_plugins, step_class
from rotdistill_core.testing import (
    ADAPTER_CHECKS,
    STEP_CHECKS,
    a_planted_rotation_is_found,
    a_rotation_of_the_stream_is_exact_or_refused,
    defaults_are_those_of_the_config_class,
    every_gain_is_absorbed_by_its_readers,
    every_tensor_is_claimed_once,
    gauges_are_exact,
    hard_inputs_are_solved_or_refused,
    it_does_the_same_again_and_changes_no_input,
    options_survive_toml_and_json,
    parametrize_with_checks,
    permutations_are_exact,
    pico_folder,
    sites_are_found,
    the_hook_is_as_specified,
    the_layerwise_forward_computes_what_transformers_computes,
)

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore

Q, DOWN, UP = (
    f"model.layers.{{i}}.{name}.weight"
    for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
)
BEFORE, BETWEEN = (
    f"model.layers.{{i}}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")
)
LLAMA = adapter_for("llama")


def broken(name: str, table: Adapter = LLAMA, **changes: object) -> Adapter:
    """Return the table with one record changed."""
    return replace(table, params={**table.params, name: replace(table.params[name], **changes)})  # type: ignore[arg-type]


def without(name: str, table: Adapter = LLAMA) -> Adapter:
    return replace(table, params={n: p for n, p in table.params.items() if n != name})


Check = Callable[[Adapter, Path], None]
CASES: dict[str, tuple[Check, Adapter, str]] = {
    "a tensor of another space": (
        every_tensor_is_claimed_once,
        broken(Q, axes=("kv.{i}", "residual")),
        r'layers.0.self_attn.q_proj.weight: axis 0 is declared "kv.0" \(24\), '
        r"it has 48 like \['q.0'\]",
    ),
    "axes the wrong way round": (
        every_tensor_is_claimed_once,
        broken(DOWN, axes=("neurons.{i}", "residual")),
        r'layers.1.mlp.down_proj.weight: axis 1 is declared "residual" \(32\), it has 56',
    ),
    "an axis too many": (
        every_tensor_is_claimed_once,
        broken(BEFORE, axes=("residual",) * 2),
        "has 1 axes, declared are",
    ),
    "a tensor left out": (
        every_tensor_is_claimed_once,
        without(UP),
        "layers.0.mlp.up_proj.weight has no entry in the table",
    ),
    "a tensor too many": (
        every_tensor_is_claimed_once,
        replace(LLAMA, params={**LLAMA.params, "x.{i}": Param(("residual",))}),
        "x.1 is declared, the checkpoint does not have it",
    ),
    "a gain that is none": (
        every_tensor_is_claimed_once,
        broken(Q, gain=UP),
        "q_proj.weight absorbs .*up_proj.weight, which",
    ),
    "a default of its own": (
        defaults_are_those_of_the_config_class,
        replace(LLAMA, defaults=lambda _: {"rms_norm_eps": 1e-5}),
        'defaults: "rms_norm_eps" is 1e-05, transformers takes 1e-06',
    ),
    "gains 1 + w that are not": (
        the_layerwise_forward_computes_what_transformers_computes,
        replace(LLAMA, gain_offset=1.0),
        "gain_offset is 1.0, the norms of this model behave as with 0.0",
    ),
    "another epsilon": (
        the_layerwise_forward_computes_what_transformers_computes,
        replace(LLAMA, eps_key="initializer_range"),
        "logits differ by .* eps_key",
    ),
    "a reader that names no gain": (
        every_gain_is_absorbed_by_its_readers,
        broken(UP, gain=None),
        "layers.0.mlp.up_proj.weight: axis 1 reads after "
        "model.layers.0.post_attention_layernorm.weight and does not name it",
    ),
    "a reader that names the gain of another norm": (
        every_gain_is_absorbed_by_its_readers,
        broken(UP, gain=BEFORE),
        "layers.1.mlp.up_proj.weight: axis 1 names model.layers.1.input_layernorm.weight "
        "as its gain and does not read after it",
    ),
    "a gain that no reader names": (
        every_gain_is_absorbed_by_its_readers,
        broken("lm_head.weight", gain=None),
        "lm_head.weight: axis 1 reads after model.norm.weight and does not name it as its gain",
    ),
    "neurons of another layer": (
        permutations_are_exact,
        broken(DOWN, axes=("residual", "neurons.0")),
        'layers.1.mlp.down_proj.weight: axis 1 is declared "neurons.0"; '
        "of neurons.0 it is none of them",
    ),
    "heads of another layer": (
        permutations_are_exact,
        broken(Q, axes=("q.1", "residual")),
        'layers.0.self_attn.q_proj.weight: axis 0 is declared "q.1"; of kv.0, q.0 it is q.0',
    ),
    "a gauge that is none": (
        gauges_are_exact,
        broken("model.layers.{i}.mlp.gate_proj.weight", gauge="up.{i}"),
        '"up.0" is declared a gauge and changes',
    ),
    "a consumer that is no producer": (
        gauges_are_exact,
        broken("model.layers.{i}.self_attn.o_proj.weight", gauge="value.{i}"),
        '"value.1" is declared a gauge',
    ),
    "heads that do not make up their space": (
        every_tensor_is_claimed_once,
        replace(LLAMA, heads=lambda _: HeadLayout(4, 4, 12)),
        r"heads: 4 and 4 of 12 do not make up q.0 \(48\) and kv.0 \(24\)",
    ),
    "another number of heads": (
        permutations_are_exact,
        replace(LLAMA, heads=lambda _: HeadLayout(2, 1, 24)),
        "permuting heads of layer 0 changes logits .* `heads`, .* is wrong, "
        "of model.layers.0.self_attn.q_proj.weight, ",
    ),
    "a tie that is not declared": (
        every_tensor_is_claimed_once,
        broken("lm_head.weight", tied=None),
        "lm_head.weight is declared, the checkpoint does not",
    ),
    "a site that is not there": (
        sites_are_found,
        replace(LLAMA, sites={**LLAMA.sites, "mid": Site("mlp_norm", "input")}),
        'site "mid": a layer has no module "mlp_norm"',
    ),
    "a site at the wrong place": (
        sites_are_found,
        replace(LLAMA, sites={**LLAMA.sites, "mid": Site("input_layernorm", "input")}),
        'sites "mid" and "mlp" do not add up to the stream after layer 0',
    ),
    "a writer of another site": (
        sites_are_found,
        replace(LLAMA, writers={**LLAMA.writers, "neurons": LLAMA.writers["heads"]}),
        'site "neurons" is 56 wide, its writer model.layers.0.self_attn.o_proj.weight reads 48',
    ),
}


@pytest.mark.parametrize(("check", "table", "message"), CASES.values(), ids=list(CASES))
def test_a_broken_table_is_reported_by_tensor_and_axis(
    tmp_path: Path, check: Check, table: Adapter, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(table, pico_folder(tmp_path / "model", head_dim=12, intermediate_size=56))


FUSED, OLMO = adapter_for("phi3"), adapter_for("olmo2")
ATTENTION = "model.layers.{i}.self_attn."


def reordered(order: str) -> Adapter:
    return replace(
        FUSED,
        fused={
            **FUSED.fused,
            f"{ATTENTION}qkv_proj.weight": tuple(
                f"{ATTENTION}{name}_proj.weight" for name in order
            ),
        },
    )


@pytest.mark.parametrize(
    ("model_type", "check", "table", "message"),
    [
        (
            "phi3",
            permutations_are_exact,
            reordered("kqv"),
            "order in `fused` is wrong, of .*0.self_attn.q_proj.weight, ",
        ),
        (
            "phi3",
            gauges_are_exact,
            reordered("qvk"),
            '"value.0" is declared .*, on model.layers.0.self_attn.v_proj.weight, ',
        ),
        (
            "phi3",
            every_tensor_is_claimed_once,
            replace(FUSED, fused={}),
            "layers.0.self_attn.qkv_proj.weight has no entry in the table",
        ),
        (
            "olmo2",
            every_tensor_is_claimed_once,
            broken(f"{ATTENTION}q_norm.weight", OLMO, axes=("head_dim.{i}",)),
            r'layers.0.self_attn.q_norm.weight: axis 0 is declared "head_dim.0" \(12\), it has 48',
        ),
        (
            "olmo2",
            every_gain_is_absorbed_by_its_readers,
            broken(Q, OLMO, gain="model.layers.{i}.post_attention_layernorm.weight"),
            r"post_attention_layernorm.weight is not absorbed by the readers that name it: "
            r"\['model.layers.0.self_attn.q_proj.weight'\]",
        ),
        (
            "olmo2",
            gauges_are_exact,
            broken(f"{ATTENTION}k_proj.weight", OLMO, gauge="key.{i}"),
            '"key.0" .* on model.layers.0.self_attn.k_proj.weight',
        ),
        (
            "qwen2",
            every_tensor_is_claimed_once,
            without(f"{ATTENTION}k_proj.bias", adapter_for("qwen2")),
            "layers.0.self_attn.k_proj.bias has no entry in the table; a projection with a bias ",
        ),
    ],
)
def test_broken_tables_of_other_architectures(
    tmp_path: Path, model_type: str, check: Check, table: Adapter, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(table, pico_folder(tmp_path / "model", model_type, head_dim=12, intermediate_size=56))


def test_every_check_of_an_adapter_is_in_the_list() -> None:
    assert {check for check, _, _ in CASES.values()} < set(ADAPTER_CHECKS)


OUTPUT = "model.layers.{i}.post_feedforward_layernorm.weight"


def test_a_norm_on_what_a_branch_writes_allows_no_rotation(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model", "gemma3_text", head_dim=12, intermediate_size=56)
    table = adapter_for("gemma3_text")
    for name in (OUTPUT, "model.layers.{i}.post_attention_layernorm.weight"):
        table = broken(name, table, is_gain=False)  # as if they were biases
    with pytest.raises(AssertionError, match="a rotation of the stream changes logits by"):
        a_rotation_of_the_stream_is_exact_or_refused(table, folder)


@pytest.mark.parametrize("name", installed_plugins(STEPS))
def test_every_step_here_is_as_specified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda *_: True
    )  # a step may ask for a package that is not installed with it
    needed: dict[str, dict[str, Any]] = {
        "chop": {"layers": 1},
        "soups": {"ingredients": ["student"]},
        "interpolation-barrier": {"between": ["variant", "elsewhere"]},
        "lm-eval": {"folder": "tasks", "tasks": ["one"]},
        "transport": {"source": "teacher"},
    }
    options = needed.get(name, {})
    for check in STEP_CHECKS[:2]:
        check(step_class(name)[0], options, tmp_path)


@parametrize_with_checks(step_class("chop")[0], {"layers": 1})
def test_a_fold_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@parametrize_with_checks(
    step_class("procrustes")[0], {}, {"tie": 1}, checks=(*STEP_CHECKS, a_planted_rotation_is_found)
)
def test_a_solver_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@step
class Spin:
    """Turn by chance."""

    use: Literal["spin"] = "spin"
    fault: str = ""
    """What it does wrong."""
    bare: int = 0

    @hookimpl
    def align(self, activations: ActivationStore, maps: Maps, pair: Pair) -> Maps:
        """See `Specs.align`."""
        R = torch.linalg.qr(
            torch.randn(pair.student.width, pair.student.width, dtype=torch.float64)
        )[0]
        if self.fault == "chance":
            return maps.add({"residual.0": Rotation(R)}, {})
        if self.fault == "input":
            activations.rows("student", 0).zero_()
            path = pair.student.folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-4] + torch.randn(1).numpy().tobytes())
        if self.fault == "none":
            return None  # type: ignore[return-value]
        return maps.add(
            {
                "residual.0": Rotation(
                    torch.full_like(R, torch.nan) if self.fault == "nan" else torch.eye(len(R))
                )
            },
            {},
        )


@step
class Astray:
    """Ask for what no hook gives."""

    use: Literal["astray"] = "astray"

    @hookimpl
    def align(self, activations: dict[str, int], maps: Maps) -> Maps:
        """See `Specs.align`."""
        return maps


@pytest.mark.parametrize(
    ("check", "cls", "fault", "message"),
    [
        (the_hook_is_as_specified, Astray, None, r"dict\[str, int\]"),
        (options_survive_toml_and_json, Spin, "", r"no text under \['bare'\]"),
        (
            it_does_the_same_again_and_changes_no_input,
            Spin,
            "chance",
            r"the result differs: \['map residual.0'\]",
        ),
        (it_does_the_same_again_and_changes_no_input, Spin, "input", "the input differs"),
        (it_does_the_same_again_and_changes_no_input, Spin, "none", "the hook gave None"),
        (hard_inputs_are_solved_or_refused, Spin, "nan", r"not finite: \['map residual.0'\]"),
        (a_planted_rotation_is_found, Spin, "", "off the planted rotation by"),
    ],
)
def test_a_broken_step_fails_its_check(
    tmp_path: Path, check: Callable[..., None], cls: type, fault: str | None, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(cls, {} if fault is None else {"fault": fault}, tmp_path)
