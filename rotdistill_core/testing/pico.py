"""For plugin authors: pico models, texts and planted truth, all made here and without any download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.forward.head import final_norm, head_logits
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Gauge, Map, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

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
        for (
            name,
            parameter,
        ) in (
            model.named_parameters()
        ):  # gains away from 1 and biases away from 0, as trained models have them
            if parameter.ndim == 1:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5
                    if "norm" in name
                    else 0.3 * torch.randn_like(parameter)
                )
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
    vocabulary = {
        token: k
        for k, token in enumerate([*special, *(f"w{k}" for k in range(size - len(special)))])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pico_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Model:
    """Return an opened pico model."""
    return open_model(ModelRef(model=str(pico_folder(folder, model_type, seed, **changes))))


def pico_samples(
    vocabulary: int = 64, texts: int = 40, prefix: int = 6, seed: int = 0, guard: int = 0
) -> Samples:
    """Return random texts that share a prefix: 60 % fit, 20 % validation, 20 % held-out; and `guard` plain ones."""
    maker = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, vocabulary, (prefix,), generator=maker).tolist()
    made = []
    for k in range(texts):
        length = int(torch.randint(8, 24, (1,), generator=maker))
        split = ("fit", "fit", "fit", "validation", "heldout")[k % 5]
        own = [k % vocabulary, *torch.randint(0, vocabulary, (length,), generator=maker).tolist()]
        made.append(Text(f"t{k}", "en", split, (*shared, *own), prefix + 4))
    for k in range(guard):
        own = torch.randint(0, vocabulary, (8 + k,), generator=maker).tolist()
        made.append(
            Text(f"g{k}", "en", "guard-validation" if k % 2 else "guard", tuple(own), 1, plain=True)
        )
    return Samples(PackedTexts(tuple(made), prefix), (), "")


def pico_output(root: Path, step: str = "step") -> StepOutput:
    """Return a place for a step to write to."""
    return StepOutput(ArtifactStore(root), Ledger(root / "run"), f"key-{step}", step)


def captured_activations(
    pair: Pair, weights: Weights, samples: Samples, out: StepOutput
) -> ActivationStore:
    """Return a bank of both models on all texts."""
    shards = {}
    for side, view in (("teacher", pair.teacher.weights), ("student", weights)):
        walk = LayerwiseForward(view, samples.layout, torch.device("cpu"), torch.float32)
        made = [write_shard(out, side, 0, walk.states, torch.float32, {})]
        for i in walk:
            walk.run()
            made.append(write_shard(out, side, i + 1, walk.states, torch.float32, {}))
        shards[side] = tuple(made)
    teacher_boundaries = tuple(pair.teacher_depth(b) for b in range(pair.student.depth + 1))
    return ActivationStore(
        out.store.root,
        shards,
        {"teacher": samples.layout, "student": samples.layout},
        weights.lineage.depths,
        teacher_boundaries,
    )


def rotated_twin(model: Model, folder: Path, seed: int = 0) -> tuple[Model, Tensor]:
    """Write the model in a random basis of its stream and return it with the planted rotation `Q [d, d]`: states are `X Q`."""
    Q = random_rotation(model.width, seed)
    save_folder(model.weights.fold({"residual": Rotation(Q)}), model.folder, folder)
    return open_model(ModelRef(model=str(folder))), Q


@contextmanager
def other_signs(seed: int) -> Iterator[None]:
    """Let every decomposition return other signs, which are as right as the ones that it returned."""
    maker, svd, eigh = torch.Generator().manual_seed(seed), scipy.linalg.svd, torch.linalg.eigh

    def signs(n: int) -> Tensor:
        return 1 - 2 * torch.randint(0, 2, (n,), generator=maker).double()

    def flipped_svd(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        U, S, Vt = svd(*args, **kwargs)
        flip = signs(len(S)).numpy()
        return U * flip, S, flip[:, None] * Vt

    def flipped_eigh(A: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(A)
        return values, vectors * signs(len(values))

    with (
        mock.patch.object(scipy.linalg, "svd", flipped_svd),
        mock.patch.object(torch.linalg, "eigh", flipped_eigh),
    ):
        yield


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix in float64."""
    noise = torch.randn(
        size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return torch.linalg.qr(noise)[0]  # type: ignore[no-any-return]


def scramble(
    weights: Weights, seed: int = 0, invertible: bool = False
) -> tuple[Weights, dict[str, Map]]:
    """Return the same model in a random basis of everything that its table leaves free, and the maps that were planted.

    One rotation of the stream (where nothing stands in its way); in every layer a permutation of key/value groups and of query
    heads inside them, one of neurons, value/output gauges (orthogonal, or any `invertible` ones), query/key gauges and signed
    up/down scales.
    """
    planted = {
        space: found
        for maps in whole_permutations(weights, seed).values()
        for space, found in maps.items()
        if space != "residual"
    }
    planted |= gauges(weights, seed, invertible)
    if not weights.adapter.gains(weights.config)[1]:
        planted["residual"] = Rotation(random_rotation(weights.width, seed))
    return replace(
        weights.fold(planted), lineage=weights.lineage
    ), planted  # a checkpoint like any other: nobody knows its basis


def gauges(weights: Weights, seed: int = 0, invertible: bool = False) -> dict[str, Map]:
    """Return random gauges of every space that the table leaves free."""
    maker = torch.Generator().manual_seed(seed)
    sizes, (_, groups, width) = (
        weights.adapter.sizes(weights.config),
        weights.adapter.heads(weights.config),
    )
    free = {
        param.gauge.removesuffix("*") for param in weights.adapter.expand(weights.config).values()
    }
    found: dict[str, Map] = {}
    for i in range(weights.depth):
        noise = torch.randn(groups, width, width, dtype=torch.float64, generator=maker)
        angles, lengths = torch.rand(2, groups, width // 2, dtype=torch.float64, generator=maker)
        scales = torch.randn(sizes[f"neurons.{i}"], dtype=torch.float64, generator=maker)
        blocks = {
            "value": 0.3 * noise / width**0.5 + torch.eye(width) if invertible else torch.linalg.qr(noise)[0],
            "key": rotary_blocks(torch.polar(0.5 + lengths, 2 * torch.pi * angles)),
            "up": (scales.sign() * (0.5 + scales.abs()))[:, None, None],
        }  # fmt: skip
        found |= {
            f"{name}.{i}": Gauge(each) for name, each in blocks.items() if f"{name}.{i}" in free
        }
    return found


def rotary_blocks(factors: Tensor) -> Tensor:
    """Return the matrices `[n, k, k]` that multiply rotary pairs (j, j + k / 2) by complex factors `[n, k / 2]`."""
    a, b = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([a, b], -1), torch.cat([-b, a], -1)], -2)


def save_folder(
    weights: Weights, like: Path, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Save a view as a plain folder with the tokenizer of `like`."""
    from rotdistill_core.checkpoint.models import tokenizer_files
    from rotdistill_core.store.files import Blocks, write_file

    def write(name: str, blocks: Blocks) -> None:
        write_file(folder / name, blocks)

    for path in tokenizer_files(like):
        write(path.name, [path.read_bytes()])
    weights.save(write, dtype)


def final_states(
    weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the stream behind the last layer `[rows, d]`."""
    walk = LayerwiseForward(weights, layout, torch.device("cpu"), dtype)
    for _ in walk:
        walk.run()
    return walk.states


def logits(weights: Weights, layout: PackedTexts, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return all logits `[rows, vocab]`."""
    return head_logits(
        weights, final_norm(weights, final_states(weights, layout, dtype)), weights.head().to(dtype)
    )


def pico_texts(folder: Path, blurbs: int = 20, questions: int = 3) -> Mapping[str, Path]:
    """Write index.tsv, heldout.tsv, guard.tsv and a style prompt for the pico tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{k}" for k in range(58)]

    def log(k: int, n: int) -> str:
        return " ".join(words[(7 * k + 3 * j * (k + 1)) % 58] for j in range(n))

    index = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    index += [f"en-{k}\ten\tplace {k}\tland\t{log(k, 5)}\t{log(k + 5, 12)}" for k in range(blurbs)]
    held = ["id\tlanguage\tplace\tcountry\tquestion\tfacts\tfalsehoods"]
    held += [
        f"held-{k}\ten\tother {k}\tland\t{log(k + 40, 5)}\t{json.dumps([])}\t{json.dumps([])}"
        for k in range(questions)
    ]
    guard = ["id\tlanguage\tkind\ttext", *(f"g-{k}\ten\tprose\t{log(k + 50, 9)}" for k in range(4))]
    files = {
        "index.tsv": index,
        "heldout.tsv": held,
        "guard.tsv": guard,
        "style.md": ["w1 w2 w3 w4"],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {name: folder / name for name in files}


def pico_head(
    name: str = "trial", teacher: object = "model", student: object = "model", tokens: int = 4
) -> str:
    """Return the first lines of a recipe for pico models, with `pico_texts` in `texts/` beside it; keys with dots and tables may follow."""
    texts = "".join(
        f'samples.{key} = "texts/{key}.{end}"\n'
        for key, end in (("index", "tsv"), ("style", "md"), ("heldout", "tsv"))
    )
    return f'name = "{name}"\nteacher.model = "{teacher}"\nstudent.model = "{student}"\n{texts}samples.answer_tokens = {tokens}\n'


def reopen(folder: Path, like: Weights) -> Weights:
    """Open a saved folder as a view with the same adapter."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return open_folder(folder, config, like.adapter)


@torch.no_grad()
def plain_transformers(
    adapter: Adapter, folder: Path, layout: PackedTexts, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    """Return the stream at every boundary and the logits, row for row, as transformers computes them one text at a time.

    Its norms drop to float32 whatever the dtype, so float64 agrees with a walk to about 1e-6.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    lost = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]
    }
    assert not lost, f"{folder}: transformers does not find its own tensors there: {lost}"
    seen: list[Tensor] = []
    norm = model.eval().get_submodule(adapter.norm.removesuffix(".weight"))
    for module in (*model.get_submodule(adapter.layers), norm):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    parts: list[list[Tensor]] = []
    for k, text in enumerate(layout.texts):
        seen.clear()
        made = model(torch.tensor([text.tokens])).logits[0]
        parts.append([rows[layout.prefix if k else 0 :] for rows in (*seen, made)])
    *states, whole = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return states, whole


def max_difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def whole_permutations(weights: Weights, seed: int = 3) -> dict[str, dict[str, Map]]:
    """Return permutations that leave any model alone, by what they move: neurons and heads of each layer, channels of the stream."""
    sizes = weights.adapter.sizes(weights.config)
    shuffled = partial(torch.randperm, generator=torch.Generator().manual_seed(seed))
    moved: dict[str, dict[str, Map]] = {
        "channels of the stream": {"residual": Permutation(shuffled(sizes["residual"]))}
    }
    for i in range(weights.depth):
        moved[f"neurons of layer {i}"] = {
            f"neurons.{i}": Permutation(shuffled(sizes[f"neurons.{i}"]))
        }
        heads, groups, width = weights.adapter.heads(weights.config)
        order = shuffled(groups)
        inside = torch.arange(heads).view(groups, -1)[
            order
        ]  # a group's query heads follow it, in a new order
        inside = torch.stack([some[shuffled(len(some))] for some in inside]).flatten()
        moved[f"heads of layer {i}"] = {
            f"kv.{i}": Permutation(order).blocks(width),
            f"q.{i}": Permutation(inside).blocks(width),
        }
    return moved
