"""Documents name what is there: hooks, options, recipes, counts. Examples run."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal
from urllib.parse import unquote

import pytest
import yaml
from pydantic import ConfigDict, Field, PositiveInt
from typer.main import get_command

import rotdistill_core
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.cli import app
from rotdistill_core.plugin.hookspecs import HookSpecs
from rotdistill_core.plugin.registry import (
    ADAPTERS,
    COMMANDS,
    OBSERVERS,
    STEPS,
    installed_plugins,
    load_plugin,
    plugin_manager,
    step_class,
)
from rotdistill_core.plugin.step import STAGES, stage_of
from rotdistill_core.recipe.document import Check, ModelRef, Recipe, SamplesRef, StudentRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import command_line

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "README.md"
SAMPLES = ROOT / "samples" / "README.md"
PAGES = {path.stem: path for path in (ROOT / "docs" / "plugins").glob("*.md")}
"""The guide for authors of plugins: tutorial, hooks, adapters, testing."""
HOOKS = {name: hook for name, hook in vars(HookSpecs).items() if hasattr(hook, "rotdistill_spec")}
TABLES = (Recipe, ModelRef, StudentRef, SamplesRef, Check)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
SHIPPED = {
    "rotdistill",
    *(f"rotdistill-{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml")),
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def section(path: Path, title: str) -> str:
    """Return what stands under a heading `### title`, up to the next heading."""
    found = re.split(
        rf"^###+ `?{re.escape(title)}`?$", FENCE.sub("", read(path)), flags=re.MULTILINE
    )
    assert len(found) == 2, f"{path.name} has {len(found) - 1} sections called {title}"
    return re.split(r"^##", found[1], flags=re.MULTILINE)[0]


def cells(text: str) -> dict[str, list[str]]:
    """Return the table rows of a text by their first cell, without backticks."""
    rows = [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0].strip("` "): row for row in rows}


def shipped_steps() -> dict[str, type]:
    """Return the installed steps that this repository ships, by name."""
    found = {name: step_class(name) for name in installed_plugins(STEPS)}
    return {name: cls for name, (cls, origin) in found.items() if origin.distribution in SHIPPED}


STEP_CLASSES = shipped_steps()
KEYS = cells(read(RECIPES).partition("\n## Steps\n")[0])
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def guide() -> str:
    """Return the text of all pages of the guide."""
    return "\n".join(read(path) for path in PAGES.values())


@pytest.mark.parametrize("name", HOOKS)
def test_the_reference_has_every_hook_with_its_signature(name: str) -> None:
    signature = GENERATE["signature_of"](name, HOOKS[name])
    assert f"`{signature}`" in section(PAGES["hooks"], name)


@pytest.mark.parametrize(
    "argument",
    sorted({p for s in STAGES for p in inspect.signature(HOOKS[s]).parameters} - {"self"}),
)
def test_the_reference_explains_every_argument_of_the_stages(argument: str) -> None:
    assert f"| `{argument}` |" in read(PAGES["hooks"])


@pytest.mark.parametrize("name", STEP_CLASSES)
def test_the_reference_lists_every_step_under_its_stage(name: str) -> None:
    assert f"`{name}`" in cells(read(PAGES["hooks"]))[stage_of(STEP_CLASSES[name])][-1]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Adapter)])
def test_the_page_on_adapters_names_every_field(field: str) -> None:
    assert f"`{field}`" in read(PAGES["adapters"])


@pytest.mark.parametrize("name", sorted({*rotdistill_core.__all__} - {"Map", "Progress"}))
def test_the_page_on_python_has_every_public_name(name: str) -> None:
    page = read(ROOT / "docs" / "python.md")
    assert f"\n### {name}\n" in page or f"`{name}`" in page


def public_modules() -> set[str]:
    """Return the modules that the page on Python names as public."""
    section = read(ROOT / "docs" / "python.md").partition("\n## Modules\n")[2].partition("\n## ")[0]
    named = re.findall(r"`(?:rotdistill_core)?\.([a-z_.]+)`", section)
    return {f"rotdistill_core.{name}" for name in named}


def test_public_modules_exist() -> None:
    assert len(public_modules()) > 20
    assert all(importlib.util.find_spec(name) for name in public_modules())


AUTHORS_PAGES = [
    *sorted((ROOT / "docs" / "plugins").glob("*.md")),
    ROOT / "docs" / "engines.md",
    *sorted((ROOT / "plugins/scaffold/src/rotdistill_scaffold/templates").rglob("*.txt")),
]


@pytest.mark.parametrize("path", AUTHORS_PAGES, ids=lambda path: path.name)
def test_what_authors_are_shown_imports_public_modules_alone(path: Path) -> None:
    used = set(re.findall(r"from (rotdistill_core\.[a-z_.]+) import", read(path)))
    assert used <= public_modules(), used - public_modules()


def entries(nav: list | dict | str) -> Iterator[str]:
    """Yield the files of a nav of mkdocs."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(part)


def test_every_document_is_a_page_of_the_site_once() -> None:
    site = yaml.safe_load(read(ROOT / "mkdocs.yml"))
    nav = list(entries(site["nav"]))
    texts_for_models = {"samples/french.md", "samples/tour_guide.md", "samples/support/system.md"}
    assert sorted(nav) == sorted(
        {path.relative_to(ROOT).as_posix() for path in documents()} - texts_for_models
    )


def test_the_site_loads_nothing_from_elsewhere() -> None:
    site = yaml.safe_load(read(ROOT / "mkdocs.yml"))
    assert site["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "extra"} & site.keys()


@pytest.mark.parametrize(
    "path", GENERATE["documents"](), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_generated_parts_of_a_document_are_those_of_the_program(path: Path) -> None:
    assert read(path) == GENERATE["described"](path), (
        f"{path.relative_to(ROOT)} is stale: run `make docs`"
    )


@pytest.mark.parametrize("name", STEP_CLASSES)
def test_every_step_has_its_options_in_both_documents(name: str) -> None:
    folder = step_class(name)[1].distribution.removeprefix("rotdistill-")
    assert f"<!-- options of {name} -->\n| option |" in read(
        ROOT / "plugins" / folder / "README.md"
    )
    assert set(cells(section(RECIPES, name))) >= {
        f.name for f in dataclasses.fields(STEP_CLASSES[name])
    } - {"use"}


@dataclasses.dataclass
class Described:
    """A step that nobody ships.

    It says more
    in a second paragraph.
    """

    some: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    """Shares,
    of something."""
    other: Literal["a", "b"] | PositiveInt | None = None
    """One or the other."""
    use: Literal["described"] = "described"

    __pydantic_config__: ClassVar = ConfigDict(use_attribute_docstrings=True)

    def fold(self) -> None: ...


def test_a_step_is_described_by_its_docstrings() -> None:
    assert GENERATE["section"](Described, "here") == (
        "Fold, [plugin](../plugins/here/README.md). A step that nobody ships.\n\n"
        "It says more in a second paragraph.\n\n"
        "| option | type | default | meaning |\n|---|---|---|---|\n"
        "| `some` | list of number > 0, ≤ 1 | required | Shares, of something. |\n"
        '| `other` | `"a"` or `"b"` or integer > 0 | none | One or the other. |\n'
    )


@pytest.mark.parametrize(
    "key", sorted({key for table in TABLES for key in table.model_fields} | {"step", "extends"})
)
def test_every_key_of_a_recipe_is_documented(key: str) -> None:
    assert key in {name.strip("[]") for name in KEYS}


@pytest.mark.parametrize("table", ["StudentRef", "SamplesRef", "Lessons", "Check"])
def test_keys_of_a_recipe_are_written_by_the_program(table: str) -> None:
    assert f"<!-- keys of {table} -->\n| key | type | default | meaning |\n" in read(RECIPES)


def test_every_shipped_recipe_is_described() -> None:
    for path in (ROOT / "recipes").glob("*.toml"):
        assert f"[{path.name}]({path.name})" in read(RECIPES)


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in ROOT.glob("plugins/*/pyproject.toml")), ids=lambda p: p.name
)
def test_every_plugin_has_a_readme(folder: Path) -> None:
    assert read(folder / "README.md").startswith(f"# {folder.name}\n")
    assert len(read(folder / "README.md").splitlines()) >= 10


def test_the_samples_are_counted_right() -> None:
    counts = []
    for file in ("index.tsv", "heldout.tsv"):
        with (ROOT / "samples" / file).open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert all(f"`{column}`" in read(SAMPLES) for column in rows[0])
        counts.append(Counter(row["language"] for row in rows))
    blurbs, heldout = counts
    table = [row for row in cells(read(SAMPLES)).values() if len(row) == 4]
    found = {
        row[1].strip("`"): (int(row[2]), int(row[3].strip("| ")))
        for row in table
        if row[1].startswith("`")
    }
    assert found == {language: (n, heldout[language]) for language, n in blurbs.items()}
    assert f"{blurbs.total()} | {heldout.total()} |" in read(SAMPLES)


def documents() -> Iterator[Path]:
    """Yield the Markdown files of the repository: not those of hidden folders or runs, nor of
    anything installed."""
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [
            d
            for d in inside
            if not d.startswith(".") and d not in ("runs", "shared", "node_modules")
        ]
        yield from (Path(folder, name) for name in files if name.endswith(".md"))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "path", sorted(documents()), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(path)))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            file, _, anchor = target.partition("#")
            there = path.parent / unquote(file) if file else path
            assert there.exists(), target
            assert not anchor or there.suffix != ".md" or anchor in anchors(there), target


def commands() -> Iterator[tuple[str, str]]:
    """Yield (document, line) for every call of `rotdistill` in a document: in a block of code, or
    between backticks."""
    for path in sorted(documents()):
        lines = [
            line
            for kind, body in FENCE.findall(read(path))
            if kind in ("", "bash", "console")
            for line in body.splitlines()
        ]
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", read(path)))
        for line in dict.fromkeys([*lines, *(text.replace("\\|", "|") for text in inline)]):
            if re.match(r"rotdistill [a-z]+ \S", line):
                yield path.relative_to(ROOT).as_posix(), line.strip()


@pytest.mark.parametrize(("document", "line"), list(commands()), ids=lambda value: value[:60])
def test_every_command_in_a_document_is_one(
    document: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line.partition("#")[0].partition(" > ")[0].partition(" | ")[0])[1:]
    # A pattern, such as `rotdistill plan RECIPE`.
    if any(re.fullmatch("[A-Z]+", word) for word in words):
        assert words[0] in get_command(app).list_commands(None)  # type: ignore[arg-type]
        return
    monkeypatch.chdir(ROOT)
    verb = get_command(app).get_command(None, words[0])  # type: ignore[arg-type]
    given = verb.make_context(words[0], words[1:]).params
    if document.startswith("docs/paths/"):  # tests/test_paths.py has their recipes
        return
    if words[0] in ("run", "plan", "check") and str(given["path"]).endswith(".toml"):
        load_recipe(given["path"], given.get("sets") or [])


Build = Callable[[str], ModuleType]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return a function that puts a file of the guide on sys.path and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    named = re.findall(
        r"`(\w+\.py)`(?:(?!```).)*?\n\n```python\n(.*?)^```$", guide(), re.MULTILINE | re.DOTALL
    )
    sources = dict(named)

    def build(file: str) -> ModuleType:
        name = file.removesuffix(".py")
        (tmp_path / file).write_text(sources[file], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, tmp_path / file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return build


def install(root: Path, distribution: str, group: str, name: str, module: str) -> None:
    info = root / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")


def test_the_example_step_works(tmp_path: Path, example: Build) -> None:
    project = next(
        tomllib.loads(body)
        for kind, body in FENCE.findall(guide())
        if kind == "toml" and "[project]" in body
    )
    ((name, module),) = project["project"]["entry-points"]["rotdistill"].items()
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"{module}.py"]
    example(f"{module}.py")
    install(tmp_path, project["project"]["name"], STEPS, name, module)
    cls, origin = step_class(name)
    assert (stage_of(cls), origin.distribution) == ("align", project["project"]["name"])
    path = tmp_path / "recipe.toml"
    path.write_text(
        'name = "t"\n[teacher]\nmodel = "a"\n[student]\nmodel = "b"\n'
        f'[[step]]\nuse = "{name}"\ncentre = true\n'
    )
    assert load_recipe(path).steps[0].step.centre
    example("test_principal_axes.py").test_a_planted_rotation_is_found(tmp_path)


def test_the_example_observer_works(tmp_path: Path, example: Build) -> None:
    module = "rotdistill_slow_steps"
    assert f'`slow-steps = "{module}"`' in guide()
    example(f"{module}.py")
    install(tmp_path, "rotdistill-slow-steps", OBSERVERS, "slow-steps", module)
    pm, lines = plugin_manager(), list[str]()
    pm.register(load_plugin(OBSERVERS, "slow-steps")[0])
    for seconds, reused in ((90.0, False), (90.0, True), (9.0, False)):
        arguments = {"step_id": "refit", "variant": "full", "seconds": seconds, "reused": reused}
        pm.hook.after_step(**arguments, stage="fold", folder=tmp_path, log=lines.append)
    assert lines == ["full: refit took 1.5 minutes"]


def test_the_example_verb_works(
    tmp_path: Path, example: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "rotdistill_where"
    assert f'`where = "{module}"`' in guide()
    example(f"{module}.py")
    install(tmp_path, "rotdistill-where", COMMANDS, "where", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/trial-1/checkpoints/full").mkdir(parents=True)
    assert command_line("where", "trial") == (0, "runs/trial-1/checkpoints/full\n", "")
    assert command_line("where", "other")[0] == 2
    assert "rotdistill where tour-guide --json" in command_line("where", "--help")[1]


@pytest.mark.parametrize("name", installed_plugins(OBSERVERS))
def test_every_observer_is_described(name: str) -> None:
    assert name in cells(section(RECIPES, "Observers")) or f"[{name}]" in section(
        RECIPES, "Observers"
    )


def test_the_example_adapter_works(tmp_path: Path, example: Build) -> None:
    module = "rotdistill_mistral_adapter"
    assert f'`mistral = "{module}"`' in guide()
    example(f"{module}.py")
    install(tmp_path, "rotdistill-mistral-adapter", ADAPTERS, "mistral", module)
    [checks] = example("test_mistral_adapter.py").test_the_table_holds.pytestmark
    for number, case in enumerate(checks.args[1]):
        case.values[0](tmp_path / str(number))
