"""Names of spaces: made and taken apart in one place."""

from __future__ import annotations

import pytest

from rotdistill_core.architecture.spaces import (
    NEURONS,
    RESIDUAL,
    in_layer,
    is_dual,
    is_residual,
    kind_of,
    layer_of,
    primal,
    residual,
)


def test_a_name_gives_its_kind_and_layer_back() -> None:
    name = in_layer(NEURONS, 12)
    assert name == "neurons.12"
    assert (kind_of(name), layer_of(name)) == (NEURONS, 12)
    assert kind_of("neurons.{i}") == NEURONS


def test_maps_of_the_stream_belong_to_boundaries() -> None:
    assert residual(3) == "residual.3"
    assert is_residual(residual(3))
    assert not is_residual(in_layer(NEURONS, 3))
    assert not is_residual(RESIDUAL), "the space itself belongs to no boundary"


@pytest.mark.parametrize(("gauge", "dual"), [("value.3", False), ("value.3*", True)])
def test_a_star_marks_the_consumer_of_a_gauge(gauge: str, dual: bool) -> None:
    assert is_dual(gauge) is dual
    assert primal(gauge) == "value.3"
