"""The plan of a run on this machine: every result in order, its cost, and whether it exists."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import attrgetter
from pathlib import Path

from rotdistill_core.checkpoint.models import Pair, require_vocabulary
from rotdistill_core.checkpoint.open import require_in_current_folder, without_downloads
from rotdistill_core.data.conversations import Conversation, facts_digest
from rotdistill_core.data.lessons import LessonTexts, checked_lesson_texts, lesson_notes
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Split
from rotdistill_core.data.summary import text_notes, texts_in_words
from rotdistill_core.errors import ModelNotAvailable, RecipeError, SetupError
from rotdistill_core.execution.keys import keyed_steps, run_inputs
from rotdistill_core.planning.answering import Asking, HasOutlook, Questions
from rotdistill_core.planning.chats import (
    DATE,
    Chats,
    cut_notes,
    date_of_run,
    ending_notes,
    planned_chats,
    planned_date,
    position_limit,
    require_end_token,
    require_room,
    require_room_to_fit,
)
from rotdistill_core.planning.cost import (
    Cost,
    CostContext,
    baseline_memory,
    checkpoint_cost,
    comparison_cost,
    context_after,
    lessons_cost,
    models_cost,
    states_cost,
    step_cost,
    teacher_answers_cost,
)
from rotdistill_core.planning.machine import BUSY, HOST, SHARED, Machine, load, this_machine
from rotdistill_core.planning.models import ModelInfo, model_info, needs_source
from rotdistill_core.planning.requirements import require_captured_states, required_results
from rotdistill_core.planning.reuse import (
    FRESH,
    UNKNOWN,
    ReuseIndex,
    StepStatus,
    last_edit,
    step_statuses,
)
from rotdistill_core.planning.shape import DTYPE_BYTES
from rotdistill_core.planning.text_counts import (
    COUNTED_TEXTS,
    TextCounts,
    count_texts,
    lengths_above,
    token_counter,
    upper_bounds,
)
from rotdistill_core.planning.times import added_seconds, seconds_of, time_in_words
from rotdistill_core.plugin.step import check_models
from rotdistill_core.recipe.document import ModelRef, Recipe, StudentRef
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.ledger import ArtifactStore

ESTIMATED_FROM_STAGE = "estimated from its stage"
"""Note of a line whose step does not state its own cost."""
MODELS = "models"
"""Id of the line of what is done before the first step: models are compared with transformers."""
CHECKPOINTS = "checkpoints"
"""Id of the lines of saved variants."""


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """One result of a run: of a step, the models' comparison, the teacher's answers, a checkpoint.

    The sizes and the time are those of making it, and 0 if it is reused. Field names are the keys
    that `rotdistill plan --json` prints.
    """

    id: str
    use: str = ""
    """Name of the step's method, or of the engine that answers; empty for a checkpoint."""
    stage: str = ""
    """Stage of the step; empty if the result is not of a step."""
    plugin: str = ""
    """Distribution of the step or engine, and its version."""
    needs: list[str] = field(default_factory=list)
    """Results of earlier steps that it takes: captured states, maps."""
    variants: list[str] = field(default_factory=list)
    reused: bool
    why: str
    """The run that has the result, or the reason why it has to be made."""
    note: str = ""
    """How the cost was estimated, if the step does not state it."""
    ram_bytes: int = 0
    """Peak memory on the host; without a GPU that of the models too."""
    gpu_bytes: int = 0
    """Peak memory on one GPU, the fullest one."""
    by_gpu: dict[str, int] = field(default_factory=dict)
    """GPU, such as `cuda:1` -> peak memory there."""
    disk_bytes: int = 0
    less_disk: str = ""
    """Options with which the step writes less; empty if there are none."""
    read_bytes: int = 0
    traffic_bytes: int = 0
    """Bytes copied between host and GPU; 0 without a GPU."""
    seconds: float | None = 0.0
    """As measured when it was made before, or estimated on an otherwise idle machine; None if it is
    not known how fast the machine is."""
    reused_seconds: float | None = 0.0
    """What making a reused result took, or would take; 0 for one that has to be made."""
    prompts: int = 0
    """Prompts that the engine answers."""
    answer_tokens: int = 0
    """Largest number of tokens of these answers together."""
    missing: list[str] = field(default_factory=list)
    """Names of prompts that the engine cannot answer."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Peak memory of all results that have to be made, and the sum of everything else."""

    ram_bytes: int
    gpu_bytes: int
    by_gpu: dict[str, int]
    """GPU, such as `cuda:1` -> peak memory there."""
    disk_bytes: int
    read_bytes: int
    traffic_bytes: int
    seconds: float | None
    """Until the last result is made, libraries loaded; None if it is not known."""
    reused_seconds: float | None
    """What making the reused results took, or would take."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run."""

    folder: Path
    lines: list[PlanLine]
    models: dict[str, ModelInfo]
    """Role (teacher, student, anchor) -> its figures."""
    texts: TextCounts
    machine: Machine
    baseline_memory: int
    """Memory that every step needs on top of its own, bytes."""
    costs: list[Cost] = field(default_factory=list)
    """Cost of each line, as its step states it; nothing where the result is reused."""
    counted: str = ""
    """How many texts there are of each file and split, in words."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of texts and how they are written, a sentence each."""

    @property
    def todo(self) -> list[PlanLine]:
        """The results that have to be made."""
        return [line for line in self.lines if not line.reused]

    @property
    def totals(self) -> Totals:
        """Resources that the results to be made need together."""
        todo = self.todo
        return Totals(
            ram_bytes=max((line.ram_bytes for line in todo), default=0) + self.baseline_memory,
            gpu_bytes=max((line.gpu_bytes for line in todo), default=0),
            by_gpu={
                gpu: max(line.by_gpu.get(gpu, 0) for line in todo)
                for gpu in sorted({gpu for line in todo for gpu in line.by_gpu})
            },
            disk_bytes=sum(line.disk_bytes for line in todo),
            read_bytes=sum(line.read_bytes for line in todo),
            traffic_bytes=sum(line.traffic_bytes for line in todo),
            seconds=added_seconds([self.loading, *(line.seconds for line in todo)]),
            reused_seconds=added_seconds(line.reused_seconds for line in self.lines),
        )

    @property
    def loading(self) -> float | None:
        """Seconds until libraries are loaded; 0 if there is nothing to make."""
        profile = self.machine.profile
        return (profile.loading if profile else None) if self.todo else 0.0

    @property
    def time(self) -> str:
        """How long the run takes, and what reused results save, in words."""
        totals = self.totals
        if self.todo and totals.seconds is None:
            return "how long it takes is not known"
        takes = f"takes {time_in_words(totals.seconds)}"
        if not totals.reused_seconds:
            return takes
        return f"{takes}; what is reused took {time_in_words(totals.reused_seconds)}"

    @property
    def time_notes(self) -> list[str]:
        """What the user should know of the times, a sentence each."""
        profile = self.machine.profile
        if not self.todo:
            return []
        if profile is None:
            return [
                "times: this machine was not measured, so they are not known; see --recalibrate."
            ]
        notes = []
        if any(line.gpu_bytes for line in self.todo) and not profile.gpu_measured:
            notes.append("times: the speed of the GPU was assumed, not measured.")
        if profile.in_use > SHARED:
            notes.append(
                f"times: other programs used {profile.in_use:.0%} of the processors when the speed "
                "of this machine was measured, so it may be faster; --recalibrate measures again."
            )
        busy = load()
        if busy > BUSY:
            notes.append(self._busy_note(busy))
        return notes

    def _busy_note(self, busy: float) -> str:
        """Return how long the run takes beside other programs.

        Args:
            busy: other programs for each core that want to compute.
        """
        seconds = self.totals.seconds
        now = f"Other programs compute now, {busy:.1f} for each core"
        if seconds is None or any(line.gpu_bytes for line in self.todo):
            return f"times: are those of an idle machine. {now}, so the run takes longer."
        # Of `busy` programs and the run itself, each gets the same share of a core.
        return (
            f"times: are those of an idle machine, {time_in_words(seconds)}. {now}: beside them "
            f"the run takes {time_in_words((1 + busy) * seconds)}."
        )

    @property
    def shortfalls(self) -> list[str]:
        """A sentence for each resource that this machine has too little of."""
        todo, totals, machine = self.todo, self.totals, self.machine
        if not todo:
            return []
        shortfalls = []
        if totals.ram_bytes > machine.ram:
            worst = max(todo, key=attrgetter("ram_bytes"))
            shortfalls.append(
                f'"{worst.id}" needs about {format_bytes(totals.ram_bytes)} of memory; '
                f"{format_bytes(machine.ram)} are free"
            )
        shortfalls += self._gpu_shortfalls()
        if machine.disk is not None and totals.disk_bytes > machine.disk:
            worst = max(todo, key=attrgetter("disk_bytes"))
            less = f", which writes less with {worst.less_disk}" if worst.less_disk else ""
            shortfalls.append(
                f"the run writes about {format_bytes(totals.disk_bytes)}, most of it for "
                f'"{worst.id}"{less}; {format_bytes(machine.disk)} are free on the disk'
            )
        return shortfalls

    def _gpu_shortfalls(self) -> Iterator[str]:
        """Yield a sentence for each GPU that is too small, or not there."""
        for gpu, size in self.totals.by_gpu.items():
            worst = next(line.id for line in self.todo if line.by_gpu.get(gpu) == size)
            there = self.machine.gpu_memory(gpu)
            if lacks := self.machine.lacks(gpu):
                yield (
                    f'"{worst}" computes on {gpu}, but {lacks}; write device = "auto" or "cpu", '
                    "as --set teacher.device=auto does, or plan for another machine with --gpu"
                )
            elif size > there:
                yield (
                    f'"{worst}" needs about {format_bytes(size)} of memory on {gpu}, '
                    f"which has {format_bytes(there)}"
                )

    @property
    def summary(self) -> str:
        """The reused results, and the needs of the others, in one line."""
        todo, totals, machine = self.todo, self.totals, self.machine
        memory = "nothing to make"
        if todo:
            needed = format_bytes(totals.ram_bytes)
            memory = f"memory about {needed}, {format_bytes(machine.ram)} are free"
        reused, results = len(self.lines) - len(todo), len(self.lines)
        missing = sum(len(line.missing) for line in todo)
        lacks = f"; the engine lacks {missing} answers" if missing else ""
        return (
            f"plan: {reused} of {results} results are there; {memory}; "
            f"disk {format_bytes(totals.disk_bytes)}{free_disk(machine)}; "
            f"{self.time}{lacks}"
        )

    def require_resources(self, recipe: Path) -> None:
        """Check that the machine is large enough.

        Args:
            recipe: path of the recipe, for the message.

        Raises:
            SetupError: it is too small.
        """
        if self.shortfalls:
            shortfalls = "; ".join(self.shortfalls)
            raise SetupError(f"{recipe}: does not fit here: {shortfalls}. Nothing was loaded.")


def build_plan(
    loaded: ResolvedRecipe,
    root: Path,
    machine: Machine,
    fresh: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return the plan of a recipe.

    A model that only a step names is downloaded, unless that is forbidden (`without_downloads`).

    Args:
        loaded: the recipe.
        root: the folder of runs.
        machine: the resources that the run may use.
        fresh: reuse nothing.
        log: receives lines for the user.

    Raises:
        ModelNotAvailable: a model is not here, nor a config that says how large it is.
        RotdistillError: texts of the recipe are missing, or its steps do not fit the models.
    """
    recipe = loaded.recipe
    read: list[str] = []
    conversations, style = read_conversations(recipe.samples, loaded.path.parent, read.append)
    lesson_texts = checked_lesson_texts(recipe, loaded.path.parent, conversations)
    models = _models(loaded, log)
    _let_steps_check(loaded, models)
    start = _start_context(recipe, models, conversations, style, machine)
    folder = loaded.folder(root)
    index = ReuseIndex(ArtifactStore(root, log).ledgers(), folder.name)
    loaded.engine.check()
    inputs = _inputs(loaded, models, conversations, style, lesson_texts)
    day = date_of_run(recipe.samples, inputs, index.starts, fresh)
    chats, notes = _chats(recipe, models, conversations, style, day)
    teacher = models["teacher"].folder
    if inputs and teacher and (date := planned_date(teacher, chats, day)):
        inputs[DATE] = date
    start_key = index.start_key(inputs)
    save_dtype = _save_dtype(recipe.student, models["student"])
    keyed = keyed_steps(loaded, start_key, save_dtype, facts_digest(conversations))
    builder = _LineBuilder(
        recipe=loaded,
        run=folder.name,
        start=start,
        fresh=fresh,
        machine=machine,
        teacher_device=machine.device_of(recipe.teacher.device),
        student_device=machine.device_of(recipe.student.device),
        index=index,
        start_key=start_key,
        save_dtype=save_dtype,
        asking=Asking(
            recipe=recipe,
            conversations=conversations,
            style=style,
            lesson_texts=lesson_texts,
            chats=chats,
            teacher=teacher,
            context=start,
        ),
        statuses=step_statuses(keyed, index, index.changed_inputs(inputs), fresh),
    )
    return Plan(
        folder=folder,
        lines=[
            *builder.model_lines(),
            *builder.answer_lines(),
            *builder.step_lines(),
            *builder.checkpoint_lines(),
        ],
        models=models,
        texts=start.texts,
        machine=machine,
        baseline_memory=round(baseline_memory(start)),
        costs=builder.costs,
        counted=texts_in_words(conversations, recipe.samples, start.texts.lessons),
        notes=[
            *read,
            *text_notes(conversations, recipe.samples, recipe.teacher.model, loaded.judged),
            *_counting_notes(start.texts),
            *notes,
            *lesson_notes(recipe, conversations, lesson_texts),
        ],
    )


def _counting_notes(texts: TextCounts) -> list[str]:
    """Return that some of many texts were counted, if that is so."""
    if not texts.estimated:
        return []
    return [
        f"texts: of splits with more than {COUNTED_TEXTS} texts some are counted token by token; "
        "the tokens of the others follow from their characters, to a percent or so."
    ]


@without_downloads()
def check_against_models(
    loaded: ResolvedRecipe, conversations: Sequence[Conversation], style: str
) -> list[str]:
    """Check a recipe against the folders and configs of its models, as a plan does.

    Nothing is unpacked or downloaded: of a recipe with a model that would be, the other models are
    looked for, and no more.

    Args:
        loaded: the recipe.
        conversations: its texts.
        style: its system prompt.

    Returns:
        A sentence for each model that was not looked at.

    Raises:
        RotdistillError: a model is missing or torn, or a step does not fit the models.
    """
    recipe = loaded.recipe
    unseen = []
    for ref in filter(None, (recipe.teacher, recipe.student, recipe.anchor)):
        require_in_current_folder(ref.model, loaded.path.parent)
        try:
            if needs_source(ref):
                raise ModelNotAvailable(ref.model)
            model_info(ref, _texts_folder(loaded), lambda _: None)
        except ModelNotAvailable:
            unseen.append(
                f"{ref.model}: was not looked at, since that would unpack or download it; "
                "`rotdistill plan` says whether it fits the recipe."
            )
    if unseen:
        return list(dict.fromkeys(unseen))
    models = _models(loaded, lambda _: None)
    try:
        _let_steps_check(loaded, models)
    except ModelNotAvailable as error:
        return [
            f"{error.model}, which a step names: was not looked at, since that would download it."
        ]
    machine = this_machine(Path())
    start = _start_context(recipe, models, conversations, style, machine)
    for chain in loaded.chains(narrow=False).values():
        context = start
        for recipe_step in chain:
            step_cost(recipe_step.step, context)
            context = _context_after(context, recipe_step)
    return []


def device_warnings(recipe: Recipe, machine: Machine) -> list[str]:
    """Return a sentence for each model whose GPU is not here.

    That is no mistake: a recipe may be checked on a machine that does not carry it out.
    """
    refs = {"teacher": recipe.teacher, "student": recipe.student, "anchor": recipe.anchor}
    return [
        f'warning: {role}.device = "{ref.device}": {lacks}, so `run` and `plan` refuse the recipe '
        'here. Write "auto" or "cpu", unless it is for another machine.'
        for role, ref in refs.items()
        if ref and (lacks := machine.lacks(machine.device_of(ref.device)))
    ]


def _texts_folder(loaded: ResolvedRecipe) -> Path:
    return (loaded.path.parent / loaded.recipe.samples.index).parent


def _models(loaded: ResolvedRecipe, log: Callable[[str], None]) -> dict[str, ModelInfo]:
    recipe = loaded.recipe
    refs = {"teacher": recipe.teacher, "student": recipe.student, "anchor": recipe.anchor}
    for role, ref in refs.items():
        if not ref:
            continue
        require_in_current_folder(ref.model, loaded.path.parent)
        # Of Apple's GPU the system tells; a plan asks no torch. Other GPUs are counted later.
        if ref.device == "mps" and sys.platform != "darwin":
            raise SetupError(
                f'{role}.device = "mps": this machine has no Apple GPU; write "cpu" or "auto".'
            )
    texts_folder = _texts_folder(loaded)
    found = {role: model_info(ref, texts_folder, log) for role, ref in refs.items() if ref}
    for role in ("teacher", "student"):  # an anchor reads no text
        if model := found[role].model:
            require_vocabulary(model.folder)
    return found


def _let_steps_check(loaded: ResolvedRecipe, models: Mapping[str, ModelInfo]) -> None:
    """Let steps refuse the models, where those are here."""
    teacher, student = models["teacher"].model, models["student"].model
    if teacher and student:
        for recipe_step in loaded.steps:
            check_models(recipe_step.step, Pair(teacher, student))


def _start_context(
    recipe: Recipe,
    models: Mapping[str, ModelInfo],
    conversations: Sequence[Conversation],
    style: str,
    machine: Machine,
) -> CostContext:
    """Return the models and texts as they are before the first step."""
    teacher, student = models["teacher"], models["student"]
    count = token_counter(student.folder, student.shape.vocab)
    return CostContext(
        teacher=teacher.shape,
        student=student.shape,
        texts=count_texts(
            conversations,
            style,
            recipe.samples,
            count,
            recipe.lessons,
            COUNTED_TEXTS if count.takes_every_text else None,
        ),
        teacher_bytes=_compute_bytes(recipe.teacher, teacher, machine),
        student_bytes=_compute_bytes(recipe.student, student, machine),
        same=recipe.teacher.model == recipe.student.model,
        anchor=models["anchor"].shape if "anchor" in models else None,
    )


def _compute_bytes(ref: ModelRef, info: ModelInfo, machine: Machine) -> int:
    """Return the bytes of a number while the model computes; see `Model.dtype`."""
    if ref.dtype != "auto":
        return DTYPE_BYTES[ref.dtype]
    # Other devices, such as Apple's, have the host's memory, but the checkpoint's dtype.
    on_cpu = ref.device in ("auto", "cpu") and machine.device_of(ref.device) == HOST
    return DTYPE_BYTES["float32" if on_cpu else info.shape.stored]


def _save_dtype(ref: StudentRef, info: ModelInfo) -> str:
    """Return the name of the dtype of checkpoints."""
    return info.shape.stored if ref.save_dtype == "auto" else ref.save_dtype


def _chats(
    recipe: Recipe,
    models: Mapping[str, ModelInfo],
    conversations: Sequence[Conversation],
    style: str,
    date: str,
) -> tuple[Chats | None, list[str]]:
    """Return how conversations will be written, after trying all prompts, and notes on them.

    There are none where the files of a model are not here.

    Raises:
        SetupError: a model has no template, its template cannot write the texts, or its tokens are
            none of the model.
        RecipeError: a held-out question leaves no room for its answer.
    """
    teacher, student = models["teacher"].model, models["student"].model
    if not (teacher and student):
        return None, []
    folders = (teacher.folder, student.folder)
    settings = recipe.samples
    planned = planned_chats(
        folders, style, conversations, date, settings.thinking, settings.bake_prompt
    )
    if planned is None:
        return None, []
    chats, prompts = planned
    notes = [*chats.notes(), *ending_notes(chats, teacher)]
    asked = [question for question in conversations if not question.split.outside_domain]
    sides = {"teacher": chats.teacher, "student": chats.student}
    limits = [position_limit(info.shape.config) for info in models.values()]
    most, answer_tokens = settings.max_tokens, settings.answer_tokens
    shortest = min([most, *filter(None, limits)])
    # Loading a tokenizer takes most of a small plan's time: one that both share is loaded once.
    for chat in {chat.source: chat for chat in sides.values()}.values():
        shapes = [models[role].shape for role, own in sides.items() if own.source == chat.source]
        vocabulary = min(shape.vocab for shape in shapes)
        require_end_token(chat, vocabulary)
        count = token_counter(Path(chat.source), vocabulary)
        texts = prompts[chat.source]
        bounds = upper_bounds(texts, count)
        require_room_to_fit(asked, lengths_above(texts, bounds, count, shortest - 1), shortest)
        heldout = {q.id: texts[q.id] for q in asked if q.split == Split.HELDOUT}
        answers = upper_bounds({q.id: q.answer for q in asked if q.answer}, count)
        for shape in {position_limit(shape.config): shape for shape in shapes}.values():
            limit = position_limit(shape.config) or sys.maxsize
            long = lengths_above(heldout, bounds, count, limit - answer_tokens)
            require_room(long, answer_tokens, shape.config, chat.source)
            fitted = (
                count(texts[q.id]) + count(q.answer)
                for q in asked
                if q.answer and bounds[q.id] + answers[q.id] > limit
            )
            notes += cut_notes(fitted, most, shape.config)
    return chats, list(dict.fromkeys(notes))


def _inputs(
    loaded: ResolvedRecipe,
    models: Mapping[str, ModelInfo],
    conversations: Sequence[Conversation],
    style: str,
    lesson_texts: LessonTexts,
) -> dict[str, str] | None:
    """Return the hashes of the run's inputs; None if the files of a model are not here."""
    opened = {role: info.model for role, info in models.items() if info.model}
    if len(opened) < len(models):
        return None
    pair = Pair(opened["teacher"], opened["student"], opened.get("anchor"))
    engine = loaded.engine.key()
    return run_inputs(loaded.recipe, pair, conversations, style, engine, lesson_texts=lesson_texts)


@dataclass(frozen=True, kw_only=True)
class _LineBuilder:
    """Everything that the lines of a plan are made from."""

    recipe: ResolvedRecipe
    run: str
    """Name of the run."""
    start: CostContext
    """The models and texts before the first step."""
    fresh: bool
    """Whether nothing is reused."""
    machine: Machine
    teacher_device: str
    """Where the teacher computes: the host, or a GPU such as `cuda:0`."""
    student_device: str
    index: ReuseIndex
    start_key: str
    save_dtype: str
    asking: Asking
    """What the engine is asked."""
    statuses: list[StepStatus]
    costs: list[Cost] = field(default_factory=list)
    """Cost of each line that was made, in their order; none of what is reused."""

    def model_lines(self) -> Iterator[PlanLine]:
        """Yield the line of what is done with the models before the first step."""
        why = self._why("compared with transformers before anything is made")
        line = PlanLine(id=MODELS, reused=self._started_before, why=why)
        yield self._with_cost(line, models_cost(self.start))

    @property
    def _started_before(self) -> bool:
        """Whether a run began from the same models and texts, and is not to be made anew."""
        return self.start_key != UNKNOWN and not self.fresh

    def _why(self, otherwise: str) -> str:
        """Return why what comes before the first step is reused or made.

        Args:
            otherwise: why it is made if no run began from the same models and texts.
        """
        if self.start_key == UNKNOWN:
            return otherwise
        return FRESH if self.fresh else "the same models and texts were run before"

    def answer_lines(self) -> Iterator[PlanLine]:
        """Yield the lines of what is written in the teacher's name: its answers, and lessons.

        Raises:
            RotdistillError: the engine cannot work.
        """
        why = self._why("not made before from these models and texts")
        texts = self.start.texts
        engine = self.recipe.engine
        line = PlanLine(
            id="teacher's answers",
            use=engine.engine.use,
            plugin=engine.origin.release,
            reused=self._started_before,
            why=why,
        )
        if texts.questions_asked:
            yield self._answered(line, self.asking.answers(), teacher_answers_cost(self.start))
        if texts.lessons:
            lessons = replace(line, id=f"{texts.lessons} lessons")
            yield self._answered(lessons, self.asking.lessons(), lessons_cost(self.start))

    def _answered(self, line: PlanLine, questions: Questions, here: Cost) -> PlanLine:
        """Return a line with what its answers cost.

        Args:
            line: the line.
            questions: what is asked.
            here: the cost if the teacher answers in this process.
        """
        line = replace(line, prompts=questions.count, answer_tokens=questions.tokens)
        engine = self.recipe.engine
        if line.reused or not isinstance(engine.engine, HasOutlook):
            return self._with_cost(line, here)
        outlook = engine.engine.outlook(self.start, questions, engine.folder)
        line = replace(line, note=outlook.note, missing=list(outlook.missing))
        return self._with_cost(line, outlook.cost)

    def step_lines(self) -> Iterator[PlanLine]:
        """Yield a line for each result of a step.

        Raises:
            RecipeError: a step takes captured states, and no step before it captures any; or its
                options do not fit the student.
        """
        captures = [step.id for step in self.recipe.steps if step.stage == "capture"]
        counted: set[Hashable] = set()
        for status in self.statuses:
            recipe_step, step = status.recipe_step, status.recipe_step.step
            require_captured_states(
                recipe_step,
                captured=any(earlier.stage == "capture" for earlier in status.earlier),
                variants=status.variants,
                captures=captures,
            )
            context = self._context_after(status.earlier)
            cost = step_cost(step, context)
            line = PlanLine(
                id=recipe_step.id,
                use=step.use,
                stage=recipe_step.stage,
                plugin=recipe_step.origin.release,
                needs=required_results(recipe_step),
                variants=status.variants,
                reused=status.existing is not None,
                why=status.existing.run if status.existing else status.reason,
                note="" if states_cost(step) else ESTIMATED_FROM_STAGE,
            )
            yield self._with_cost(
                line,
                _own_files(cost, counted),
                status.measured_seconds,
                beside=self._comparison_after(recipe_step, context),
            )

    def _comparison_after(self, recipe_step: RecipeStep, before: CostContext) -> Cost:
        """Return the cost of comparing a model that a step has cut with transformers."""
        after = _context_after(before, recipe_step).student
        adapter = after.adapter
        sizes = adapter.sizes(after.config), adapter.sizes(before.student.config)
        if after.depth == before.student.depth and sizes[0] == sizes[1]:
            return Cost()
        return comparison_cost(after, before.texts).work_only()

    def checkpoint_lines(self) -> Iterator[PlanLine]:
        """Yield a line for the checkpoint of each variant.

        Raises:
            RecipeError: the options of a step do not fit the student.
        """
        variants = [variant for status in self.statuses for variant in status.variants]
        for variant in dict.fromkeys([*self.recipe.recipe.variants, *variants]):
            edit = last_edit(self.statuses, variant)
            steps = (*edit.earlier, edit.recipe_step) if edit else ()
            state_key = edit.key if edit else self.start_key
            exists = self.index.has_checkpoint(self.run, variant, state_key, self.save_dtype)
            why = "these steps have no checkpoint yet"
            if exists:
                why = FRESH if self.fresh else "in the run's folder"
            line = PlanLine(
                id=CHECKPOINTS,
                variants=[variant],
                reused=exists and not self.fresh,
                why=why,
            )
            cost = checkpoint_cost(self._context_after(steps), DTYPE_BYTES[self.save_dtype])
            yield self._with_cost(line, cost)

    def _context_after(self, steps: Sequence[RecipeStep]) -> CostContext:
        return reduce(_context_after, steps, self.start)

    def _with_cost(
        self,
        line: PlanLine,
        cost: Cost,
        measured_seconds: float | None = None,
        beside: Cost | None = None,
    ) -> PlanLine:
        """Return the line with the cost of its result, or with the time that reusing it saves.

        Args:
            line: the line.
            cost: the cost of making the result.
            measured_seconds: what making it took; None: it is estimated.
            beside: further work that takes time.
        """
        self.costs.append(Cost() if line.reused else cost)
        seconds = measured_seconds
        if seconds is None:
            seconds = self._seconds(cost + beside if beside else cost)
        seconds = None if seconds is None else round(seconds, 1)
        if line.reused:
            return replace(line, reused_seconds=seconds)
        by_device: dict[str, float] = {}
        for device, size in (
            (self.teacher_device, cost.teacher_device_bytes),
            (self.student_device, cost.device_bytes),
        ):
            # Teacher and student compute one after the other.
            by_device[device] = max(by_device.get(device, 0.0), size)
        on_host = by_device.pop(HOST, 0.0)
        by_gpu = {gpu: round(size) for gpu, size in by_device.items() if size}
        traffic = cost.traffic_bytes if by_gpu else 0
        return replace(
            line,
            ram_bytes=round(cost.host_bytes + on_host),
            gpu_bytes=max(by_gpu.values(), default=0),
            by_gpu=by_gpu,
            disk_bytes=round(cost.disk_bytes),
            less_disk=cost.less_disk,
            read_bytes=round(cost.read_bytes),
            traffic_bytes=round(traffic),
            seconds=seconds,
        )

    def _seconds(self, cost: Cost) -> float | None:
        """Return how long work takes on this machine; None if that is not known."""
        if self.machine.profile is None:
            return None
        only_teacher = cost.teacher_device_bytes and not cost.device_bytes
        device = self.teacher_device if only_teacher else self.student_device
        return seconds_of(cost, self.machine.profile, on_gpu=device != HOST)


def _context_after(context: CostContext, recipe_step: RecipeStep) -> CostContext:
    """Return the context after a step; an error names the step."""
    try:
        return context_after(recipe_step.step, context)
    except RecipeError as error:
        problems = [f'step "{recipe_step.id}": {problem}' for problem in error.problems]
        raise RecipeError(*problems) from error


def _own_files(cost: Cost, counted: set[Hashable]) -> Cost:
    """Add shared files to the step's disk, except those in `counted`; add the new ones there."""
    new = {key: size for key, size in cost.shared_files.items() if key not in counted}
    counted.update(new)
    return replace(cost, disk_bytes=cost.disk_bytes + sum(new.values()))


def format_bytes(size: float) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def free_disk(machine: Machine) -> str:
    """Return how much of its disk is free, to follow what is needed; nothing if it is unknown."""
    return "" if machine.disk is None else f", {format_bytes(machine.disk)} are free"
