"""For plugin authors: pico models, texts and planted truth, all made here and without any download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.bank import Bank, write_shard
from rotdistill_core.ledger import Ledger, Out, Store
from rotdistill_core.maps import Gauge, Map, Permutation, Rotation
from rotdistill_core.models import Model, Pair, open_model
from rotdistill_core.recipe import ModelRef
from rotdistill_core.samples import Layout, Samples, Text
from rotdistill_core.walk import Walk
from rotdistill_core.weights import Weights, open_folder

PICO = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def pico_folder(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a random model of hidden size 32 with 2 layers, built from its Hugging Face config class, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**PICO, "tie_word_embeddings": True, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # gains away from 1 and biases away from 0, as trained models have them
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    pico_tokenizer(int(config.vocab_size)).save_pretrained(folder)
    return folder


def pico_tokenizer(size: int) -> Any:
    """Return a word tokenizer of `size` tokens with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
    vocabulary = {token: k for k, token in enumerate([*special, *(f"w{k}" for k in range(size - len(special)))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pico_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Model:
    """Return an opened pico model."""
    return open_model(ModelRef(model=str(pico_folder(folder, model_type, seed, **changes))))


def pico_samples(vocabulary: int = 64, texts: int = 40, prefix: int = 6, seed: int = 0) -> Samples:
    """Return random texts that share a prefix: 60 % fit, 20 % validation, 20 % held-out."""
    maker = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, vocabulary, (prefix,), generator=maker).tolist()
    made = []
    for k in range(texts):
        length = int(torch.randint(8, 24, (1,), generator=maker))
        split = ("fit", "fit", "fit", "validation", "heldout")[k % 5]
        own = [k % vocabulary, *torch.randint(0, vocabulary, (length,), generator=maker).tolist()]
        made.append(Text(f"t{k}", "en", split, (*shared, *own), prefix + 4))
    return Samples(Layout(tuple(made), prefix), (), "")


def pico_out(root: Path, step: str = "step") -> Out:
    """Return a place for a step to write to."""
    return Out(Store(root), Ledger(root / "run"), f"key-{step}", step)


def captured(pair: Pair, weights: Weights, samples: Samples, out: Out) -> Bank:
    """Return a bank of both models on all texts."""
    shards = {}
    for side, view in (("teacher", pair.teacher.weights), ("student", weights)):
        walk = Walk(view, samples.layout, torch.device("cpu"), torch.float32)
        made = [write_shard(out, side, 0, walk.states, torch.float32, {})]
        for i in walk:
            walk.run()
            made.append(write_shard(out, side, i + 1, walk.states, torch.float32, {}))
        shards[side] = tuple(made)
    return Bank(out.store.root, shards, {"teacher": samples.layout, "student": samples.layout}, weights.lineage.depths)


def rotated_twin(model: Model, folder: Path, seed: int = 0) -> tuple[Model, Tensor]:
    """Write the model in a random basis of its stream and return it with the planted rotation `Q [d, d]`: states are `X Q`."""
    Q = random_rotation(model.width, seed)
    save_folder(model.weights.fold({"residual": Rotation(Q)}), model.folder, folder)
    return open_model(ModelRef(model=str(folder))), Q


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix in float64."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q: Tensor = torch.linalg.qr(noise)[0]
    return Q


def scramble(weights: Weights, seed: int = 0, invertible: bool = False) -> tuple[Weights, dict[str, Map]]:
    """Return the same model in a random basis of everything that its table leaves free, and the maps that were planted.

    One rotation of the stream; in every layer a permutation of key/value groups and of query heads inside them, a permutation of
    neurons, value/output gauges (orthogonal, or any `invertible` ones), query/key gauges and signed up/down scales.
    """
    maker = torch.Generator().manual_seed(seed)
    sizes, heads = weights.adapter.sizes(weights.config), weights.adapter.heads(weights.config)
    free = {param.gauge.removesuffix("*") for param in weights.adapter.expand(weights.config).values()}
    planted: dict[str, Map] = {"residual": Rotation(random_rotation(weights.width, seed))}
    for i in range(weights.depth):
        order = torch.randperm(heads.groups, generator=maker)
        each = heads.query // heads.groups
        inside = torch.stack([torch.randperm(each, generator=maker) for _ in order])
        planted[f"q.{i}"] = Permutation((order[:, None] * each + inside).flatten()).blocks(heads.width)
        planted[f"kv.{i}"] = Permutation(order).blocks(heads.width)
        planted[f"neurons.{i}"] = Permutation(torch.randperm(sizes[f"neurons.{i}"], generator=maker))
        noise = torch.randn(heads.groups, heads.width, heads.width, dtype=torch.float64, generator=maker)
        factors = 2.0 * torch.randn(heads.groups, heads.width // 2, 2, dtype=torch.float64, generator=maker)
        factors = factors / factors.norm(dim=-1, keepdim=True) * (0.5 + torch.rand(factors.shape[:2], generator=maker))[..., None]
        scales = torch.randn(sizes[f"neurons.{i}"], dtype=torch.float64, generator=maker)
        scales = scales.sign() * (0.5 + scales.abs())
        eye = torch.eye(heads.width, dtype=torch.float64)
        gauges = {
            f"value.{i}": 0.3 * noise / heads.width**0.5 + eye if invertible else torch.linalg.qr(noise)[0],
            f"key.{i}": rotary_blocks(torch.view_as_complex(factors)), f"up.{i}": scales[:, None, None],
        }  # fmt: skip
        planted |= {space: Gauge(blocks) for space, blocks in gauges.items() if space in free}
    return replace(weights.fold(planted), lineage=weights.lineage), planted  # a checkpoint like any other: nobody knows its basis


def rotary_blocks(factors: Tensor) -> Tensor:
    """Return the matrices `[n, k, k]` that multiply rotary pairs (j, j + k / 2) by complex factors `[n, k / 2]`."""
    a, b = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([a, b], -1), torch.cat([-b, a], -1)], -2)


def save_folder(weights: Weights, like: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save a view as a plain folder with the tokenizer of `like`."""
    from rotdistill_core.ledger import Blocks, write_file
    from rotdistill_core.models import tokenizer_files

    def write(name: str, blocks: Blocks) -> None:
        write_file(folder / name, blocks)

    for path in tokenizer_files(like):
        write(path.name, [path.read_bytes()])
    weights.save(write, dtype)


def final_states(weights: Weights, layout: Layout, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the stream behind the last layer `[rows, d]`."""
    walk = Walk(weights, layout, torch.device("cpu"), dtype)
    for _ in walk:
        walk.run()
    return walk.states


def logits(weights: Weights, layout: Layout, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return all logits `[rows, vocab]`."""
    from rotdistill_core.walk import final_norm

    normed: Tensor = final_norm(weights, final_states(weights, layout, dtype))
    return normed @ weights.head().to(dtype).T


def pico_texts(folder: Path, blurbs: int = 20, questions: int = 3) -> Mapping[str, Path]:
    """Write index.tsv, heldout.tsv and a style prompt for the pico tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{k}" for k in range(58)]

    def say(k: int, n: int) -> str:
        return " ".join(words[(7 * k + 3 * j * (k + 1)) % 58] for j in range(n))

    index = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    index += [f"en-{k}\ten\tplace {k}\tland\t{say(k, 5)}\t{say(k + 5, 12)}" for k in range(blurbs)]
    held = ["id\tlanguage\tplace\tcountry\tquestion\tfacts\tfalsehoods"]
    held += [f"held-{k}\ten\tother {k}\tland\t{say(k + 40, 5)}\t{json.dumps([])}\t{json.dumps([])}" for k in range(questions)]
    return _write_all(folder, {"index.tsv": index, "heldout.tsv": held, "style.md": ["w1 w2 w3 w4"]})


def _write_all(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    for name, lines in files.items():
        (folder / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {name: folder / name for name in files}


def reopen(folder: Path, like: Weights) -> Weights:
    """Open a saved folder as a view with the same adapter."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return open_folder(folder, config, like.adapter)
