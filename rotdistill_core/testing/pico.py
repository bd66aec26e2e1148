"""Pico models, tokenizers, texts and recipes, all made on the spot and without any download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.data.tokenization import with_prompt
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

PICO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Config keys of a pico model."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Chat template of the pico tokenizer."""
THINKING_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content.split('</think>')[-1] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think>\n{% endif %}"
)
"""A chat template like DeepSeek-R1's: answers begin inside a thinking block, and earlier ones have
none."""
SPECIAL_TOKENS = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>")
WORDS = tuple(f"w{k}" for k in range(58))
"""All words of a pico tokenizer with 64 tokens."""


def pico_folder(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a random model of hidden size 32 with 2 layers, and a tokenizer; return the folder.

    Args:
        folder: where to write.
        model_type: its Hugging Face architecture; the config class fills in what is not given.
        seed: of the weights.
        changes: config keys other than those of `PICO`.
    """
    settings = {**PICO, "tie_word_embeddings": True, **changes}
    return pico_checkpoint(folder, AutoConfig.for_model(model_type, **settings), seed)


def pico_checkpoint(folder: Path, config: Any, seed: int = 0) -> Path:
    """Write a random model of a config of transformers, and a tokenizer; return the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains away from 1 and biases away from 0, as trained models have them.
            if parameter.ndim > 1:
                parameter.copy_(0.15 * torch.randn_like(parameter))
            elif "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    pico_tokenizer(int(config.vocab_size)).save_pretrained(folder)
    return folder


def pico_tokenizer(size: int, thinks: bool = False) -> Any:
    """Return a word tokenizer of `size` tokens with a chat template.

    With `thinks`, answers begin inside a thinking block, whose beginning and end are the last two
    words.
    """
    words = [f"w{k}" for k in range(size - len(SPECIAL_TOKENS))]
    if thinks:
        words[-2:] = ["<think>", "</think>"]
    vocabulary = {token: k for k, token in enumerate([*SPECIAL_TOKENS, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = THINKING_TEMPLATE if thinks else TEMPLATE
    return tokenizer


def pico_model(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Model:
    """Write a pico model and open it; see `pico_folder`."""
    return open_model(ModelRef(model=str(pico_folder(folder, model_type, seed, **changes))))


def pico_samples(
    vocabulary: int = 64, texts: int = 40, prefix: int = 6, seed: int = 0, guard: int = 0
) -> Samples:
    """Return random texts that share a prefix: of five, three to fit, one to validate, one held
    out.

    Args:
        vocabulary: number of tokens.
        texts: how many.
        prefix: tokens that all share.
        seed: of the tokens.
        guard: how many plain texts outside the domain are added.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(0, vocabulary, (count,), generator=generator).tolist()
        return drawn

    shared = tokens(prefix)
    splits = (Split.FIT, Split.FIT, Split.FIT, Split.VALIDATION, Split.HELDOUT)
    made = []
    for k in range(texts):
        length = int(torch.randint(8, 24, (1,), generator=generator))
        own = [k % vocabulary, *tokens(length)]
        made.append(Text(f"t{k}", "en", splits[k % 5], (*shared, *own), prefix + 4))
    for k in range(guard):
        split = Split.GUARD_VALIDATION if k % 2 else Split.GUARD
        made.append(Text(f"g{k}", "en", split, tuple(tokens(8 + k)), 1, plain=True))
    return Samples(PackedTexts(tuple(made), prefix), (), "")


def pico_baked(samples: Samples) -> Samples:
    """Return samples whose shared prefix the teacher reads, and the student only its first token.

    With `samples.bake_prompt` a run has such texts.
    """
    shared = samples.layout.prefix
    texts = tuple(
        text
        if text.plain
        else with_prompt(text, (text.tokens[0], *text.tokens[shared : text.answer]))
        for text in samples.layout.texts
    )
    return replace(samples, layout=PackedTexts(texts, 1), theirs=samples.layout, baked=True)


def pico_output(root: Path, step: str = "step") -> StepOutput:
    """Return a place for a step to write to, below `root`."""
    return StepOutput(ArtifactStore(root), Ledger(root / "run"), f"key-{step}", step)


def captured_activations(
    pair: Pair, weights: Weights, samples: Samples, out: StepOutput
) -> ActivationStore:
    """Return the residual streams of both models on all texts, in float32."""
    shards: dict[str, tuple[str, ...]] = {}
    for side, view in ((Side.TEACHER, pair.teacher.weights), (Side.STUDENT, weights)):
        walk = LayerwiseForward(view, samples.layout, torch.device("cpu"), torch.float32)
        sidecar = {"side": side}
        written = [write_shard(out, side, 0, walk.states, torch.float32, sidecar)]
        for i in walk:
            walk.run()
            written.append(write_shard(out, side, i + 1, walk.states, torch.float32, sidecar))
        shards[side] = tuple(written)
    boundaries = tuple(pair.teacher_depth(b) for b in range(pair.student.depth + 1))
    layouts: dict[str, PackedTexts] = {Side.TEACHER: samples.layout, Side.STUDENT: samples.layout}
    depths = weights.lineage.depths
    return ActivationStore(out.store.root, shards, layouts, depths, boundaries, student=weights)


def pico_texts(folder: Path, blurbs: int = 20, questions: int = 3) -> Mapping[str, Path]:
    """Write index.tsv, heldout.tsv, guard.tsv and style.md in words of the pico tokenizer.

    Returns:
        File name -> path.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def sentence(k: int, count: int) -> str:
        return " ".join(WORDS[(7 * k + 3 * j * (k + 1)) % len(WORDS)] for j in range(count))

    index = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    for k in range(blurbs):
        index.append(f"en-{k}\ten\tplace {k}\tland\t{sentence(k, 5)}\t{sentence(k + 5, 12)}")
    heldout = ["id\tlanguage\tplace\tcountry\tquestion\tfacts\tfalsehoods"]
    for k in range(questions):
        heldout.append(f"held-{k}\ten\tother {k}\tland\t{sentence(k + 40, 5)}\t[]\t[]")
    guard = ["id\tlanguage\tkind\ttext"]
    for k in range(4):
        guard.append(f"g-{k}\ten\tprose\t{sentence(k + 50, 9)}")
    files = {
        "index.tsv": index,
        "heldout.tsv": heldout,
        "guard.tsv": guard,
        "style.md": ["w1 w2 w3 w4"],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {name: folder / name for name in files}


def pico_head(
    name: str = "trial", teacher: object = "model", student: object = "model", tokens: int = 4
) -> str:
    """Return the first lines of a recipe for pico models; more keys with dots, and tables, may
    follow.

    `pico_texts` must lie in `texts/`, next to the recipe. `tokens` is the length of held-out
    answers.
    """
    lines = [
        f"name = {json.dumps(name)}",
        f"teacher.model = {json.dumps(str(teacher))}",
        f"student.model = {json.dumps(str(student))}",
        'samples.index = "texts/index.tsv"',
        'samples.style = "texts/style.md"',
        'samples.heldout = "texts/heldout.tsv"',
        f"samples.answer_tokens = {tokens}",
        "",
    ]
    return "\n".join(lines)
