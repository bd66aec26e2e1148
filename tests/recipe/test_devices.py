"""Names of devices in recipes, without torch."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.devices import is_device
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_devices_have_names(name: str) -> None:
    assert is_device(name)
    assert ModelRef(model="m", device=name).device == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpu",
        "tpu",
        "CUDA",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:01",
        "cuda:0:1",
        "cpu:1",
        "auto:0",
        "mps:0",
        "cuda: 1",
        "cuda:99999",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    assert not is_device(name)
    with pytest.raises(ValidationError, match=r'write "auto", .*"cuda:1" \(the second GPU\)'):
        ModelRef(model="m", device=name)


def test_a_recipe_with_another_device_names_the_key(pico_workspace: PicoWorkspace) -> None:
    path = pico_workspace.recipe('[[step]]\nuse = "residuals"\n', tables='teacher.device = "gpu"')
    with pytest.raises(
        RecipeError, match=r"trial.toml: line \d+: teacher.device: write .* \(it is 'gpu'\)"
    ):
        load_recipe(path)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_gpu_of_another_maker_is_missed_before_a_model_is_opened(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, role: str, verb: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    pico_workspace.recipe('step = [{ use = "residuals" }]', teacher="gone", student="gone")
    code, _, err = pico_workspace.command(verb, "trial.toml", "--set", f"{role}.device=mps")
    assert (code, "no Apple GPU" in err) == (3, True)


def test_float64_on_an_apple_gpu_is_refused_with_the_recipe(pico_workspace: PicoWorkspace) -> None:
    path = pico_workspace.recipe('step = [{ use = "residuals" }]')
    with pytest.raises(RecipeError, match="student: an Apple GPU has no float64"):
        load_recipe(path, ["student.device=mps", "student.dtype=float64"])
