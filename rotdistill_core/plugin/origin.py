"""Where a plugin comes from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, version

CORE_DISTRIBUTION = "rotdistill"
"""The distribution of the core."""
CORE_PACKAGE = "rotdistill_core"


@dataclass(frozen=True)
class Origin:
    """An entry point and the distribution that offers it."""

    name: str
    """Name of the entry point: what recipes, config files or the command line call the plugin."""
    distribution: str
    version: str
    target: str
    """The module that is imported."""

    @property
    def release(self) -> str:
        """Distribution and version, for people and for records."""
        return f"{self.distribution} {self.version}"


def origin_of(point: EntryPoint) -> Origin:
    """Return the origin of an entry point; a question mark stands for what its distribution does
    not say."""
    installed = point.dist
    if installed is None and point.module.partition(".")[0] == CORE_PACKAGE:
        return Origin(point.name, CORE_DISTRIBUTION, version(CORE_DISTRIBUTION), point.value)
    return Origin(
        name=point.name,
        distribution=installed.name if installed else "?",
        version=installed.version if installed else "?",
        target=point.value,
    )
