"""Hostile tokenizers, settings of generation, and chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.inputs import ANY, Input, edit_json, write_bytes

BAD = frozenset({3})


def tokenizer_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    yield from _tokenizers()
    yield from _templates()


def _tokenizers() -> Iterator[Input]:
    kind = "tokenizers"
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        for title, data in {
            "empty": b"",
            "{}": b"{}",
            "a list": b"[]",
            "garbage": b"\xff\x00garbage",
            "null": b"null",
            "deep": b'{"a":' * 50_000,
            "ESC": b'{"\\u001b[31m": "\\u001b]0;x\\u0007"}',
        }.items():
            change = partial(write_bytes, file=f"model/{file}", data=data)
            yield Input(kind, f"{file}: {title}", change, ANY, early=True)
    edits: dict[str, tuple[str, dict[str, Any]]] = {
        "a vocabulary that is a list": (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": []}},
        ),
        "ids beyond the embedding": (
            "tokenizer.json",
            {
                "model": {
                    "type": "WordLevel",
                    "unk_token": "<unk>",
                    "vocab": {
                        "<pad>": 0,
                        "<unk>": 1,
                        "<end>": 2,
                        **{f"w{k}": 10**6 + k for k in range(58)},
                    },
                }
            },
        ),
        "no unknown token": (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "unk_token": "<nope>", "vocab": {"w1": 0}}},
        ),
        "an unknown model": ("tokenizer.json", {"model": {"type": "Evil"}}),
        "a pattern that never ends": (
            "tokenizer.json",
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(w+w+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
        ),
        "a pattern that is none": (
            "tokenizer.json",
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
        ),
        "a normaliser that deletes all": (
            "tokenizer.json",
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}},
        ),
        "a normaliser that multiplies": (
            "tokenizer.json",
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "w"}, "content": "w " * 2000}},
        ),
        "no end token": ("tokenizer_config.json", {"eos_token": None}),
        "an end token that is a number": ("tokenizer_config.json", {"eos_token": 7}),
        "an end token that is not there": ("tokenizer_config.json", {"eos_token": "<nope>"}),
        "a class of no tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
        "a length that is text": ("tokenizer_config.json", {"model_max_length": "x"}),
        "a length of 4": ("tokenizer_config.json", {"model_max_length": 4}),
        "padding left": ("tokenizer_config.json", {"padding_side": "evil"}),
        "an end id that is text": ("generation_config.json", {"eos_token_id": "x"}),
        "an end id beyond": ("generation_config.json", {"eos_token_id": 10**6}),
        "no end id": ("generation_config.json", {"eos_token_id": None}),
        "beams": ("generation_config.json", {"num_beams": 10**6}),
        "a temperature": ("generation_config.json", {"temperature": "hot", "do_sample": True}),
        "a length that never ends": (
            "generation_config.json",
            {"max_length": 10**9, "min_length": 10**9},
        ),
        "an unknown key": ("generation_config.json", {"evil": "x"}),
    }
    for title, (file, keys) in edits.items():
        yield Input(kind, title, partial(_edit, file=file, keys=keys), ANY, early=True)


def _edit(work: Path, file: str, keys: Mapping[str, Any]) -> None:
    path = work / "model" / file
    if not path.exists():
        path.write_text("{}", encoding="utf-8")
    edit_json(path, **keys)


# Chat templates

TEMPLATES: Mapping[str, tuple[str, frozenset[int]]] = {
    "no end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        BAD,
    ),
    "no end, with output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        BAD,
    ),
    "a string of 10 GB": ("{{ 'x' * 10**10 }}", BAD),
    "a power without end": ("{{ 9**9**9 }}", BAD),
    "a list of 10**9": ("{% set x = [0] * 10**9 %}{{ x|length }}", BAD),
    "a string doubled 60 times": (
        "{% set n = namespace(s='x') %}"
        "{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
        "{{ n.s|length }}",
        BAD,
    ),
    "it raises": ("{{ raise_exception('\x1b[31mno\x1b]0;owned\x07') }}", BAD),
    "it divides by 0": ("{{ 1 // 0 }}", BAD),
    "an unknown filter": ("{{ messages|evil }}", BAD),
    "an unknown name": ("{{ evil.evil.evil }}", BAD),
    "a torn tag": ("{% for m in messages", BAD),
    "an endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", BAD),
    "empty": ("", ANY),
    "only blanks": (" \n ", ANY),
    "a constant": ("w1 w2", ANY),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", BAD),
    "out of the sandbox by attr": ("{{ ''|attr('__class__')|attr('__mro__') }}", ANY),
    "it includes a file": ("{% include '/etc/passwd' %}", BAD),
    "it imports a file": ("{% import '/etc/passwd' as x %}", BAD),
    "it formats": ("{{ '{0.__class__}'.format(messages) }}", ANY),
    "no system role": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}> {{ m.content }} <end> {% endfor %}",
        ANY,
    ),
    "the time of day": (
        "{{ strftime_now('%H:%M:%S') }}{% for m in messages %}{{ m.content }}{% endfor %}",
        ANY,
    ),
    "NUL and ESC": (
        "\0\x1b[31m{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}",
        ANY,
    ),
    "10 MB": (
        "{# " + "x" * 10_000_000 + " #}{% for m in messages %}{{ m.content }} {% endfor %}",
        ANY,
    ),
    "deep": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, BAD),
    "long lists": ("{{ " + "+".join(["1"] * 20_000) + " }}", ANY),
    "a sort of much": (
        "{{ range(99999)|map('string')|join|length }}{{ range(99999)|list|tojson|length }}",
        ANY,
    ),
    "padding": ("{{ '%099999999d' % 1 }}", BAD),
    "a long centre": ("{{ 'x'.center(10**10) }}", BAD),
    "indent": ("{{ ('x\n' * 10**6)|indent(10**5) }}", BAD),
}
"""Title -> template, and the codes that are right."""


def _templates() -> Iterator[Input]:
    for title, (text, codes) in TEMPLATES.items():
        data = text.encode()
        change = partial(write_bytes, file="model/chat_template.jinja", data=data)
        yield Input("chat templates", title, change, codes, early=True)
    for title, value in {
        "a number": 7,
        "a list": [],
        "named": [{"name": "tool_use", "template": "x"}],
        "null": None,
        "named without a name": [{"template": "x"}],
        "an object": {"a": 1},
    }.items():
        yield Input(
            "chat templates",
            f"in the config: {title}",
            partial(_config_template, value=value),
            ANY,
            early=True,
        )


def _config_template(work: Path, value: Any) -> None:
    (work / "model/chat_template.jinja").unlink()
    edit_json(work / "model/tokenizer_config.json", chat_template=value)
