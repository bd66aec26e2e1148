"""What `rotdistill new adapter` makes of architectures that transformers has.

    python benchmarks/new_adapters.py [MODEL_TYPE ...]

Each adapter is written into an empty folder, also where one is installed, and its own test is run
untouched. Prints the table of plugins/scaffold/README.md. No weights are needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rotdistill_scaffold._templates import adapter_files

from rotdistill_core.errors import SetupError

MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "granite",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "exaone4",
    "phi3",
    "glm",
    "glm4",
    "gemma",
    "gemma3",
    "stablelm",
    "starcoder2",
    "cohere",
    "gpt_neox",
    "mixtral",
    "deepseek_v3",
    "diffllama",
    "arcee",
    "bamba",
    "bert",
)


def row(model_type: str) -> str:
    """Return the line of a model type: what the command does, its test, and what it found."""
    try:
        files = adapter_files(model_type)
    except SetupError as error:
        return f"| `{model_type}` | refuses | | {reasons(str(error))} |"
    with tempfile.TemporaryDirectory() as root:
        for name, text in files.items():
            path = Path(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        outcome = "passes" if passes(Path(root) / f"{model_type}-adapter") else "fails"
    [module] = [text for name, text in files.items() if name.count("/") == 1 and ".py" in name]
    return f"| `{model_type}` | writes | {outcome} | {differences(module)} |"


def passes(folder: Path) -> bool:
    """Return whether the tests of a new adapter pass."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    made = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        print(made.stdout, file=sys.stderr)
    return made.returncode == 0


def differences(module: str) -> str:
    """Return the arguments of `rope_decoder` in a module, without the defaults of its config."""
    lines = module.partition("TABLE = ")[2].splitlines()[2:]
    names = [
        line.strip().partition("=")[0]
        for line in lines[: lines.index(")")]
        if line.startswith("    ") and line[4].isalpha()
    ]
    return ", ".join(f"`{name}`" for name in names if name != "defaults") or "as Llama"


def reasons(message: str) -> str:
    """Return the reasons of a refusal, without what all refusals say."""
    return message.partition("as a table: ")[2].partition(". Nothing was written")[0] or message


def main() -> None:
    """Print a line for each model type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", default=MODEL_TYPES)
    print("| model type | `new adapter` | its test | what the table says, or why there is none |")
    print("|---|---|---|---|")
    for model_type in parser.parse_args().model_types:
        print(row(model_type), flush=True)


if __name__ == "__main__":
    main()
