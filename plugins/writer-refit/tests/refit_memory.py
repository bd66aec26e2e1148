"""Driver of the test of a refit's memory: refits a pico model on some texts.

    python refit_memory.py WORK_FOLDER TEXTS

Prints one JSON document: the peak of anonymous memory during the refit, in bytes, and how many
texts the teacher and the student sent through a layer.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit.step import WriterRefit

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.testing import pico_model, pico_output, pico_samples


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


class Peak(threading.Thread):
    """Looks at the anonymous memory a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())


def silent(*_: object) -> None:
    """Report no progress."""


def main() -> None:
    work, texts = Path(sys.argv[1]), int(sys.argv[2])
    model = pico_model(work / "model", num_hidden_layers=4)
    pair, samples = Pair(model, model), pico_samples(texts=texts)
    weights = model.weights.cut([0, 1, 3])
    capture = pico_output(work / "runs", "capture")
    activations = Residuals(store="moments").capture(pair, weights, samples, capture, silent)
    passes: list[int] = []
    run = LayerwiseForward.run

    def counted(forward: LayerwiseForward, *arguments: object, **named: object) -> None:
        passes.append(len(forward.layout.texts))
        run(forward, *arguments, **named)  # type: ignore[arg-type]

    LayerwiseForward.run = counted  # type: ignore[method-assign,assignment]
    peak = Peak()
    peak.start()
    WriterRefit().fold(
        weights, Maps(), activations, pair, samples, pico_output(work / "runs"), silent
    )
    peak.ended.set()
    left = [path.name for path in (work / "runs").rglob("*.tmp")]
    print(json.dumps({"peak": peak.bytes, "passes": passes, "left": left, "texts": texts}))


if __name__ == "__main__":
    main()
