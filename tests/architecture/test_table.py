"""A table expands to parameters and sizes, and compares a checkpoint with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rotdistill_core.architecture.rope_decoder import ATTENTION, MLP, rope_decoder
from rotdistill_core.errors import SetupError

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
TABLE = rope_decoder(("trial",))


def shapes() -> dict[str, tuple[int, ...]]:
    sizes = TABLE.sizes(CONFIG)
    return {n: tuple(sizes[a] for a in p.axes) for n, p in TABLE.expand(CONFIG).items()}


def test_spaces_have_the_sizes_of_the_config() -> None:
    sizes = TABLE.sizes(CONFIG)
    assert (sizes["residual"], sizes["vocab"]) == (8, 16)
    assert (sizes["q.1"], sizes["kv.1"], sizes["neurons.1"], sizes["head_dim.0"]) == (8, 4, 12, 2)


def test_every_layer_has_its_own_spaces_gains_and_gauges() -> None:
    value = TABLE.expand(CONFIG)["model.layers.1.self_attn.v_proj.weight"]
    assert value.axes == ("kv.1", "residual")
    assert value.gain == "model.layers.1.input_layernorm.weight"
    assert value.gauge == "value.1"


def test_a_fitting_checkpoint_passes() -> None:
    TABLE.check(CONFIG, shapes(), "here")


def test_a_tied_head_and_optional_biases_may_be_absent() -> None:
    table = rope_decoder(("trial",), optional_biases=("q",))
    without_head = {name: shape for name, shape in shapes().items() if name != table.head}
    table.check({**CONFIG, "tie_word_embeddings": True}, without_head, "here")
    with pytest.raises(SetupError, match=r"lm_head.weight is missing \(expected \[16, 8\]\)"):
        table.check(CONFIG, without_head, "here")


def test_only_the_first_differences_are_listed() -> None:
    with pytest.raises(SetupError, match=r"here: .*; and \d+ more"):
        TABLE.check(CONFIG, {}, "here")


def test_a_config_that_the_table_does_not_cover_is_refused() -> None:
    table = replace(TABLE, refuses={"act": ("relu",)})
    table.check({**CONFIG, "act": "silu"}, shapes(), "here")
    with pytest.raises(SetupError, match="act = 'relu' is not covered by this table"):
        table.check({**CONFIG, "act": "relu"}, shapes(), "here")


@pytest.mark.parametrize(
    ("setting", "covered"),
    [
        ({}, True),
        ({"scale": None}, True),
        ({"scale": 1.0}, True),
        ({"scale": 1}, True),
        ({"scale": 8.0}, False),
        ({"scale": 0}, False),
        ({"kind": "a"}, True),
        ({"kind": "b"}, True),
        ({"kind": "c"}, False),
        ({"kind": ["a"]}, False),
        ({"per_layer_config": {}}, True),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, False),
    ],
    ids=str,
)
def test_a_table_holds_only_under_what_it_requires(
    setting: dict[str, object], covered: bool
) -> None:
    table = replace(TABLE, requires={"scale": 1.0, "kind": ("a", "b")})
    config = {**CONFIG, **setting}
    if covered:
        table.check(config, shapes(), "here")
        return
    [key] = setting
    with pytest.raises(SetupError, match=f"here: .*{key}"):
        table.check(config, shapes(), "here")


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("setting", "covered"),
    [
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, False),
        ({"rope_parameters": LINEAR, "partial_rotary_factor": 0.5}, False),
        ({"rope_scaling": {"type": "yarn"}, "partial_rotary_factor": 0.75}, False),
        ({"rope_parameters": {"a": {}, "b": {**LINEAR, "partial_rotary_factor": 0.5}}}, False),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}}, True),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": None}}, True),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, True),
        (
            {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
            True,
        ),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5}, True),
    ],
    ids=str,
)
def test_tables_too_narrow_for_whole_heads_are_refused(
    setting: dict[str, object], covered: bool
) -> None:
    config = {**CONFIG, **setting}
    replace(TABLE, partial_rotary=True).check(config, shapes(), "here")
    if covered:
        TABLE.check(config, shapes(), "here")
        return
    with pytest.raises(SetupError, match=r"here: .*partial_rotary_factor = 0"):
        TABLE.check(config, shapes(), "here")


def test_multipliers_are_1_without_a_key_or_a_value() -> None:
    assert TABLE.residual_multiplier(CONFIG) == TABLE.embedding_multiplier(CONFIG) == 1.0
    table = replace(TABLE, residual_multiplier_key="m", embedding_multiplier_key="e")
    assert table.residual_multiplier(CONFIG) == table.embedding_multiplier(CONFIG) == 1.0
    config = {**CONFIG, "m": 0.22, "e": 12}
    assert (table.residual_multiplier(config), table.embedding_multiplier(config)) == (0.22, 12.0)


def test_a_fused_tensor_is_seen_as_its_parts() -> None:
    whole, parts = f"{MLP}gate_up_proj.weight", (f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight")
    table = rope_decoder(("trial",), fused={whole: parts})
    names = {part.replace("{i}", str(i)) for part in parts for i in range(2)}
    fused = {name: shape for name, shape in shapes().items() if name not in names}
    fused |= {whole.replace("{i}", str(i)): (24, 8) for i in range(2)}
    table.check(CONFIG, fused, "here")
    assert table.unfused(CONFIG, fused) == shapes()


def test_a_fused_tensor_of_another_height_stays_whole_to_be_reported() -> None:
    whole, parts = f"{MLP}gate_up_proj.weight", (f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight")
    table = rope_decoder(("trial",), fused={whole: parts})
    too_short: dict[str, tuple[int, ...]] = {whole.replace("{i}", "0"): (23, 8)}
    assert table.unfused(CONFIG, too_short) == too_short


def test_gains_are_absorbed_where_readers_name_them_and_stuck_elsewhere() -> None:
    absorbed, stuck = TABLE.gains(CONFIG)
    assert len(absorbed) == 5
    assert stuck == []
    outputs = rope_decoder(("trial",), output_norms=("post_norm",)).gains(CONFIG)
    assert outputs.stuck == [f"model.layers.{i}.post_norm.weight" for i in range(2)]


def test_head_norms_take_the_key_gauge_away() -> None:
    table = rope_decoder(("trial",), head_norms=("q_norm", "k_norm"))
    assert TABLE.params[f"{ATTENTION}q_proj.weight"].gauge == "key.{i}*"
    assert table.params[f"{ATTENTION}q_proj.weight"].gauge == ""
    assert table.params[f"{ATTENTION}v_proj.weight"].gauge == "value.{i}"


def test_missing_keys_of_a_config_are_completed() -> None:
    table = replace(TABLE, defaults=lambda _: {"head_dim": 3, "rms_norm_eps": 1e-5})
    completed = table.completed({**CONFIG, "head_dim": 2, "rms_norm_eps": None})
    assert (completed["head_dim"], completed["rms_norm_eps"]) == (2, 1e-5)


def test_biases_that_the_table_lacks_are_one_line_for_all_layers() -> None:
    q, kv = ((n,) for n in (TABLE.sizes(CONFIG)["q.0"], TABLE.sizes(CONFIG)["kv.0"]))
    biases = {
        f"{ATTENTION}{x}_proj.bias".replace("{i}", str(i)): s
        for i in range(2)
        for x, s in (("q", q), ("k", kv))
    }
    with pytest.raises(SetupError) as caught:
        TABLE.check(CONFIG, {**shapes(), **biases}, "here")
    hint = (
        "is not in the table; a projection with a bias belongs in `biases`, or in "
        "`optional_biases` where the config switches it"
    )
    names = [f"{ATTENTION}{x}_proj.bias" for x in "qk"]
    wanted = "; ".join(f"{name} {hint}" for name in names)
    assert str(caught.value).endswith(f"the adapter for trial: {wanted}.")
