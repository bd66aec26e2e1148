"""The module of a verb loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("verb", ["chat", "check", "plan", "runs"])
def test_the_module_of_a_verb_is_light(verb: str) -> None:
    script = (
        f"import rotdistill_commands.{verb}, sys; "
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
