"""Which ingredients belong together, how they are brought together, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._basis_check import mismatch
from rotdistill_soups._fisher import fisher
from rotdistill_soups._ingredients import content
from rotdistill_soups._kl_scorer import KLScorer
from rotdistill_soups.run_source import locate
from rotdistill_soups.step import Soups
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, RotdistillError, SetupError
from rotdistill_core.linalg.maps import Permutation, Rotation
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import (
    logits,
    pico_folder,
    pico_model,
    pico_output,
    pico_samples,
    pico_tokenizer,
    random_rotation,
    reopen,
    save_folder,
    scramble,
)

SAMPLES = pico_samples()


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def moved(view: Weights, seed: int, size: float) -> Weights:
    maker = torch.Generator().manual_seed(seed)
    return view.edit(
        {
            n: view[n] + size * view[n].std() * torch.randn(view[n].shape, generator=maker)
            for n in view.entries
        }
    )


def kin(model: Model, folder: Path, seed: int, size: float = 0.02) -> Path:
    """Write a checkpoint a little way from a model, as a fine-tune is."""
    save_folder(moved(model.weights, seed, size), model.folder, folder)
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "student")


def soup(
    student: Model,
    ingredients: tuple[str | Path, ...],
    root: Path,
    teacher: Model | None = None,
    **options: Any,
) -> tuple[Weights, dict[str, Any]]:
    step, out = (
        Soups(ingredients=tuple(map(str, ingredients)), **{"only_better": False, **options}),
        pico_output(root / "runs"),
    )
    return step.fold(
        student.weights, Pair(teacher or student, student), SAMPLES, out, quiet
    ), out.notes


def kl(one: Weights, two: Weights) -> float:
    p, q = (logits(view, SAMPLES.layout).log_softmax(-1) for view in (one, two))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_greedy_leaves_out_what_does_not_help(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher")
    good = [kin(teacher, tmp_path / f"good{k}", k, 0.15) for k in range(3)]
    bad = kin(teacher, tmp_path / "bad", 9, 1.5)
    kin(teacher, tmp_path / "student", 5, 0.3)
    student = open_model(ModelRef(model=str(tmp_path / "student")))
    made, notes = soup(
        student,
        (bad, *good),
        tmp_path,
        teacher,
        method="greedy",
        same_basis="ignore",
        only_better=True,
    )
    assert set(notes["members"]) == {str(path) for path in good}
    judge = KLScorer(
        Pair(teacher, student), SAMPLES, "validation", pico_output(tmp_path / "runs"), quiet
    )
    alone = min(notes["validation KL alone"].values())
    assert judge(made).mean < 0.7 * alone
    assert notes["validation KL after"] == pytest.approx(judge(made).mean)


def test_a_soup_that_is_no_better_is_dropped(tmp_path: Path, student: Model) -> None:
    made, notes = soup(student, (kin(student, tmp_path / "a", 1),), tmp_path, only_better=True)
    assert made is student.weights
    assert "no gain" in notes["refused"]


def scrambled(path: Path, folder: Path, seed: int = 3) -> Path:
    model = open_model(ModelRef(model=str(path)))
    save_folder(scramble(model.weights, seed)[0], path, folder)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_scrambled_ingredient_is_refused_or_brought_back(tmp_path: Path, model_type: str) -> None:
    student = pico_model(tmp_path / "student", model_type)
    paths = [kin(student, tmp_path / str(k), k, 0.005) for k in range(3)]
    elsewhere = scrambled(paths[1], tmp_path / "scrambled")
    with pytest.raises(
        RecipeError, match=r'brings the embeddings from 1\.\d\d to 0\.0\d: .* same_basis = "align"'
    ):
        soup(student, (paths[0], elsewhere, paths[2]), tmp_path)
    plain, _ = soup(student, tuple(paths), tmp_path)
    made, notes = soup(student, (paths[0], elsewhere, paths[2]), tmp_path, same_basis="align")
    assert notes["aligned"] == [str(elsewhere)]
    assert kl(plain, made) < 1e-4
    garbage, _ = soup(student, (paths[0], elsewhere, paths[2]), tmp_path, same_basis="ignore")
    assert kl(plain, garbage) > 0.1


def test_neurons_that_are_permuted_in_one_layer_are_seen(tmp_path: Path) -> None:
    student = pico_model(tmp_path / "student", num_hidden_layers=8)
    view = student.weights.fold({"neurons.1": Permutation(torch.arange(48).flip(0))})
    apart = mismatch(view, student.weights)
    assert apart["gate_proj"] > 0.7 > apart["q_proj"]
    save_folder(view, student.folder, tmp_path / "permuted")
    with pytest.raises(
        RecipeError, match="Its stream is the student's, but heads or neurons are not"
    ):
        soup(student, (tmp_path / "permuted",), tmp_path)


def test_what_was_trained_apart_is_not_aligned(tmp_path: Path, student: Model) -> None:
    other = pico_folder(tmp_path / "other", seed=8)
    with pytest.raises(RecipeError, match=r"No rotation of the stream .* trained apart"):
        soup(student, (other,), tmp_path)
    with pytest.raises(RecipeError, match=r"could not be aligned: .* still"):
        soup(student, (other,), tmp_path, same_basis="align")


def test_a_student_whose_gains_were_absorbed_takes_plain_ingredients(
    tmp_path: Path, student: Model
) -> None:
    from rotdistill_soups._basis_check import fused

    path = kin(student, tmp_path / "a", 1)
    save_folder(fused(student.weights), student.folder, tmp_path / "fused")
    folded = open_model(ModelRef(model=str(tmp_path / "fused")))
    made, _ = soup(folded, ("student", path), tmp_path)
    plain, _ = soup(student, ("student", path), tmp_path)
    assert kl(plain, made) < 1e-4


def with_more_tokens(model: Model, folder: Path, order: list[int] | None = None) -> Path:
    """Write a checkpoint with two tokens more, and the others in another order."""
    E = model.weights["model.embed_tokens.weight"]
    order = order or list(range(64))
    view = model.weights.edit(
        {"model.embed_tokens.weight": torch.cat([E[order], 100 * torch.ones(2, 32)])}, vocab_size=66
    )
    save_folder(view, model.folder, folder)
    names = [
        "<pad>",
        "<unk>",
        "<end>",
        "<system>",
        "<user>",
        "<assistant>",
        *(f"w{k}" for k in range(58)),
    ]
    content_ = json.loads((folder / "tokenizer.json").read_text())
    content_["model"]["vocab"] = {names[old]: new for new, old in enumerate(order)} | {
        "new1": 64,
        "new2": 65,
    }
    content_["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content_))
    return folder


def test_tokens_are_matched_by_their_string(tmp_path: Path, student: Model) -> None:
    more = with_more_tokens(student, tmp_path / "more", [*range(6), *range(63, 5, -1)])
    made, _ = soup(student, ("student", more), tmp_path)
    torch.testing.assert_close(
        made["model.embed_tokens.weight"], student.weights["model.embed_tokens.weight"]
    )
    assert made.config["vocab_size"] == 64


def test_a_token_that_some_lack_is_averaged_over_the_others(tmp_path: Path) -> None:
    student, small = (
        pico_model(tmp_path / "student", seed=1),
        pico_model(tmp_path / "small", seed=1),
    )
    view = moved(small.weights, 3, 0.02)
    E = view["model.embed_tokens.weight"]
    save_folder(
        view.edit({"model.embed_tokens.weight": E[:60]}, vocab_size=60),
        small.folder,
        tmp_path / "less",
    )
    pico_tokenizer(60).save_pretrained(tmp_path / "less")
    two = kin(student, tmp_path / "two", 2)
    made, _ = soup(student, (tmp_path / "less", two), tmp_path)
    other = open_model(ModelRef(model=str(two))).weights["model.embed_tokens.weight"]
    torch.testing.assert_close(made["model.embed_tokens.weight"][60:], other[60:])
    torch.testing.assert_close(made["model.embed_tokens.weight"][:60], (other[:60] + E[:60]) / 2)
    made, _ = soup(student, (tmp_path / "less",), tmp_path)
    torch.testing.assert_close(
        made["model.embed_tokens.weight"][60:], student.weights["model.embed_tokens.weight"][60:]
    )


def test_ties_of_the_head_may_differ(tmp_path: Path, student: Model) -> None:
    head = torch.randn(64, 32)
    save_folder(
        student.weights.untie().edit({"lm_head.weight": head}), student.folder, tmp_path / "untied"
    )
    made, _ = soup(student, ("student", tmp_path / "untied"), tmp_path, same_basis="ignore")
    torch.testing.assert_close(made["lm_head.weight"], (student.weights.head() + head) / 2)
    assert made.config["tie_word_embeddings"] is False
    untied = open_model(ModelRef(model=str(tmp_path / "untied")))
    other, _ = soup(untied, ("student", student.folder), tmp_path, same_basis="ignore")
    torch.testing.assert_close(other["lm_head.weight"], made["lm_head.weight"])


def test_fisher_weighs_by_information_and_is_the_mean_of_equals(
    tmp_path: Path, student: Model
) -> None:
    one, two = kin(student, tmp_path / "a", 1), kin(student, tmp_path / "b", 2)
    made, notes = soup(student, (one, two), tmp_path, method="fisher", texts=6)
    assert set(notes["mean Fisher"]) == {str(one), str(two)}
    files = sorted((tmp_path / "runs").glob("*/weights/step/fisher_*.safetensors"))
    F, G = (load_file(file) for file in files)
    A, B = (open_model(ModelRef(model=str(p))).weights for p in (one, two))
    for n in A.entries:
        wanted = (F[n].double() * A[n] + G[n].double() * B[n]) / (
            F[n].double() + G[n].double()
        ).clamp_min(1e-30)
        told = (F[n].double() + G[n].double()) > 1e-20
        torch.testing.assert_close(made[n].double()[told], wanted[told], rtol=0, atol=1e-6)
    same, _ = soup(student, (one, one), tmp_path / "again", method="fisher", texts=6)
    assert max(float((same[n] - A[n]).abs().max()) for n in A.entries) < 1e-6


def test_fisher_belongs_to_one_basis(tmp_path: Path, student: Model) -> None:
    found = []
    for k, Q in enumerate((random_rotation(32), torch.eye(32, dtype=torch.float64))):
        view, out = (
            student.weights.fold({"residual": Rotation(Q)}),
            pico_output(tmp_path / "runs", str(k)),
        )
        F = fisher(
            view,
            SAMPLES.layout,
            24,
            False,
            0,
            torch.device("cpu"),
            torch.float32,
            out,
            "fisher",
            quiet,
        )
        found.append(F["model.layers.0.mlp.down_proj.weight"].read().float())
    after, before = found  # [32, 48]: what writes into the stream
    torch.testing.assert_close(
        after.sum(0), before.sum(0), rtol=0.02, atol=0
    )  # a rotation moves information between channels
    assert (
        float((after - before).norm() / before.norm()) > 0.3
    )  # so that from the squares alone nobody knows where it went


def test_sampled_labels_are_those_that_the_model_expects(tmp_path: Path, student: Model) -> None:
    sure = student.weights.untie().edit({"lm_head.weight": 8 * student.weights.head()})
    save_folder(sure, student.folder, tmp_path / "sure")
    sure_student = open_model(ModelRef(model=str(tmp_path / "sure")))
    sampled, texts = (
        soup(
            sure_student, ("student",), tmp_path / labels, method="fisher", texts=8, labels=labels
        )[1]["mean Fisher"]["student"]
        for labels in ("sampled", "texts")
    )
    assert (
        texts > 2 * sampled
    )  # random texts surprise a model that is sure of itself, its own words do not


REFUSED = {
    "nothing": ({}, "ingredients"),
    "sum": ({"ingredients": ["a", "b"], "weights": [1.0, -1.0]}, "sum to 0"),
    "sum of a pattern": ({"ingredients": ["a", "b"], "tensors": {"*": [1.0, -1.0]}}, "sum to 0"),
    "count": ({"ingredients": ["a", "b"], "weights": [1.0]}, "1 weights for 2 ingredients"),
    "slerp": ({"ingredients": ["a"], "method": "slerp"}, "name two, not 1"),
    "greedy": (
        {"ingredients": ["a", "b"], "method": "greedy", "weights": [1.0, 2.0]},
        "greedy chooses",
    ),
    "rank": ({"ingredients": ["a", "b"], "rank": 4}, 'needs method = "lora"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_make_no_sense_are_refused(case: str) -> None:
    options, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        validator_of(Soups).validate_json(json.dumps({"use": "soups", **options}))


def test_differences_may_sum_to_nothing(tmp_path: Path, student: Model) -> None:
    one, two = kin(student, tmp_path / "a", 1), kin(student, tmp_path / "b", 2)
    made, _ = soup(student, (one, two), tmp_path, method="task-arithmetic", weights=(1.0, -1.0))
    assert float((made["model.norm.weight"] - student.weights["model.norm.weight"]).abs().max()) > 0


def broken(kind: str, student: Model, root: Path) -> Path:
    folder = root / kind
    if kind == "architecture":
        return pico_folder(folder, "qwen2")
    if kind == "shape":
        return pico_folder(folder, intermediate_size=40)
    kin(student, folder, 1)
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    if kind == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("architecture", RecipeError, "is a qwen2 model and the student llama"),
        ("shape", RecipeError, r"neurons\.0 is 40, and 48 in the student"),
        ("missing", SetupError, r"up_proj\.weight is missing"),
        ("nan", SetupError, r"up_proj\.weight has 1 values that are NaN or Inf"),
    ],
)
def test_an_ingredient_that_does_not_fit_is_refused(
    tmp_path: Path, student: Model, kind: str, error: type[RotdistillError], told: str
) -> None:
    good, bad = kin(student, tmp_path / "good", 4), broken(kind, student, tmp_path)
    with pytest.raises(error, match=told) as caught:
        save_folder(soup(student, (good, bad), tmp_path)[0], student.folder, tmp_path / "made")
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made" / "model.safetensors").exists()


def test_the_folder_that_the_run_writes_is_no_ingredient(tmp_path: Path, student: Model) -> None:
    inside = kin(student, tmp_path / "runs" / "run" / "checkpoints" / "full", 1)
    with pytest.raises(RecipeError, match="inside the folder that this run writes"):
        soup(student, (inside,), tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path, student: Model) -> None:
    path = kin(student, tmp_path / "a", 1)
    text = (path / "tokenizer.json").read_text().replace('"w', '"v')
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(SetupError, match=r"shares 6 of the student's 64 tokens"):
        soup(student, (path,), tmp_path)


def test_the_content_of_an_ingredient_counts(tmp_path: Path, student: Model) -> None:
    path = kin(student, tmp_path / "a", 1)
    before = content(str(path))
    assert Soups(ingredients=(str(path), "student")).inputs() == [before, "student"]
    kin(student, path, 2)
    assert content(str(path)) != before


def test_variants_of_runs_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, variant in (("tour-0123abcd", "full"), ("tour-guide-0123abcd", "full")):
        for folder in ("checkpoints", "checkpoints-again"):
            (tmp_path / "runs" / run / folder / variant).mkdir(parents=True)
            files = [
                {"path": f"{run}/{folder}/{variant}/{name}"} for name in ("config.json", "COMPLETE")
            ]
            Ledger(tmp_path / "runs" / run).append("step", id=f"save {variant}", files=files)
    (tmp_path / "runs/tour-0123abcd/weights/style/adapter").mkdir(parents=True)
    assert locate("run:tour/full", quiet) == Path("runs/tour-0123abcd/checkpoints-again/full")
    assert locate("run:tour-0123abcd/full", quiet) == locate("run:tour/full", quiet)
    assert locate("run:tour/weights/style/adapter", quiet) == Path(
        "runs/tour-0123abcd/weights/style/adapter"
    )
    with pytest.raises(SetupError, match="no run of that name"):
        locate("run:nothing/full", quiet)
    for wrong in ("run:tour/base", "run:tour", "run:tour/weights/other"):
        with pytest.raises(SetupError, match="its variants: full"):
            locate(wrong, quiet)
    (tmp_path / "runs/tour-4567abcd/weights/style/adapter").mkdir(parents=True)
    for run, seconds in (("tour-0123abcd", 2e9), ("tour-4567abcd", 1e9)):
        os.utime(tmp_path / f"runs/{run}/weights/style/adapter", (seconds, seconds))
    with pytest.raises(SetupError) as caught:
        locate("run:tour/weights/style/adapter", quiet)
    assert re.fullmatch(
        r"run:tour/weights/style/adapter: 2 runs have it, the newest first: "
        r"run:tour-0123abcd/weights/style/adapter \(of 2033-05-1\d \d\d:\d\d\), "
        r"run:tour-4567abcd/weights/style/adapter \(of 2001-09-0\d \d\d:\d\d\)\. Write one of these in its place; "
        r"`rotdistill diff tour-4567abcd tour-0123abcd` shows how they differ\.",
        str(caught.value),
    )


def test_a_saved_soup_reads_the_same(tmp_path: Path, student: Model) -> None:
    made, _ = soup(
        student, (kin(student, tmp_path / "a", 1), kin(student, tmp_path / "b", 2)), tmp_path
    )
    save_folder(made, student.folder, tmp_path / "saved")
    again = reopen(tmp_path / "saved", student.weights)
    assert all(torch.equal(again[n], made[n]) for n in made.entries)
