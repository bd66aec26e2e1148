"""Chat templates: rendered as transformers does it, under limits, with or without a system role."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from rotdistill_core.data import chat as chat_module
from rotdistill_core.data._rendering import _environment
from rotdistill_core.data.chat import PLAIN_TEMPLATE, ChatFormat
from rotdistill_core.data.conversations import Turn
from rotdistill_core.data.tokenization import require_text_of_transformers
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


def asked(chat: ChatFormat, style: str, *questions: str) -> list[str]:
    """Return the prompts of questions."""
    return chat.prompts([chat.messages(style, question) for question in questions])


def refused(template: str) -> str:
    """Return why a template is refused."""
    with pytest.raises(SetupError) as caught:
        asked(ChatFormat("big", template).for_style(STYLE, QUESTION), STYLE, QUESTION, "Who?")
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
    assert asked(chat, STYLE, QUESTION) == [f"<user>{STYLE}\n\n{QUESTION}"]


@pytest.mark.parametrize("template", [LOOP, LLAMA, GENERATION])
def test_a_system_role_is_used_where_there_is_one(template: str) -> None:
    chat = ChatFormat("big", template).for_style(STYLE, QUESTION)
    assert chat.system_turn
    assert [turn["role"] for turn in chat.messages(STYLE, QUESTION)] == ["system", "user"]


def test_an_empty_system_prompt_has_no_turn() -> None:
    chat = ChatFormat("big", LOOP).for_style("", QUESTION)
    assert asked(chat, "", QUESTION) == [f"<user>{QUESTION}"]


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
        (LOOP + "{{ range(10 ** 4) | random }}", "writes another text each time, by chance"),
        (LOOP + "{{ ['random'] | map('length') | map('random') }}{{ lipsum() }}", "by chance"),
        ("{% set n = namespace(_x=1) %}" + LOOP, "SecurityError: the attribute '_x'"),
        ("{% set n = namespace({'__a': 1}) %}" + LOOP, "SecurityError: the attribute '__a'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}" + LOOP, "SecurityError: the attribute"),
        ("{{ dict.mro() }}" + LOOP, "UndefinedError: "),
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


def test_the_date_is_that_of_the_run() -> None:
    template = "{{ strftime_now('%d %B %Y %H:%M') }} " + LOOP
    chat = ChatFormat("big", template, date="2025-07-01")
    assert chat.uses_date
    (one,) = asked(chat, "", QUESTION)
    assert one.startswith("01 July 2025 00:00 ")
    assert asked(chat, "", QUESTION, "Who?")[0] == one


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
        (
            {"additional_chat_templates/default.jinja": "A", "chat_template.jinja": "B"},
            "A",
            "",
        ),
        ({"additional_chat_templates/default.jinja": "A"}, "A", ""),
        ({}, PLAIN_TEMPLATE, ""),
        ({"chat_template.jinja": " \n"}, "", "is no text, or a blank one"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "", "is no text, or a blank one"),
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


@pytest.mark.parametrize(
    ("settings", "older"),
    [
        ({}, {}),
        ({"bos_token": "w1"}, {}),
        ({"bos_token": "w1"}, {"bos_token": {"content": "w2"}}),
        ({"bos_token": "w1", "added_tokens_decoder": {}}, {"bos_token": "w2"}),
        ({"extra_special_tokens": {"image_token": "<end>"}}, {}),
        ({"extra_special_tokens": ["<end>"], "add_bos_token": True}, {}),
        ({"model_specific_special_tokens": {"audio_token": "w3"}}, {}),
        ({"image_token": "w4", "eos_token": {"__type": "AddedToken", "content": "w5"}}, {}),
    ],
)
def test_special_tokens_of_a_folder_are_those_of_its_tokenizer(
    tmp_path: Path, settings: dict[str, Any], older: dict[str, Any]
) -> None:
    pico_tokenizer(64).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if older:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatFormat.read(tmp_path).tokens == ChatFormat.of(tokenizer).tokens


@pytest.mark.parametrize(
    ("settings", "is_whole"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, True),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}, True),
        ({}, False),
    ],
)
def test_a_class_may_have_special_tokens_that_no_file_names(
    tmp_path: Path, settings: dict[str, Any], is_whole: bool
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token + 'x' }}" + LOOP)
    assert ChatFormat.read(tmp_path).is_whole is is_whole


def test_templates_meet_the_environment_of_transformers() -> None:
    theirs = _compile_jinja_template(LOOP).environment
    ours = _environment("2025-07-01")
    for part in ("filters", "globals", "tests"):
        assert getattr(ours, part).keys() == getattr(theirs, part).keys()
    assert len(ours.extensions) == len(theirs.extensions)
    assert (ours.trim_blocks, ours.lstrip_blocks) == (theirs.trim_blocks, theirs.lstrip_blocks)


def test_a_template_runs_nowhere_but_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it can tell apart, such as addresses and hashes, it could use to hang this one."""
    tokenizer: Any = pico_tokenizer(64)
    tokenizer.chat_template = LOOP

    def never(*_: Any, **__: Any) -> str:
        raise AssertionError("rendered here")

    monkeypatch.setattr("transformers.tokenization_utils_base.render_jinja_template", never)
    require_text_of_transformers(ChatFormat.of(tokenizer), tokenizer, STYLE, QUESTION)


def test_a_tokenizer_that_writes_other_chats_than_its_template_is_refused() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "[INST]"

    tokenizer: Any = Own(tokenizer_object=pico_tokenizer(64).backend_tokenizer)
    tokenizer.chat_template = LOOP
    with pytest.raises(SetupError, match=r"its tokenizer \(Own\) does not write chats as"):
        require_text_of_transformers(ChatFormat.of(tokenizer), tokenizer, STYLE, QUESTION)


def test_a_process_that_cannot_start_is_no_fault_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'ImportError: no jinja2' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(chat_module.sys, "executable", str(python))
    with pytest.raises(SetupError, match=r"has failed: ImportError: no jinja2\. Run `"):
        asked(ChatFormat("big", LOOP), "", "Is jinja there?")


@pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"])
def test_the_process_finds_the_libraries_of_its_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{{\\"text\\": \\"${name} $HOME\\"}}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(chat_module.sys, "executable", str(python))
    monkeypatch.setenv(name, "/opt/there")
    assert asked(ChatFormat(name, LOOP), "", f"Is {name} there?") == ["/opt/there "]


def test_many_chats_are_written_by_several_processes_and_equal_ones_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[str] = []

    def counted(job: str) -> list[dict[str, str]] | None:
        jobs.append(job)
        return rendered(job)

    rendered = chat_module._rendered
    counted.__wrapped__ = rendered.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(chat_module, "_rendered", counted)
    monkeypatch.setattr(chat_module, "CHATS_AT_ONCE", 3)
    questions = [f"Is it {k % 7}?" for k in range(20)]
    assert asked(ChatFormat("many", LOOP), "", *questions) == [f"<user>{q}" for q in questions]
    assert [job.count("\n") - 1 for job in jobs] == [3, 3, 1]


def test_a_copy_of_a_model_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said = asked(ChatFormat("one", LOOP), "", "Who is asked once?")
    monkeypatch.setattr(chat_module.subprocess, "run", None)
    assert asked(ChatFormat("other", LOOP), "", "Who is asked once?") == said


def test_a_long_job_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "REMEMBERED", 100)
    before = chat_module._rendered.cache_info()
    assert asked(ChatFormat("long", LOOP), "", "Who is it?") == ["<user>Who is it?"]
    assert chat_module._rendered.cache_info() == before


@pytest.mark.parametrize("kind", ["v", "t"])
def test_lower_limits_of_the_machine_stay(kind: str, tmp_path: Path) -> None:
    program = tmp_path / "limited.py"
    program.write_text(
        "from rotdistill_core.data.chat import ChatFormat\n"
        f"print(ChatFormat('big', {LOOP!r}).prompts([[dict(role='user', content='Who?')]]))\n"
    )
    most = {"v": 900_000, "t": 8}[kind]
    done = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -{kind} {most}; exec "$0" "$1"', sys.executable, str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.stdout == "['<user>Who?']\n", done.stderr


# Models without a template, and models that think.


def plain_tokenizer(bos: bool) -> Any:
    """Return a tokenizer without a template, which may begin texts with a token."""
    tokenizer: Any = pico_tokenizer(64)
    tokenizer.chat_template = None
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<system>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<system> $A", special_tokens=[("<system>", 3)]
        )
    return tokenizer


@pytest.mark.parametrize(("bos", "begin"), [(False, ""), (True, "<system>")])
def test_without_a_template_chats_are_written_plainly(
    tmp_path: Path, bos: bool, begin: str
) -> None:
    tokenizer = plain_tokenizer(bos)
    tokenizer.save_pretrained(tmp_path)
    earlier = (Turn("user", "Hi."), Turn("assistant", "Hello."))
    for chat in (ChatFormat.of(tokenizer), ChatFormat.read(tmp_path)):
        assert chat.is_ours
        assert chat.for_style(STYLE, QUESTION).system_turn
        asked_with = chat.messages(STYLE, QUESTION, earlier=earlier)
        answered = chat.messages(STYLE, QUESTION, "There.", earlier)
        shared = f"{begin}{STYLE}\n\nUser: Hi.\nAssistant: Hello.<end>\nUser: {QUESTION}\n"
        assert chat.prompts([asked_with]) == [f"{shared}Assistant:"]
        assert chat.render([answered]) == [f"{shared}Assistant: There.<end>"]
        assert asked(chat, "", QUESTION) == [f"{begin}User: {QUESTION}\nAssistant:"]


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not "
    "enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize(("thinking", "end"), [(False, "<think></think>"), (True, "")])
def test_models_think_only_if_they_are_let_to(tmp_path: Path, thinking: bool, end: str) -> None:
    tokenizer: Any = pico_tokenizer(64)
    tokenizer.chat_template = THINKS
    tokenizer.save_pretrained(tmp_path)
    for chat in (ChatFormat.of(tokenizer, "", thinking), ChatFormat.read(tmp_path, "", thinking)):
        assert chat.switches == {"enable_thinking": thinking}
        assert asked(chat, "", QUESTION) == [f"<user>{QUESTION}<assistant>{end}"]
        theirs = tokenizer.apply_chat_template(
            chat.messages("", QUESTION),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        assert asked(chat, "", QUESTION) == [theirs]


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (LOOP, []),
        ("{% if message.thinking and 'thinking' in message %}thinking{% endif %}", []),
        ("{%- if thinking %}<think>{% endif %}", ["thinking"]),
        ("{%- if enable_thinking is defined %}<think>{% endif %}", ["enable_thinking"]),
    ],
)
def test_only_variables_of_a_template_are_its_switches(template: str, names: list[str]) -> None:
    chat = ChatFormat("big", template, thinking=True)
    assert chat.switches == dict.fromkeys(names, True)
