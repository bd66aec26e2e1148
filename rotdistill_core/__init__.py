"""rotdistill: surgery on language models with linear algebra."""

from rotdistill_core.hookspecs import hookimpl, hookspec
from rotdistill_core.step import step

__all__ = ["hookimpl", "hookspec", "step"]
