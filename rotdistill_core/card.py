"""The card inside each checkpoint: what it is made of and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotdistill_core.ledger import Blocks
from rotdistill_core.recipe import Loaded


def write_card(loaded: Loaded, variant: str, steps: Mapping[tuple[str, str], Any]) -> Blocks:
    """Return the README.md of a variant."""
    ran = [step for name, step in steps if name == variant]
    lines = [
        f"# {loaded.recipe.name}: {variant}", "",
        f"Made by rotdistill from `{loaded.recipe.student.model}` (student) and `{loaded.recipe.teacher.model}` (teacher).", "",
        f"Steps: {', '.join(ran) or 'none'}. A plain Hugging Face folder: it loads with `AutoModelForCausalLM`.", "",
        "## Recipe", "", "```toml", loaded.text.rstrip(), "```", "",
    ]  # fmt: skip
    return ["\n".join(lines).encode()]
