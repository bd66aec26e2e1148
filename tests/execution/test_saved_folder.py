"""A saved checkpoint is whole: loaded back, its tokenizer and settings are those of the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.execution.executor import Executor
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing.pico import TEMPLATE

Open = Callable[..., Executor]
TOOLS = "TOOLS {{ messages }}"


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def named_templates_in_a_folder(model: Path) -> None:
    folder = model / "additional_chat_templates"
    folder.mkdir()
    for name in ("tool_use", "rag"):
        (folder / f"{name}.jinja").write_text(f"{name} {TOOLS}")


def named_templates_in_the_config(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    templates = {"default": TEMPLATE, "tool_use": TOOLS}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    edit(model / "tokenizer_config.json", chat_template=listed)


def one_template_in_the_config(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", chat_template=TEMPLATE)


def generation_settings(model: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=[2, 5], temperature=0.7, do_sample=True)


def older_files(model: Path) -> None:
    edit(model / "special_tokens_map.json", pad_token="<pad>")
    edit(model / "added_tokens.json", **{"<end>": 2})
    (model / "vocab.txt").write_text("kept as it is")


def code_of_the_model(model: Path) -> None:
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def another_kernel(model: Path) -> None:
    edit(model / "config.json", _attn_implementation="flash_attention_2")


FOLDERS = (
    named_templates_in_a_folder,
    named_templates_in_the_config,
    one_template_in_the_config,
    generation_settings,
    older_files,
    code_of_the_model,
    another_kernel,
)


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_what_is_saved_is_loaded_back_as_the_student_was(
    work: Path, executor: Open, change: Callable[[Path], None]
) -> None:
    change(work / "model")
    run = executor("whole")
    run.go()
    saved = run.folder / "checkpoints/base"
    one, two = (AutoTokenizer.from_pretrained(path) for path in (work / "model", saved))
    assert two.chat_template == one.chat_template
    assert two.get_vocab() == one.get_vocab()
    assert two.special_tokens_map == one.special_tokens_map
    assert settings_of(saved) == settings_of(work / "model")
    assert config_of(saved) == config_of(work / "model")
    AutoModelForCausalLM.from_pretrained(saved)
    for text in (path.read_text() for path in saved.glob("*config.json")):
        assert "auto_map" not in text
        assert "attn_implementation" not in text
    manifest = json.loads((saved / RunLayout.MANIFEST).read_text())
    written = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert manifest == {name: sha256_of(saved / name) for name in written - {RunLayout.MANIFEST}}


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = GenerationConfig.from_pretrained(folder).to_dict()
    return settings


def config_of(folder: Path) -> dict[str, Any]:
    """Return a config as transformers reads it, without what is no property of a model."""
    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    other = ("_name_or_path", "auto_map", "num_hidden_layers", "transformers_version")
    return {key: value for key, value in config.items() if key not in other}


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
    ],
)
def test_every_file_that_is_used_is_in_the_hash(work: Path, name: str) -> None:
    path = work / "model" / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}")
    before = open_checkpoint(work / "model")
    seen = before.sha256, before.fingerprint
    path.write_bytes(path.read_bytes() + b"\n")
    after = open_checkpoint(work / "model")
    assert after.sha256 != seen[0]
    assert after.fingerprint != seen[1]


def test_a_template_of_another_name_is_another_model(work: Path) -> None:
    named_templates_in_a_folder(work / "model")
    before = open_checkpoint(work / "model").sha256
    folder = work / "model/additional_chat_templates"
    (folder / "rag.jinja").rename(folder / "rug.jinja")
    assert open_checkpoint(work / "model").sha256 != before
