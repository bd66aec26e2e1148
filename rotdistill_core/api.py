"""The types that hook implementations are annotated with, in one place. Import them under TYPE_CHECKING: they load torch."""

from rotdistill_core.adapter import Adapter
from rotdistill_core.bank import Bank
from rotdistill_core.ledger import Out
from rotdistill_core.maps import Gauge, Map, Maps, Permutation, Rotation
from rotdistill_core.models import Model, Pair
from rotdistill_core.moments import Moments
from rotdistill_core.pipeline import Outcome
from rotdistill_core.recipe import Loaded
from rotdistill_core.samples import Layout, Row, Samples, Variant
from rotdistill_core.walk import Progress, Walk
from rotdistill_core.weights import Weights

__all__ = ["Adapter", "Bank", "Gauge", "Layout", "Loaded", "Map", "Maps", "Model", "Moments", "Out", "Outcome",
           "Pair", "Permutation", "Progress", "Rotation", "Row", "Samples", "Variant", "Walk", "Weights"]  # fmt: skip
