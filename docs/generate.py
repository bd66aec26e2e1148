"""Write what the program knows of itself into the documents: `make docs`.

It fills the places between `<!-- NAME -->` and `<!-- end -->`, where NAME is one of

- `steps`: every shipped step with its options;
- `options of STEP`, `keys of TABLE`: one table of options, or of keys of a recipe;
- `stages`, `hooks`: the hook specifications;
- `plugins`: the distributions of this project, and what each offers.

The rest of a document stays as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from inspect import getdoc
from pathlib import Path
from typing import Any

from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.registry import STEPS, installed_plugins, step_class
from rotdistill_core.plugin.step import STAGES, stage_of, validator_of
from rotdistill_core.recipe import document

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(
    r"(<!-- (steps|stages|hooks|plugins|(?:keys|options) of [\w-]+) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": "≥",
    "exclusiveMaximum": "<",
    "maximum": "≤",
}
EXACTNESS = {
    None: "",
    True: ", exact",
    False: ", not exact",
}
WIDTH = 100


def documents() -> list[Path]:
    """Return the documents that have places."""
    return [
        ROOT / "recipes" / "README.md",
        ROOT / "plugins" / "README.md",
        ROOT / "docs" / "plugins" / "hooks.md",
        *sorted(ROOT.glob("plugins/*/README.md")),
    ]


def described(path: Path) -> str:
    """Return the text that a document should have: its own, with its places filled anew."""
    return PLACE.sub(_filled, path.read_text(encoding="utf-8"))


def _filled(place: re.Match[str]) -> str:
    head, name, tail = place.groups()
    what, _, subject = name.partition(" of ")
    if what == "options":
        return head + table(step_class(subject)[0]) + tail
    if what == "keys":
        return head + table(getattr(document, subject), "key") + tail
    writers: dict[str, Callable[[], str]] = {
        "steps": _all_steps,
        "stages": _stages,
        "hooks": _hooks,
        "plugins": _plugins,
    }
    return head + writers[what]() + tail


def shipped_steps() -> list[tuple[str, type, str]]:
    """Return (name, class, folder of the plugin) of every shipped step, in order of the stages."""
    found = []
    for name in installed_plugins(STEPS):
        cls, origin = step_class(name)
        folder = origin.distribution.removeprefix("rotdistill-")
        if (ROOT / "plugins" / folder).is_dir():
            found.append((name, cls, folder))
    return sorted(found, key=lambda step: STAGES.index(stage_of(step[1])))


def _all_steps() -> str:
    sections = [
        f"\n### {name}\n\n{section(cls, folder)}" for name, cls, folder in shipped_steps()
    ]
    return "".join(sections) + "\n"


def _stages() -> str:
    """Return a table of the stages: what a step of each does, and which there are."""
    rows = ["| stage | a step of this stage | steps that exist |", "|---|---|---|"]
    for stage in STAGES:
        first = _first_line(getattr(HookSpecs, stage)).removeprefix("Return ")
        names = [f"`{name}`" for name, cls, _ in shipped_steps() if stage_of(cls) == stage]
        rows.append(f"| `{stage}` | {first} | {', '.join(names)} |")
    return "\n".join(rows) + "\n"


def hooks() -> Iterator[tuple[str, Any]]:
    """Yield every hook specification with its name."""
    for name, hook in vars(HookSpecs).items():
        if hasattr(hook, "rotdistill_spec"):
            yield name, hook


def signature_of(name: str, hook: Any) -> str:
    """Return a hook's signature as the reference prints it."""
    found = inspect.signature(hook)
    arguments = [p for p in found.parameters.values() if p.name != "self"]
    listed = ", ".join(f"{p.name}: {p.annotation}" for p in arguments)
    return f"{name}({listed}) -> {found.return_annotation}"


def _hooks() -> str:
    sections = [
        f"\n### {name}\n\n`{signature_of(name, hook)}`\n\n{getdoc(hook)}\n"
        for name, hook in hooks()
    ]
    return "".join(sections) + "\n"


def _plugins() -> str:
    """Return a table of the distributions of this project."""
    rows = ["| distribution | what it is | offers |", "|---|---|---|"]
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        names = [name for group in project["entry-points"].values() for name in group]
        offers = ", ".join(f"`{name}`" for name in names)
        folder = path.parent.name
        rows.append(f"| [{folder}]({folder}/README.md) | {project['description']} | {offers} |")
    return "\n".join(rows) + "\n"


def _first_line(subject: Any) -> str:
    return (getdoc(subject) or "").partition("\n")[0]


def section(cls: type, plugin: str) -> str:
    """Return what a recipe's author needs to know of a step: stage, docstring, options."""
    exact = getattr(cls, "exact", None)
    kind = EXACTNESS.get(exact, ", exact or not by its options")
    stage = stage_of(cls).capitalize()
    text = f"{stage}, [plugin](../plugins/{plugin}/README.md){kind}. {getdoc(cls)}"
    paragraphs = [
        textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n\n")
    ]
    return "\n\n".join(paragraphs) + f"\n\n{table(cls)}"


def table(cls: type, what: str = "option") -> str:
    """Return the options of a step class, or the keys of a table of recipes, as a table."""
    schema = validator_of(cls).json_schema()
    factories: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if callable(field.default_factory):
                factories[field.name] = field.default_factory()
    rows = [f"| {what} | type | default | meaning |", "|---|---|---|---|"]
    for name, about in schema["properties"].items():
        if name == "use":
            continue
        default = _default(factories.get(name, about.get("default")))
        if name in schema.get("required", ()):
            default = "required"
        meaning = " ".join(about["description"].split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {type_in_words(about)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    return "none" if value is None else f"`{json.dumps(value)}`"


def type_in_words(schema: dict[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if branch != {"type": "null"}]
        return " or ".join(type_in_words(branch) for branch in branches)
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if "prefixItems" in schema:
        items = schema["prefixItems"]
        return f"list of {len(items)}: {type_in_words(items[0])}"
    if schema["type"] == "array":
        return f"list of {type_in_words(schema['items'])}"
    if schema["type"] == "object":
        return f"table of {type_in_words(schema['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)
    return f"{schema['type']} {bounds}".strip()


if __name__ == "__main__":
    for each in documents():
        each.write_text(described(each), encoding="utf-8")
