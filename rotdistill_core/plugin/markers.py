"""TODO: rotdistill_core.plugin.markers."""

from __future__ import annotations

import pluggy

hookspec = pluggy.HookspecMarker("rotdistill")
hookimpl = pluggy.HookimplMarker("rotdistill")
