"""Readers of what others made, on inputs that nobody thought of.

Each returns, or raises a `RotdistillError` of the right exit code, and soon. The environment
variable `FUZZ_EXAMPLES` sets how many inputs each reader gets; `make faults` gives it many.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rotdistill_sources._cache import dequantised_folder
from safetensors.torch import save_file

from rotdistill_core.checkpoint.headers import folder_headers, read_header, shard_files
from rotdistill_core.checkpoint.lora import read_lora
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.rows import KEYS
from rotdistill_core.errors import RotdistillError
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import FileRecord
from rotdistill_core.testing import PicoWorkspace
from tests.faults.gguf_file import gguf_file

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    # One input: a reader that needs longer has no end. Others may use the machine meanwhile.
    deadline=timedelta(seconds=20),
    database=None,
    derandomize=EXAMPLES <= 25,
    suppress_health_check=list(HealthCheck),
)
slowly_fuzzed = settings(fuzzed, max_examples=max(4, EXAMPLES // 10))

TEXT = st.text(max_size=20) | st.sampled_from(["", "../x", "\x1b[31m", "\0", "a" * 500, "evil"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**18, 2**63, -1, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
CHUNKS = st.binary(max_size=30) | st.sampled_from([b"\n", b"\t", b'"', b"\xff", b"\0" * 9, b"{"])
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), CHUNKS), min_size=1, max_size=4)
"""Where in a file (as a share), how many bytes go, and what comes in their place."""


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + gone :]
    return data


def outcome(read: Callable[[], object], codes: Collection[int]) -> None:
    """Call a reader: it may return, or raise an error of ours with one of the codes."""
    try:
        read()
    except RotdistillError as error:
        assert error.exit_code in codes, repr(error)
        assert str(error).strip()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> PicoWorkspace:
    made = PicoWorkspace(tmp_path_factory.mktemp("fuzz"))
    made.texts(blurbs=8, questions=2)
    made.model()
    made.recipe('[[step]]\nuse = "chop"\nlayers = 2\n')
    return made


@pytest.fixture(scope="module")
def model(workspace: PicoWorkspace) -> Model:
    return open_model(ModelRef(model=str(workspace.folder / "model")))


@fuzzed
@given(EDITS)
@example([(0.0, 0, b"\xef\xbb\xbf")])
@example([(0.0, 10**6, b"a = " + b"[" * 20_000)])
@example([(0.0, 10**6, b"seed = " + b"9" * 5000)])
def test_recipes_with_other_bytes(
    workspace: PicoWorkspace, edits: list[tuple[float, int, bytes]]
) -> None:
    data = (workspace.folder / "trial.toml").read_bytes()
    path = workspace.folder / "fuzzed.toml"
    path.write_bytes(edited(data, edits))
    outcome(lambda: load_recipe(path), {2})


RECIPE_KEYS = st.sampled_from(
    [
        "name",
        "seed",
        "teacher",
        "student",
        "anchor",
        "samples",
        "check",
        "observers",
        "variants",
        "baseline",
        "headline",
        "chop.layers",
        "chop.id",
        "chop.use",
        "student.device",
        "check.facts",
    ]
)


@fuzzed
@given(RECIPE_KEYS | TEXT, JSON)
@example("seed", float("nan"))
@example("variants", {"../x": []})
def test_recipes_with_other_values(workspace: PicoWorkspace, key: str, value: Any) -> None:
    outcome(lambda: load_recipe(workspace.folder / "trial.toml", {key: value}), {2})


@fuzzed
@given(st.lists(TEXT, max_size=3))
@example(["=", "chop.layers", "a.b.c=[[[["])
def test_words_of_set(workspace: PicoWorkspace, words: list[str]) -> None:
    outcome(lambda: load_recipe(workspace.folder / "trial.toml", words), {2})


@fuzzed
@given(EDITS, st.sampled_from(["index.tsv", "heldout.tsv", "guard.tsv", "style.md"]))
@example([(0.0, 10**6, b"")], "index.tsv")
@example([(0.0, 0, b"\xff\xfe")], "heldout.tsv")
def test_texts(workspace: PicoWorkspace, edits: list[tuple[float, int, bytes]], name: str) -> None:
    texts = workspace.folder / "fuzzed-texts"
    shutil.copytree(workspace.folder / "texts", texts, dirs_exist_ok=True)
    path = texts / name
    path.write_bytes(edited(path.read_bytes(), edits))
    ref = SamplesRef(index="index.tsv", heldout="heldout.tsv", guard="guard.tsv", style="style.md")
    outcome(lambda: read_conversations(ref, texts), {2})


COLUMNS = st.sampled_from(sorted(KEYS)) | TEXT
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant"]) | JSON,
            "content": TEXT | JSON,
        },
    ),
    max_size=4,
)
ROWS = st.lists(st.dictionaries(COLUMNS, TEXT | MESSAGES | JSON, max_size=5), max_size=4)


@fuzzed
@given(ROWS, EDITS, st.booleans())
@example([{"messages": [{"role": "assistant"}]}], [(0.0, 0, b"\xef\xbb\xbf")], True)
def test_json_lines(
    workspace: PicoWorkspace,
    rows: list[dict[str, Any]],
    edits: list[tuple[float, int, bytes]],
    thinking: bool,
) -> None:
    good = [{"id": f"c{k}", "language": "en", "prompt": "w1", "completion": "w2"} for k in range(4)]
    text = "\n".join(json.dumps(row) for row in [*good, *rows])
    path = workspace.folder / "fuzzed.jsonl"
    path.write_bytes(edited(text.encode(), edits))
    ref = SamplesRef(index=path.name, guard=path.name, thinking=thinking)
    outcome(lambda: read_conversations(ref, workspace.folder), {2})


TENSORS = st.dictionaries(
    TEXT,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "evil"]) | JSON,
            "shape": st.lists(st.integers(-2, 2**64), max_size=4) | JSON,
            "data_offsets": st.lists(st.integers(-2, 2**64), min_size=2, max_size=2) | JSON,
        },
    ),
    max_size=4,
)


@fuzzed
@given(TENSORS | JSON, st.none() | st.integers(0, 2**64 - 1), st.integers(0, 64))
@example({}, 2**63, 0)
def test_headers_of_safetensors(
    workspace: PicoWorkspace, header: Any, length: int | None, body: int
) -> None:
    text = json.dumps(header).encode()
    path = workspace.folder / "fuzzed.safetensors"
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(body))
    outcome(lambda: read_header(path), {3})


@fuzzed
@given(EDITS)
def test_bytes_of_safetensors(
    workspace: PicoWorkspace, edits: list[tuple[float, int, bytes]]
) -> None:
    data = (workspace.folder / "model/model.safetensors").read_bytes()
    path = workspace.folder / "edited.safetensors"
    front = edited(data[:4000], edits)  # most of the file is numbers
    path.write_bytes(front + data[4000:])
    outcome(lambda: read_header(path), {3})


@fuzzed
@given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(TEXT, TEXT | JSON, max_size=3)}))
@example({"weight_map": {"a": "../model/model.safetensors"}})
def test_shard_indices(workspace: PicoWorkspace, index: Any) -> None:
    folder = workspace.folder / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    outcome(lambda: shard_files(folder), {3})
    outcome(lambda: folder_headers(folder), {3})


CONFIG_KEYS = st.sampled_from(
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "num_key_value_heads",
        "vocab_size",
        "rope_parameters",
        "rope_scaling",
        "hidden_act",
        "tie_word_embeddings",
        "layer_types",
        "architectures",
        "quantization_config",
        "auto_map",
        "attn_implementation",
        "max_position_embeddings",
        "rms_norm_eps",
        "dtype",
        "eos_token_id",
    ]
)


@fuzzed
@given(st.dictionaries(CONFIG_KEYS | TEXT, JSON, min_size=1, max_size=3))
@example({"num_hidden_layers": 10**9})
@example({"rope_parameters": {"rope_type": 1}})
def test_configs_of_models(workspace: PicoWorkspace, changes: dict[str, Any]) -> None:
    folder = workspace.folder / "fuzzed-model"
    if not folder.exists():
        shutil.copytree(workspace.folder / "model", folder)
    config = json.loads((workspace.folder / "model/config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    def opened() -> None:
        model = open_model(ModelRef(model=str(folder)))
        assert model.depth >= 1
        assert model.weights.entries

    outcome(opened, {2, 3})


ADAPTER_KEYS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "target_modules",
        "peft_type",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "modules_to_save",
        "layers_to_transform",
        "base_model_name_or_path",
        "task_type",
        "fan_in_fan_out",
        "lora_dropout",
    ]
)


@fuzzed
@given(st.dictionaries(ADAPTER_KEYS | TEXT, JSON, min_size=1, max_size=3))
@example({"lora_alpha": float("inf")})
@example({"rank_pattern": {"(": 1}})
@example({"r": 0})
def test_configs_of_adapters(
    workspace: PicoWorkspace, model: Model, changes: dict[str, Any]
) -> None:
    folder = workspace.folder / "lora"
    folder.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    outcome(lambda: read_lora(folder, model.weights), {2, 3})


@fuzzed
@given(EDITS, JSON)
@example([(0.5, 30, b"")], {"schema": 3, "kind": "file"})
@example([(0.0, 0, b"[" * 50_000 + b"\n")], [])
def test_lines_of_ledgers(
    workspace: PicoWorkspace, edits: list[tuple[float, int, bytes]], value: Any
) -> None:
    """A damaged ledger is read, and holds no record that nobody committed."""
    folder = workspace.folder / "ledger"
    shutil.rmtree(folder, ignore_errors=True)
    ledger = Ledger(folder)
    for k in range(5):
        name = f"file {k}"
        ledger.append(FileRecord(key="k", name=name, path=f"run/{name}", bytes=k, sha256="0" * 64))
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(edited(data, edits) + json.dumps(value).encode() + b"\n")
    found = Ledger(folder).records
    assert all(record in ledger.records for record in found)


@pytest.fixture(scope="module")
def gguf(workspace: PicoWorkspace) -> Iterator[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(workspace.folder / "cache"))
        yield gguf_file(workspace.folder / "pico.gguf").read_bytes()


@slowly_fuzzed
@given(EDITS)
@example([(0.0, 4, b"EVIL")])
@example([(0.0005, 8, b"\xff" * 8)])
def test_headers_of_gguf(
    workspace: PicoWorkspace, gguf: bytes, edits: list[tuple[float, int, bytes]]
) -> None:
    path = workspace.folder / "fuzzed.gguf"
    path.write_bytes(edited(gguf[:1500], edits) + gguf[1500:])
    outcome(lambda: dequantised_folder(path, lambda _: None), {3})
