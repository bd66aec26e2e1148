"""For programs that fork: what every child would load or compute is there before the first fork."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from py3langid.langid import LanguageIdentifier
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.plugin import source_code


def keep_to_one_thread() -> None:
    """Let libraries begin no thread: a fork would not be safe. To be called first."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # it has a thread of its own
    disable_progress_bar()


def warm_up(action: Callable[[], object]) -> None:
    """Do in this process, before it forks, what its children will do.

    Raises:
        RuntimeError: threads are left.
    """
    _remember()
    action()
    tasks = len(list(Path("/proc/self/task").iterdir()))
    if threading.active_count() > 1 or tasks > 1:
        raise RuntimeError(f"{tasks} threads are left after warming up")


def _remember() -> None:
    """Compute once what does not change and every child would compute: hashes of the code, and the
    model that tells languages apart."""
    for name in ("source_digest", "core_digest", "package_digest"):
        plain = getattr(source_code, name)
        kept = cache(plain)
        for module in list(sys.modules.values()):
            if getattr(module, name, None) is plain:
                setattr(module, name, kept)
    LanguageIdentifier.from_model_file = cache(LanguageIdentifier.from_model_file)
