"""How much goes through a model at once. Estimates and forward passes share these numbers."""

from __future__ import annotations

from collections.abc import Mapping

from rotdistill_core.data.splits import Split

BATCH_TOKENS = 1536
"""Padded tokens that go through a layer at once: the budget of `LayerwiseForward`."""
ANSWERS_AT_ONCE = 64
"""Answers that a model generates at once."""
ANSWERS_PER_CHUNK = 256
"""Answers that are committed together, a whole number of batches: the most that a kill costs."""
LOGIT_ROWS = 256
"""Rows whose logits are compared at once."""
BLOCK_TEXTS = 64
"""Texts to fit on whose sums are added up together, whatever the machine: the unit of work."""
SAMPLE_TEXTS: Mapping[Split, int] = {Split.FIT: 24, Split.VALIDATION: 8}
"""Split -> how many of its texts have rows that every capture keeps. What needs rows and not sums
is taken from these: thresholds, layer maps and principal frames from texts to fit on, diagnostics
from those for validation."""
