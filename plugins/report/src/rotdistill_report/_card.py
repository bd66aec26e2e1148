"""The model card of a checkpoint: sources and licences, steps, results, limits, undo, recipe."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rotdistill_core.characters import visible
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.chat import ChatFormat
from rotdistill_core.data.languages import NO_LANGUAGE
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.plugin.step import is_exact
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import read_bytes, read_text
from rotdistill_report._data import ReportData
from rotdistill_report._templates import template

UNKNOWN = "unknown"
YOUR_PROMPT = "Your system prompt."
"""Stands in an example where each text has a prompt of its own."""
LICENCES_BY_STRICTNESS = (
    r"cc0|unlicense|wtfpl|pddl",
    r"mit|bsd|isc|zlib",
    r"apache|cc-by-\d|cc-by$|odc-by",
    r"lgpl|mpl|epl|cdla|openrail|cc-by-sa",
    r"gpl",
    r"agpl",
    r".*-n[cd](?:-|$)|.*noncommercial",
    r".*",
)
"""Patterns of licences, from free to strict.

The last one takes what no other matches: a vendor's own licence, `other`, an unknown one.
"""


def licence_of(model: Model) -> str:
    """Return the licence that the front matter of a model's card names, or `unknown`."""
    card = model.folder / RunLayout.CARD
    if not card.is_file():
        return UNKNOWN
    front_matter = read_bytes(card).decode(errors="replace").split("---")[1:2]
    pattern = r"^license(?:_name)?:\s*[\"']?([\w.+-]+)"
    found = re.search(pattern, front_matter[0], re.MULTILINE) if front_matter else None
    return found[1].lower() if found else UNKNOWN


def strictest(licences: list[str]) -> str:
    """Return the licence under which something made of all of them can be passed on."""

    def strictness(licence: str) -> int:
        patterns = enumerate(LICENCES_BY_STRICTNESS)
        return next(rank for rank, pattern in patterns if re.match(pattern, licence))

    return max(licences, key=strictness)


def model_card(
    report: ReportData,
    recipe: ResolvedRecipe,
    outcome: RunResult,
    pair: Pair,
    variant: str,
    date: str = "",
) -> str:
    """Return the README.md of a variant's checkpoint.

    Args:
        report: the figures of the run.
        recipe: its recipe.
        outcome: what the run made.
        pair: its models.
        variant: the variant.
        date: the day that chat templates wrote in the run, if they wrote one.
    """
    models = _source_models(pair)
    names = {role: public_name(model.ref) for role, model in models.items()}
    licences = {role: licence_of(model) for role, model in models.items()}
    kinds = {recipe_step.id: _kind(recipe_step) for recipe_step in _edits(recipe, variant)}
    edits = [name for name, kind in kinds.items() if kind in ("fold", "style")]
    samples = recipe.recipe.samples
    texts = _texts(outcome)
    languages = {text["language"] for text in texts if text["split"] == Split.FIT}
    chat = _chat_format(outcome.checkpoints[variant], samples.thinking)
    system = _system_prompt(outcome, texts)
    if samples.bake_prompt:
        system = SystemPrompt("", 0)
    return template("card.md.j2").render(
        report=report,
        variant=variant,
        models=models,
        names=names,
        licences=licences,
        licence=strictest(list(licences.values())),
        kinds=kinds,
        exact=[name for name, kind in kinds.items() if kind == "exact"],
        edits=edits,
        asking=[
            *_prompting(recipe, edits),
            *_asking(chat, pair, names, date, samples.thinking),
        ],
        system=system,
        baked=samples.bake_prompt,
        example=_example(chat, system, samples.answer_tokens),
        languages=sorted(
            code for code in languages if re.fullmatch(r"[a-z]{2,3}", code) and code != NO_LANGUAGE
        ),
    )


def public_name(ref: ModelRef) -> str:
    """Return how a card names a model: without the folders of the machine that it lies on.

    A snapshot in the hub's cache goes by its id, and a folder or file by its own name. What is no
    path (a hub id, `run:...`, `package:...`) stays as the recipe has it.
    """
    path = Path(ref.model).expanduser()
    of_hub = re.search(r"models--(.+?)--(.+?)/snapshots/", f"{path.as_posix()}/")
    if of_hub:
        return f"{of_hub[1]}/{of_hub[2]}"
    is_path = path.exists() or path.is_absolute() or ref.model.startswith(".")
    return path.resolve().name if is_path else ref.model


def _prompting(recipe: ResolvedRecipe, edits: Sequence[str]) -> list[str]:
    """Return with which system prompt to ask a checkpoint, where the run bakes one in."""
    if not recipe.recipe.samples.bake_prompt:
        return []
    sentence = "Read and scored without a system prompt, next to a teacher that reads one."
    if edits:
        sentence = (
            "Ask it without a system prompt: the one of the run is baked in, and the held-out KL "
            "below is that to the teacher that reads it. A conversation begins as the chat "
            "template writes it without a system turn."
        )
    return [sentence]


class SystemPrompt(NamedTuple):
    """The system prompt that the texts of a run were read under."""

    text: str
    """Empty where there is none, or not one for all."""
    others: int
    """How many others rows bring along."""


def _texts(outcome: RunResult) -> list[dict[str, str]]:
    """Return the table of the texts of a run, a mapping for each."""
    path = RunLayout(outcome.folder).texts
    if not path.is_file():
        return []
    lines = read_text(path).split("\n")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _system_prompt(outcome: RunResult, texts: Sequence[Mapping[str, str]]) -> SystemPrompt:
    """Return the system prompt of a run, and how many others its texts have."""
    path = RunLayout(outcome.folder).system_prompt
    text = read_text(path) if path.is_file() else ""
    # Runs of earlier versions have no such column. Plain texts have no prompt.
    hashes = {each["system"] for each in texts if each.get("system") and _in_domain(each)}
    return SystemPrompt(text, len(hashes - {digest(text)}))


def _in_domain(text: Mapping[str, str]) -> bool:
    return not Split(text["split"]).outside_domain


def _example(chat: ChatFormat | None, system: SystemPrompt, tokens: int) -> str:
    """Return Python that asks a checkpoint; `SYSTEM` is its system prompt.

    Args:
        chat: its format; None if only transformers can tell.
        system: its system prompt.
        tokens: the longest answer.
    """
    asked = bool(system.text or system.others)
    if chat and chat.is_ours:
        start = 'SYSTEM + "\\n\\n' if asked else '"'
        prompt = f'tokenizer({start}User: Your question?\\nAssistant:", return_tensors="pt")'
    else:
        own_turn = not (chat and asked) or chat.for_style(system.text or "?", "?").system_turn
        turns = ['{"role": "user", "content": "Your question?"}']
        if asked and own_turn:
            turns.insert(0, '{"role": "system", "content": SYSTEM}')
        elif asked:
            turns = ['{"role": "user", "content": SYSTEM + "\\n\\nYour question?"}']
        switches = [f"{name}={value}" for name, value in (chat.switches if chat else {}).items()]
        options = ["add_generation_prompt=True", "return_dict=True", 'return_tensors="pt"']
        prompt = "tokenizer.apply_chat_template(\n    "
        prompt += f"[{', '.join(turns)}],\n    {', '.join([*options, *switches])},\n)"
    defined = f"SYSTEM = {python_text(system.text or YOUR_PROMPT)}\n" if asked else ""
    return (
        "from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer\n\n"
        f"{defined}"
        'tokenizer, model = Tokenizer.from_pretrained("."), Model.from_pretrained(".")\n'
        f"prompt = {prompt}\n"
        "print(tokenizer.decode(model.generate("
        f"**prompt, max_new_tokens={tokens}, do_sample=False)[0]))"
    )


def python_text(text: str) -> str:
    """Return a text as a Python literal of as many lines, which evaluates to it.

    Characters that are not seen are escapes, so that what is pasted is what is read.
    """
    escaped = text.replace("\\", "\\\\").replace("\r", "\\r")
    escaped = re.sub(r'"(?="|\Z)', r"\"", escaped)  # no three in a row, and none at the end
    return f'"""{visible(escaped)}"""'


def _asking(
    asked: ChatFormat | None, pair: Pair, names: Mapping[str, str], date: str, thinking: bool
) -> list[str]:
    """Return what a user should know of the checkpoint's chat template, a sentence each."""
    if asked is None:  # only transformers can tell
        return []
    sentences = []
    own = _chat_format(pair.student.folder, thinking)
    if own is None or not own.same_texts(asked):
        sentences.append(
            "The chat template and the tokenizer files are those of the teacher, "
            f"{names['teacher']}, in whose format the texts of the run were written; the student "
            f"{'has another one' if own and not own.is_ours else 'has no chat template'}."
        )
    if asked.is_ours:
        sentences.append(
            "The model has no chat template. The texts of the run were written plainly: the system "
            "prompt, a blank line, `User: ` and the question, and on the next line `Assistant:`, "
            "which the answer follows."
        )
    if asked.switches:
        switches = ", ".join(f"`{name}={value}`" for name, value in asked.switches.items())
        sentences.append(
            f"The texts of the run were written with {switches} in the chat template. Ask the "
            "model so."
        )
    if not thinking and asked.opens_thoughts:
        sentences.append(
            "The chat template begins answers inside a thinking block. The texts of the run were "
            "written without thoughts: end the block before the model answers, with `</think>` and "
            "a blank line after the prompt."
        )
    if asked.uses_date and date:
        sentences.append(
            f"The chat template writes the date. The texts of the run have {date}; in another "
            "program they have the day on which the model is asked."
        )
    return sentences


def _chat_format(folder: Path, thinking: bool) -> ChatFormat | None:
    """Return the format of a folder; None if its files do not tell it."""
    try:
        return ChatFormat.read(folder, thinking=thinking)
    except SetupError:
        return None


def _source_models(pair: Pair) -> dict[str, Model]:
    """Return role -> model; a student that is cut from its teacher stands for both."""
    models = {"student": pair.student}
    if not pair.same:
        models["teacher"] = pair.teacher
    if pair.anchor:
        models["anchor"] = pair.anchor
    return models


def _edits(recipe: ResolvedRecipe, variant: str) -> list[RecipeStep]:
    # `round-trip` is no variant of the recipe: the core adds it, with the exact steps alone.
    in_recipe = variant in recipe.recipe.variants
    chain = recipe.chain(variant) if in_recipe else recipe.exact_chain()
    return [recipe_step for recipe_step in chain if recipe_step.stage != "evaluate"]


def _kind(recipe_step: RecipeStep) -> str:
    """Return `exact`, or the stage of a step that is not."""
    return "exact" if is_exact(recipe_step.step) else recipe_step.stage
