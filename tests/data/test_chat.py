"""Chat templates: rendered as transformers does it, under limits, with or without a system role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotdistill_core.data import chat as chat_module
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import pico_tokenizer

STYLE = "Be brief."
QUESTION = 'Where is "Łódź" <b>?'
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = 'x' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}\n"
    "{{- '<sys>' + system }}\n{%- for message in messages %}\n"
    "    {{- '<' + message['role'] + '>\\n\\n' + message['content'] | trim + '<end>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | tojson }}{% endif %}{% endfor %}"
)
BREAKS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if ns.n > 3 %}{% break %}{% endif %}\n"
    "  {% set ns.n = ns.n + 1 %}\n{{ ns.n }} {{ m.content }}\n{% endfor %}\n"
    "{% if tools is none %}-{% endif %}{{ dict(a=1) | tojson(indent=1) }}"
)


def refused(template: str) -> str:
    """Return why a template is refused."""
    with pytest.raises(SetupError) as caught:
        ChatFormat("big", template).for_style(STYLE, QUESTION).prompts(STYLE, [QUESTION, "Who?"])
    assert str(caught.value).startswith("big: ")
    return str(caught.value)


@pytest.mark.parametrize("template", [LOOP, LLAMA, GENERATION, BREAKS])
@pytest.mark.parametrize("generation", [True, False])
def test_texts_are_those_of_transformers(template: str, generation: bool) -> None:
    tokenizer: Any = pico_tokenizer(64)
    tokenizer.chat_template = template
    chat = ChatFormat.of(tokenizer)
    messages = chat.messages(STYLE, QUESTION, "There.\n")
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    assert chat.render([messages], generation) == [theirs]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + LOOP,
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ {'user': '<user>', 'assistant': '<a>'}[m.role].strip() }}"
        "{{ m.content }}{% endfor %}",
    ],
    ids=["refused", "user first", "left out", "unknown role"],
)
def test_without_a_system_role_the_prompt_goes_before_the_question(template: str) -> None:
    chat = ChatFormat("big", template).for_style(STYLE, QUESTION)
    assert not chat.system_turn
    assert chat.prompts(STYLE, [QUESTION]) == [f"<user>{STYLE}\n\n{QUESTION}"]


@pytest.mark.parametrize("template", [LOOP, LLAMA, GENERATION])
def test_a_system_role_is_used_where_there_is_one(template: str) -> None:
    chat = ChatFormat("big", template).for_style(STYLE, QUESTION)
    assert chat.system_turn
    assert [turn["role"] for turn in chat.messages(STYLE, QUESTION)] == ["system", "user"]


def test_an_empty_system_prompt_has_no_turn() -> None:
    chat = ChatFormat("big", LOOP).for_style("", QUESTION)
    assert chat.prompts("", [QUESTION]) == [f"<user>{QUESTION}"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content ", "TemplateSyntaxError: unexpected end of template"),
        ("{{ tools.first.second }}", "UndefinedError: 'None' has no attribute"),
        ("{{ user_name.upper() }}", "UndefinedError: 'user_name' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ raise_exception('no \x1b[31m chats') }}", "TemplateError: no "),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError: "),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("w1 w2", "writes every question alike, as 'w1 w2'"),
        ("{{ messages[0].role }}", "writes every question alike"),
    ],
)
def test_a_template_that_cannot_write_a_chat_says_why(template: str, message: str) -> None:
    assert message in refused(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length * 10) ** (messages | length * 10 ** 9) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ messages[0].content * 10 ** 10 }}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(a='a' * 99) %}{% for i in range(99) %}"
        "{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{{ '%9999999999d' % 1 }}",
        "{{ messages[0].content | center(9999999999) }}",
    ],
    ids=["loops", "power", "output", "repeat", "constant", "doubling", "width", "filter"],
)
def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(chat_module, "SECONDS", 1)
    why = refused(template)
    assert "does not end within the limits" in why or "Error" in why


def test_the_date_is_that_of_the_run_and_chance_repeats_itself() -> None:
    template = "{{ strftime_now('%d %B %Y %H:%M') }} {{ range(10 ** 4) | random }}" + LOOP
    chat = ChatFormat("big", template, date="2025-07-01")
    assert chat.uses_date
    (one,) = chat.prompts("", [QUESTION])
    assert one.startswith("01 July 2025 00:00 ")
    assert chat.prompts("", [QUESTION, "Who?"])[0] == one


@pytest.mark.parametrize(
    ("files", "template", "message"),
    [
        ({"chat_template.jinja": "A"}, "A", ""),
        ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}}, "A", ""),
        ({"tokenizer_config.json": {"chat_template": "B"}}, "B", ""),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "default", "template": "C"},
                        {"name": "rag", "template": "D"},
                    ]
                }
            },
            "C",
            "",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag"}]}}, "", "only rag"),
        ({"additional_chat_templates/tool_use.jinja": "A"}, "", "only tool_use"),
        ({}, "", "has no chat template"),
        ({"chat_template.jinja": " \n"}, "", "has no chat template"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "", "has no chat template"),
        ({"tokenizer_config.json": [1]}, "", "must hold one JSON object"),
        ({"tokenizer_config.json": "{"}, "", "not valid JSON"),
        ({"chat_template.jinja": "é".encode("latin-1")}, "", "is not UTF-8 text"),
        ({"chat_template.jinja": "x" * (1 << 21)}, "", "cannot be read"),
    ],
)
def test_the_template_of_a_folder_is_that_of_transformers(
    tmp_path: Path, files: dict[str, Any], template: str, message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if message:
        with pytest.raises(SetupError, match=message):
            ChatFormat.read(tmp_path)
    else:
        assert ChatFormat.read(tmp_path).template == template


def test_special_tokens_of_a_folder_are_those_of_its_tokenizer(tmp_path: Path) -> None:
    pico_tokenizer(64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatFormat.read(tmp_path).tokens == ChatFormat.of(tokenizer).tokens
