"""Write what the program knows of itself into the documents: `make docs`.

It fills the places between `<!-- NAME -->` and `<!-- end -->`, where NAME is one of

- `steps`: every shipped step with its options;
- `options of STEP`, `keys of TABLE`: one table of options, or of keys of a recipe;
- `stages`, `hooks`: the hook specifications;
- `functions`, `types`: the public names of `rotdistill_core`;
- `names of MODULE`: the public names of one module of it, a line each;
- `plugins`: the distributions of this project, and what each offers;
- `commands`, `exit codes`: the command line, from its own parser and errors.

The rest of a document stays as it is.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import signal
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cached_property
from inspect import getdoc
from pathlib import Path
from typing import Any, ForwardRef, get_args

from typer.main import get_command

import rotdistill_core
from rotdistill_core.cli import app
from rotdistill_core.errors import (
    CheckFailed,
    PluginError,
    RecipeError,
    RotdistillError,
    SetupError,
)
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.registry import STEPS, installed_plugins, step_class
from rotdistill_core.plugin.step import STAGES, stage_of, validator_of
from rotdistill_core.recipe import document

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(
    r"(<!-- (steps|stages|hooks|plugins|functions|types|commands|exit codes"
    r"|(?:keys|options|names) of [\w.-]+) -->\n)"
    r".*?(<!-- end -->)",
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
KINDS = {str: "text", int: "integer", Path: "path", bool: "none"}
"""Type of a value on the command line -> what its table calls it."""
WIDTH = 100


def documents() -> list[Path]:
    """Return the documents that have places."""
    return [
        ROOT / "recipes" / "README.md",
        ROOT / "plugins" / "README.md",
        ROOT / "docs" / "commands.md",
        ROOT / "docs" / "python.md",
        ROOT / "docs" / "paths" / "method.md",
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
    if what == "names":
        return head + _names(subject) + tail
    writers: dict[str, Callable[[], str]] = {
        "steps": _all_steps,
        "stages": _stages,
        "hooks": _hooks,
        "plugins": _plugins,
        "functions": _functions,
        "types": _types,
        "commands": _commands,
        "exit codes": _exit_codes,
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
    sections = [f"\n### {name}\n\n{section(cls, folder)}" for name, cls, folder in shipped_steps()]
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


def public_names() -> Iterator[tuple[str, Any]]:
    """Yield the public names of the core with what they stand for, but for pluggy's markers."""
    for name in rotdistill_core.__all__:
        found = getattr(rotdistill_core, name)
        if getattr(found, "__module__", "").startswith("rotdistill_core"):
            yield name, found


def _functions() -> str:
    sections = []
    for name, found in public_names():
        if inspect.isfunction(found):
            sections.append(f"\n### {name}\n\n`{call_of(name, found)}`\n\n{prose(found)}\n")
    return "".join(sections) + "\n"


def _types() -> str:
    sections = []
    for name, found in public_names():
        if inspect.isclass(found):
            sections.append(f"\n### {name}\n\n{prose(found)}\n{_members(found)}")
    return "".join(sections) + "\n"


def _names(module: str) -> str:
    """Return a table of the public names of a module of the core, with their first sentences."""
    namespace = importlib.import_module(f"rotdistill_core.{module}")
    rows = ["| name | what it is |", "|---|---|"]
    for name in namespace.__all__:
        found = getattr(namespace, name)
        written = name if inspect.isclass(found) else call_of(name, found)
        rows.append(f"| `{written}` | {escaped(_first_line(found))} |")
    return "\n".join(rows) + "\n"


def _members(cls: type) -> str:
    """Return a table of the public fields, methods and properties of a class, if it has any."""
    fields = {
        name: kind
        for name, kind in vars(cls).get("__annotations__", {}).items()
        if not name.startswith("_") and "ClassVar" not in str(kind)
    }
    rows = [f"| `{name}` | `{escaped(_written(kind))}` |" for name, kind in fields.items()]
    if issubclass(cls, Enum):
        rows += [f"| `{each.name}` | `{each.value!r}` |" for each in cls]
    for name, member in vars(cls).items():
        if name.startswith("_") or name in fields:
            continue
        found = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(found):
            rows.append(f"| `{call_of(name, found)}` | {escaped(_first_line(found))} |")
        elif isinstance(found, property | cached_property):
            rows.append(f"| `{name}` | {escaped(_first_line(found))} |")
    if not rows:
        return ""
    return "\n".join(["\n| member | type, or what it is |", "|---|---|", *rows]) + "\n"


def _written(kind: Any) -> str:
    """Return a type as the code writes it. Of a named tuple it is a forward reference."""
    return str(kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind)


def escaped(cell: str) -> str:
    """Return the text of a cell of a table, whose bars do not end it."""
    return cell.replace("|", "\\|")


def call_of(name: str, function: Callable[..., Any]) -> str:
    """Return a call with the names of its arguments; those with a default end in `=...`."""
    listed = []
    keyword_only = False
    arguments = list(inspect.signature(function).parameters.values())
    if "." in function.__qualname__:  # a method
        del arguments[0]
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            listed.append("*")
        star = "*" if argument.kind is argument.VAR_POSITIONAL else ""
        default = "" if argument.default is argument.empty else "=..."
        listed.append(f"{star}{argument.name}{default}")
    return f"{name}({', '.join(listed)})"


def prose(subject: Any) -> str:
    """Return a docstring as Markdown: what `Args:` and `Raises:` list becomes a list."""
    paragraphs = []
    for paragraph in (getdoc(subject) or "").split("\n\n"):
        title, _, rest = paragraph.partition("\n")
        if re.fullmatch(r"[A-Z]\w+:", title):
            entries = re.split(r"\n(?=\S)", textwrap.dedent(rest))
            listed = (re.sub(r"^([\w, ]+):", r"`\1`:", " ".join(e.split())) for e in entries)
            paragraph = f"{title}\n\n" + "\n".join(f"- {entry}" for entry in listed)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


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


def _commands() -> str:
    """Return a section for each verb, and one for the options before it, as `--help` has them."""
    program: Any = get_command(app)
    rows = "".join(_parameter_row(parameter) for parameter in program.params)
    table_of_program = "\n| option | value | meaning |\n|---|---|---|\n" + rows
    sections = [f"\n{program.help}\n\n{program.epilog}\n{table_of_program}"]
    for name in sorted(program.list_commands(None)):
        sections.append(_verb(name, program.get_command(None, name)))
    return "".join(sections) + "\n"


def _verb(name: str, verb: Any) -> str:
    """Return the section of a verb: usage, help, arguments and options, examples."""
    about, _, examples = inspect.cleandoc(verb.help).partition("Examples:")
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    usage = ["rotdistill", name, *map(_metavar, arguments)]
    if len(arguments) < len(verb.params):
        usage.append("[OPTIONS]")
    parts = [f"\n### {name}\n\n```text\n{' '.join(usage)}\n```\n\n{about.strip()}\n"]
    if verb.params:
        rows = "".join(map(_parameter_row, [*arguments, *_options(verb)]))
        parts.append(f"\n| argument or option | value | meaning |\n|---|---|---|\n{rows}")
    lines = "\n".join(line.strip() for line in examples.splitlines() if line.strip())
    if lines:
        parts.append(f"\n```bash\n{lines}\n```\n")
    return "".join(parts)


def _options(verb: Any) -> list[Any]:
    return [p for p in verb.params if p.param_type_name == "option"]


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _parameter_row(parameter: Any) -> str:
    """Return a row of a table about an argument or an option."""
    annotation = parameter.type_descriptor.annotation
    annotation = next(iter(get_args(annotation)), annotation)  # of a list's items
    if issubclass(annotation, Enum):
        kind = " or ".join(f"`{each.value}`" for each in annotation)
    else:
        kind = KINDS[annotation]
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        kind = f"{kind}, required" if parameter.required else kind
    else:
        name = ", ".join(parameter.opts)
        if parameter.multiple:
            kind = f"{kind}, may be repeated"
        if not parameter.is_flag and parameter.default not in (None, ()):
            kind = f"{kind}, default `{parameter.default}`"
    return f"| `{name}` | {kind} | {escaped(' '.join((parameter.help or '').split()))} |\n"


def _exit_codes() -> str:
    """Return a table of the exit codes: those of the errors, and those of other ends."""
    meanings: dict[int, list[str]] = {0: ["The work is done."]}
    for error in (RotdistillError, RecipeError, PluginError, SetupError, CheckFailed):
        meaning = re.sub(r" \(exit code \d\)", "", _first_line(error))
        meanings.setdefault(error.exit_code, []).append(meaning)
    for number, name in ((signal.SIGINT, "SIGINT, Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        end = f"A signal ended the run ({name}). The last line is the command that continues it."
        meanings[128 + number] = [end]
    rows = [f"| {code} | {' '.join(texts)} |" for code, texts in sorted(meanings.items())]
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows]) + "\n"


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
        meaning = escaped(" ".join(about["description"].split()))
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
