"""The peak anonymous memory of this process: what it holds apart from files that are mapped."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.02
"""Seconds between two readings, by default."""


class PeakMemory:
    """Reads the memory of this process while it is entered, in a thread of its own."""

    def __init__(self, interval: float = INTERVAL) -> None:
        """Prepare to read.

        Args:
            interval: seconds between two readings. A peak that is shorter may be missed.
        """
        self.bytes = 0
        """The most that was read since the beginning."""
        self.interval = interval
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            info = process.memory_info()
            self.bytes = max(self.bytes, info.rss - info.shared)
            if self._ended.wait(self.interval):
                return
