"""For plugin authors: pico models, texts and planted truth, all made here and without any download."""

from __future__ import annotations

import inspect
import json
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.adapter import Adapter
from rotdistill_core.bank import Bank, write_shard
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.headers import folder_headers, read_config
from rotdistill_core.hookspecs import Specs
from rotdistill_core.ledger import Ledger, Out, Store
from rotdistill_core.maps import Gauge, Map, Maps, Permutation, Rotation, tensor_of
from rotdistill_core.models import Model, Pair, open_model
from rotdistill_core.recipe import ModelRef
from rotdistill_core.samples import Layout, Samples, Text, Variant
from rotdistill_core.step import options_of, stage_of, validator_of
from rotdistill_core.walk import Walk, final_norm, head_logits
from rotdistill_core.weights import Weights, open_folder

if TYPE_CHECKING:
    from rotdistill_core.pipeline import Outcome

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


def pico_samples(vocabulary: int = 64, texts: int = 40, prefix: int = 6, seed: int = 0, guard: int = 0) -> Samples:
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
        made.append(Text(f"g{k}", "en", "guard-validation" if k % 2 else "guard", tuple(own), 1, plain=True))
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
    partners = tuple(pair.teacher_depth(b) for b in range(pair.student.depth + 1))
    return Bank(out.store.root, shards, {"teacher": samples.layout, "student": samples.layout}, weights.lineage.depths, partners)


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

    with mock.patch.object(scipy.linalg, "svd", flipped_svd), mock.patch.object(torch.linalg, "eigh", flipped_eigh):
        yield


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix in float64."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise)[0]  # type: ignore[no-any-return]


def scramble(weights: Weights, seed: int = 0, invertible: bool = False) -> tuple[Weights, dict[str, Map]]:
    """Return the same model in a random basis of everything that its table leaves free, and the maps that were planted.

    One rotation of the stream (where nothing stands in its way); in every layer a permutation of key/value groups and of query
    heads inside them, one of neurons, value/output gauges (orthogonal, or any `invertible` ones), query/key gauges and signed
    up/down scales.
    """
    planted = {space: found for maps in whole_permutations(weights, seed).values() for space, found in maps.items() if space != "residual"}
    planted |= gauges(weights, seed, invertible)
    if not weights.adapter.gains(weights.config)[1]:
        planted["residual"] = Rotation(random_rotation(weights.width, seed))
    return replace(weights.fold(planted), lineage=weights.lineage), planted  # a checkpoint like any other: nobody knows its basis


def gauges(weights: Weights, seed: int = 0, invertible: bool = False) -> dict[str, Map]:
    """Return random gauges of every space that the table leaves free."""
    maker = torch.Generator().manual_seed(seed)
    sizes, (_, groups, width) = weights.adapter.sizes(weights.config), weights.adapter.heads(weights.config)
    free = {param.gauge.removesuffix("*") for param in weights.adapter.expand(weights.config).values()}
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
        found |= {f"{name}.{i}": Gauge(each) for name, each in blocks.items() if f"{name}.{i}" in free}
    return found


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
    return head_logits(weights, final_norm(weights, final_states(weights, layout, dtype)), weights.head().to(dtype))


def pico_texts(folder: Path, blurbs: int = 20, questions: int = 3) -> Mapping[str, Path]:
    """Write index.tsv, heldout.tsv, guard.tsv and a style prompt for the pico tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{k}" for k in range(58)]

    def say(k: int, n: int) -> str:
        return " ".join(words[(7 * k + 3 * j * (k + 1)) % 58] for j in range(n))

    index = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    index += [f"en-{k}\ten\tplace {k}\tland\t{say(k, 5)}\t{say(k + 5, 12)}" for k in range(blurbs)]
    held = ["id\tlanguage\tplace\tcountry\tquestion\tfacts\tfalsehoods"]
    held += [f"held-{k}\ten\tother {k}\tland\t{say(k + 40, 5)}\t{json.dumps([])}\t{json.dumps([])}" for k in range(questions)]
    guard = ["id\tlanguage\tkind\ttext", *(f"g-{k}\ten\tprose\t{say(k + 50, 9)}" for k in range(4))]
    files = {"index.tsv": index, "heldout.tsv": held, "guard.tsv": guard, "style.md": ["w1 w2 w3 w4"]}
    for name, lines in files.items():
        (folder / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {name: folder / name for name in files}


def pico_head(name: str = "trial", teacher: object = "model", student: object = "model", tokens: int = 4) -> str:
    """Return the first lines of a recipe for pico models, with `pico_texts` in `texts/` beside it; keys with dots and tables may follow."""
    texts = "".join(f'samples.{key} = "texts/{key}.{end}"\n' for key, end in (("index", "tsv"), ("style", "md"), ("heldout", "tsv")))
    return f'name = "{name}"\nteacher.model = "{teacher}"\nstudent.model = "{student}"\n{texts}samples.answer_tokens = {tokens}\n'


class Quiet:
    """What a run reports to: it keeps the lines, and shows none."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:  # noqa: D102
        self.lines.append(text)


def carry_out(path: Path, screen: Any = None) -> Outcome:
    """Carry out a recipe, in `runs/` beside it."""
    from rotdistill_core import pipeline, recipe

    return pipeline.Run(recipe.load(path), path.parent / "runs", screen or Quiet(), lambda *_: None).go()


def command_line(*words: str) -> tuple[int, str, str]:
    """Call the command line in this process; return its exit code and what it printed on stdout and on stderr."""
    from rotdistill_core.cli import main

    out, err, code = StringIO(), StringIO(), 0
    inside = mock.patch.multiple(sys, argv=["rotdistill", *words]), mock.patch.object(signal, "signal")  # handlers are the caller's
    with redirect_stdout(out), redirect_stderr(err), inside[0], inside[1]:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, out.getvalue(), err.getvalue()


def reopen(folder: Path, like: Weights) -> Weights:
    """Open a saved folder as a view with the same adapter."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return open_folder(folder, config, like.adapter)


@torch.no_grad()
def plain_transformers(adapter: Adapter, folder: Path, layout: Layout, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Return the stream at every boundary and the logits, row for row, as transformers computes them one text at a time.

    Its norms drop to float32 whatever the dtype, so float64 agrees with a walk to about 1e-6.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    lost = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
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


# The checks of an adapter: each takes a table and a folder with a pico checkpoint, and says what is wrong with the table.

EXACT, PLAIN = 1e-9, 1e-5


def _opened(adapter: Adapter, folder: Path) -> tuple[Weights, Layout]:
    config = adapter.completed(read_config(folder))
    return open_folder(folder, config, adapter), pico_samples(int(adapter.sizes(config)["vocab"]), texts=4).layout


def _report(problems: Sequence[str]) -> None:
    if problems:
        raise AssertionError("the table is wrong:\n" + "\n".join(problems))


def _apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def every_tensor_is_claimed_once(adapter: Adapter, folder: Path) -> None:
    """Compare every tensor of the checkpoint with the table, axis by axis."""
    config, found, problems = adapter.completed(read_config(folder)), folder_headers(folder), []
    table, sizes, (query, groups, width) = adapter.expand(config), adapter.sizes(config), adapter.heads(config)
    if (query * width, groups * width) != (sizes["q.0"], sizes["kv.0"]) or query % groups:
        problems.append(f"heads: {query} and {groups} of {width} do not make up q.0 ({sizes['q.0']}) and kv.0 ({sizes['kv.0']})")
    shapes = adapter.unfused(config, {name: header.shape for name, header in found.items()})
    for name, shape in shapes.items():
        templates = [t for t in adapter.params if re.fullmatch(re.escape(t).replace(r"\{i\}", r"\d+"), name)]
        if len(templates) != 1 or name not in table:
            problems.append(f"{name} is claimed {len(templates)} times: {templates}")
        elif len(shape) != len(table[name].axes):
            problems.append(f"{name} has {len(shape)} axes, declared are {list(table[name].axes)}")
        else:
            for axis, (size, space) in enumerate(zip(shape, table[name].axes, strict=True)):
                if sizes.get(space) != size:
                    like = [other for other, n in sizes.items() if n == size]
                    problems.append(f'{name}: axis {axis} is declared "{space}" ({sizes.get(space)}), it has {size} like {like}')
    for name, param in table.items():
        if name not in shapes and not param.optional and not (param.tied and config.get("tie_word_embeddings")):
            problems.append(f"{name} is declared, the checkpoint does not have it")
        if param.gain and not (param.gain in table and table[param.gain].is_gain):
            problems.append(f"{name} absorbs {param.gain}, which is not declared as a gain")
    _report(problems)


def defaults_are_those_of_the_config_class(adapter: Adapter, folder: Path) -> None:
    """Leave one key after the other out of config.json and compare what the table and transformers take instead."""
    from transformers import AutoConfig

    whole, problems = read_config(folder), []
    for key in adapter.defaults(whole):
        config = {k: v for k, v in whole.items() if k not in (key, "dtype")}
        theirs, ours = getattr(AutoConfig.for_model(**config), key), adapter.defaults(config)[key]
        if theirs != ours:
            problems.append(f'defaults: "{key}" is {ours!r}, transformers takes {theirs!r}')
    _report(problems)


def the_walk_computes_what_transformers_computes(adapter: Adapter, folder: Path) -> None:
    """Compare every boundary of the stream, and the logits, in float64."""
    weights, layout = _opened(adapter, folder)
    states, expected = plain_transformers(adapter, folder, layout)
    other = replace(adapter, gain_offset=1.0 - adapter.gain_offset)
    if _apart(logits(weights, layout), expected) > PLAIN >= _apart(logits(replace(weights, adapter=other), layout), expected):
        _report([f"gain_offset is {adapter.gain_offset}, the norms of this model behave as with {other.gain_offset}"])
    walk = Walk(weights, layout, torch.device("cpu"), torch.float64)
    far = [_apart(walk.states, states[0])]
    for i in walk:
        walk.states = states[i].clone()
        walk.run()
        far.append(_apart(walk.states, states[i + 1]))
    names = ["the embeddings", *(f"layer {i}" for i in range(weights.depth))]
    problems = [f"the stream behind {n} differs from transformers by {x:.1e}" for n, x in zip(names, far, strict=True) if x > PLAIN]
    made = head_logits(weights, final_norm(weights, states[-1]), weights.head().double())
    if _apart(made, expected) > PLAIN:
        problems.append(f"logits differ by {_apart(made, expected):.1e}: look at norm, head, eps_key, gain_offset and softcap_key")
    _report(problems)


def every_gain_is_absorbed_by_its_readers(adapter: Adapter, folder: Path) -> None:
    """Fuse one norm gain after the other into the readers that name it; where that changes logits, find the reader to blame."""
    weights, layout = _opened(adapter, folder)
    weights, problems = weights.untie(), []
    before, table = logits(weights, layout), adapter.expand(weights.config)
    matrices = [n for n, p in table.items() if n in weights.entries and p.axes[1:] == ("residual",) and n != adapter.embedding]
    layer_of = re.compile(r"\.\d+\.").findall

    def change(gain: str, readers: list[str]) -> float:
        factor = weights.gain(gain)
        fused = {name: weights[name].double() * factor for name in readers}
        return _apart(logits(weights.edit({gain: torch.full_like(factor, 1.0 - adapter.gain_offset), **fused}), layout), before)

    missing, wrong = "reads behind {} and does not name it as its gain", "names {} as its gain and does not read behind it"
    for gain in (n for n, p in table.items() if p.is_gain and p.axes == ("residual",)):
        readers = [name for name in matrices if table[name].gain == gain]
        if readers and change(gain, readers) <= EXACT:
            continue
        orphans = [name for name in matrices if table[name].gain is None and layer_of(name) == layer_of(gain)]
        if orphans and change(gain, [*readers, *orphans]) <= EXACT:
            problems += [f"{name}: axis 1 {missing.format(gain)}" for name in orphans]
        elif readers:  # a norm on what a branch writes has none, and needs none
            blamed = [n for n in matrices if change(gain, sorted({n} ^ set(readers))) <= EXACT]
            problems += [f"{n}: axis 1 {(wrong if n in readers else missing).format(gain)}" for n in blamed]
            problems += [] if blamed else [f"{gain} is not absorbed by the readers that name it: {readers}"]
    _report(problems)


def _blame(weights: Weights, maps: Mapping[str, Map], layout: Layout, wanted: Tensor) -> Iterator[str]:
    """Yield the single axes of the table whose being carried or not explains that a fold changes the logits."""
    table, sizes = weights.adapter.expand(weights.config), weights.adapter.sizes(weights.config)
    for name, param in table.items():
        for axis, space in enumerate(param.axes):
            for other in ("none of them",) if space in maps else tuple(s for s in maps if sizes[s] == sizes[space]):
                axes = (*param.axes[:axis], other, *param.axes[axis + 1 :])
                changed = replace(weights.adapter, params={**table, name: replace(param, axes=axes)})
                if name in weights.entries and _apart(logits(replace(weights, adapter=changed).fold(maps), layout), wanted) <= EXACT:
                    yield f'{name}: axis {axis} is declared "{space}"; of {", ".join(maps)} it is {other}'


def _compare_fold(weights: Weights, maps: Mapping[str, Map], layout: Layout, wanted: Tensor, what: str) -> list[str]:
    change = _apart(logits(weights.fold(maps), layout), wanted)
    if change <= EXACT:
        return []
    names = [n for n, p in weights.adapter.expand(weights.config).items() if {*p.axes} & {*maps}]
    doubt = f"{what} changes logits by {change:.1e}: `heads`, an axis, or the order in `fused` is wrong, of {', '.join(names)}"
    return list(_blame(weights, maps, layout, wanted)) or [doubt]


def a_rotation_of_the_stream_is_exact_or_refused(adapter: Adapter, folder: Path) -> None:
    """Fold a random rotation: logits stay, or the table has norms behind writers and the fold says so."""
    weights, layout = _opened(adapter, folder)
    width = weights.width
    if stuck := adapter.gains(weights.config)[1]:
        try:
            weights.fold({"residual": Rotation(random_rotation(width, 1))})
        except RecipeError as told:
            assert stuck[0] in str(told), told
            return
        raise AssertionError(f"{stuck[0]} has no reader behind it, yet the rotation was folded")
    fused = logits(weights.fold({"residual": Rotation(torch.eye(width, dtype=torch.float64))}), layout)
    _report(_compare_fold(weights, {"residual": Rotation(random_rotation(width, 1))}, layout, fused, "a rotation of the stream"))


def whole_permutations(weights: Weights, seed: int = 3) -> dict[str, dict[str, Map]]:
    """Return permutations that leave any model alone, by what they move: neurons and heads of each layer, channels of the stream."""
    sizes = weights.adapter.sizes(weights.config)
    shuffled = partial(torch.randperm, generator=torch.Generator().manual_seed(seed))
    moved: dict[str, dict[str, Map]] = {"channels of the stream": {"residual": Permutation(shuffled(sizes["residual"]))}}
    for i in range(weights.depth):
        moved[f"neurons of layer {i}"] = {f"neurons.{i}": Permutation(shuffled(sizes[f"neurons.{i}"]))}
        heads, groups, width = weights.adapter.heads(weights.config)
        order = shuffled(groups)
        inside = torch.arange(heads).view(groups, -1)[order]  # a group's query heads follow it, in a new order
        inside = torch.stack([some[shuffled(len(some))] for some in inside]).flatten()
        moved[f"heads of layer {i}"] = {f"kv.{i}": Permutation(order).blocks(width), f"q.{i}": Permutation(inside).blocks(width)}
    return moved


def permutations_are_exact(adapter: Adapter, folder: Path) -> None:
    """Permute the neurons and the heads of each layer, and the channels of the stream: logits stay."""
    weights, layout = _opened(adapter, folder)
    before = logits(weights, layout)
    for what, maps in whole_permutations(weights).items():
        _report(_compare_fold(weights, maps, layout, before, f"permuting {what}"))


def gauges_are_exact(adapter: Adapter, folder: Path) -> None:
    """Put one random gauge after the other into the heads and neurons of each layer: logits stay."""
    weights, layout = _opened(adapter, folder)
    before = logits(weights, layout)
    folds = {space: weights.fold({space: found}) for space, found in gauges(weights, invertible=True).items()}
    changes = {space: _apart(logits(folded, layout), before) for space, folded in folds.items()}
    on = {space: [n for n, p in weights.adapter.expand(weights.config).items() if p.gauge.removesuffix("*") == space] for space in changes}
    _report([f'"{s}" is declared a gauge and changes logits by {x:.1e}, on {", ".join(on[s])}' for s, x in changes.items() if x > EXACT])


def unfolding_gives_the_weights_back(adapter: Adapter, folder: Path) -> None:
    """Fold everything that may be folded, and take it back."""
    weights, _ = _opened(adapter, folder)
    back = (folded := scramble(weights)[0]).unfold(folded.undo)  # type: ignore[arg-type]  # a fold can be undone
    problems = [f"{name} is there only before or only after" for name in set(weights.entries) ^ set(back.entries)]
    changes = {name: _apart(weights[name].double(), back[name].double()) for name in set(weights.entries) & set(back.entries)}
    problems += [f"{name} comes back changed by {change:.1e}" for name, change in changes.items() if change > 1e-12]
    _report(problems)


def a_saved_fold_reloads_in_transformers(adapter: Adapter, folder: Path) -> None:
    """Save the folded model and compare what plain transformers computes from both folders."""
    weights, layout = _opened(adapter, folder)
    there = folder.with_name(f"{folder.name}-folded")
    save_folder(scramble(weights)[0], folder, there, torch.float64)
    _opened(adapter, there)
    one, two = (plain_transformers(adapter, path, layout)[1] for path in (folder, there))
    _report([f"a saved fold has other logits in transformers, by {_apart(one, two):.1e}"] if _apart(one, two) > PLAIN else [])


def sites_are_found(adapter: Adapter, folder: Path) -> None:
    """Observe every site: `mid` and `mlp` add up to the stream behind a layer, writers carry their sites into it."""
    weights, layout = _opened(adapter, folder)
    walk = Walk(weights, layout, torch.device("cpu"), torch.float64)
    problems: list[str] = []
    for i in walk:
        lost = [s for s, site in adapter.sites.items() if site.module not in dict(walk.layer.named_modules())]
        _report([f'site "{s}": a layer has no module "{adapter.sites[s].module}"' for s in lost])
        seen: dict[str, Tensor] = {}

        def note(site: str, rows: Tensor, X: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen.setdefault(site, torch.full((layout.rows, X.shape[1]), torch.nan, dtype=X.dtype))[rows] = X

        start = walk.states.clone()
        walk.run({site: lambda rows, X, site=site, note=note: note(site, rows, X) for site in adapter.sites})  # type: ignore[misc]
        problems += [f'site "{s}" sees only some rows' for s, X in seen.items() if bool(X.isnan().any())]
        if {"mid", "mlp"} <= seen.keys() and not _apart(seen["mid"] + seen["mlp"], walk.states) <= EXACT:
            problems.append(f'sites "mid" and "mlp" do not add up to the stream behind layer {i}')
        branches = {"attention": seen["mid"] - start, "the MLP": walk.states - seen["mid"]} if "mid" in seen else {}
        for site, template in adapter.writers.items():
            name = template.replace("{i}", str(i))
            bias = f"{name.removesuffix('weight')}bias"
            W, b = weights[name].double(), weights[bias].double() if bias in weights.entries else 0.0
            if seen[site].shape[1] != W.shape[1]:
                problems.append(f'site "{site}" is {seen[site].shape[1]} wide, its writer {name} reads {W.shape[1]}')
            elif branches and not any(_apart(seen[site] @ W.T + b, X) <= EXACT for X in branches.values()):
                problems.append(f'{name} does not carry the site "{site}" into what {" or ".join(branches)} adds to the stream')
    _report(problems)


ADAPTER_CHECKS: tuple[Callable[[Adapter, Path], None], ...] = (
    every_tensor_is_claimed_once, defaults_are_those_of_the_config_class, the_walk_computes_what_transformers_computes,
    every_gain_is_absorbed_by_its_readers, a_rotation_of_the_stream_is_exact_or_refused, permutations_are_exact, gauges_are_exact,
    unfolding_gives_the_weights_back, a_saved_fold_reloads_in_transformers, sites_are_found,
)  # fmt: skip
"""What every adapter must pass, on a pico checkpoint of each variant of its architecture: `check(adapter, folder)`."""


def _tried(cls: type, options: Mapping[str, Any], folder: Path, **size: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a step on a pico model and its twin in another basis; return what it gave and what it was given, as tensors by name."""
    student = pico_model(folder / "student", **size)
    if size:  # a channel that is always 0
        table = {n: p for n, p in student.adapter.expand(student.config).items() if n in student.weights.entries}
        axes = {n: p.axes.index("residual") for n, p in table.items() if "residual" in p.axes and not p.gain and not p.is_gain}
        dead = student.weights.edit({n: student.weights[n].index_fill(axis, torch.tensor(0), 0.0) for n, axis in axes.items()})
        save_folder(dead, student.folder, folder / "dead")
        student = open_model(ModelRef(model=str(folder / "dead")))
    teacher, Q = rotated_twin(student, folder / "teacher")
    pair, samples, out = Pair(teacher, student), pico_samples(texts=5 if size else 40, guard=2), pico_out(folder / "runs")
    bank = captured(pair, student.weights, samples, out)
    maps = Maps({f"residual.{b}": Rotation(Q) for b in range(student.depth + 1)} if stage_of(cls) != "align" else {})
    given = {"pair": pair, "samples": samples, "out": out, "bank": bank, "maps": maps, "weights": student.weights,
             "variant": Variant("base", student.weights, maps, 0.0, student.folder), "progress": lambda *_: None}  # fmt: skip
    hook = getattr(validator_of(cls).validate_json(json.dumps(options), strict=True), stage_of(cls))
    torch.seed()  # what a step draws must come from its own seed
    made = hook(**{name: given[name] for name in inspect.signature(hook).parameters})
    return _tensors(made), {**_tensors(maps), **_tensors(bank), **_tensors(reopen(student.folder, student.weights)), "Q": Q}


def _tensors(made: Any) -> dict[str, Any]:
    """Return what a stage gives by name: maps, weights, captured rows, or result rows."""
    if isinstance(made, Bank):
        return {f"{side} {b}": made.rows(side, b).clone() for side, shards in made.shards.items() for b in range(len(shards))}
    if isinstance(made, Weights):
        return {name: made[name].clone() for name in made.entries}
    assert made is not None, "the hook gave None"
    return {f"map {space}": tensor_of(found) for space, found in made.items()} if isinstance(made, Maps) else {"rows": list(made)}


def the_hook_is_as_specified(cls: type, _: Mapping[str, Any], __: Path) -> None:
    """Compare the arguments of the one stage hook, and their annotations, with its specification."""
    mine, theirs = (inspect.signature(getattr(of, stage_of(cls))) for of in (cls, Specs))
    wrong = [p for n, p in mine.parameters.items() if n != "self" and str(p) != str(theirs.parameters.get(n))]
    assert not wrong and mine.return_annotation == theirs.return_annotation, f"{wrong} or the result differ from {theirs}"


def options_survive_toml_and_json(cls: type, options: Mapping[str, Any], _: Path) -> None:
    """Write the options as a recipe does and read them again; each has a description."""
    read: Any = validator_of(cls).validate_json
    told = options_of(read(json.dumps(options), strict=True))
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in told.items() if value is not None)
    assert options_of(read(json.dumps(tomllib.loads(text)), strict=True)) == told
    bare = [n for n, about in validator_of(cls).json_schema()["properties"].items() if n != "use" and not about.get("description")]
    assert not bare, f"no text under {bare}: it is what a recipe's author reads"


def it_does_the_same_again_and_changes_no_input(cls: type, options: Mapping[str, Any], folder: Path) -> None:
    """Run it twice on the same inputs, and compare what it gives, and the inputs with fresh ones."""
    (made, seen), (again, fresh) = (_tried(cls, options, folder / name) for name in ("one", "two"))
    for what, one, two in (("result", made, again), ("input", seen, fresh)):
        differ = [k for k in one if not (torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k])]
        assert one.keys() == two.keys() and not differ, f"the {what} differs: {differ or one.keys() ^ two.keys()}"


def hard_inputs_are_solved_or_refused(cls: type, options: Mapping[str, Any], folder: Path) -> None:
    """Run it where there are fewer rows than channels, and one channel is always 0: finite, or an error that says why."""
    with suppress(RotdistillError):
        made, _ = _tried(cls, options, folder, hidden_size=128, num_attention_heads=4)
        bad = [k for k, value in made.items() if isinstance(value, Tensor) and not bool(value.double().isfinite().all())]
        assert not bad, f"not finite: {bad}"


def a_planted_rotation_is_found(cls: type, options: Mapping[str, Any], folder: Path) -> None:
    """Align a model with its twin in another basis: the map is the planted rotation. For solvers of rotations."""
    made, given = _tried(cls, options, folder)
    far = {k: _apart(value.double(), given["Q"]) for k, value in made.items() if k.startswith("map residual")}
    assert far and max(far.values()) < 1e-4, f"off the planted rotation by {far}"


STEP_CHECKS: tuple[Callable[[type, Mapping[str, Any], Path], None], ...] = (
    the_hook_is_as_specified, options_survive_toml_and_json, it_does_the_same_again_and_changes_no_input, hard_inputs_are_solved_or_refused,
)  # fmt: skip
"""What every step must pass: `check(class, options, empty folder)`. Solvers of rotations add `a_planted_rotation_is_found`."""


def parametrize_with_checks(subject: Adapter | type, *cases: Mapping[str, Any], checks: Sequence[Any] = ()) -> Any:
    """Let a test run every check of an adapter (cases: changes of the pico config) or a step class (cases: its options).

    `@parametrize_with_checks(TABLE, {"head_dim": 12})` before `def test_it_conforms(check, tmp_path): check(tmp_path)`.
    """
    import pytest

    def bound(check: Any, case: Mapping[str, Any]) -> Callable[[Path], None]:
        if not isinstance(subject, Adapter):
            return lambda folder: check(subject, case, folder)
        return lambda folder: check(subject, pico_folder(folder / "model", subject.model_types[0], **case))

    chosen = checks or (ADAPTER_CHECKS if isinstance(subject, Adapter) else STEP_CHECKS)
    some = [pytest.param(bound(c, case), id=" ".join([c.__name__, *case])) for case in cases or ({},) for c in chosen]
    return pytest.mark.parametrize("check", some)
