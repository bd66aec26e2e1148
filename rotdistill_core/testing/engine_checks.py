"""What every engine must pass: each check takes an engine class, its options, and an empty folder.

An engine answers in the name of a pico model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rotdistill_core.forward.answers import KeptAnswers, kept_answers
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.plugin.engine import Answering, Asked, settings_of
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.step import options_of, validator_of
from rotdistill_core.testing.pico import pico_model, pico_output

Options = Mapping[str, Any]
ASKED = {f"q{k}": Asked(tuple(range(10, 13 + k)), 1 + k) for k in range(8)}
"""Prompts of several lengths, with answers of several lengths."""
DRAWN = {
    name: replace(each, temperature=1.0, seed=k) for k, (name, each) in enumerate(ASKED.items())
}


def _instance(cls: type, options: Options) -> Any:
    return validator_of(cls).validate_json(json.dumps(options), strict=True)


def _answered(
    cls: type, options: Options, folder: Path, asked: Mapping[str, Asked]
) -> tuple[AnsweringModel, KeptAnswers, Answering]:
    """Let an engine answer as a run does; return the model, the answers and the engine."""
    engine = _instance(cls, options)
    model = AnsweringModel.of(pico_model(folder / "model"))
    connected: list[Answering] = []

    def connect(model: AnsweringModel, log: Callable[[str], None]) -> Answering:
        given = {"model": model, "folder": folder, "log": log}
        taken = inspect.signature(engine.connect).parameters
        connected.append(engine.connect(**{name: given[name] for name in taken}))
        return connected[0]

    out = pico_output(folder / "runs")
    kept = kept_answers(connect, model, asked, out, "checked", lambda *_: None)
    return model, kept, connected[0]


def the_hook_is_as_specified(cls: type, _: Options, __: Path) -> None:
    """`connect` takes no argument that there is not."""
    known = {*inspect.signature(HookSpecs.connect).parameters}
    unknown = {*inspect.signature(cls.connect).parameters} - known  # type: ignore[attr-defined]
    assert not unknown, f"`connect` takes {sorted(unknown)}, and nothing gives it"


def options_are_described_and_survive_json(cls: type, options: Options, _: Path) -> None:
    """Options come back from JSON, and each has a docstring."""
    engine = _instance(cls, options)
    again = _instance(cls, options_of(engine))
    assert options_of(again) == options_of(engine)
    assert settings_of(engine).keys() <= options_of(engine).keys()
    described = validator_of(cls).json_schema()["properties"]
    for field in fields(cls):
        assert field.name == "use" or described[field.name].get("description"), field.name


def every_prompt_is_answered_once(cls: type, options: Options, folder: Path) -> None:
    """Each prompt gets 1 to `max_tokens` tokens that the model knows, and a right ending."""
    model, kept, _ = _answered(cls, options, folder, ASKED)
    assert list(kept.answers) == list(ASKED)
    for name, answer in kept.answers.items():
        model.require_known_tokens(answer.tokens, name)
        ends = [token in model.stops for token in answer.tokens]
        assert not any(ends[:-1]), f"{name} goes on after a token that ends it"
        assert answer.finish == ("stop" if ends[-1] else "length"), name


def the_record_says_who_answered(cls: type, options: Options, folder: Path) -> None:
    """`about` is JSON, and names engine and version."""
    _, __, engine = _answered(cls, options, folder, ASKED)
    about = json.loads(json.dumps(engine.about))
    assert about["engine"]
    assert about["version"]


def greedy_answers_come_again(cls: type, options: Options, folder: Path) -> None:
    """Asked twice, an engine answers the same."""
    _, first, __ = _answered(cls, options, folder / "one", ASKED)
    _, second, __ = _answered(cls, options, folder / "two", ASKED)
    assert first.answers == second.answers


def a_drawn_answer_follows_its_seed(cls: type, options: Options, folder: Path) -> None:
    """What is drawn for a prompt does not depend on the other prompts."""
    _, every, __ = _answered(cls, options, folder / "all", DRAWN)
    few = {name: DRAWN[name] for name in ("q6", "q3")}
    _, some, __ = _answered(cls, options, folder / "some", few)
    assert some.answers == {name: every.answers[name] for name in few}


ENGINE_CHECKS: tuple[Callable[[type, Options, Path], None], ...] = (
    the_hook_is_as_specified,
    options_are_described_and_survive_json,
    every_prompt_is_answered_once,
    the_record_says_who_answered,
    greedy_answers_come_again,
    a_drawn_answer_follows_its_seed,
)
"""All checks of an engine."""
