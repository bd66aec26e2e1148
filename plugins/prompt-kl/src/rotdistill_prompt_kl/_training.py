"""One training run: batches, optimiser, validation, and going on after a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.store.results import TrainingCurve
from rotdistill_prompt_kl._gradients import add_gradients
from rotdistill_prompt_kl._loss import divergence_of
from rotdistill_prompt_kl._saved import SavedTraining
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

    @classmethod
    def drawn(cls, step: PromptKl, layout: PackedTexts) -> Batches:
        """Draw the order of the texts of each epoch from torch's generator."""
        k, n = step.shard
        texts = [i for i, text in enumerate(layout.texts) if text.split == Split.FIT][k - 1 :: n]
        orders = [torch.randperm(len(texts)).tolist() for _ in range(step.max_epochs)]
        steps = [
            [texts[i] for i in order[start : start + step.batch_size]]
            for order in orders
            for start in range(0, len(order), step.batch_size)
        ]
        halves = 2 * step.max_epochs
        evaluated = (round(len(steps) * half / halves) for half in range(1, halves + 1))
        return cls(steps, frozenset(evaluated))


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

    def run(self, progress: Progress) -> Learned:
        """Train from the beginning, or from what was saved last, to the end."""
        self._go_on()
        learned, steps = self.learned, self.batches.steps
        if not learned.kl:
            self._measure()
        while len(learned.losses) < len(steps) and learned.checks_without_gain < self.step.patience:
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
            self.targets,
            self.batches.steps[done],
            trainable,
            divergence_of(step.loss, step.beta),
            step.micro_batch_size,
        )
        if not math.isfinite(loss):
            return math.nan
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        rate = step.learning_rate * _warm_up_and_decay(len(self.batches.steps), done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _measure(self) -> None:
        kl = self.targets.kl(self.student, self.view, Split.VALIDATION)
        self.learned.checked(kl, self.parameters)

    # What a killed training goes on from.

    def _tensors(self) -> dict[str, Tensor]:
        """Return all that is saved, by name."""
        learned = self.learned
        tensors = {
            "losses": torch.tensor(learned.losses, dtype=torch.float64),
            "checks": torch.tensor(learned.checks),
            "kl": torch.tensor(learned.kl, dtype=torch.float64),
        }
        tensors |= {BEST + name: tensor for name, tensor in learned.best.items()}
        for name, parameter in self.parameters.items():
            tensors[NOW + name] = parameter.detach()
            state = self.optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        return tensors

    def _go_on(self) -> None:
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
            moments = {moment: tensors[f"{moment}.{name}"].to(device) for moment in MOMENTS}
            count = torch.tensor(float(len(learned.losses)))
            self.optimizer.state[parameter] = {"step": count, **moments}


def _warm_up_and_decay(total: int, done: int) -> float:
    """Return the learning rate after `done` of `total` steps, relative to its peak."""
    warm_up = max(1, total // 20)
    return min(1.0, (done + 1) / warm_up) * (1 - done / (total + 1))
