"""Row pairs of two tokenizers: every byte is covered, spans equal a byte-by-byte reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_residuals._spans import (
    UNPAIRED,
    ByteSpan,
    PairedRows,
    content_spans,
    pair_rows,
    token_bytes,
)
from rotdistill_residuals._tokenizers import require_pairs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rotdistill_core.data.conversations import Conversation, Turn
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import tokenize_for_both
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.testing import PicoWorkspace, pico_tokenizer

CORPUS = [
    "the tower was built in 1889",
    "la tour fut construite",
    "башня построена",
    "塔は建てられた",
    "मीनार बनाई गई",
]
TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
)


def with_template(inner: Tokenizer, template: str) -> Any:
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
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|end|>"],
    )
    inner.train_from_iterator(corpus * 4, trainer)
    return with_template(inner, template)


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
    return with_template(inner, TEMPLATES[1])


SMALL = byte_level(300, CORPUS)
LARGE = byte_level(420, CORPUS[::-1], TEMPLATES[1])
FALLBACK = byte_fallback()
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="▁<>|[]"),
    min_size=1,
    max_size=24,
)


def tokenized(
    student: Any, teacher: Any, conversations: list[tuple[str, str]], max_tokens: int = 512
) -> Samples:
    questions = [
        Conversation(f"t{k}", "en", Split.FIT, question, answer)
        for k, (question, answer) in enumerate(conversations)
    ]
    return tokenize_for_both(student, teacher, questions, {}, "Be brief.", max_tokens)


def content_bytes(samples: Samples, question: Conversation) -> list[bytes]:
    return [part.encode() for part in (samples.style, question.question, question.answer or "")]


def row_of_each_byte(
    layout: PackedTexts, text_index: int, bytes_of: list[bytes], contents: list[bytes]
) -> list[int]:
    """Return the row of the token that made each byte of the contents of a text."""
    text, start = layout.texts[text_index], layout.starts[text_index]
    owners: list[int] = []
    for position, token in enumerate(text.tokens):
        row = position if position < layout.prefix else start + position - layout.prefix
        owners += [row] * len(bytes_of[token])
    whole = b"".join(bytes_of[token] for token in text.tokens)
    rows: list[int] = []
    end = 0
    for content in contents:
        begin = whole.index(content, end)
        end = begin + len(content)
        rows += owners[begin:end]
    return rows


def reference(samples: Samples, student: Any, teacher: Any) -> list[set[int]]:
    """Return the teacher's rows of each of the student's rows, from every single byte."""
    pairs: list[set[int]] = [set() for _ in range(samples.layout.rows)]
    student_bytes, teacher_bytes = token_bytes(student), token_bytes(teacher)
    for k, question in enumerate(samples.conversations):
        contents = content_bytes(samples, question)
        student_rows = row_of_each_byte(samples.layout, k, student_bytes, contents)
        teacher_rows = row_of_each_byte(samples.teacher, k, teacher_bytes, contents)
        for student_row, teacher_row in zip(student_rows, teacher_rows, strict=True):
            pairs[student_row].add(teacher_row)
    return pairs


def covered_bytes(pairs: PairedRows) -> list[tuple[int, int]]:
    """Return the bytes of each text and how many of them are covered."""
    header, *lines = pairs.table
    columns = header.split("\t")
    cells = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines]
    return [(int(row["bytes"]), int(row["covered"])) for row in cells]


@settings(max_examples=25, deadline=None)  # each renders its chats in a process of its own
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.sampled_from([(SMALL, LARGE), (LARGE, SMALL), (SMALL, FALLBACK), (FALLBACK, LARGE)]),
)
def test_spans_are_those_of_the_bytes_and_every_byte_is_covered(
    conversations: list[tuple[str, str]], tokenizers: tuple[Any, Any]
) -> None:
    samples = tokenized(*tokenizers, conversations)
    pairs = pair_rows(samples, *tokenizers)
    prefix = samples.teacher.prefix
    for row, teacher_rows in enumerate(reference(samples, *tokenizers)):
        span = tuple(pairs.spans[row].tolist())
        if not teacher_rows:
            assert span == UNPAIRED
        elif row >= samples.layout.prefix:
            # A token on both sides of the shared prompt is paired within its own text.
            kept = {r for r in teacher_rows if r >= prefix} or teacher_rows
            assert span == (min(kept), max(kept) + 1)
    assert all(size == covered for size, covered in covered_bytes(pairs))
    again = pair_rows(samples, *tokenizers)
    assert torch.equal(pairs.spans, again.spans)
    assert pairs.table == again.table


def test_ids_beyond_the_tokenizer_stand_for_no_bytes() -> None:
    """A padded embedding has more ids than its tokenizer, and a model may write one of them."""
    bytes_of = token_bytes(SMALL)
    tokens = SMALL.encode("the tower")
    padded = [tokens[0], len(SMALL) + 7, *tokens[1:]]
    assert SMALL.decode(padded) == SMALL.decode(tokens)
    plain, with_gap = (
        content_spans(Text("t", "en", Split.FIT, tuple(ids), 0), bytes_of, [b"the tower"], "small")
        for ids in (tokens, padded)
    )
    assert list(with_gap.values()) == list(plain.values())
    assert 1 not in with_gap


@pytest.mark.parametrize("tokenizers", [(SMALL, LARGE), (FALLBACK, SMALL)])
def test_every_turn_and_its_own_system_prompt_are_paired(tokenizers: tuple[Any, Any]) -> None:
    earlier = (Turn("user", "the tower"), Turn("assistant", "the two towers"))
    chat = Conversation("t1", "en", Split.FIT, "the third", "no third", "", earlier, "Say the.")
    plain = Conversation("t2", "en", Split.FIT, "the other", "two others")
    samples = tokenize_for_both(*tokenizers, [chat, plain], {}, "Be brief.", 512)
    pairs = pair_rows(samples, *tokenizers)
    texts = ("Say the.", "the tower", "the two towers", "the third", "no third")
    sizes = [sum(map(len, texts)), len("Be brief." + "the other" + "two others")]
    assert covered_bytes(pairs) == [(size, size) for size in sizes]


@pytest.mark.parametrize(
    ("one", "other", "overlap"), [((0, 2), (1, 3), True), ((0, 2), (2, 3), False)]
)
def test_spans_overlap_in_a_common_byte(
    one: tuple[int, int], other: tuple[int, int], overlap: bool
) -> None:
    assert ByteSpan(*one).overlaps(ByteSpan(*other)) is overlap
    assert ByteSpan(*other).overlaps(ByteSpan(*one)) is overlap


def test_a_cut_answer_is_paired_as_far_as_both_have_it() -> None:
    conversation = ("Why?", "the tower was built in 1889 " * 8)
    samples = tokenized(SMALL, LARGE, [conversation], max_tokens=60)
    pairs = pair_rows(samples, SMALL, LARGE)
    ((size, covered),) = covered_bytes(pairs)
    assert 0 < covered < size
    assert (pairs.spans[:, 0] > 0).any()


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.NFD(), normalizers.Replace(Regex(r"\d"), "")],
)
def test_a_tokenizer_that_changes_bytes_is_refused(normalizer: Any) -> None:
    lossy = byte_level(300, CORPUS, normalizer=normalizer)
    samples = tokenized(lossy, LARGE, [("Why Éa 1889?", "É1")])
    with pytest.raises(RecipeError, match=r"text t0: the tokens of .* do not give its bytes back"):
        pair_rows(samples, lossy, LARGE)


def test_a_vocabulary_that_is_not_bytes_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(SetupError, match="its tokens are not bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_plan_and_run_refuse_vocabularies_that_cannot_be_paired(tmp_path: Path, role: str) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("model")
    workspace.model("other", vocab_size=56)
    names = {"teacher": "model", "student": "model", role: "other"}
    recipe = workspace.recipe('step = [{ use = "residuals" }]', **names)
    for verb in ("plan", "run"):
        code, _, err = workspace.command(verb, recipe.name)
        assert code == 3
        assert "its tokens are not bytes (decoder null)" in " ".join(err.split())
    assert not workspace.runs.exists()
    # One vocabulary needs no pairs, nor does a class that knows its decoder by itself.
    workspace.model("other", seed=3)
    assert workspace.command("plan", recipe.name)[0] == 0


def test_files_tell_nothing_of_classes_with_a_decoder_of_their_own(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pico_tokenizer(64).save_pretrained(one)
    pico_tokenizer(56).save_pretrained(two)
    with pytest.raises(SetupError, match="its tokens are not bytes"):
        require_pairs((one, two))
    for folder in (one, two):
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text().replace("TokenizersBackend", "LlamaTokenizer"))
    require_pairs((one, two))
    (one / "tokenizer.json").unlink()
    require_pairs((one, two))


STEPS = """
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
"""


def run_with_two_tokenizers(root: Path, more: str = "") -> RunResult:
    workspace = PicoWorkspace(root)
    workspace.texts()
    for name, tokenizer, shape in (
        ("teacher", LARGE, {"hidden_size": 48, "num_hidden_layers": 3}),
        ("student", SMALL, {}),
    ):
        folder = workspace.model(name, vocab_size=len(tokenizer), **shape)
        tokenizer.save_pretrained(folder)
    recipe = workspace.recipe(
        STEPS + more,
        teacher="teacher",
        student="student",
        answer_tokens=8,
        observers=("report",),
    )
    return workspace.run(recipe)


@pytest.mark.slow
def test_a_whole_run_with_two_tokenizers(tmp_path: Path) -> None:
    result = run_with_two_tokenizers(tmp_path)
    certificate = result.steps["full", "basis-fold"].report.certificate
    assert certificate is not None
    assert certificate.logits_float64 <= 1e-9
    assert {row.metric for row in result.rows if row.layer is None} == {
        "hidden_cosine",
        "residual_rms_diff",
        "channel_rms_gap",
        "perplexity",
        "parameters",
        "seconds",
    }
    table = (result.folder / "alignment.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in table.splitlines()[1:]]
    assert len(lines) == 23
    assert all(size == covered for _, size, *_, covered in lines)
    assert "full" in (result.folder / "report.md").read_text(encoding="utf-8")
    again = run_with_two_tokenizers(tmp_path)
    assert all(step.reused for step in again.steps.values())
    assert again.rows == result.rows


@pytest.mark.parametrize("use", ["writer-refit", "lm-head-ridge"])
def test_steps_that_compare_logits_need_one_tokenizer(tmp_path: Path, use: str) -> None:
    with pytest.raises(SetupError, match="have different tokenizers"):
        run_with_two_tokenizers(tmp_path, f'[[step]]\nuse = "{use}"')
