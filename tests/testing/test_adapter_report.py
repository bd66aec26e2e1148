"""A wrong table ends in one failure that lists all that is wrong, the most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import (
    adapter_problems,
    defaults_are_those_of_the_config_class,
    every_gain_is_absorbed_by_its_readers,
    every_tensor_is_claimed_once,
    gauges_are_exact,
    parametrize_with_checks,
    the_layerwise_forward_computes_what_transformers_computes,
)

LLAMA = adapter_for("llama")
UP, GATE, Q = (
    f"model.layers.{{i}}.{name}.weight"
    for name in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")
)
WRONG_DEFAULT = 'defaults: "rms_norm_eps" is 1.0, transformers takes 1e-06'
QUICK = (
    defaults_are_those_of_the_config_class,
    gauges_are_exact,
    every_gain_is_absorbed_by_its_readers,
    the_layerwise_forward_computes_what_transformers_computes,
    every_tensor_is_claimed_once,
)


def broken(**changes: dict[str, object]) -> Adapter:
    """Return the llama table with records changed: `up={"gain": None}`."""
    params = dict(LLAMA.params)
    for name, change in changes.items():
        key = {"up": UP, "gate": GATE, "q": Q}[name]
        params[key] = replace(params[key], **change)  # type: ignore[arg-type]
    return replace(LLAMA, params=params, defaults=lambda _: {"rms_norm_eps": 1.0})


def test_a_table_that_holds_has_no_problems(tmp_path: Path) -> None:
    assert adapter_problems(LLAMA, tmp_path, checks=QUICK) == []


def test_problems_come_by_importance_and_layers_are_one(tmp_path: Path) -> None:
    table = broken(up={"gain": None}, gate={"gauge": "up.{i}"})
    unabsorbed, gauge, default = adapter_problems(table, tmp_path, checks=QUICK)
    assert unabsorbed == (
        f"{UP}: axis 1 reads after model.layers.{{i}}.post_attention_layernorm.weight and does not "
        "name it as its gain"
    )
    assert gauge.startswith('"up.{i}" is declared a gauge and changes logits by ')
    assert default == WRONG_DEFAULT


def test_what_builds_on_wrong_tensors_waits_for_them(tmp_path: Path) -> None:
    table = broken(up={"gain": None}, q={"axes": ("kv.{i}", "residual")})
    cases = {"head_dim": 8}, {"head_dim": 12}, {"num_key_value_heads": 4}
    same, narrow, rest = adapter_problems(table, tmp_path, *cases, checks=QUICK)
    assert same.startswith(f'{Q}: axis 0 is declared "kv.{{i}}" (16), it has 32')
    assert same.endswith("(case 1 of 3)")
    assert narrow.endswith("(case 2 of 3)")
    # Where there are as many keys as queries, nothing is seen of it.
    assert rest.startswith("not checked before these are right: defaults_are_those_of")
    assert "every_gain_is_absorbed_by_its_readers" in rest


def test_whatever_a_wrong_table_raises_is_listed(tmp_path: Path) -> None:
    table = replace(LLAMA, eps_key="no_such_key")
    first, *others = adapter_problems(table, tmp_path, checks=QUICK)
    assert first.endswith(", gauges_are_exact: KeyError: 'no_such_key'")
    assert not any("KeyError" in problem for problem in others)


def test_transformers_prints_nothing_meanwhile(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enable_progress_bar()
    try:
        adapter_problems(broken(up={"gain": None}), tmp_path, checks=QUICK)
        assert is_progress_bar_enabled()
    finally:
        disable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_an_adapter_is_one_test(tmp_path: Path) -> None:
    decorate = parametrize_with_checks(broken(up={"gain": None}), {}, {"head_dim": 12})
    (one,) = decorate.args[1]
    held: Callable[[Path], None] = one.values[0]
    with pytest.raises(pytest.fail.Exception, match=r"the table of llama is wrong:\n1. model") as e:
        held(tmp_path)
    assert f"\n2. {WRONG_DEFAULT}\n3. not checked before these are right: " in str(e.value)
    assert str(e.value).endswith("case 1 is {}\ncase 2 is {'head_dim': 12}")


def test_a_table_has_no_check_that_may_fail() -> None:
    with pytest.raises(ValueError, match="a table that fails a check computes wrongly"):
        parametrize_with_checks(LLAMA, expected_failures={"gauges_are_exact": "it is new"})
