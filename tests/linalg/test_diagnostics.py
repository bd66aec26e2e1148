"""Diagnostics of layers: figures of several aligners come together, and survive JSON."""

from __future__ import annotations

import json

from rotdistill_core.linalg.diagnostics import (
    AssignmentDiagnostics,
    GaugeDiagnostics,
    LayerDiagnostics,
)

HEADS = AssignmentDiagnostics(
    identity=False,
    moved=2,
    of=3,
    score=0.9,
    identity_score=0.1,
    random_score=0.2,
    permutation=(1, 0, 2),
)
GAUGE = GaugeDiagnostics(distance_before=0.5, distance_after=0.1, distance_chance=0.8)
FULL = LayerDiagnostics(
    layer=3,
    aligner="procrustes",
    singular_values=(2.0, 1.0),
    cosine_after=0.75,
    heads=HEADS,
    gauges={"value": GAUGE},
    extra={"distance": 0.25},
)


def test_later_figures_override_earlier_ones_and_keep_the_rest() -> None:
    later = LayerDiagnostics(cosine_after=0.8, reference=5, extra={"note": 1})
    merged = FULL.merge(later)
    assert merged.cosine_after == 0.8
    assert merged.reference == 5
    assert merged.heads is HEADS
    assert merged.extra == {"distance": 0.25, "note": 1}
    assert FULL.cosine_after == 0.75


def test_diagnostics_survive_json() -> None:
    text = json.dumps(FULL.as_dict(), allow_nan=False)
    assert LayerDiagnostics.from_dict(json.loads(text)) == FULL


def test_a_document_holds_extra_figures_among_the_others_and_no_absent_ones() -> None:
    document = FULL.as_dict()
    assert document["distance"] == 0.25
    assert document["gauges"]["value"]["distance_chance"] == 0.8
    assert "cosine_before" not in document
    assert "extra" not in document


def test_unknown_keys_of_a_document_become_extra_figures() -> None:
    assert LayerDiagnostics.from_dict({"k": 4, "of another plugin": 1}) == LayerDiagnostics(
        k=4, extra={"of another plugin": 1}
    )
