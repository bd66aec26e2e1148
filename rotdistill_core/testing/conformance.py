"""The conformance kit: one decorator that runs every check of an adapter, an engine or a step.

An adapter gets one test, because one wrong entry of a table makes many checks fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.testing.adapter_report import adapter_problems
from rotdistill_core.testing.config_checks import ADAPTER_CHECKS
from rotdistill_core.testing.engine_checks import ENGINE_CHECKS
from rotdistill_core.testing.step_checks import STEP_CHECKS


def parametrize_with_checks(
    subject: Adapter | type,
    *cases: Mapping[str, Any],
    checks: Sequence[Callable[..., None]] = (),
    expected_failures: Mapping[str, str] | None = None,
) -> Any:
    """Let a test run every check of an adapter, an engine class or a step class, on every case.

    The checks of an adapter are one test. Its failure lists all that is wrong with the table, the
    most important first.

    ```python
    @parametrize_with_checks(TABLE, {"head_dim": 12})
    def test_it_conforms(check, tmp_path):
        check(tmp_path)
    ```

    Args:
        subject: an architecture table, an engine class, or a step class.
        cases: changes of the pico config for an adapter, else options; none: the defaults.
        checks: the checks to run instead of all.
        expected_failures: name of a check -> why it cannot hold for this class. It must fail.

    Raises:
        ValueError: `expected_failures` names no check that runs here, or is for an adapter.
    """
    reasons = expected_failures or {}
    if isinstance(subject, Adapter):
        if reasons:
            raise ValueError("expected_failures: a table that fails a check computes wrongly")
        held = partial(_require_table, subject, cases, checks or ADAPTER_CHECKS)
        return pytest.mark.parametrize("check", [pytest.param(held, id=subject.model_types[0])])
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


def _checks_of(subject: type) -> Sequence[Callable[..., None]]:
    return ENGINE_CHECKS if hasattr(subject, "connect") else STEP_CHECKS


def _run(check: Callable[..., None], subject: type, case: Mapping[str, Any], folder: Path) -> None:
    check(subject, case, folder)


def _require_table(
    adapter: Adapter,
    cases: Sequence[Mapping[str, Any]],
    checks: Sequence[Callable[..., None]],
    folder: Path,
) -> None:
    """Fail with all that is wrong with a table; the kit's own frames would hide it."""
    problems = adapter_problems(adapter, folder, *cases, checks=checks)
    if not problems:
        return
    numbered = [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    lines = [f"the table of {adapter.model_types[0]} is wrong:", *numbered]
    if len(cases) > 1:
        lines += [f"case {number} is {case}" for number, case in enumerate(cases, 1)]
    pytest.fail("\n".join(lines), pytrace=False)
