"""One training run: batches, optimiser, validation, and going on after a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.store.results import TrainingCurve
from rotdistill_prompt_kl._gradients import add_gradients
from rotdistill_prompt_kl._lora import folded
from rotdistill_prompt_kl._loss import divergence_of
from rotdistill_prompt_kl._saved import SavedTraining
from rotdistill_prompt_kl._student_texts import student_answers
from rotdistill_prompt_kl._targets import DistillationTargets

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_prompt_kl.step import PromptKl

SAVED_STEPS = 50
"""Steps of training after which what was learned is saved at the latest."""
NOW, BEST = "now.", "best."
"""Begin the names of saved parameters: those that train, and those of the least validation KL."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of a gradient and of its square."""


class Batches(NamedTuple):
    """Which texts each step trains on, all of it drawn before training."""

    steps: list[list[int]]
    """For each step the indices of its texts in the layout."""
    evaluated: frozenset[int]
    """Numbers of steps after which the validation KL is measured; they count from 1."""
    by_student: list[list[int]]
    """For each epoch the texts that the student answers, at its beginning."""

    @property
    def in_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.steps) // len(self.by_student)

    @classmethod
    def drawn(cls, step: PromptKl, layout: PackedTexts) -> Batches:
        """Draw the order of the texts of each epoch from torch's generator."""
        texts = [i for i, text in enumerate(layout.texts) if text.split == Split.FIT]
        orders = [torch.randperm(len(texts)).tolist() for _ in range(step.max_epochs)]
        steps = [
            [texts[i] for i in order[start : start + step.batch_size]]
            for order in orders
            for start in range(0, len(order), step.batch_size)
        ]
        halves = 2 * step.max_epochs
        evaluated = (round(len(steps) * half / halves) for half in range(1, halves + 1))
        by_student: list[list[int]] = [[] for _ in orders]
        if step.on_policy:
            count = math.ceil(step.on_policy * len(texts))
            for chosen in by_student:
                chosen += [texts[i] for i in sorted(torch.randperm(len(texts))[:count].tolist())]
        return cls(steps, frozenset(evaluated), by_student)


@dataclass
class Learned:
    """How far training is, apart from the parameters and the optimiser's moments."""

    losses: list[float] = field(default_factory=list)
    """Of each step so far, nats a token."""
    checks: list[int] = field(default_factory=list)
    """Numbers of the steps after which the validation KL was measured; 0 is before training."""
    kl: list[float] = field(default_factory=list)
    """The validation KL at each of them, nats a token."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The parameters of the least validation KL; empty while none is below that at first."""
    epoch: int = -1
    """The epoch at whose beginning the student answered; -1 if it has not."""
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Number of a text -> how the student answered it."""

    @property
    def checks_without_gain(self) -> int:
        """How many times in a row the validation KL was not below all before."""
        best, worse = self.kl[0], 0
        for kl in self.kl[1:]:
            best, worse = (kl, 0) if kl < best else (best, worse + 1)
        return worse

    def checked(self, kl: float, parameters: Mapping[str, Tensor]) -> None:
        """Take in the validation KL of the parameters as they are now."""
        if self.kl and kl < min(self.kl):
            self.best = {name: each.detach().clone() for name, each in parameters.items()}
        self.checks.append(len(self.losses))
        self.kl.append(kl)

    def curve(self, loss: str) -> TrainingCurve:
        """Return what the report draws."""
        return TrainingCurve(loss, tuple(self.losses), tuple(self.checks), tuple(self.kl))


class Training:
    """Trains parameters of a student by AdamW without weight decay, gradients clipped to norm 1.

    The learning rate rises over the first twentieth of the steps, and decays linearly to 0. The
    validation KL is measured before training and twice an epoch. Training ends where it diverges,
    or after `patience` measurements in a row without gain. It saves itself at each measurement and
    every `SAVED_STEPS` steps; a killed one goes on from there, to the same bits.

    Args:
        step: the options.
        student: the model that trains.
        view: the weights that it was made of.
        targets: the texts and the teacher's states.
        batches: what each step trains on.
        saved: what a killed training of these options left, and where this one saves itself.
    """

    def __init__(
        self,
        step: PromptKl,
        student: Any,
        view: Weights,
        targets: DistillationTargets,
        batches: Batches,
        saved: SavedTraining,
    ) -> None:
        self.step = step
        self.student = student
        self.view = view
        self.targets = targets
        self.batches = batches
        self.parameters: dict[str, torch.nn.Parameter] = {
            name: parameter
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=0.0)
        self.learned = Learned()
        self.saved = saved
        self.current = targets
        """The texts of this epoch, with the student's answers."""

    def run(self, progress: Progress) -> Learned:
        """Train from the beginning, or from what was saved last, to the end."""
        self._go_on(progress)
        learned, steps = self.learned, self.batches.steps
        if not learned.kl:
            self._measure()
        while len(learned.losses) < len(steps) and learned.checks_without_gain < self.step.patience:
            self._let_student_answer(len(learned.losses) // self.batches.in_epoch, progress)
            loss = self._learn(len(learned.losses))
            if not math.isfinite(loss):
                break
            learned.losses.append(loss)
            done = len(learned.losses)
            progress(done, len(steps), f"{self.step.loss_name} {loss:.3f}")
            is_measured = done in self.batches.evaluated
            if is_measured:
                self._measure()
            if is_measured or done % SAVED_STEPS == 0:
                self.saved.save(self._tensors())
        return learned

    def _learn(self, done: int) -> float:
        """Take the step after `done` steps; return its loss, NaN if training has diverged."""
        step, trainable = self.step, list(self.parameters.values())
        loss = add_gradients(
            self.student,
            self.view,
            self.current,
            self.batches.steps[done],
            trainable,
            divergence_of(step.loss, step.beta),
            step.micro_batch_size,
        )
        if not math.isfinite(loss):
            return math.nan
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        rate = step.peak_rate * _warm_up_and_decay(len(self.batches.steps), done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _let_student_answer(self, epoch: int, progress: Progress) -> None:
        """Let the student answer at the beginning of an epoch, and the teacher read its answers."""
        chosen, learned = self.batches.by_student[epoch], self.learned
        if not chosen or learned.epoch == epoch:
            return
        texts = {k: self.targets.layout.texts[k] for k in chosen}

        def answers() -> dict[int, tuple[int, ...]]:
            progress(0, len(texts), "questions are answered by the student")
            own, step = self.targets.pair.student, self.step
            now = folded(self.view, self.student, own)
            model = AnsweringModel(own.folder, now, own.device, own.dtype)
            warn = self.saved.out.store.warn
            return student_answers(model, texts, step.temperature, step.seed, epoch, warn)

        learned.answers = self.targets.ranks.lead(answers)
        learned.epoch = epoch
        self.saved.save(self._tensors())
        self._read_answers(progress)

    def _read_answers(self, progress: Progress) -> None:
        """Let the teacher read the student's answers of this epoch."""
        answers, ending = self.learned.answers, f".student{self.learned.epoch}"
        self.current = self.targets.answered(answers, ending, self.saved.out, progress)

    def _measure(self) -> None:
        kl = self.targets.kl(self.student, self.view, Split.VALIDATION)
        self.learned.checked(kl, self.parameters)

    # What a killed training goes on from.

    def _tensors(self) -> dict[str, Tensor]:
        """Return all that is saved, by name."""
        learned = self.learned
        lengths = [len(tokens) for tokens in learned.answers.values()]
        tokens = [*chain.from_iterable(learned.answers.values())]
        tensors = {
            "losses": torch.tensor(learned.losses, dtype=torch.float64),
            "checks": torch.tensor(learned.checks),
            "kl": torch.tensor(learned.kl, dtype=torch.float64),
            "epoch": torch.tensor(learned.epoch),
            "answered": torch.tensor([*learned.answers], dtype=torch.long),
            "lengths": torch.tensor(lengths, dtype=torch.long),
            "tokens": torch.tensor(tokens, dtype=torch.long),
        }
        tensors |= {BEST + name: tensor for name, tensor in learned.best.items()}
        for name, parameter in self.parameters.items():
            tensors[NOW + name] = parameter.detach()
            if learned.losses:
                state = self.optimizer.state[parameter]
                tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        return tensors

    def _go_on(self, progress: Progress) -> None:
        """Take in what was saved last, if anything was."""
        tensors = self.saved.load()
        if not tensors:
            return
        learned = self.learned
        learned.losses = tensors["losses"].tolist()
        learned.checks = tensors["checks"].tolist()
        learned.kl = tensors["kl"].tolist()
        for name, parameter in self.parameters.items():
            device = parameter.device
            if BEST + name in tensors:
                learned.best[name] = tensors[BEST + name].to(device)
            parameter.data.copy_(tensors[NOW + name])
            if not learned.losses:
                continue
            moments = {moment: tensors[f"{moment}.{name}"].to(device) for moment in MOMENTS}
            count = torch.tensor(float(len(learned.losses)))
            self.optimizer.state[parameter] = {"step": count, **moments}
        learned.epoch = int(tensors["epoch"])
        answers = torch.split(tensors["tokens"], tensors["lengths"].tolist())
        numbers = tensors["answered"].tolist()
        learned.answers = {
            k: tuple(each.tolist()) for k, each in zip(numbers, answers, strict=True)
        }
        if learned.answers:
            self._read_answers(progress)


def _warm_up_and_decay(total: int, done: int) -> float:
    """Return the learning rate after `done` of `total` steps, relative to its peak."""
    warm_up = max(1, total // 20)
    return min(1.0, (done + 1) / warm_up) * (1 - done / (total + 1))
