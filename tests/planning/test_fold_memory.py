"""The memory that a plan states for an exact fold is what a process takes for it, and not less.

The C library keeps some of what a process frees, and how much differs from run to run by half. So
it is told to return every block of this process, and what the plan states beyond that is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rotdistill_basis_fold._cost import unreturned_bytes

from rotdistill_core.planning.cost import CostContext, step_cost
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.testing import pico_model

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 10_000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
RETURNING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""With these, glibc returns what is freed to the system (mallopt(3))."""
PROGRAM = """
import sys
from pathlib import Path
import torch
from benchmarks.peak_memory import PeakMemory
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.forward.certificate import certify
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_output, pico_samples
import psutil

torch.set_num_threads(1)
weights = open_model(ModelRef(model=sys.argv[1])).weights
layout = pico_samples(texts=20).layout
out = pico_output(Path(sys.argv[2]))
generator = torch.Generator().manual_seed(0)
noise = torch.randn(weights.width, weights.width, dtype=torch.float64, generator=generator)
folded = weights.fold({"residual": Rotation(torch.linalg.qr(noise).Q)})
info = psutil.Process().memory_info()
before = info.rss - info.shared
with PeakMemory(interval=0.001) as peak:
    folded.store(out, torch.float32)
    certify(weights, folded, folded.unfold(folded.undo), layout, torch.device("cpu"))
print(peak.bytes - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PeakMemory reads what Linux says of pages")
def test_the_memory_of_a_fold_is_enough_and_not_much_more(
    tmp_path: Path, pico_context: CostContext
) -> None:
    model = pico_model(tmp_path / "model", **SIZES)
    shape = ModelShape(model.adapter, model.config, "float32")
    texts = replace(pico_context.texts, prefix=6, rows={"fit": 200, "validation": 64})
    context = replace(pico_context, student=shape, teacher=shape, texts=texts, stages=1)
    fold = step_class("basis-fold")[0]()
    needed = step_cost(fold, context)
    planned = needed.host_bytes + needed.device_bytes - unreturned_bytes(shape)
    words = [sys.executable, "-c", PROGRAM, str(model.folder), str(tmp_path / "runs")]
    surroundings = {**os.environ, **RETURNING}
    done = subprocess.run(
        words, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 < planned / int(done.stdout) < 1.3
