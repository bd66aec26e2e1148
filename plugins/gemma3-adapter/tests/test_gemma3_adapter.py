"""The gemma3_text table holds for its plain config, completes old ones, and refuses others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_gemma3_adapter.table import GEMMA3

from rotdistill_core.checkpoint.open import open_checkpoint, open_model
from rotdistill_core.errors import PluginError, SetupError
from rotdistill_core.forward.generate import AnsweringModel, greedy_answers
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    logits,
    parametrize_with_checks,
    pico_folder,
    pico_samples,
    plain_transformers,
    reopen,
    save_folder,
)

SLIDING, FULL = "sliding_attention", "full_attention"


@parametrize_with_checks(GEMMA3, {"head_dim": 12, "sliding_window": 5})
def test_gemma3_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def rewrite_config(folder: Path, *without: str, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


def test_a_config_of_the_first_release_is_completed_and_follows_a_cut(tmp_path: Path) -> None:
    folder = pico_folder(
        tmp_path / "model", "gemma3_text", num_hidden_layers=5, head_dim=12, sliding_window=5
    )
    rewrite_config(
        folder,
        "tie_word_embeddings",
        "layer_types",
        "rope_parameters",
        "_sliding_window_pattern",
        "rms_norm_eps",
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=None,
    )
    model, layout = open_model(ModelRef(model=str(folder))), pico_samples(texts=4).layout
    assert model.config["layer_types"] == [SLIDING, FULL, SLIDING, FULL, SLIDING]
    plain = plain_transformers(GEMMA3, folder, layout)[1]
    torch.testing.assert_close(logits(model.weights, layout), plain, rtol=0, atol=1e-5)

    short = model.weights.cut([0, 2, 3])
    assert short.config["layer_types"] == [SLIDING, SLIDING, FULL]
    save_folder(short, folder, tmp_path / "cut")
    plain = plain_transformers(GEMMA3, tmp_path / "cut", layout)[1]
    again = reopen(tmp_path / "cut", short)
    torch.testing.assert_close(logits(again, layout), plain, rtol=0, atol=1e-5)


def test_answers_in_a_batch_are_those_of_every_prompt_alone(tmp_path: Path) -> None:
    folder = pico_folder(
        tmp_path / "model",
        "gemma3_text",
        seed=3,
        head_dim=12,
        layer_types=[SLIDING, FULL],
        sliding_window=12,
    )
    shared = list(range(10, 18))
    prompts = {str(n): [*shared, *range(20 + n, 20 + 2 * n)] for n in (2, 5, 9, 14)}
    prompts["same"] = [*shared, 7, 9]

    def answers(asked: dict[str, list[int]]) -> dict[str, list[int]]:
        weights = open_checkpoint(folder).weights
        model = AnsweringModel(folder, weights, torch.device("cpu"), torch.float32)
        return greedy_answers(model, asked, 12)

    alone = {name: answers({name: prompt})[name] for name, prompt in prompts.items()}
    assert answers(prompts) == alone


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model", "gemma3_text", head_dim=12)
    rewrite_config(folder, use_bidirectional_attention=True)
    with pytest.raises(SetupError, match="use_bidirectional_attention = True is not covered"):
        open_model(ModelRef(model=str(folder)))


def test_the_multimodal_wrapper_is_refused(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model", "gemma3_text", head_dim=12)
    rewrite_config(folder, model_type="gemma3")
    with pytest.raises(PluginError, match='no adapter for model type "gemma3" is installed'):
        open_model(ModelRef(model=str(folder)))
