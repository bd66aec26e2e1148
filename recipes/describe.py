"""Write what recipes and installed plugins say of their keys, steps and options into the READMEs: `make docs`.

What is written stands between `<!-- steps -->`, `<!-- options of STEP -->` or `<!-- keys of TABLE -->` and `<!-- end -->`; the rest of a
document is as it was.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from inspect import getdoc
from pathlib import Path
from typing import Any

from rotdistill_core.plugin.registry import STEPS, installed_plugins, step_class
from rotdistill_core.plugin.step import STAGES, stage_of, validator_of
from rotdistill_core.recipe import load as recipe

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- (steps|(keys|options) of ([\w-]+)) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def described(path: Path) -> str:
    """Return the text that a README should have: its own, its places filled anew."""
    return PLACE.sub(filled, path.read_text(encoding="utf-8"))


def filled(place: re.Match[str]) -> str:
    """Return a place with what belongs there."""
    head, _, what, name, end = place.groups()
    if name:
        return (
            head
            + table(
                step_class(name)[0] if what == "options" else getattr(recipe, name),
                what.removesuffix("s"),
            )
            + end
        )
    found = [(name, *step_class(name)) for name in installed_plugins(STEPS)]
    found.sort(key=lambda step: STAGES.index(stage_of(step[1])))
    named = [
        (name, cls, origin.distribution.removeprefix("rotdistill-")) for name, cls, origin in found
    ]
    shipped = [
        f"\n### {name}\n\n{section(cls, plugin)}"
        for name, cls, plugin in named
        if (ROOT / "plugins" / plugin).is_dir()
    ]
    return head + "".join(shipped) + "\n" + end


def section(cls: type, plugin: str) -> str:
    """Return what there is to say of a step: its stage, its docstring, its options."""
    exact = getattr(cls, "exact", None)
    kind = {None: "", True: ", exact", False: ", not exact"}.get(
        exact, ", exact or not by its options"
    )
    text = f"{stage_of(cls).capitalize()}, [plugin](../plugins/{plugin}/README.md){kind}. {getdoc(cls)}"
    prose = "\n\n".join(
        textwrap.fill(p, 160, break_long_words=False, break_on_hyphens=False)
        for p in text.split("\n\n")
    )
    return f"{prose}\n\n{table(cls)}"


def table(cls: type, what: str = "option") -> str:
    """Return the options of a step class, or the keys of a table of recipes, as a table."""
    schema = validator_of(cls).json_schema()
    made = (
        {
            f.name: f.default_factory()
            for f in dataclasses.fields(cls)
            if callable(f.default_factory)
        }
        if hasattr(cls, "use")
        else {}
    )
    rows = [f"| {what} | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if name != "use":
            value = json.dumps(made.get(name, field.get("default")))
            default = (
                "required"
                if name in schema.get("required", ())
                else "none"
                if value == "null"
                else f"`{value}`"
            )
            meaning = " ".join(field["description"].split()).replace("|", "\\|")
            rows.append(f"| `{name}` | {typed(field)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def typed(schema: dict[str, Any]) -> str:
    """Return in words what JSON schema says of a value."""
    if "anyOf" in schema:
        return " or ".join(typed(one) for one in schema["anyOf"] if one != {"type": "null"})
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {typed(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list of {typed(schema['items'])}"
    if schema["type"] == "object":
        return f"table of {typed(schema['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)
    return f"{schema['type']} {bounds}".strip()


if __name__ == "__main__":
    for readme in (ROOT / "recipes" / "README.md", *sorted(ROOT.glob("plugins/*/README.md"))):
        readme.write_text(described(readme), encoding="utf-8")
