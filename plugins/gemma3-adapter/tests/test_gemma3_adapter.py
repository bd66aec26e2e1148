"""The gemma3_text table against pico checkpoints of plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_gemma3_adapter.table import GEMMA3, adapters

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import PluginError, SetupError
from rotdistill_core.forward.generate import greedy_answers
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    ADAPTER_CHECKS,
    logits,
    pico_folder,
    pico_samples,
    plain_transformers,
    reopen,
    save_folder,
)

MIXED = ["sliding_attention", "full_attention"]
CHANGES: list[dict[str, object]] = [
    {"head_dim": 12, "intermediate_size": 56, "sliding_window": 5},
    {
        "head_dim": 6,
        "layer_types": MIXED,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    {
        "head_dim": 12,
        "layer_types": MIXED,
        "sliding_window": 5,
        "num_key_value_heads": 1,
        "final_logit_softcapping": 3.0,
    },
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapters() == [GEMMA3]
    assert adapter_for("gemma3_text") is GEMMA3


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[[Adapter, Path], None], changes: dict[str, object]
) -> None:
    check(GEMMA3, pico_folder(tmp_path / "model", "gemma3_text", **changes))


def rewrite(folder: Path, *without: str, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


def test_a_config_of_the_first_release_is_completed_and_follows_a_cut(tmp_path: Path) -> None:
    folder = pico_folder(
        tmp_path / "model", "gemma3_text", num_hidden_layers=5, head_dim=12, sliding_window=5
    )
    left_out = (
        "tie_word_embeddings",
        "layer_types",
        "rope_parameters",
        "_sliding_window_pattern",
        "rms_norm_eps",
    )
    rewrite(
        folder,
        *left_out,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=None,
    )
    model, layout = open_model(ModelRef(model=str(folder))), pico_samples(texts=4).layout
    s, f = "sliding_attention", "full_attention"
    assert model.config["layer_types"] == [s, f, s, f, s]
    torch.testing.assert_close(
        logits(model.weights, layout),
        plain_transformers(GEMMA3, folder, layout)[1],
        rtol=0,
        atol=1e-5,
    )
    short = model.weights.cut([0, 2, 3])
    assert short.config["layer_types"] == [s, s, f]
    save_folder(short, folder, tmp_path / "cut")
    expected = plain_transformers(GEMMA3, tmp_path / "cut", layout)[1]
    torch.testing.assert_close(
        logits(reopen(tmp_path / "cut", short), layout), expected, rtol=0, atol=1e-5
    )


def test_answers_in_a_batch_are_those_of_every_prompt_alone(tmp_path: Path) -> None:
    folder = pico_folder(
        tmp_path / "model", "gemma3_text", seed=3, head_dim=12, layer_types=MIXED, sliding_window=12
    )
    shared = list(range(10, 18))
    prompts = {str(n): [*shared, *range(20 + n, 20 + 2 * n)] for n in (2, 5, 9, 14)} | {
        "same": [*shared, 7, 9]
    }
    together = greedy_answers(
        folder, prompts, 12, torch.device("cpu"), torch.float32, lambda *_: None
    )
    assert together == {
        k: greedy_answers(folder, {k: p}, 12, torch.device("cpu"), torch.float32, lambda *_: None)[
            k
        ]
        for k, p in prompts.items()
    }


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = rewrite(
        pico_folder(tmp_path / "model", "gemma3_text", head_dim=12),
        use_bidirectional_attention=True,
    )
    with pytest.raises(SetupError, match="use_bidirectional_attention = True is not covered"):
        open_model(ModelRef(model=str(folder)))


def test_the_multimodal_wrapper_is_refused(tmp_path: Path) -> None:
    folder = rewrite(
        pico_folder(tmp_path / "model", "gemma3_text", head_dim=12), model_type="gemma3"
    )
    with pytest.raises(PluginError, match='no adapter for model type "gemma3" is installed'):
        open_model(ModelRef(model=str(folder)))
