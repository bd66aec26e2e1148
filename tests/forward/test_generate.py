"""Greedy answers in batches, compared with one prompt after the other in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.generate import (
    AnsweringModel,
    AnswerWriter,
    greedy_answers,
    unconfirmed_token,
)
from rotdistill_core.forward.growth import GrowingAnswer, Growth, add_tokens
from rotdistill_core.forward.slots import Slots, attend, fits_slots
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.testing import pico_folder
from rotdistill_core.testing.pico import PICO

CPU = torch.device("cpu")
END = 2


def prompts(shared: int) -> dict[str, list[int]]:
    """Return prompts of several lengths with a shared beginning."""
    prefix = list(range(10, 10 + shared))
    lengths = (3, 5, 5, 9)
    return {f"q{k}": [*prefix, *range(20 + 7 * k, 20 + 7 * k + n)] for k, n in enumerate(lengths)}


def model_in(folder: Path) -> AnsweringModel:
    return AnsweringModel(folder, open_checkpoint(folder).weights, CPU, torch.float32)


def answered(folder: Path, prompts: dict[str, list[int]], tokens: int) -> dict[str, list[int]]:
    """Return what the model of a folder answers on the CPU in float32."""
    return greedy_answers(model_in(folder), prompts, tokens)


def greedy_alone(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """Return the greedy continuation, one token at a time, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


FULL: dict[str, dict[str, Any]] = {
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "llama": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"sliding_window": None},
    "qwen2": {"sliding_window": 6, "use_sliding_window": False},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"head_dim": 8, "layer_types": ["sliding_attention"] * 2, "sliding_window": 6}
    | {"use_sliding_window": True},
}
ALL = [*FULL.items(), *WINDOWS.items()]


@pytest.mark.parametrize("shared", [0, 3])
def test_scores_in_the_hundreds_keep_their_digits_in_bfloat16(shared: int) -> None:
    """Qwen2.5 has such scores, where neighbours in bfloat16 are 1 apart and more."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 8, 64, generator=draw, dtype=torch.float64).bfloat16()
    key += 5
    query += 5
    module = nn.Module()
    module.layer_idx = 0
    slots = Slots(1, 8 - shared)
    if shared:
        slots.begin_shared(shared, CPU)
        slots.update(key[:, :, :shared], value[:, :, :shared], 0)
    slots.place(0, torch.arange(8 - shared)[None], 8 - shared)
    own = slots.update(key[:, :, shared:], value[:, :, shared:], 0)
    found, _ = attend(module, query[:, :, shared:], *own, None, slots=slots, scaling=0.125)
    scores = query.double() @ key.double().transpose(2, 3) * 0.125
    assert scores.min() > 100
    weights = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf")).softmax(-1)
    right = (weights @ value.double()).transpose(1, 2)[:, shared:]
    assert float((found.double() - right).norm() / right.norm()) < 0.01


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize(
    ("model_type", "changes"), ALL, ids=[f"{name}-{len(config)}" for name, config in ALL]
)
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    tmp_path: Path, shared: int, model_type: str, changes: dict[str, Any]
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, **changes)
    asked = prompts(shared)
    answers = answered(folder, asked, 6)
    assert answers == {name: greedy_alone(folder, prompt, 6) for name, prompt in asked.items()}


def model_of(model_type: str, **changes: Any) -> Any:
    """Return a model of a type that need not have an adapter."""
    settings = {**PICO, "head_dim": 8, **changes}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("shared", [0, 4])
def test_a_slot_that_becomes_free_takes_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: int, width: int
) -> None:
    folder = pico_folder(tmp_path / "model", "gemma3_text", **WINDOWS["gemma3_text"])
    asked = {
        name: Asked(tuple(p), 2 + 3 * k) for k, (name, p) in enumerate(prompts(shared).items())
    }
    rows: list[int] = []
    plain = Growth._logits

    def noted(growth: Growth, ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(ids))
        return plain(growth, ids)

    monkeypatch.setattr(Growth, "_logits", noted)
    writer = AnswerWriter(model_in(folder), print)
    writer.at_once = width
    answers = {name: list(answer.tokens) for name, answer in writer.answers(asked)}
    assert max(rows) == width
    assert answers == {
        name: greedy_alone(folder, list(each.prompt), each.max_tokens)
        for name, each in asked.items()
    }
    # What is computed is what is answered: a row for each token, and none for ended answers.
    assert sum(rows) == sum(map(len, answers.values())) + bool(shared)


def test_a_model_without_attention_by_name_answers_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico_folder(tmp_path / "model")
    expected = answered(folder, prompts(4), 6)
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    monkeypatch.setattr(Growth, "run", None)
    assert answered(folder, prompts(4), 6) == expected


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("gemma2", {}), ("gpt_oss", {}), ("qwen3_next", {}), ("llama4_text", {})],
)
def test_what_slots_do_not_hold_is_seen(model_type: str, changes: dict[str, Any]) -> None:
    assert not fits_slots(model_of(model_type, **changes))


def drawn(folder: Path, width: int, names: str = "abcdef", seed: int = 0) -> dict[str, list[int]]:
    writer = AnswerWriter(model_in(folder), print)
    writer.at_once = width
    asked = {
        name: Asked((10, 11, 12), 6, temperature=1.5, seed=seed + k)
        for k, name in enumerate("abcdef")
        if name in names
    }
    return {name: list(answer.tokens) for name, answer in writer.answers(asked)}


def test_what_is_drawn_follows_from_the_seed_of_an_answer_alone(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    together = drawn(folder, 6)
    assert drawn(folder, 2) == drawn(folder, 1) == together
    assert drawn(folder, 6, "bdf") == {name: together[name] for name in "bdf"}
    assert drawn(folder, 6, seed=100) != together
    assert len({tuple(tokens) for tokens in together.values()}) > 3


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([1.0, float("-inf"), 0.0, 2.0]).expand(4000, 4)
    growing = [
        GrowingAnswer(str(k), Asked((1,), 1, temperature=2.0, seed=k), 1) for k in range(4000)
    ]
    add_tokens(growing, logits)
    counts = torch.bincount(torch.tensor([each.tokens[0] for each in growing]), minlength=4)
    expected = (logits[0] / 2).softmax(0) * 4000
    assert counts[1] == 0
    assert float(((counts - expected) ** 2)[[0, 2, 3]].div(expected[[0, 2, 3]]).sum()) < 14


@pytest.mark.parametrize("model_type", ["phi3", "gemma3_text", "qwen2"])
def test_an_answer_that_no_forward_pass_confirms_is_refused_by_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    plain = Slots.hidden_columns
    monkeypatch.setattr(Slots, "hidden_columns", lambda slots, _: plain(slots, None))
    folder = pico_folder(tmp_path / "model", model_type, **WINDOWS[model_type])
    with pytest.raises(CheckFailed, match=r"model: the answer to 'q\d': its token \d") as caught:
        answered(folder, prompts(4), 6)
    assert caught.value.exit_code == 4


def test_the_best_token_up_to_rounding_is_confirmed(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    model = whole_model(open_checkpoint(folder).weights, CPU, torch.float32)
    prompt = [10, 11, 12]
    answer = greedy_alone(folder, prompt, 4)
    assert unconfirmed_token(model, prompt, answer) == ""
    wrong = [*answer[:-1], (answer[-1] + 1) % 64]
    assert f"its token {len(answer)} ({wrong[-1]})" in unconfirmed_token(model, prompt, wrong)
    with torch.no_grad():
        model.lm_head.weight[wrong[-1]] = model.lm_head.weight[answer[-1]] * (1 - 1e-5)
    assert unconfirmed_token(model, prompt, wrong) == ""
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert "its token 1 " in unconfirmed_token(model, prompt, answer)


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    | {"original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_answers_below_the_limit_of_rotary_tables_are_plain(tmp_path: Path, rope: str) -> None:
    folder = rope_folder(tmp_path, rope)
    asked = {name: prompt for name, prompt in prompts(4).items() if len(prompt) <= 10}
    answers = answered(folder, asked, 6)
    assert answers == {name: greedy_alone(folder, prompt, 6) for name, prompt in asked.items()}


@pytest.mark.parametrize("rope", ROPES)
def test_an_answer_that_passes_the_limit_of_rotary_tables_is_refused(
    tmp_path: Path, rope: str
) -> None:
    folder = rope_folder(tmp_path, rope)
    with pytest.raises(SetupError, match=r"text 'q3': has a prompt of 13 tokens.* passes 16"):
        answered(folder, prompts(4), 6)


def test_prompts_beyond_the_limit_have_the_long_tables_throughout(tmp_path: Path) -> None:
    folder = rope_folder(tmp_path, "longrope")
    asked = {"short": [10, 11, 12, 13], "long": list(range(10, 30)), "longer": list(range(10, 33))}
    answers = answered(folder, asked, 6)
    assert answers == {name: greedy_alone(folder, prompt, 6) for name, prompt in asked.items()}


def rope_folder(root: Path, rope: str) -> Path:
    settings = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]}
    if rope == "dynamic":
        return pico_folder(root / "model", rope_parameters=settings, max_position_embeddings=16)
    return pico_folder(
        root / "model", "phi3", rope_parameters=settings, original_max_position_embeddings=16
    )


def test_tokens_beyond_the_embedding_are_refused_by_text(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    with pytest.raises(SetupError, match=r"token 64 of the text 'b', and its embedding has 64"):
        answered(folder, {"a": [10, 63], "b": [10, 64]}, 2)


@pytest.mark.parametrize("ends", [None, [], 2, [2, 3]], ids=str)
def test_end_tokens_may_be_missing_one_or_several(tmp_path: Path, ends: object) -> None:
    folder = pico_folder(tmp_path / "model")
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    answers = answered(folder, {"q": [10, 11, 12]}, 4)
    assert 1 <= len(answers["q"]) <= 4


WRONG_SETTINGS = {
    "a list": "[]",
    "torn": "{",
    "text": '{"eos_token_id": "<end>"}',
    "a fraction": '{"eos_token_id": 2.5}',
    "text in a list": '{"eos_token_id": [2, "<end>"]}',
    "negative": '{"eos_token_id": -1}',
    "a truth value": '{"eos_token_id": true}',
}


@pytest.mark.parametrize("text", WRONG_SETTINGS.values(), ids=list(WRONG_SETTINGS))
def test_wrong_generation_settings_are_refused_when_the_model_opens(
    tmp_path: Path, text: str
) -> None:
    folder = pico_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(SetupError, match=r"generation_config\.json: ") as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 3


def test_answer_ends_with_the_first_end_token(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tokens = greedy_alone(folder, [10, 11, 12], 6)
    end = tokens[2]
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = end
    settings.save_pretrained(folder)
    answers = answered(folder, {"q": [10, 11, 12]}, 6)
    assert answers == {"q": tokens[: tokens.index(end) + 1]}
    assert len(answers["q"]) < len(tokens)
