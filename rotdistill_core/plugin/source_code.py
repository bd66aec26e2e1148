"""The code that a result depends on: a step's key covers it, so an edit of it makes the result
anew.

It is (1) every Python file of the step's distribution, of its package as it is imported, and of the
rotdistill distributions that it requires, directly or not, and (2) the modules of this core that
those files import, directly or not. Parts of the core that cannot change a figure are left out
(`NO_FIGURES`): an edit of the command line or of an estimate leaves stored results valid.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rotdistill_core.plugin.origin import CORE_DISTRIBUTION, CORE_PACKAGE, Origin

NO_FIGURES = tuple(
    f"{CORE_PACKAGE}.{part}"
    for part in ("cli", "errors", "evaluation.metrics", "planning", "plugin", "terminal", "testing")
)
"""Modules and packages of the core that no figure depends on."""
CORE_FOLDER = Path(__file__).parents[1]


def source_digest(origin: Origin) -> str:
    """Return the sha256 of all code that a plugin can reach."""
    own = {
        path for each in _rotdistill_closure(origin.distribution) for path in _python_files(each)
    }
    own.update(_imported_files(origin.target.partition(":")[0]))
    return _digest_of({*own, *_core_modules(_imported_by(own))})


def core_digest(*modules: str) -> str:
    """Return the sha256 of modules of the core and of all modules of it that they import.

    Names are relative to the core, such as `forward.layerwise`.
    """
    return _digest_of(_core_modules(f"{CORE_PACKAGE}.{module}" for module in modules))


def package_digest(package: str) -> str:
    """Return the sha256 of an imported package and of all modules of the core that it imports.

    For files that steps share under a key of their own; see `StepOutput.shared`.
    """
    module = importlib.util.find_spec(package)
    folders = list(module.submodule_search_locations or ()) if module else []
    own = {path for folder in folders for path in Path(folder).rglob("*.py")}
    return _digest_of({*own, *_core_modules(_imported_by(own))})


def _digest_of(paths: Iterable[Path]) -> str:
    digests = sorted({_parsed(path).sha256 for path in paths if path.is_file()})
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _rotdistill_closure(name: str) -> list[Distribution]:
    """Return a distribution and those that it requires and that build on rotdistill themselves, the
    core apart."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        candidate = canonicalize_name(waiting.pop())
        if candidate in found or candidate == CORE_DISTRIBUTION:
            continue
        try:
            installed = distribution(candidate)
        except PackageNotFoundError:
            continue  # an optional dependency that is not there
        required = [Requirement(line) for line in installed.requires or ()]
        names = {canonicalize_name(requirement.name) for requirement in required}
        if candidate == canonicalize_name(name) or CORE_DISTRIBUTION in names:
            found[candidate] = installed
            waiting += sorted(names)
    return list(found.values())


def _python_files(installed: Distribution) -> Iterator[Path]:
    """Yield the Python files of a distribution, tests apart.

    One that is installed in place for editing lists no files and says where its folder is.
    """
    for file in installed.files or ():
        if file.suffix == ".py":
            yield Path(str(file.locate()))
    where = json.loads(installed.read_text("direct_url.json") or "{}")
    if where.get("dir_info", {}).get("editable"):
        yield from _without_tests(Path(unquote(where["url"].removeprefix("file://"))))


def _imported_files(name: str) -> Iterator[Path]:
    """Yield the Python files of the package of a plugin's module, tests apart, as it is imported.

    They need not be those that its distribution lists: `PYTHONPATH` may name a working copy, and
    some distributions list none of their files.
    """
    module = importlib.util.find_spec(name)
    if module is None or not module.origin:
        return
    yield Path(module.origin)
    top = name.partition(".")[0]
    package = importlib.util.find_spec(top)
    # A namespace package, which has no file of its own, may be that of many distributions.
    if package and package.origin and package.submodule_search_locations and top != CORE_PACKAGE:
        yield from _without_tests(Path(package.origin).parent)


def _without_tests(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        if not {"tests", ".venv"} & {*path.relative_to(folder).parts}:
            yield path


def _imported_by(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file():
            yield from _parsed(path).imports


def _core_modules(names: Iterable[str]) -> set[Path]:
    """Return the files of the core that these dotted names lead to, directly or not."""
    public = _public_names()
    there = _core_files()
    found: set[Path] = set()
    waiting = set(names)
    followed: set[str] = set()
    while waiting:
        name = waiting.pop()
        followed.add(name)
        path = _core_file(name, public, there)
        if path and path not in found:
            found.add(path)
            waiting |= {*_parsed(path).imports} - followed
    return found


def _core_files() -> dict[str, Path]:
    """Return the files of the core by the dotted name of each module, relative to the core.

    A digest asks for some 200 names: to list the folders once costs less than to look for each.
    """
    files: dict[str, Path] = {}
    for folder, _, names in os.walk(CORE_FOLDER):
        package = os.path.relpath(folder, CORE_FOLDER).replace(os.sep, ".").strip(".")
        for name in names:
            module, dot, ending = name.partition(".")
            if dot and ending == "py":
                dotted = package if module == "__init__" else f"{package}.{module}".strip(".")
                files[dotted] = Path(folder, name)
    return files


def _core_file(name: str, public: Mapping[str, str], there: Mapping[str, Path]) -> Path | None:
    """Return the file of the core that defines a dotted name; None where figures cannot depend on
    it.

    `public` are the names that the core exports lazily, with the dotted name of each; `there` are
    the files of the core.
    """
    package, _, rest = name.partition(".")
    if package != CORE_PACKAGE:
        return None
    if rest in public:  # `from rotdistill_core import Maps`
        return _core_file(public[rest], public, there)
    if any(name == part or name.startswith(f"{part}.") for part in NO_FIGURES):
        return None
    while rest:
        if rest in there:
            return there[rest]
        rest = rest.rpartition(".")[0]
    return None


def _public_names() -> dict[str, str]:
    """Return the names that the core exports lazily, with the dotted name of each."""
    return dict(_parsed(CORE_FOLDER / "__init__.py").typing_imports)


@dataclass(frozen=True)
class _Source:
    """A file's hash, and the dotted names that it imports."""

    sha256: str
    imports: tuple[str, ...]
    """Names that are imported when it runs: of modules, or of things in modules."""
    typing_imports: tuple[tuple[str, str], ...]
    """Local name -> dotted name of what is imported for annotations only."""


def _parsed(path: Path) -> _Source:
    status = path.stat()
    return _parsed_once(path, status.st_mtime_ns, status.st_size)


@cache
def _parsed_once(path: Path, _modified: int, _size: int) -> _Source:
    content = path.read_bytes()
    imports: list[str] = []
    typing_imports: list[tuple[str, str]] = []
    waiting: list[ast.AST] = [ast.parse(content)]
    while waiting:
        node = waiting.pop()
        if _for_annotations(node):
            typing_imports += [
                (alias.asname or alias.name, f"{each.module}.{alias.name}")
                for each in ast.walk(node)
                if isinstance(each, ast.ImportFrom)
                for alias in each.names
            ]
            continue
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            imports += [f"{module}.{alias.name}" for alias in node.names]
        waiting += _statements_in(node)
    return _Source(hashlib.sha256(content).hexdigest(), tuple(imports), tuple(typing_imports))


def _statements_in(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements directly inside a statement. Imports are nowhere else, and most of a
    tree is expressions."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        yield from getattr(node, block, ())


def _for_annotations(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    """Return the absolute name of the module that an import names, for files of the core."""
    if not node.level:
        return node.module or ""
    if not path.is_relative_to(CORE_FOLDER):
        return ""  # inside its own distribution, all of which counts already
    package = path.relative_to(CORE_FOLDER.parent).parent.parts
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, node.module] if node.module else kept)
