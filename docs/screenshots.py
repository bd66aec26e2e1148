"""Screenshots of a report for the documents: `make screenshots`.

Carries out recipes/support.toml, or takes its finished run, and lets a browser draw the report
into docs/images/. A browser without a window does it: Chromium or Chrome must be on the PATH, or
be named by the environment variable BROWSER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import rotdistill_core

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH = 1100
"""Pixels, of a page and of its picture."""
FIRST_SCREEN = 900
"""Pixels of height: what a reader sees before he scrolls."""
SECONDS = 120
"""Time that the browser has for one picture."""


def browser() -> str:
    """Return the path of a browser.

    Raises:
        SystemExit: there is none.
    """
    names = (os.environ.get("BROWSER", ""), *BROWSERS)
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    sys.exit(
        f"screenshots: none of {', '.join(BROWSERS)} is on the PATH. Install one, or put the path "
        "of such a browser into the environment variable BROWSER."
    )


def draw(page: Path, picture: Path, height: int) -> None:
    """Draw the top of a page, `height` pixels, into a PNG file."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(),
            "--headless",
            "--no-sandbox",  # the page is our own, and has no scripts
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{height}",
            f"--screenshot={picture}",
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def main() -> None:
    """Draw the first screen of the report."""
    browser()
    os.chdir(ROOT)  # what the page shows of paths is then not of this machine
    outcome = rotdistill_core.run("recipes/support.toml")
    IMAGES.mkdir(exist_ok=True)
    draw(outcome.folder / "report.html", IMAGES / "report.png", FIRST_SCREEN)


if __name__ == "__main__":
    main()
