"""Everything that is wrong with a table, in one list with the most important first.

A wrong tensor makes most other checks fail too, and a wrong forward pass all that compare logits.
So checks run in stages, and a stage runs where the one before it holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.forward.parity import quiet_transformers
from rotdistill_core.testing.adapter_checks import (
    WrongTableError,
    a_rotation_of_the_stream_is_exact_or_refused,
    defaults_are_those_of_the_config_class,
    every_gain_is_absorbed_by_its_readers,
    every_tensor_is_claimed_once,
    gauges_are_exact,
    permutations_are_exact,
    sites_are_found,
    the_layerwise_forward_computes_what_transformers_computes,
)
from rotdistill_core.testing.compute import one_thread
from rotdistill_core.testing.config_checks import ADAPTER_CHECKS
from rotdistill_core.testing.key_checks import (
    every_name_of_the_table_is_found,
    every_size_key_sets_its_size,
    the_depth_key_sets_the_depth,
)
from rotdistill_core.testing.pico import pico_folder

Check = Callable[[Adapter, Path], None]

LAYER_NUMBER = re.compile(r"(?:(?<=[a-z]\.)|(?<=layer ))\d+\b")
FIGURE = re.compile(r"\d\.\de[+-]\d+")

STAGES: tuple[tuple[Check, ...], ...] = (
    (every_name_of_the_table_is_found,),
    (the_depth_key_sets_the_depth,),
    (every_tensor_is_claimed_once,),
    (
        every_size_key_sets_its_size,
        the_layerwise_forward_computes_what_transformers_computes,
        sites_are_found,
        every_gain_is_absorbed_by_its_readers,
        permutations_are_exact,
        a_rotation_of_the_stream_is_exact_or_refused,
        gauges_are_exact,
        defaults_are_those_of_the_config_class,
    ),
)
"""Checks of the first stages, in order of importance. All others are of the last stage."""


def adapter_problems(
    adapter: Adapter,
    folder: Path,
    *cases: Mapping[str, Any],
    checks: Sequence[Check] = ADAPTER_CHECKS,
) -> list[str]:
    """Return what is wrong with a table, the most important first; nothing for one that holds.

    Problems of several layers or cases are named once.

    Args:
        adapter: the table.
        folder: an empty folder for pico checkpoints.
        cases: changes of the pico config; none: the config as it is.
        checks: the checks to run.
    """
    with quiet_transformers(), one_thread():
        folders = [
            pico_folder(folder / f"model-{number}", adapter.model_types[0], **case)
            for number, case in enumerate(cases or ({},))
        ]
        return _staged_problems(adapter, folders, checks)


def _staged_problems(
    adapter: Adapter, folders: Sequence[Path], checks: Sequence[Check]
) -> list[str]:
    """Return the problems of the first stage that has any."""
    waiting = [*checks]
    problems: list[str] = []
    for stage in (*STAGES, tuple(checks)):
        if problems:
            break
        for check in stage:
            if check in waiting:
                waiting.remove(check)
                problems += _of_all_cases([_problems(check, adapter, path) for path in folders])
    problems = _errors_as_one(problems)
    if problems and waiting:
        names = ", ".join(check.__name__ for check in waiting)
        problems.append(f"not checked before these are right: {names}")
    return problems


def _problems(check: Check, adapter: Adapter, folder: Path) -> list[str]:
    """Return what one check says of one checkpoint, the problems of all layers as one."""
    try:
        check(adapter, folder)
    except WrongTableError as error:
        problems = error.problems
    except Exception as error:
        # A table that is wrong may make anything fail.
        problems = [f"{check.__name__}: {type(error).__name__}: {error}"]
    else:
        return []
    by_meaning = {_meaning(problem): problem for problem in map(_of_any_layer, problems)}
    return list(by_meaning.values())


def _errors_as_one(problems: Sequence[str]) -> list[str]:
    """Return problems with one for all checks that raised the same error, named at its first."""
    checks: dict[str, list[str]] = {}
    for problem in problems:
        name, colon, error = problem.partition(": ")
        known = bool(colon) and any(name == check.__name__ for check in ADAPTER_CHECKS)
        checks.setdefault(error if known else problem, []).extend([name] if known else [])
    return [f"{', '.join(names)}: {key}" if names else key for key, names in checks.items()]


def _of_any_layer(problem: str) -> str:
    """Return a problem with `{i}` for the layer's number, if it names one layer only."""
    numbers = set(LAYER_NUMBER.findall(problem))
    return LAYER_NUMBER.sub("{i}", problem) if len(numbers) == 1 else problem


def _meaning(problem: str) -> str:
    """Return a problem without its figures, which differ by layer and case."""
    return FIGURE.sub("", problem)


def _of_all_cases(found: Sequence[Sequence[str]]) -> list[str]:
    """Return the problems of all cases, each once; those of some cases with their numbers."""
    cases: dict[str, list[int]] = {}
    shown: dict[str, str] = {}
    for number, problems in enumerate(found, 1):
        for problem in problems:
            cases.setdefault(_meaning(problem), []).append(number)
            shown.setdefault(_meaning(problem), problem)
    return [
        problem if len(cases[key]) == len(found) else f"{problem} {_of(cases[key], len(found))}"
        for key, problem in shown.items()
    ]


def _of(numbers: Sequence[int], count: int) -> str:
    return f"(case {', '.join(map(str, numbers))} of {count})"
