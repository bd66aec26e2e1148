"""Steps state themselves why their result is not to be trusted."""

from __future__ import annotations

import pytest
from rotdistill_lm_head_ridge.step import LmHeadRidge
from rotdistill_procrustes.random_rotation import RandomRotation
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit.step import WriterRefit

from rotdistill_core.plugin.caveats import MIN_RIDGE, CaveatKind, ridge_caveats
from rotdistill_core.plugin.step import caveats_of


@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        (Residuals(), []),
        (Residuals(control="shuffled"), [CaveatKind.CONTROL]),
        (Residuals(control="reversed"), [CaveatKind.CONTROL]),
        (Residuals(control="self"), [CaveatKind.CONTROL]),
        (WriterRefit(), []),
        (WriterRefit(ridge=(1e-9, 1e-8)), [CaveatKind.NO_RIDGE]),
        (LmHeadRidge(), []),
        (LmHeadRidge(ridge=(1e-9,)), [CaveatKind.NO_RIDGE]),
        (RandomRotation(), [CaveatKind.RANDOM_MAP]),
        (object(), []),
    ],
)
def test_caveats_follow_from_the_options(step: object, kinds: list[CaveatKind]) -> None:
    assert [caveat.kind for caveat in caveats_of(step)] == kinds


def test_one_large_ridge_is_enough() -> None:
    assert ridge_caveats((0.0, MIN_RIDGE)) == []
