"""Whether answers move to the teacher's from one variant to another: length, language, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rotdistill_core.evaluation.intervals import Estimate
from rotdistill_core.evaluation.metrics import metric_named, teacher_metric
from rotdistill_report._data import with_interval


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
