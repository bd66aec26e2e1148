"""The conformance kit: one decorator that runs every check of an adapter, an engine or a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.testing.config_checks import ADAPTER_CHECKS
from rotdistill_core.testing.engine_checks import ENGINE_CHECKS
from rotdistill_core.testing.pico import pico_folder
from rotdistill_core.testing.step_checks import STEP_CHECKS


def parametrize_with_checks(
    subject: Adapter | type,
    *cases: Mapping[str, Any],
    checks: Sequence[Callable[..., None]] = (),
    expected_failures: Mapping[str, str] | None = None,
) -> Any:
    """Let a test run every check of an adapter, an engine class or a step class, on every case.

    ```python
    @parametrize_with_checks(TABLE, {"head_dim": 12})
    def test_it_conforms(check, tmp_path):
        check(tmp_path)
    ```

    Args:
        subject: an architecture table, an engine class, or a step class.
        cases: changes of the pico config for an adapter, else options; none: the defaults.
        checks: the checks to run instead of all.
        expected_failures: name of a check -> why it cannot hold for this subject. It must fail.
    """
    reasons = expected_failures or {}
    chosen = checks or _checks_of(subject)
    unknown = set(reasons) - {check.__name__ for check in chosen}
    if unknown:
        raise ValueError(f"expected_failures names no check that runs here: {sorted(unknown)}")
    parameters = []
    for case in cases or ({},):
        for check in chosen:
            name = check.__name__
            marks = []
            if name in reasons:
                marks = [pytest.mark.xfail(reason=reasons[name], strict=True)]
            bound = partial(_run, check, subject, case)
            parameters.append(pytest.param(bound, id=" ".join([name, *case]), marks=marks))
    return pytest.mark.parametrize("check", parameters)


def _checks_of(subject: Adapter | type) -> Sequence[Callable[..., None]]:
    if isinstance(subject, Adapter):
        return ADAPTER_CHECKS
    return ENGINE_CHECKS if hasattr(subject, "connect") else STEP_CHECKS


def _run(
    check: Callable[..., None], subject: Adapter | type, case: Mapping[str, Any], folder: Path
) -> None:
    if isinstance(subject, Adapter):
        check(subject, pico_folder(folder / "model", subject.model_types[0], **case))
    else:
        check(subject, case, folder)
