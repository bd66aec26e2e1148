"""Hostile recipes, words of the command line, names and paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rotdistill_core.recipe.schema import recipe_schema
from tests.faults.inputs import ANY, CHECK_RECIPE, REFUSED, RUN, Input, replace_in

RECIPES = "hostile recipes"
HEAD = """teacher.model = "model"
student.model = "model"
samples.index = "texts/index.tsv"
samples.style = "texts/style.md"
samples.heldout = "texts/heldout.tsv"
"""
WRONG_VALUES: Mapping[str, tuple[str, ...]] = {
    "string": ("1", "true", "[]", "{}", '""', "1979-05-27", '"\\u0000"'),
    "integer": ('"1"', "1.5", "nan", "1e308", "-1", "[]", "true", "9" * 30, "0x7fffffffffffffff"),
    "number": ('"1"', "nan", "inf", "-inf", "-1e308", "[]", "true", "1e309"),
    "boolean": ('"true"', "1", "[]", "nan"),
    "array": ('"x"', "1", "{}", "[[[[]]]]", "[nan]"),
    "object": ('"x"', "1", "[]", "nan"),
}
"""Type -> values that a field of the type does not take, or only just."""
ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "a\x00b", "\x9b31m", "\u202egpj.exe", "a\rb", "a\x7f")
"""What must reach no terminal."""
NAMES = (
    "../x",
    "/etc/x",
    "..",
    ".",
    "",
    " ",
    "a/b",
    "a\\b",
    "~",
    "$HOME",
    "con:",
    "x" * 300,
    "a\nb",
    "<script>alert(1)</script>",
    '" onload="x',
    "'; rm",
    "%s%n",
    "{}",
    "{{ 7 }}",
    "é" * 90,
    "CHECKPOINTS",
    "-rf",
    "--yes",
    *ESCAPES,
)
"""Names that are none."""
BAD_WORDS = (
    "x",
    "=",
    "=1",
    "chop",
    "chop.",
    ".layers=1",
    "chop..layers=1",
    "chop.layers",
    "chop.layers=",
    "chop.layers=nan",
    "chop.layers=1e308",
    "chop.layers=[",
    "chop.layers={a=1}",
    "chop.layers=-1",
    "chop.layers=" + "9" * 5000,
    "nope.layers=2",
    "chop.nope=2",
    "name=../x",
    "name=",
    "name=[1]",
    "student.device=evil",
    "student.dtype=evil",
    "student.model=",
    "seed=-1",
    "seed=1e400",
    "samples.index=/dev/zero",
    "samples.index=texts",
    "samples.index=nope.tsv",
    "samples.limit=0",
    "samples.style=/dev/zero",
    "samples.validation=2",
    "variants={}",
    "variants.base=[1]",
    'variants."../x"=[]',
    "step=[]",
    "step.0.use=x",
    "check.kl_ratio=nan",
    "extends=/dev/zero",
    "observers=[1]",
    "observers=['nope']",
    "baseline=nope",
    "headline=[]",
    "a" * 100_000 + "=1",
    "chop.layers=" + "[" * 5000,
    "chop.id=x/../y",
    "chop.use=fidelity",
    "seed=\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    *(f"chop.{e}=1" for e in ESCAPES if "\0" not in e),
    *(f"name={e}" for e in ESCAPES if "\0" not in e),
)
"""Words after --set that are to be refused."""


def recipe_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    yield from _whole_documents()
    yield from _fields()
    yield from _names()
    yield from _paths()
    for k, word in enumerate(BAD_WORDS):
        calls = (
            ("check", "trial.toml", "--set", word),
            ("run", "trial.toml", "--no-plan", "--set", word),
        )
        yield Input("words of --set", f"{k}: {word[:60]!r}", lambda _: None, REFUSED, calls)


def _document(name: str, content: str | bytes, codes: frozenset[int] = frozenset({2})) -> Input:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def change(work: Path) -> None:
        (work / "trial.toml").write_bytes(data)

    return Input(RECIPES, name, change, codes, (CHECK_RECIPE, RUN))


def _recipe(steps: str, head: str = "", name: str = "trial") -> str:
    return f'name = "{name}"\n{HEAD}{head}\n{steps}\n'


CHOP = '[[step]]\nuse = "chop"\nlayers = 2\n'


def _whole_documents() -> Iterator[Input]:
    yield _document("empty", "")
    yield _document("no steps", _recipe(""))
    yield _document("no name", HEAD + CHOP)
    yield _document("a torn line", _recipe(CHOP) + "[[step]\n")
    yield _document("not UTF-8", b"\xff\xfe\x00")
    yield _document("UTF-16", _recipe(CHOP).encode("utf-16"))
    yield _document("a surrogate", _recipe(CHOP, 'observers = ["\ud800"]'))
    yield _document("a byte-order mark", b"\xef\xbb\xbf" + _recipe(CHOP).encode(), ANY)
    yield _document("CRLF", _recipe(CHOP).replace("\n", "\r\n"), ANY)
    yield _document("NUL", _recipe(CHOP) + "\0")
    yield _document("a duplicate key", _recipe(CHOP, "seed = 1\nseed = 2"))
    yield _document("a duplicate table", _recipe("[check]\n[check]\n" + CHOP))
    yield _document("a table that is a key", _recipe(CHOP, "check = 1\ncheck.unfold = 1.0"))
    yield _document("a duplicate id", _recipe(CHOP + CHOP))
    yield _document("a step that is a table", _recipe("[step]\nuse = 'chop'"))
    yield _document("a step that is text", _recipe("", "step = 'chop'"))
    yield _document("a step in a step", _recipe("[[step]]\nuse = 'chop'\n[[step.step]]\nuse = 'x'"))
    yield _document("a list 900 deep", _recipe(CHOP, "observers = " + "[" * 900 + "]" * 900))
    yield _document("a list 100000 deep", _recipe(CHOP, "observers = " + "[" * 100_000))
    yield _document("a table 500 deep", _recipe(CHOP, ".".join("a" * 500) + " = 1"))
    yield _document("a table 20000 deep", _recipe(CHOP, ".".join("a" * 20_000) + " = 1"))
    yield _document("a number of 5000 digits", _recipe(CHOP, "seed = " + "9" * 5000))
    yield _document("a float of 5000 digits", _recipe(CHOP, "check.unfold = 1" + "0" * 5000 + ".0"))
    yield _document("10 MB of comment", "#" * 10_000_000)
    yield _document("a name of 900 kB", _recipe(CHOP, name="x" * 900_000))
    yield _document("2000 unknown steps", _recipe("[[step]]\nuse = 'chopp'\n" * 2000))
    yield _document("30000 unknown steps", _recipe("[[step]]\nuse = 'chopp'\n" * 30_000))
    yield _document("3000 unknown keys", _recipe(CHOP, "".join(f"k{k} = 1\n" for k in range(3000))))
    yield _document(
        "5000 variants",
        _recipe(CHOP + "[variants]\n" + "".join(f"v{k} = []\n" for k in range(5000))),
        ANY,
    )
    yield _document("a cycle of extends", 'extends = "trial.toml"\nname = "x"\n')
    for target in ("nope.toml", "/dev/zero", "../trial.toml", ".", "texts", "\\u0000", "fifo"):
        yield _document(f"extends {target}", f'extends = "{target}"\nname = "x"\n' + CHOP)
    for use in ("os", "../x", "chop.chop", "сhop", "CHOP", "", "rotdistill_core.cli", "\\u001b[0m"):
        yield _document(f"a step that uses {use!r}", _recipe(f'[[step]]\nuse = "{use}"\n'))
    for observer in ("os", "../x", "Report", "", "\\u001b[0m", "report\\u0000"):
        yield _document(f"the observer {observer!r}", _recipe(CHOP, f'observers = ["{observer}"]'))
    yield Input(RECIPES, "a fifo", _fifo_recipe, {2}, (CHECK_RECIPE, RUN))
    yield Input(RECIPES, "an endless device", _endless_recipe, {2}, (CHECK_RECIPE, RUN))
    yield Input(RECIPES, "a folder", _folder_recipe, {2}, (CHECK_RECIPE, RUN))
    yield Input(RECIPES, "a link to itself", _looped_recipe, {2}, (CHECK_RECIPE, RUN))


def _fifo_recipe(work: Path) -> None:
    (work / "trial.toml").unlink()
    os.mkfifo(work / "trial.toml")


def _endless_recipe(work: Path) -> None:
    (work / "trial.toml").unlink()
    (work / "trial.toml").symlink_to("/dev/zero")


def _folder_recipe(work: Path) -> None:
    (work / "trial.toml").unlink()
    (work / "trial.toml").mkdir()


def _looped_recipe(work: Path) -> None:
    (work / "trial.toml").unlink()
    (work / "trial.toml").symlink_to("trial.toml")


# From the schema: each field with values of other types, and an unknown key in each table


def _fields() -> Iterator[Input]:
    schema = recipe_schema()
    definitions = schema["$defs"]
    for field, about in schema["properties"].items():
        if field == "step":
            continue
        if "$ref" in about or any("$ref" in each for each in about.get("anyOf", ())):
            yield from _table(field, _target(about, definitions))
        else:
            yield from _field(RECIPES, field, about, "{line}", CHOP)
    yield from _unknown_keys(definitions)
    for name, definition in definitions.items():
        if name.startswith("step."):
            use = name.removeprefix("step.")
            for field, about in definition["properties"].items():
                if field in ("use", "id"):
                    continue
                few = 3
                frame = f'[[step]]\nuse = "{use}"\n{{line}}\n'
                yield from _field(RECIPES, f"{use}.{field}", about, "", frame, few, field)


def _target(about: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    references = [about, *about.get("anyOf", ())]
    path = next(each["$ref"] for each in references if "$ref" in each)
    found: Mapping[str, Any] = definitions[path.rpartition("/")[2]]
    return found


def _table(table: str, definition: Mapping[str, Any]) -> Iterator[Input]:
    for field, about in definition["properties"].items():
        yield from _field(RECIPES, f"{table}.{field}", about, "{line}", CHOP, 4)


def _field(
    kind: str,
    path: str,
    about: Mapping[str, Any],
    head: str,
    steps: str,
    most: int = 5,
    key: str = "",
) -> Iterator[Input]:
    types = _types(about)
    values = [value for one in types for value in WRONG_VALUES.get(one, ())]
    # A value that one type of a union takes is no wrong value; the outcome has to be sound.
    for value in dict.fromkeys(values[:most] if len(types) == 1 else values[: most + 2]):
        line = f"{key or path} = {value}"
        text = _overridden(path, head.format(line=line), steps.replace("{line}", line))
        calls = (CHECK_RECIPE,)
        yield Input(kind, f"{path} = {value[:30]}", partial(_write_recipe, text=text), ANY, calls)


def _overridden(path: str, head: str, steps: str) -> str:
    """Return a recipe in which a key is given once."""
    lines = [f'name = "trial"\n{HEAD}{head}' if head else f'name = "trial"\n{HEAD}', steps]
    text = "\n".join(lines)
    kept = []
    for line in text.splitlines():
        if line.startswith(f"{path} = ") and any(one.startswith(f"{path} = ") for one in kept):
            kept = [one for one in kept if not one.startswith(f"{path} = ")]
        kept.append(line)
    return "\n".join(kept) + "\n"


def _write_recipe(work: Path, text: str) -> None:
    (work / "trial.toml").write_text(text, encoding="utf-8")


def _types(about: Mapping[str, Any]) -> list[str]:
    one = about.get("type")
    if isinstance(one, str):
        return [one]
    found = [each.get("type") for each in about.get("anyOf", ()) if each.get("type") != "null"]
    return [each for each in found if each] or ["string"]


def _unknown_keys(definitions: Mapping[str, Any]) -> Iterator[Input]:
    for table in ("teacher", "student", "anchor", "samples", "check"):
        yield _document(f"an unknown key in {table}", _recipe(CHOP, f"{table}.modle = 1"))
        yield _document(f"a table in {table}", _recipe(CHOP, f"{table}.a.b.c = 1"))
    for name in definitions:
        if name.startswith("step."):
            use = name.removeprefix("step.")
            yield _document(
                f"an unknown key in {use}", _recipe(f'[[step]]\nuse = "{use}"\nlayrs = nan\n')
            )


# Names and paths


def _names() -> Iterator[Input]:
    kind = "names and paths"
    for k, name in enumerate(NAMES):
        text = json.dumps(name)
        for place, lines in (
            ("the run", f"name = {text}\n{HEAD}{CHOP}"),
            ("a step", f'name = "trial"\n{HEAD}{CHOP}id = {text}\n'),
            ("a variant", f'name = "trial"\n{HEAD}{CHOP}[variants]\n{text} = []\n'),
        ):
            title = f"{place} is called {name[:30]!r} ({k})"
            change = partial(_write_recipe, text=lines)
            codes = ANY if name == "CHECKPOINTS" else frozenset({2})
            yield Input(kind, title, change, codes, (CHECK_RECIPE, RUN))
    for k, name in enumerate((*NAMES, "x" * 5000)):
        if "\0" in name:
            continue
        for words in (("show", name), ("rm", name, "--yes"), ("check", name), ("chat", name)):
            if name.startswith("-"):
                continue
            title = f"{words[0]} {name[:30]!r} ({k})"
            yield Input(kind, title, lambda _: None, {2, 3, 4}, (words,))


def _paths() -> Iterator[Input]:
    kind = "names and paths"
    paths = (
        "nope",
        "../nope",
        "/nope",
        "/",
        ".",
        "",
        "/etc/passwd",
        "texts/index.tsv",
        "model/config.json",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "~/nope",
        "model/../nope",
        "x" * 300,
        "model\\",
        "file:///etc",
        "https://example.com/x",
        "owner/name",
        "owner/name@x",
        "a/b/c",
        "run:nope/full",
        "run:../x/full",
        "run:",
        "package:os/x.gguf",
        "package:nope",
        "x.gguf",
        "x.gguf@1",
        "nope:x",
        *ESCAPES,
    )
    for k, path in enumerate(paths):
        old, new = 'student.model = "model"', f"student.model = {json.dumps(path)}"
        change = partial(_replace_line, old=old, new=new)
        yield Input(kind, f"a model at {path[:40]!r} ({k})", change, {2, 3}, early=False)
    for k, path in enumerate(paths[:18] + ESCAPES):
        for key in ("index", "style", "heldout"):
            old = next(line for line in HEAD.splitlines() if line.startswith(f"samples.{key} = "))
            change = partial(_replace_line, old=old, new=f"samples.{key} = {json.dumps(path)}")
            readable = key == "style" or (key == "index" and path == "texts/index.tsv")
            codes = ANY if readable else frozenset({2, 3})
            yield Input(kind, f"{key} at {path[:40]!r} ({k})", change, codes)


def _replace_line(work: Path, old: str, new: str) -> None:
    replace_in(work / "trial.toml", old, new)
