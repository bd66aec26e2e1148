"""The decorators that mark hooks."""

from __future__ import annotations

import pluggy

hookspec = pluggy.HookspecMarker("rotdistill")
"""Marks a function as the specification of a hook."""
hookimpl = pluggy.HookimplMarker("rotdistill")
"""Marks a function or method as the implementation of a hook."""
