"""The command line answers every fault in a paragraph, with its exit code and no traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from rotdistill_core.cli import Interrupted
from rotdistill_core.errors import PluginError
from rotdistill_core.execution import samples
from rotdistill_core.planning.machine import Machine
from rotdistill_core.plugin.registry import (
    ADAPTERS,
    COMMANDS,
    OBSERVERS,
    SOURCES,
    STEPS,
    adapter_for,
)
from rotdistill_core.store import files
from rotdistill_core.testing import PicoWorkspace, command_line

RECIPE = """
variants = { base = [], full = ["basis", "fold"] }
step = [
    { use = "chop", layers = 1 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""
MAIN = [sys.executable, "-m", "rotdistill_core"]


@pytest.fixture
def work(pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a recipe, its texts and its model."""
    pico_workspace.recipe(RECIPE)
    monkeypatch.chdir(pico_workspace.folder)
    return pico_workspace.folder


def printed(code: int, *words: str) -> str:
    """Return all that a command line prints; check its exit code, and that it is no traceback."""
    found, out, err = command_line(*words)
    assert found == code, err
    assert "Traceback" not in out + err
    assert (out + err).strip()
    return out + err


Spoil = Callable[[Path], object]


def edit(old: str, new: str) -> Spoil:
    """Return a function that replaces a part of the recipe."""

    def replace(work: Path) -> None:
        path = work / "trial.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return replace


def put(name: str, text: str | bytes) -> Spoil:
    """Return a function that writes a file."""

    def write(work: Path) -> None:
        (work / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def config(**changes: object) -> Spoil:
    """Return a function that changes the model's config."""

    def change(work: Path) -> None:
        path = work / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def remove(name: str) -> Spoil:
    """Return a function that removes files."""

    def unlink(work: Path) -> None:
        for path in work.glob(name):
            path.unlink()

    return unlink


def cut(work: Path) -> None:
    path = work / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def replace_by_a_folder(work: Path) -> None:
    (work / "trial.toml").unlink()
    (work / "trial.toml").mkdir()


def pickle(work: Path) -> None:
    (work / "model/model.safetensors").rename(work / "model/model.bin")


CASES: dict[str, tuple[Spoil, int, str]] = {
    "no recipe": (remove("trial.toml"), 2, "cannot be read: No such file"),
    "a folder": (
        replace_by_a_folder,
        2,
        "it is a folder, not a plain file.",
    ),
    "not text": (put("trial.toml", b"\xff\xfe\x00"), 2, "is not UTF-8 text"),
    "not TOML": (put("trial.toml", "name = = 3"), 2, "is not valid TOML"),
    "empty": (put("trial.toml", ""), 2, "at least one [[step]]"),
    "too long": (put("trial.toml", "#" * 1_000_001), 2, "it is longer than 1000000 bytes"),
    "nested too deeply": (put("trial.toml", "a = " + "[" * 5000), 2, "is not valid TOML"),
    "an unknown key": (
        edit("layers = 1", "layer = 1"),
        2,
        'layer: unknown key. Did you mean "layers"?',
    ),
    "a wrong type": (edit("layers = 1", 'layers = "one"'), 2, "layers: "),
    "an unknown step": (edit('"procrustes"', '"procrustis"'), 2, 'Did you mean "procrustes"?'),
    "an unknown id": (
        edit('["basis", "fold"]', '["basis", "folt"]'),
        2,
        'no step has the id "folt"',
    ),
    "an unknown observer": (
        edit("observers = []", 'observers = ["reprot"]'),
        2,
        'Did you mean "report"?',
    ),
    "a lost parent": (
        edit('name = "trial"', 'name = "trial"\nextends = "gone.toml"'),
        2,
        "gone.toml: cannot be read",
    ),
    "a name with slashes": (edit('name = "trial"', 'name = "../trial"'), 2, "name: "),
    "no model": (
        edit('"model"', '"nowhere"'),
        3,
        "nowhere: is neither a folder here nor a Hugging Face id",
    ),
    "no config": (
        remove("model/config.json"),
        3,
        "A model folder needs a config.json",
    ),
    "a broken config": (put("model/config.json", "{"), 3, "config.json: not valid JSON"),
    "an unknown architecture": (config(model_type="lama"), 2, 'Did you mean "llama"?'),
    "another shape": (config(intermediate_size=64), 3, "does not fit the adapter for llama"),
    "remote code": (config(attn_implementation="owner/kernel"), 3, "owner/kernel"),
    "quantised": (config(quantization_config={}), 3, "the weights are quantised"),
    "torn weights": (cut, 3, "not a valid safetensors file"),
    "pickled weights": (
        pickle,
        3,
        "has no .safetensors weights",
    ),
    "no tokenizer": (
        remove("model/tokenizer*"),
        3,
        "has no tokenizer",
    ),
    "no texts": (remove("texts/index.tsv"), 2, "index.tsv: cannot be read"),
    "other columns": (
        put("texts/index.tsv", "id\ttext\n1\thello\n"),
        2,
        "texts/index.tsv: line 2: has no question",
    ),
    "too few texts": (
        put("texts/heldout.tsv", "id\tlanguage\tplace\tcountry\tquestion\tfacts\tfalsehoods\n"),
        2,
        "too few different texts, none for: heldout",
    ),
    "a layer too many": (
        edit("layers = 1", "layers = 9"),
        2,
        'step "chop": layers = 9, but the student has 2',
    ),
    "a fold without an aligner": (
        edit('base = [], full = ["basis", ', 'base = ["basis"], full = ['),
        2,
        "needs an aligner before it",
    ),
    "no capture": (edit('{ use = "residuals" },', ""), 2, "put a capture step"),
    "a gate that fails": (
        edit("variants =", "check.logits_float32 = 1e-30\nvariants ="),
        4,
        "the certificate fails",
    ),
    "runs is a file": (put("runs", "x"), 3, "runs"),
}


@pytest.mark.parametrize(("spoil", "code", "message"), CASES.values(), ids=list(CASES))
def test_a_run_that_cannot_start_says_why(
    work: Path, spoil: Spoil, code: int, message: str
) -> None:
    spoil(work)
    assert message in printed(code, "run", "trial.toml")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Usage: rotdistill"),
        (("runn", "trial.toml"), 2, 'there is no verb "runn". Did you mean "run"?'),
        (("frobnicate",), 2, "There is: run, "),
        (("run",), 2, "Missing argument 'RECIPE'. `rotdistill run --help` shows how."),
        (
            ("run", "gone.toml"),
            2,
            'gone.toml: cannot be read: No such file or directory. Did you mean "trial.toml"?',
        ),
        (("run", "trial.toml", "--frech"), 2, "--frech"),
        (("run", "trial.toml", "--set", "chop"), 2, "write it as key.path=value"),
        (("run", "trial.toml", "--set", "chup.layers=1"), 2, 'Did you mean "chop"?'),
        (("show", "nothing"), 2, 'there is no run "nothing"'),
        (("check", "texts"), 2, "is not a run"),
        (("check", "nothing"), 2, 'there is no run "nothing"'),
        (("check", "trial.toml"), 0, "fine"),
    ],
)
def test_a_wrong_command_line_says_why(
    work: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    assert message in printed(code, *words)


def refuse(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "name", "error", "code", "message"),
    [
        (
            files.os,
            "fsync",
            OSError(errno.ENOSPC, "No space left on device"),
            3,
            "cannot be written: No space left on device",
        ),
        (
            Path,
            "replace",
            OSError(errno.EROFS, "Read-only file system"),
            3,
            "cannot be written: Read-only file system",
        ),
        (samples, "tokenize_texts", MemoryError(), 3, "memory is not enough"),
        (
            samples,
            "tokenize_texts",
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            3,
            "memory is not enough",
        ),
        (
            samples,
            "tokenize_texts",
            PermissionError(errno.EACCES, "Permission denied", "texts"),
            3,
            "texts: Permission denied",
        ),
        (
            samples,
            "tokenize_texts",
            ZeroDivisionError("by zero"),
            1,
            "ZeroDivisionError: by zero\nThat should not happen; -v shows where",
        ),
        (
            samples,
            "tokenize_texts",
            Interrupted(signal.SIGINT),
            130,
            "Go on with:\nrotdistill run trial.toml --set seed=3",
        ),
        (
            samples,
            "tokenize_texts",
            Interrupted(signal.SIGTERM),
            143,
            "Go on with:\nrotdistill run trial.toml --set seed=3",
        ),
    ],
    ids=[
        "full disk",
        "read-only",
        "no memory",
        "no memory for torch",
        "forbidden",
        "unexpected",
        "interrupted",
        "terminated",
    ],
)
def test_a_fault_of_the_machine_has_its_exit_code(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: object,
    name: str,
    error: Exception,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(where, name, refuse(error))
    assert message in printed(code, "run", "trial.toml", "--set", "seed=3")


SMALL = {
    "memory": (Machine(ram=1, gpus=(), disk=1 << 40, cores=1), "of memory; 0 MB are free"),
    "disk": (Machine(ram=1 << 40, gpus=(), disk=1, cores=1), "the run writes about"),
}


@pytest.mark.parametrize(("machine", "reason"), SMALL.values(), ids=list(SMALL))
def test_a_machine_that_is_too_small_ends_a_run_before_it_begins(
    work: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, reason: str
) -> None:
    monkeypatch.setattr("rotdistill_core.cli.this_machine", lambda _: machine)
    text = printed(3, "run", "trial.toml")
    assert "results are there" in text
    assert "trial.toml: does not fit here: " in text
    assert reason in text
    assert not (work / "runs").exists()
    assert "saved" in printed(0, "run", "trial.toml", "--no-plan")


def test_a_broken_plugin_is_named_in_every_verb(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = work / "site" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    groups = (STEPS, ADAPTERS, OBSERVERS, SOURCES, COMMANDS)
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\nfail = fake_acme\n" for group in groups)
    )
    (work / "site" / "fake_acme.py").write_text("raise SystemExit('gone')")
    monkeypatch.syspath_prepend(str(work / "site"))
    assert printed(0, "plugins").count(
        "acme 1.0 (fake_acme) fails on import: SystemExit: gone"
    ) == len(groups)
    assert "acme 1.0" in printed(2, "fail")
    edit('"procrustes"', '"fail"')(work)
    assert "acme 1.0" in printed(2, "run", "trial.toml")
    edit("observers = []", 'observers = ["fail"]')(work)
    assert "acme 1.0" in printed(2, "run", "trial.toml")
    with pytest.raises(PluginError, match="acme"):
        adapter_for("fail")
    assert "step.fail" not in printed(0, "schema")


@pytest.mark.parametrize("place", ["a tensor", "the model", "the run", "a step"])
def test_a_problem_of_any_length_is_a_short_paragraph(work: Path, place: str) -> None:
    long = "x" * 100_000
    words = {
        "the model": ("check", "trial.toml", "--set", f"student.model=owner/{long}/name"),
        "the run": ("show", long),
        "a step": ("check", "trial.toml", "--set", f"{long}.layers=2"),
    }
    if place == "a tensor":
        save_file({long: torch.zeros(2)}, work / "model" / "model.safetensors")
    code, _, told = command_line(*words.get(place, ("plan", "trial.toml")))
    assert code in (2, 3)
    assert len(told) < 10_000
    assert told.count("error ") == 1


def test_v_shows_the_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "tokenize_texts", refuse(ZeroDivisionError("by zero")))
    for words in (("-v", "run", "trial.toml"), ("run", "trial.toml", "-v")):
        code, _, err = command_line(*words)
        assert code == 1
        assert "Traceback" in err


def test_a_narrow_terminal_is_enough(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for words in (
        ("--help",),
        ("run", "--help"),
        ("plan", "trial.toml"),
        ("run", "trial.toml"),
        ("runs",),
        ("show", "trial"),
    ):
        printed(0, *words)


def test_messages_and_results_keep_apart_and_plain(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = command_line("run", "trial.toml", "--json")
    assert (code, "saved" in err) == (0, True)
    assert json.loads(out)["results"]
    assert "\x1b" not in out + err  # no colours, no bars where there is no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in command_line("show", "nothing")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in command_line("show", "nothing")[2]


def test_output_that_nobody_reads_ends_quietly(work: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    made = subprocess.run(
        [*MAIN, "schema"], cwd=work, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in made.stderr
    assert "unexpected" not in made.stderr


def test_a_run_whose_model_is_on_the_hub_says_that_its_plan_is_not_known_yet(work: Path) -> None:
    edit('model = "model"', 'model = "nobody/nothing"')(work)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        [*MAIN, "run", "trial.toml"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = " ".join(made.stderr.split())
    assert "plan: not known before nobody/nothing is here." in told
    assert "it is downloaded now" in told
    assert (made.returncode, "Traceback" in made.stderr) == (3, False)


def test_neither_plan_nor_check_downloads_what_a_step_names(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of a stranger may name models of any size."""
    asked: list[str] = []

    def snapshot(name: str, *, local_files_only: bool, **_: object) -> str:
        if not local_files_only:
            asked.append(name)
        raise ValueError("nothing is there")

    monkeypatch.setattr("rotdistill_sources._hub.snapshot_download", snapshot)
    soup = 'use = "soups", ingredients = ["student", "nobody/nothing"]'
    edit('{ use = "fidelity" },', f'{{ {soup} }},\n    {{ use = "fidelity" }},')(work)
    assert "nobody/nothing, which a step names: was not looked at" in printed(
        0, "check", "trial.toml"
    )
    assert "`hf download nobody/nothing`" in printed(3, "plan", "trial.toml")
    assert asked == []
    assert "the hub did not give it" in printed(3, "run", "trial.toml")
    assert asked == ["nobody/nothing"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_counts_even_if_a_library_makes_an_error_of_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def convert(*_: object) -> None:
        # `command_line` keeps the handlers of the command line from being set.
        handle = cast("Mock", signal.signal).call_args_list[0].args[1]
        try:
            handle(number, None)
        except Interrupted:
            raise TypeError("no such shape") from None

    monkeypatch.setattr(samples, "tokenize_texts", convert)
    assert printed(128 + number, "run", "trial.toml").endswith("rotdistill run trial.toml\n")


@pytest.mark.slow
def test_a_signal_ends_a_run_with_the_line_that_resumes_it(work: Path) -> None:
    running = subprocess.Popen(
        [*MAIN, "run", "trial.toml"],
        cwd=work,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    until = time.monotonic() + 60
    while not (work / "runs").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert err.splitlines()[-1] == "rotdistill run trial.toml"
    assert "Traceback" not in err
