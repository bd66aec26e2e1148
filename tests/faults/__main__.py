"""Carry out the fault matrix.

    python -m tests.faults [--sample N] [--only CLASS] [--workers N] [--json FILE] [--write]

Prints one table: class, tried, right, wrong. `--write` puts it into docs/reliability.md. The cases
are the same each time. The exit code is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.matrix import all_cases, carry_out, sample, show, table
from tests.faults.workshop import Workshop, warm_up_in

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/reliability.md"
TABLE = re.compile(r"(?s)(<!-- faults -->\n).*(<!-- end of faults -->)")
SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    """Carry out the cases that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="about N cases, of every class")
    parser.add_argument("--only", action="append", metavar="CLASS", help="classes that hold this")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="cases at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    parser.add_argument("--list", action="store_true", help="list the cases and carry out none")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    wanted = parser.parse_args()
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=place) as name:
        workshop = Workshop(Path(name))
        warm_up_in(workshop.folder)
        cases = all_cases(workshop)
        if wanted.only:
            cases = [each for each in cases if any(part in each.kind for part in wanted.only)]
        if wanted.sample:
            cases = sample(cases, wanted.sample)
        if wanted.list:
            print("\n".join(f"{each.kind}: {each.name}" for each in cases))
            return 0
        started = time.monotonic()
        rows = carry_out(workshop, cases, wanted.workers, show)
        seconds = time.monotonic() - started
    order = list(dict.fromkeys(each.kind for each in cases))
    rows.sort(key=lambda each: (order.index(each.kind) if each.kind in order else -1, each.name))
    if wanted.json:
        document = [each.as_dict() for each in rows]
        wanted.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(table(rows))
    print(f"{len(rows)} rows in {seconds / 60:.1f} minutes", file=sys.stderr)
    if wanted.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        written = TABLE.sub(lambda found: f"{found[1]}{table(rows)}\n{found[2]}", text)
        DOCUMENT.write_text(written, encoding="utf-8")
    return int(any(each.wrong for each in rows))


if __name__ == "__main__":
    sys.exit(main())
