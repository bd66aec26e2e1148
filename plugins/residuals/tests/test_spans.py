"""Two tokenizers, paired by bytes: every byte is covered, ranges are those of a byte-by-byte reference, and losses are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_residuals._spans import pair_rows, token_bytes
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rotdistill_core.data.packed import Samples
from rotdistill_core.data.questions import Question
from rotdistill_core.data.tokenization import tokenize_for_both
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.testing import pico_folder, pico_head, pico_texts, run_recipe

CORPUS = [
    "the tower was built in 1889",
    "la tour fut construite",
    "башня построена",
    "塔は建てられた",
    "मीनार बनाई गई",
]
TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
)


def made(inner: Tokenizer, template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", bos_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(
    size: int, corpus: list[str], template: str = TEMPLATES[0], normalizer: Any = None
) -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus * 4,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "<|end|>"]
        ),
    )
    return made(inner, template)


def byte_fallback() -> Any:
    vocabulary = {"<unk>": 0, "<s>": 1, "<|end|>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    for word in ("▁", "t", "h", "e", "▁t", "o", "w"):
        vocabulary[word] = len(vocabulary)
    inner = Tokenizer(
        models.BPE(vocabulary, [("▁", "t")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made(inner, TEMPLATES[1])


ONE, TWO, THREE = (
    byte_level(300, CORPUS),
    byte_level(420, CORPUS[::-1], TEMPLATES[1]),
    byte_fallback(),
)
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="▁<>|[]"),
    min_size=1,
    max_size=24,
)


def both(tokenizers: tuple[Any, Any], said: list[tuple[str, str]], most: int = 512) -> Samples:
    questions = [
        Question(f"t{k}", "en", "fit", question, answer)
        for k, (question, answer) in enumerate(said)
    ]
    return tokenize_for_both(tokenizers[0], tokenizers[1], questions, {}, "Be brief.", most)


def reference(samples: Samples, tokenizers: tuple[Any, Any]) -> list[set[int]]:
    """Return the teacher's rows beside each of the student's, by marking every byte of the content with the row that made it."""
    found: list[set[int]] = [set() for _ in range(samples.layout.rows)]
    known = [token_bytes(tokenizer) for tokenizer in tokenizers]
    for k, asked in enumerate(samples.questions):
        marks: list[list[int]] = []
        for layout, table in zip((samples.layout, samples.teacher), known, strict=True):
            text, start = layout.texts[k], layout.starts[k]
            rows = [
                j if j < layout.prefix else start + j - layout.prefix
                for j in range(len(text.tokens))
            ]
            owners = [
                row for row, token in zip(rows, text.tokens, strict=True) for _ in table[token]
            ]
            whole, at, mine = b"".join(table[token] for token in text.tokens), 0, []
            for part in (samples.style, asked.question, asked.answer or ""):
                at = whole.index(part.encode(), at)
                mine += owners[at : at + len(part.encode())]
                at += len(part.encode())
            marks.append(mine)
        for one, other in zip(*marks, strict=True):
            found[one].add(other)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.sampled_from([(ONE, TWO), (TWO, ONE), (ONE, THREE), (THREE, TWO)]),
)
def test_every_byte_is_covered_and_ranges_are_those_of_the_bytes(
    said: list[tuple[str, str]], tokenizers: tuple[Any, Any]
) -> None:
    samples = both(tokenizers, said)
    spans, lines = pair_rows(samples, tokenizers)
    wanted, prefix = reference(samples, tokenizers), samples.teacher.prefix
    for row, rows in enumerate(wanted):
        start, end = spans[row].tolist()
        if rows:
            own = {
                r for r in rows if r >= prefix
            } or rows  # a token on both sides of the shared prompt goes with its own text
            assert (start, end) in {(min(own), max(own) + 1)} or row < samples.layout.prefix
        else:
            assert (start, end) == (0, 1)
    for line in lines[1:]:
        _, size, *_, covered = line.split("\t")
        assert size == covered
    again, told = pair_rows(samples, tokenizers)
    assert torch.equal(spans, again)
    assert lines == told


def test_an_answer_cut_short_is_paired_as_far_as_both_have_it() -> None:
    samples = both((ONE, TWO), [("Why?", "the tower was built in 1889 " * 8)], most=60)
    spans, lines = pair_rows(samples, (ONE, TWO))
    _, size, *_, covered = lines[1].split("\t")
    assert 0 < int(covered) < int(size)
    assert (spans[:, 0] > 0).any()


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.NFD(), normalizers.Replace(Regex(r"\d"), "")],
)
def test_a_tokenizer_that_changes_bytes_is_refused(normalizer: Any) -> None:
    lossy = byte_level(300, CORPUS, normalizer=normalizer)
    with pytest.raises(RecipeError, match=r"text t0: the tokens of .* do not give its bytes back"):
        pair_rows(both((lossy, TWO), [("Why Éa 1889?", "É1")]), (lossy, TWO))


def test_a_vocabulary_that_is_not_bytes_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(SetupError, match="its tokens are not bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner))


RECIPE = (
    pico_head("two", "{root}/teacher", "{root}/student", tokens=8)
    + """
[[step]]
use = "residuals"
layer_map = "match"
[[step]]
use = "procrustes"
[[step]]
use = "basis-fold"
mode = "canonical"
[[step]]
use = "fidelity"
{more}
"""
)


def whole_run(root: Path, more: str = "") -> RunResult:
    pico_texts(root / "texts")
    for name, tokenizer, shape in (
        ("teacher", TWO, {"hidden_size": 48, "num_hidden_layers": 3}),
        ("student", ONE, {}),
    ):
        folder = pico_folder(root / name, vocab_size=len(tokenizer), **shape)
        tokenizer.save_pretrained(folder)
    (root / "two.toml").write_text(RECIPE.format(root=root, more=more), encoding="utf-8")
    return run_recipe(root / "two.toml")


def test_a_whole_run_with_two_tokenizers(tmp_path: Path) -> None:
    outcome = whole_run(tmp_path)
    assert outcome.steps["full", "basis-fold"].report.certificate.logits_float64 <= 1e-9
    metrics = {row.metric: row.value for row in outcome.rows if row.layer is None}
    assert metrics.keys() == {
        "hidden_cosine",
        "residual_rms_diff",
        "channel_rms_gap",
        "perplexity",
        "parameters",
        "seconds",
    }
    lines = [
        line.split("\t") for line in (outcome.folder / "alignment.tsv").read_text().splitlines()[1:]
    ]
    assert len(lines) == 23
    assert all(size == covered for _, size, *_, covered in lines)
    assert "full" in (outcome.folder / "report.md").read_text()
    again = whole_run(tmp_path)
    assert all(done.reused for done in again.steps.values())
    assert again.rows == outcome.rows


@pytest.mark.parametrize("use", ["writer-refit", "lm-head-ridge"])
def test_what_compares_logits_wants_one_tokenizer(tmp_path: Path, use: str) -> None:
    with pytest.raises(SetupError, match="have different tokenizers"):
        whole_run(tmp_path, f'[[step]]\nuse = "{use}"')
