"""Plugins that `new` writes install, pass their own tests, and are listed like ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock, patch

import pytest
from rotdistill_scaffold._templates import step_files

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.planning import cost
from rotdistill_core.plugin.step import STAGES
from rotdistill_core.testing import (
    a_planted_rotation_is_found,
    captured_activations,
    command_line,
    pico_model,
    pico_output,
    pico_samples,
    rotated_twin,
)

ROOT = Path(__file__).parents[3]
RECIPE = f"""name = "t"
[samples]
index = "{ROOT}/samples/index.tsv"
style = "{ROOT}/samples/tour_guide.md"
heldout = "{ROOT}/samples/heldout.tsv"
[teacher]
model = "a"
[student]
model = "b"
[[step]]
use = "residuals"
[[step]]
use = "my-fold"
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder outside the project: a step of each stage and an adapter, all installed."""
    root = tmp_path_factory.mktemp("outside")
    for stage in STAGES:
        code, out, err = command_line(
            "new", "step", f"my-{stage}", "--stage", stage, "--in", str(root)
        )
        assert (code, out) == (0, f"{root / f'my-{stage}'}\n"), err
    assert command_line("new", "adapter", "mistral", "--in", str(root))[0] == 0
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run(
        [*pip, "--target", str(root / "site"), *map(str, root.glob("m*"))],
        check=True,
        capture_output=True,
    )
    return root


def call(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call a module of the environment in which the new plugins are installed."""
    beside = {**os.environ, "PYTHONPATH": str(root / "site"), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=beside, capture_output=True, text=True, check=False
    )


def test_a_new_plugin_passes_its_own_tests(begun: Path) -> None:
    # Of the two cases that each step is written with the first, and the long checks of two of them.
    subjects = "my_align or my_fold or mistral or specified or survive or cost"
    first = ["-k", f"not strength and not tie and ({subjects})"]
    words = ["-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *first]
    made = call(begun, *words, *map(str, begun.glob("m*/tests")))
    assert made.returncode == 0, made.stdout
    assert "passed" in made.stdout


def test_a_new_plugin_keeps_to_the_style_of_the_project(begun: Path) -> None:
    files = [str(path) for path in begun.glob("m*/**/*.py")]
    for words in (["check", "--ignore", "INP001,I001,S101,PLC0415"], ["format", "--check"]):
        made = call(begun, "-m", "ruff", *words, "--config", str(ROOT / "pyproject.toml"), *files)
        assert made.returncode == 0, made.stdout


def test_a_strangers_step_is_used_listed_and_validated_like_ours(begun: Path) -> None:
    main = ["-c", "from rotdistill_core.cli import main; main()"]
    rows = {row["name"]: row for row in json.loads(call(begun, *main, "plugins", "--json").stdout)}
    assert rows["my-align"]["stage"] == "align"
    assert rows["my-align"]["distribution"] == "rotdistill-my-align"
    assert rows["mistral"]["stage"] == "adapter"
    document = json.loads(call(begun, *main, "schema").stdout)
    assert document["$defs"]["step.my-align"]["properties"]["use"]["enum"] == ["my-align"]
    pico_model(begun / "a")
    pico_model(begun / "b")
    (begun / "good.toml").write_text(RECIPE)
    assert call(begun, *main, "check", "good.toml").returncode == 0
    (begun / "bad.toml").write_text(RECIPE + "strenght = 0.5\n")
    made = call(begun, *main, "check", "bad.toml")
    assert made.returncode == 2
    assert 'step "my-fold" (#2): strenght: unknown key. Did you mean "strength"?' in made.stderr
    (begun / "bad.toml").write_text(RECIPE + "strength = 1.5\n")
    assert (
        'step "my-fold" (#2): strength: Input should be less than or equal to 1'
        in call(begun, *main, "check", "bad.toml").stderr
    )


def test_the_page_on_adapters_shows_the_adapter_that_new_writes(begun: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/plugins/adapters.md").read_text(encoding="utf-8")
    written = begun / "mistral-adapter" / "rotdistill_mistral_adapter.py"
    assert f"```python\n{written.read_text(encoding='utf-8')}```" in page


@pytest.fixture
def aligner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """Return the class of a new aligner."""
    name = "my-measured-aligner"
    assert command_line("new", "step", name, "--in", str(tmp_path))[0] == 0
    monkeypatch.syspath_prepend(str(tmp_path / name))
    monkeypatch.delitem(sys.modules, "rotdistill_my_measured_aligner", raising=False)
    cls: type = import_module("rotdistill_my_measured_aligner").MyMeasuredAligner
    return cls


@pytest.mark.parametrize(("tie", "stages"), [("all", [0, 0, 0]), (2, [0, 0, 1])])
def test_a_new_aligner_solves_stages_and_measures_its_map_with_nulls(
    aligner: type, tmp_path: Path, tie: object, stages: list[int]
) -> None:
    student = pico_model(tmp_path / "student")
    teacher, planted = rotated_twin(student, tmp_path / "teacher")
    pair, out = Pair(teacher, student), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, student.weights, pico_samples(), out)
    maps = aligner(tie=tie).align(
        activations=activations, maps=Maps(), pair=pair, progress=lambda *_: None
    )
    assert [*maps.diagnostics] == [*range(student.depth + 1)]
    assert [figures.stage for figures in maps.diagnostics.values()] == stages
    for boundary, figures in maps.diagnostics.items():
        assert (maps[f"residual.{boundary}"].matrix - planted).abs().max() < 1e-5
        assert (figures.layer, figures.aligner) == (boundary, "my-measured-aligner")
        assert figures.cosine_after == pytest.approx(1.0, abs=1e-6)
        assert figures.scale == pytest.approx(1.0, abs=1e-6)
        assert max(figures.cosine_shuffled, figures.cosine_random, figures.cosine_mean) < 0.9


@pytest.mark.parametrize(
    "wrong", ["sums.C_st_shuffled", "sums.C_st.abs()", "sums.C_st.roll(1, 0)", "-sums.C_st"]
)
def test_the_test_of_a_new_aligner_fails_where_its_method_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    files = step_files("wrong", "align")
    source = files["wrong/rotdistill_wrong.py"]
    assert source.count("polar(sums.C_st,") == 1
    module = ModuleType("rotdistill_wrong")
    monkeypatch.setitem(sys.modules, "rotdistill_wrong", module)
    exec(source.replace("polar(sums.C_st,", f"polar({wrong},"), vars(module))
    test = ModuleType("test_wrong")
    exec(files["wrong/tests/test_wrong.py"], vars(test))
    assert a_planted_rotation_is_found in test.CHECKS
    with pytest.raises(AssertionError, match="off the planted rotation"):
        a_planted_rotation_is_found(module.Wrong, {}, tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_step_costs_what_a_plain_step_of_its_stage_does(stage: str) -> None:
    source = step_files("anything", stage)["anything/rotdistill_anything.py"]
    (name,) = re.findall(r"return (\w+_cost)\(context\b", source)
    context = Mock()
    with patch.object(cost, name, return_value="its cost") as function:
        assert cost.default_cost(stage, context) == "its cost"
    function.assert_called_once_with(context)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("step", "My Step"), 2, "a name is lower-case letters"),
        (("step", "../step"), 2, "a name is lower-case letters"),
        (("step", "mine", "--stage", "alien"), 2, 'Did you mean "align"?'),
        (("step", "procrustes"), 2, 'a step "procrustes" is installed already'),
        (("adapter", "llama"), 2, "is installed already, by rotdistill-llama-adapter. Uninstall"),
        (("adapter", "mistrall"), 3, 'Did you mean "mistral"?'),
        (("wheel", "mine"), 2, "wheel"),
        (("recipe", "taken"), 2, "taken.toml: is there already"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_written(
    tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "taken.toml").write_text("x = 1")
    found, out, err = command_line("new", *words, "--in", str(tmp_path))
    assert (found, out) == (code, "")
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.toml"]
