"""Whatever a library raises over somebody's file is one paragraph that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.foreign import SHOWN_CHARACTERS, reading
from rotdistill_core.checkpoint.models import load_tokenizer
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.planning.text_counts import token_counter
from rotdistill_core.testing import PicoWorkspace, command_line, pico_folder


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\nlines"), "two lines."),
        (OSError(2, "No such file"), "[Errno 2] No such file."),
        (KeyError("foo"), "KeyError: 'foo'."),
        (AssertionError(), "AssertionError."),
        (Exception("expected value at line 1"), "Exception: expected value at line 1."),
    ],
)
def test_an_error_becomes_one_sentence(error: Exception, words: str) -> None:
    with pytest.raises(SetupError) as caught, reading(Path("model/x.json"), "the file"):
        raise error
    assert str(caught.value) == f"model/x.json: the file cannot be loaded: {words}"
    assert caught.value.__cause__ is error


def test_long_words_are_cut() -> None:
    with pytest.raises(SetupError) as caught, reading("x", "it"):
        raise ValueError("word " * 1000)
    assert len(str(caught.value)) < SHOWN_CHARACTERS + 50


@pytest.mark.parametrize("error", [CheckFailed("as it is"), MemoryError(), KeyboardInterrupt()])
def test_errors_that_say_something_else_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("x", "it"):
        raise error
    assert caught.value is error


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TOKENIZERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "garbage": ("tokenizer.json", lambda path: path.write_text("garbage")),
    "empty": ("tokenizer.json", lambda path: path.write_text("")),
    "an empty object": ("tokenizer.json", lambda path: path.write_text("{}")),
    "no model": ("tokenizer.json", lambda path: edit(path, model={})),
    "other bytes": ("tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "a list": ("tokenizer_config.json", lambda path: path.write_text("[]")),
    "a torn config": ("tokenizer_config.json", lambda path: path.write_text("{")),
    "a class by number": ("tokenizer_config.json", lambda path: edit(path, tokenizer_class=3)),
    "a map as text": ("tokenizer_config.json", lambda path: edit(path, auto_map="a.B")),
    "a config of wrong kinds": ("config.json", lambda path: edit(path, rope_parameters=[1])),
    "a dtype that there is not": ("config.json", lambda path: edit(path, dtype="junk")),
}


@pytest.mark.parametrize(("file", "change"), TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_a_tokenizer_that_cannot_be_loaded_is_refused_by_name(
    tmp_path: Path, file: str, change: Callable[[Path], object]
) -> None:
    folder = pico_folder(tmp_path / "model")
    change(folder / file)
    with pytest.raises(SetupError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert file == "tokenizer.json" or "AttributeError: '" in message or file in message


@pytest.mark.parametrize("text", ["garbage", "{}", "", "[1]"])
def test_plan_refuses_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(SetupError, match=r"tokenizer\.json: the tokenizer cannot be loaded"):
        token_counter(tmp_path, 64)


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("word", ["w1", "w17", "w40"])
def test_tokens_beyond_the_embedding_are_refused_by_both_verbs(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, verb: str, word: str
) -> None:
    folder = pico_workspace.model()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"][word] = 900
    path.write_text(json.dumps(content))
    monkeypatch.chdir(pico_workspace.folder)
    steps = 'step = [{ use = "residuals" }, { use = "fidelity" }]\nvariants = { base = [] }'
    recipe = pico_workspace.recipe(steps)
    code, _, err = command_line(verb, str(recipe))
    assert code == 3, err
    assert "token 900" in err
    assert "model" in err


@pytest.mark.parametrize("value", [None, "missing"])
@pytest.mark.parametrize(
    "key", ["num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers"]
)
def test_a_size_without_a_value_is_named(tmp_path: Path, key: str, value: object) -> None:
    folder = pico_folder(tmp_path / "model")
    path = folder / "config.json"
    config = {name: held for name, held in json.loads(path.read_text()).items() if name != key}
    path.write_text(json.dumps({**config, key: None} if value is None else config))
    with pytest.raises(SetupError, match=rf"config\.json: has no value for {key}\."):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_weights_outside_the_layers_that_are_not_finite_are_refused_by_the_run(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = pico_workspace.model(tie_word_embeddings=False) / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    monkeypatch.chdir(pico_workspace.folder)
    steps = 'step = [{ use = "residuals" }, { use = "fidelity" }]\nvariants = { base = [] }'
    code, _, err = command_line("run", str(pico_workspace.recipe(steps)))
    assert code == 3, err
    assert f"model.safetensors: tensor {name}: 1 of its" in " ".join(err.split())
