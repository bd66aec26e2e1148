"""Records that were forged, with marks that fit: named by `check` and made again by `run`.

Who can write lines can write any score, so not every forgery is seen. None ends a verb with an
error that nobody expects, and none leads out of the folder of runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.store.chain import chained_lines
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import command_line

Content = dict[str, Any]


def forge(run: Path, which: str, change: Callable[[Content], object]) -> None:
    """Change the first record of a kind, or of a step, and chain all lines anew."""
    ledger = run / RunLayout.LEDGER
    contents = []
    for line in ledger.read_bytes().splitlines():
        values = json.loads(line)
        contents.append({k: v for k, v in values.items() if k not in ("schema", "after", "mark")})
    change(next(c for c in contents if which in (c["kind"], c.get("id"))))
    ledger.write_bytes(chained_lines(contents, []))


def each_map(**changes: object) -> Callable[[Content], object]:
    """Return a change of what is said of each stored map; None takes a key out."""

    def change(content: Content) -> None:
        for about in content["result"]["spaces"].values():
            about.update(changes)
            for key in [key for key, value in changes.items() if value is None]:
                del about[key]

    return change


def each_tensor(file: str | None = None, name: str | None = None) -> Callable[[Content], object]:
    """Return a change of where each tensor is said to lie."""

    def change(content: Content) -> None:
        tensors = content["result"]["tensors"]
        for key, (old_file, old_name) in tensors.items():
            tensors[key] = [file or old_file, name or old_name]

    return change


CERTIFICATE = {
    "logits_float64": 0.0,
    "logits_float32": 0.0,
    "kl_float32": 0.0,
    "unfold": 0.0,
    "texts": 1,
}
FORGED: dict[str, tuple[str, Callable[[Content], object]]] = {
    "a row that is too short": ("fidelity", lambda c: c["result"].update(rows=[[1]])),
    "a row of words": ("fidelity", lambda c: c["result"].update(rows=[["full", "kl", "x"]])),
    "a map without a file": ("rotate", each_map(file=None)),
    "a map of no kind": ("rotate", each_map(kind="Wish")),
    "a map with a field more": ("rotate", each_map(wish=1)),
    "a map elsewhere": ("rotate", each_map(file="../../../../etc/passwd")),
    "a document that is gone": ("rotate", lambda c: c["result"].update(cards={"0": "a/b"})),
    "tensors without names": ("fold", each_tensor(name="nothing")),
    "tensors without a file": ("fold", each_tensor(file="nowhere")),
    "no tensors": ("fold", lambda c: c["result"].update(tensors={})),
    "no way back": ("fold", lambda c: c["result"].update(undo=None)),
    "a proof of nothing": ("fidelity", lambda c: c["report"].update(certificate=CERTIFICATE)),
    "no files": ("fold", lambda c: c.pop("files")),
    "another start": ("fold", lambda c: c.update(before="x")),
    "a step after itself": ("fold", lambda c: c.update(before=c["key"])),
    "another id": ("chop", lambda c: c.update(id="cut")),
    "a path out of the runs": ("file", lambda c: c.update(path="../../../../etc/passwd")),
    "a path from the root": ("file", lambda c: c.update(path="/etc/passwd")),
    "a path that no file has": ("file", lambda c: c.update(path="a\0b")),
    "a name that is too long": ("file", lambda c: c.update(path="a" * 300)),
    "a checkpoint elsewhere": ("checkpoint", lambda c: c.update(folder="../..")),
    "a checkpoint of nothing": ("checkpoint", lambda c: c.update(files=[])),
    "another variant": ("checkpoint", lambda c: c.update(variant="ghost")),
    "another model": ("start", lambda c: c.update(models={"ghost": "x"})),
}


@pytest.mark.parametrize(("which", "change"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_record_is_named_and_made_again(
    run: Path, which: str, change: Callable[[Content], object]
) -> None:
    forge(run, which, change)
    code, out, err = command_line("check", str(run))
    assert code == 4, out + err
    for verb in ("show", "runs"):
        assert command_line(verb, *([run.name] if verb == "show" else []))[0] in (0, 4)
    code, out, err = command_line("run", "trial.toml", "--no-plan")
    assert code == 0, out + err
    code, out, err = command_line("check", str(run))
    assert code == 0, out + err
