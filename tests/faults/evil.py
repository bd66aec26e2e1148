"""A pickle that runs code when it is read: it writes the file that CANARY names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

PICKLE = "pytorch_model.bin"


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import os; open(os.environ['CANARY'], 'w').close()",)


def write_pickle(path: Path) -> None:
    """Write the pickle."""
    with path.open("wb") as stream:
        pickle.dump(Evil(), stream)
