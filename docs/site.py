"""What mkdocs is told of the repository: the hook of `mkdocs.yml`.

The site shows the documents where they lie: README.md, docs/, recipes/, plugins/ and others keep
their places, so a relative link means the same on the site as in the repository. Files that a
document links to, such as recipes, are part of the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"(?<!\\)\]\(<?([^)\s>#]+)")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")


def anchor(title: str, separator: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def linked(page: Path) -> Iterator[Path]:
    """Yield the files that a document links to."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if not SCHEME.match(target):
            yield (page.parent / unquote(target)).resolve()


def pages(nav: Any) -> Iterator[Path]:
    """Yield the documents of a nav, a part of it, or one entry."""
    if isinstance(nav, str):
        yield ROOT / nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(part)


def on_config(config: MkDocsConfig) -> None:
    """Give headings the anchors that the documents' links use."""
    config.mdx_configs["toc"]["slugify"] = anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the theme, the documents of the nav, and what these link to.

    A document that is linked to but not in the nav becomes a file to download; `mkdocs` warns of
    it, which `make docs` takes for an error.
    """
    documents = list(pages(config.nav))
    others = {path for page in documents for path in linked(page) if path.is_file()}
    kept = [file for file in files if not file.src_uri.endswith(".py") and _of_theme(file)]
    for path in sorted({*documents, *others}):
        uri = path.relative_to(ROOT).as_posix()
        kept.append(File.generated(config, uri, abs_src_path=str(path)))
    return Files(kept)


def _of_theme(file: File) -> bool:
    return not Path(file.abs_src_path or ROOT).is_relative_to(ROOT / "docs")
