"""TODO: rotdistill_core.plugin.origin."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from urllib.parse import unquote


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from."""

    name: str
    distribution: str
    version: str
    target: str


def origin_of(point: EntryPoint) -> Origin:
    """Return the distribution behind an entry point."""
    dist = point.dist
    return Origin(
        point.name, dist.name if dist else "?", dist.version if dist else "?", point.value
    )


def source_digest(origin: Origin) -> str:
    """Return the sha256 of all Python code of a distribution, tests apart: helper modules make a step's result as its own file does.

    What is installed in place for editing lists no files and says where its folder is.
    """
    dist = distribution(origin.distribution)
    found = [Path(str(file.locate())) for file in dist.files or () if file.suffix == ".py"]
    where = json.loads(dist.read_text("direct_url.json") or "{}")
    if where.get("dir_info", {}).get("editable"):
        inside = Path(unquote(where["url"].removeprefix("file://"))).rglob("*.py")
        found += [p for p in inside if not {"tests", ".venv"} & {*p.parts}]
    own = importlib.util.find_spec(origin.target.partition(":")[0])
    found += [Path(own.origin)] if own and own.origin else []
    return hashlib.sha256(
        "".join(
            sorted({hashlib.sha256(p.read_bytes()).hexdigest() for p in found if p.is_file()})
        ).encode()
    ).hexdigest()
