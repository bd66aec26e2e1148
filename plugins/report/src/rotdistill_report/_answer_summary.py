"""Whether answers move to the teacher's from one variant to another: length, language, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rotdistill_core.evaluation.intervals import Estimate, FiguresByText, Interval, paired_change
from rotdistill_core.evaluation.metrics import metric_named, teacher_metric
from rotdistill_report._data import MIN_TEXTS, ReportData, Tone, Verdict, with_interval

JUDGED_BY = (
    "answer_chrf",
    "answer_length_gap",
    "answer_language_teacher",
    "factual_completeness",
    "hallucination_rate",
)
"""The metrics that say whether an answer is better. The question's language is none of them: the
goal is the teacher, who may answer in another."""


def answer_verdict(
    report: ReportData, figures: Mapping[str, Mapping[str, FiguresByText]], seed: int
) -> Verdict:
    """Return whether the headline answers better than the baseline, and whether its KL said so.

    The answers are judged by their own metrics alone. A metric counts if the interval of its
    paired change does not hold 0.

    Args:
        report: names the two variants, and has their answers.
        figures: metric -> variant -> figures of single texts.
        seed: of the intervals.

    Returns:
        An empty sentence where fewer than two variants answered.
    """
    if len(report.answer_variants) < 2:
        return Verdict("", Tone.NEUTRAL)
    before, after = report.answer_variants
    changes = {}
    for metric in ("kl", *JUDGED_BY):
        of_variants = figures.get(metric, {})
        if before in of_variants and after in of_variants:
            change = paired_change(of_variants[after], of_variants[before], seed)
            if change is not None:
                changes[metric] = change
    kl = changes.pop("kl", None)
    texts_before, texts_after = (
        {question: answer.student for question, answer in report.answers[variant].items()}
        for variant in (before, after)
    )
    if texts_before == texts_after:
        sentence = f"`{after}` answers as `{before}` does, word for word."
        judged = Judgement(sentence, Tone.NEUTRAL, better=False)
    elif len(texts_after) < MIN_TEXTS:
        sentence = (
            f"Whether `{after}` answers better than `{before}` cannot be told from "
            f"{len(texts_after)} held-out questions; it takes {MIN_TEXTS} or more."
        )
        return Verdict(sentence, Tone.NEUTRAL)
    else:
        judged = _judged(before, after, changes)
    if kl is not None and kl.beyond_noise() and kl.value < 0 and not judged.better:
        return Verdict(f"The lower KL did not make better answers. {judged.sentence}", Tone.BAD)
    return Verdict(judged.sentence, judged.tone)


class Judgement(NamedTuple):
    """Whether answers got better."""

    sentence: str
    tone: Tone
    better: bool
    """Whether they did by any metric."""


def _judged(before: str, after: str, changes: Mapping[str, Interval]) -> Judgement:
    """Return whether answers got better, from metric -> paired change."""
    moved = {metric: change for metric, change in changes.items() if change.beyond_noise()}
    better = {m: c for m, c in moved.items() if c.value * metric_named(m).direction > 0}
    worse = {m: c for m, c in moved.items() if m not in better}
    subject, others = f"The answers of `{after}` are", f"those of `{before}`"
    if better and worse:
        sentence = f"better than {others} by {_changes(better)}, and worse by {_changes(worse)}."
        return Judgement(f"{subject} {sentence}", Tone.NEUTRAL, better=True)
    if better:
        sentence = f"{subject} better than {others}: {_changes(better)}."
        return Judgement(sentence, Tone.GOOD, better=True)
    if worse:
        sentence = f"{subject} worse than {others}: {_changes(worse)}."
        return Judgement(sentence, Tone.BAD, better=False)
    first = dict(list(changes.items())[:1])
    shown = f": {_changes(first)}" if first else ""
    sentence = f"{subject} not distinguishable from {others}{shown}."
    return Judgement(sentence, Tone.NEUTRAL, better=False)


def _changes(changes: Mapping[str, Interval]) -> str:
    """Return changes in words, `chrF +24.5 [+17.4, +31.7], length gap -0.20 [-0.31, -0.09]`."""
    return ", ".join(
        f"{metric_named(metric).title} {with_interval(change, metric, '+')}"
        for metric, change in changes.items()
    )


def answer_summary(
    estimates: Mapping[str, Mapping[str, Estimate]], variants: Sequence[str]
) -> list[str]:
    """Return one line each for length, language, chrF and facts, where two variants answered.

    The first of the two is the one that changes are against.
    """
    if len(variants) < 2:
        return []
    before, after = variants
    return AnswerComparison(estimates, before, after).lines()


@dataclass(frozen=True)
class AnswerComparison:
    """The answers of two variants, compared with the teacher's."""

    estimates: Mapping[str, Mapping[str, Estimate]]
    """Metric -> variant -> estimate, with changes against `before`."""
    before: str
    after: str

    def lines(self) -> list[str]:
        """Return in words whether answers move towards the teacher's."""
        lines = [self._length()]
        # No figure of it exists where no answer of the teacher is in an identifiable language.
        if "answer_language_teacher" in self.estimates:
            lines.append(self._language())
        scores = self._values("answer_chrf", ".1f")
        lines.append(
            f"chrF against the teacher's answers: {scores}: {self._movement('answer_chrf')}"
        )
        if "factual_completeness" in self.estimates:
            lines.append(self._facts("factual_completeness", "Expected facts named"))
        if "hallucination_rate" in self.estimates:
            lines.append(self._facts("hallucination_rate", "Answers with a known error"))
        return lines

    def _length(self) -> str:
        ratio = self._values("answer_length", ".2f")
        gap = self._values("answer_length_gap", ".2f")
        movement = self._movement("answer_length_gap")
        return f"Length: {ratio} times the teacher's, mean |ln| of that {gap}: {movement}"

    def _language(self) -> str:
        asked = ""
        if "answer_language" in self.estimates:
            asked = f"{self._values('answer_language', '.0%')} in the question's language, "
        same = self._values("answer_language_teacher", ".0%")
        movement = self._movement("answer_language_teacher")
        return f"Language: {asked}{same} in that of the teacher's answer: {movement}"

    def _facts(self, metric: str, title: str) -> str:
        of_teacher = self.estimates.get(teacher_metric(metric))
        goal = f" (the teacher {of_teacher[self.before].own.value:.0%})" if of_teacher else ""
        movement = self._movement(metric, improvement="better", decline="worse")
        return f"{title}: {self._values(metric, '.0%')}{goal}: {movement}"

    def _values(self, metric: str, specification: str) -> str:
        """Return the figures of both variants, `1.8 → 26.3`."""
        row = self.estimates[metric]
        before, after = row[self.before].own.value, row[self.after].own.value
        return f"{before:{specification}} → {after:{specification}}"

    def _movement(
        self,
        metric: str,
        improvement: str = "towards the teacher",
        decline: str = "away from the teacher",
    ) -> str:
        """Return in which direction a figure changes, with the interval of its change."""
        change = self.estimates[metric][self.after].change
        if change is None:
            return "not compared."
        improves = change.value * metric_named(metric).direction > 0
        words = "no change beyond noise"
        if change.beyond_noise():
            words = improvement if improves else decline
        return f"{words} ({with_interval(change, metric, '+')})."
