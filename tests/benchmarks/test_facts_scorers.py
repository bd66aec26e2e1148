"""benchmarks/facts_scorers.py scores claims behind a shared prompt as a model does by itself."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rotdistill_answers._normalize import normalize

from rotdistill_core.data.conversations import Claim
from rotdistill_core.testing import pico_folder

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/facts_scorers.py"


@pytest.fixture(scope="module")
def scorers() -> ModuleType:
    spec = spec_from_file_location("facts_scorers", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_claims_are_as_likely_as_each_by_itself(scorers: ModuleType, tmp_path: Path) -> None:
    words = {"1": "w5", "2": "w7 w8 w9", "a": "w1 w2"}
    question = scorers.Question("w3 w4", {key: Claim(what, ()) for key, what in words.items()})
    model = scorers.Likelihood(str(pico_folder(tmp_path / "model")))
    found = model.log_likelihoods(question, "w6\n")

    tokenizer = model.tokenizer
    chat = [{"role": "user", "content": "w3 w4"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before = tokenizer.encode(prompt + "w6\n", add_special_tokens=False)
    for key, what in words.items():
        claim = tokenizer.encode(what, add_special_tokens=False)
        with torch.no_grad():
            logits = model.loaded(torch.tensor([before + claim])).logits[0, len(before) - 1 : -1]
        alone = logits.log_softmax(-1)[torch.arange(len(claim)), torch.tensor(claim)].sum()
        assert found[key] == pytest.approx(float(alone), abs=1e-4)


def test_the_threshold_is_the_one_with_most_right_decisions(scorers: ModuleType) -> None:
    labels = scorers.FACTS + scorers.FALSEHOODS
    answers = [scorers.Answer("q", "en", "", frozenset("135"))]
    ratios = [{label: 5.0 if label in "135" else float(k) / 10 for k, label in enumerate(labels)}]
    limit = scorers.best_threshold(answers, ratios)
    assert 0.9 <= limit < 5
    inverse = [{label: -value for label, value in ratios[0].items()}]
    # No threshold parts them, so the best one finds no claim.
    assert scorers.best_threshold(answers, inverse) == max(inverse[0].values())


def test_only_the_shipped_scorer_reads_denials(scorers: ModuleType) -> None:
    claim = Claim("in 1889", ("1889",))
    text = normalize("It was not built in 1889.", "en")
    for label in ("1", "a"):
        assert scorers.by_phrase(text, "en", claim, label)
        assert scorers.as_shipped(text, "en", claim, label) == (label == "1")
