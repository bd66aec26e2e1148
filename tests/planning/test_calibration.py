"""The rates of a machine are measured once and kept, and no failure stops a plan."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from rotdistill_core.planning import calibration, measure
from rotdistill_core.planning.calibration import (
    FIXED,
    OFF,
    VARIABLE,
    calibrated,
    kept_profile,
    machine_key,
)
from rotdistill_core.planning.rates import ASSUMED, Profile, Rates

FAST = replace(ASSUMED, loading=1.5)


class Measuring:
    """Stands for the process that measures."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self) -> Profile:
        self.calls += 1
        if self.error:
            raise self.error
        return FAST


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this test keep rates in a cache of its own; return the file."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rotdistill" / "calibration.json"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    stand_in = Measuring()
    monkeypatch.setattr(calibration, "measured", stand_in)
    return stand_in


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_machine_is_measured_once(cache: Path, measuring: Measuring, lines: list[str]) -> None:
    assert kept_profile() is None
    assert calibrated(lines.append) == FAST
    assert [str(cache) in line for line in lines] == [True]
    assert calibrated(lines.append) == kept_profile() == FAST
    assert (measuring.calls, len(lines)) == (1, 1)
    assert calibrated(lines.append, again=True) == FAST
    assert measuring.calls == 2
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.usefixtures("cache")
def test_other_threads_or_another_torch_are_another_machine(
    measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(print)
    keys = {machine_key()}
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    keys.add(machine_key())
    assert kept_profile() is None
    monkeypatch.setattr(calibration, "version", lambda _: "99.0")
    keys.add(machine_key())
    monkeypatch.setattr(calibration, "gpu_listing", lambda: "NVIDIA H200\n")
    keys.add(machine_key())
    assert len(keys) == 4
    calibrated(print)
    assert measuring.calls == 2


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, ["python"], stderr="Traceback\n  ...\nImportError: torch"),
        subprocess.TimeoutExpired(["python"], 300),
        OSError("no process"),
        ValueError("no rates"),
    ],
)
def test_a_calibration_that_fails_leaves_times_unknown_and_is_not_tried_again(
    cache: Path, measuring: Measuring, lines: list[str], error: Exception
) -> None:
    measuring.error = error
    assert calibrated(lines.append) is None
    assert "times are not known" in lines[-1]
    assert "\n" not in lines[-1]
    measuring.error = None
    assert calibrated(lines.append) is None
    assert measuring.calls == 1
    assert calibrated(lines.append, again=True) == FAST


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff\xfe", b'{"key": {"host": 3}}', b'{"key": 1e400}'],
)
def test_a_damaged_cache_counts_for_nothing(
    cache: Path, measuring: Measuring, lines: list[str], content: bytes
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    assert calibrated(lines.append) == FAST
    assert kept_profile() == FAST


@pytest.mark.parametrize("rate", [0, -1, "NaN", None])
def test_a_rate_that_is_none_counts_for_nothing(
    cache: Path, measuring: Measuring, rate: object
) -> None:
    calibrated(print)
    kept = json.loads(cache.read_text())
    kept[machine_key()]["host"]["float32"] = rate
    cache.write_text(json.dumps(kept))
    assert kept_profile() is None


def test_rates_that_cannot_be_kept_are_used(
    tmp_path: Path, measuring: Measuring, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "rotdistill").write_text("a file in the place of the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibrated(lines.append) == FAST
    assert "The next plan measures again" in lines[-1]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("value", "profile"), [(OFF, None), (FIXED, ASSUMED)])
def test_the_environment_says_where_rates_come_from(
    measuring: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    profile: Profile | None,
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert calibrated(print) == kept_profile() == profile
    assert measuring.calls == 0


def test_a_process_that_prints_no_rates_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MEASURE", ["-c", "print('hello')"])
    with pytest.raises(ValueError, match="JSON"):
        calibration.measured()
    monkeypatch.setattr(calibration, "MEASURE", ["-c", "raise SystemExit('broken')"])
    with pytest.raises(subprocess.CalledProcessError):
        calibration.measured()


def test_every_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "ENOUGH": 1e-6,
        "SIDE": 16,
        "SVD_SIDE": 8,
        "UNKNOWNS": 16,
        "STREAMED": (64, 64),
        "FILE_BYTES": 4096,
        "BATCH_TOKENS": 16,
    }
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "processors_in_use", lambda _: 0.375)
    profile = measure.profile()
    assert profile.in_use == 0.375
    assert all(value > 0 for value in asdict(profile.host).values())
    assert {*asdict(profile.host)} == {field.name for field in fields(Rates)}
    printed = json.dumps(asdict(profile))
    assert calibration._MEASURED.validate_json(printed) == profile
