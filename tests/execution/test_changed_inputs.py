"""What a run takes from earlier runs of its recipe after inputs changed, and changed back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.errors import CheckFailed
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunFailed
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, command_line

Open = Callable[..., Executor]
EXACT = """
variants = { base = [], full = ["basis", "fold"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""


def keys_of(run: RunFolder) -> dict[tuple[str, str], str]:
    chains = run.chains().items()
    return {(name, step): record.key for name, chain in chains for step, record in chain.items()}


def test_readers_take_what_the_last_run_was_made_from(work: Path, executor: Open) -> None:
    """Also where the inputs are again what they were, and everything is found."""
    style = work / "texts" / "style.md"
    before = style.read_text(encoding="utf-8")
    folders = []
    for text in (before, "w9 w8 w7\n", before, "w9 w8 w7\n"):
        style.write_text(text, encoding="utf-8")
        outcome = executor("run").go()
        run = RunFolder(outcome.folder)
        assert keys_of(run) == {place: step.key for place, step in outcome.steps.items()}
        saved = {variant: run.folder_of(record) for variant, record in run.checkpoints.items()}
        assert {variant: path.resolve() for variant, path in saved.items()} == {
            variant: path.resolve() for variant, path in outcome.checkpoints.items()
        }
        folders.append(saved["full"].parent.name)
    assert folders[:2] == folders[2:]
    assert folders[0] != folders[1]
    executor("run").go()
    again = RunFolder(outcome.folder).ledger  # the same again says nothing new
    assert again.starts == run.ledger.starts
    assert again.steps == run.ledger.steps
    assert again.checkpoints == run.ledger.checkpoints


def test_comparisons_and_the_last_lines_are_those_of_the_last_run(
    work: Path, write_recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    recipe, style = write_recipe("run"), work / "texts" / "style.md"
    before = style.read_text(encoding="utf-8")
    compared, told = [], []
    for text in (before, "w9 w8 w7\n", before):
        style.write_text(text, encoding="utf-8")
        code, out, err = command_line("run", str(recipe))
        assert code == 0, err
        (folder,) = (work / "runs").iterdir()
        run = RunFolder(folder)
        of_full = [each for each in run.ledger.parities if each.variant == "full"]
        compared.append(of_full[-1].key)
        lines = [line.split()[-1] for line in out.splitlines() if line.startswith("checkpoints ")]
        told.append(lines)
        saved = {run.folder_of(record).resolve() for record in run.checkpoints.values()}
        found = {Path(line).resolve() for line in lines}
        assert found in (saved, {path.parent for path in saved})
    assert compared[0] == compared[2] != compared[1]
    assert told[0] == told[2] != told[1]


def test_what_failed_under_other_inputs_has_not_failed(
    work: Path, executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = work / "texts" / "style.md"
    before = style.read_text(encoding="utf-8")
    folder = executor("run").go().folder
    style.write_text("w9 w8 w7\n", encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("rotdistill_chop._method.solve", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor("run").go()
    assert [each.id for each in RunFolder(folder).failures] == ["chop"]
    style.write_text(before, encoding="utf-8")
    executor("run").go()
    assert RunFolder(folder).failures == []


def test_a_run_without_scores_shows_its_edits(
    work: Path, write_recipe: Callable[[str], Path]
) -> None:
    """Also where an evaluator is listed first."""
    recipe = write_recipe("run")
    text = recipe.read_text(encoding="utf-8")
    score = '    { use = "fidelity" },\n'
    recipe.write_text(text.replace(score, "").replace("step = [\n", f"step = [\n{score}"))
    outcome = PicoWorkspace(work).run(recipe)
    ledger = RunFolder(outcome.folder).ledger
    ledger.rewrite([each for each in ledger.records if getattr(each, "id", "") != "fidelity"])
    assert [*RunFolder(outcome.folder).chains()["full"]] == ["chop", "residuals", "refit"]


def test_an_evaluator_may_be_listed_first(work: Path, write_recipe: Callable[[str], Path]) -> None:
    recipe = write_recipe("run")
    text = recipe.read_text(encoding="utf-8")
    score = '    { use = "fidelity" },\n'
    recipe.write_text(text.replace(score, "").replace("step = [\n", f"step = [\n{score}"))
    outcome = PicoWorkspace(work).run(recipe)
    assert keys_of(RunFolder(outcome.folder)) == {
        place: step.key for place, step in outcome.steps.items()
    }


@pytest.mark.parametrize("column", ["language", "topic"])
def test_a_label_of_a_text_is_an_input(work: Path, executor: Open, column: str) -> None:
    """Scores go by language, and continuations by topic; neither changes a token."""
    first = executor("run").go()
    name = "heldout.tsv" if column == "language" else "index.tsv"
    table = work / "texts" / name
    text = table.read_text(encoding="utf-8")
    old, new = ("\ten\t", "\tpt\t") if column == "language" else ("\tplace 0\t", "\tplace zero\t")
    assert old in text
    table.write_text(text.replace(old, new), encoding="utf-8")
    second = executor("run").go()
    assert not any(step.reused for step in second.steps.values())
    if column == "language":
        assert {row.language for row in first.rows} == {None, "en"}
        assert {row.language for row in second.rows} == {None, "pt"}


def test_a_fact_that_becomes_a_falsehood_is_scored_again(work: Path, executor: Open) -> None:
    table = work / "texts" / "heldout.tsv"
    claim = json.dumps([{"what": "it is", "any": ["w1"]}])
    text = table.read_text(encoding="utf-8")
    keys = []
    for columns in (f"{claim}\t[]", f"[]\t{claim}"):
        table.write_text(text.replace("[]\t[]", columns, 1), encoding="utf-8")
        steps = executor("run").go().steps
        keys.append(steps["full", "fidelity"].key)
        assert steps["full", "refit"].key
    assert keys[0] != keys[1]


def test_a_stricter_check_holds_for_what_is_found(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.model(num_hidden_layers=3)
    pico_workspace.run(pico_workspace.recipe(EXACT))
    for key in ("logits_float32", "orthogonality"):
        loaded = load_recipe(pico_workspace.recipe(EXACT), {f"check.{key}": 1e-30})
        with pytest.raises(RunFailed) as failed:
            PicoWorkspace.run(pico_workspace, loaded.path, {f"check.{key}": 1e-30})
        assert isinstance(failed.value, CheckFailed)
        assert failed.value.outcome.failed.keys() == {"full"}


def test_removal_keeps_the_newest_checkpoints(
    work: Path, executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    executor("run").go()
    (work / "texts" / "style.md").write_text("w9 w8 w7\n", encoding="utf-8")
    outcome = executor("run").go()
    code, _, err = command_line("rm", "run", "--keep-checkpoints", "--yes")
    assert code == 0, err
    run = RunFolder(outcome.folder)
    assert run.folder_of(run.checkpoints["full"]).resolve() == outcome.checkpoints["full"].resolve()
    assert run.require_checkpoint("full").is_dir()
    assert not (run.path / "weights").exists()
