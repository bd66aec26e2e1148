"""Whether answers move to the teacher's from one variant to another: length, language, facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rotdistill_core.evaluation.intervals import Estimate, FiguresByText, Interval, paired_change
from rotdistill_core.evaluation.metrics import is_teacher_metric, metric_named, teacher_metric
from rotdistill_report._data import MIN_TEXTS, ReportData, Tone, with_interval

NEARNESS = ("answer_chrf", "answer_length_gap", "answer_language_teacher")
"""The metrics that say whether an answer is like the teacher's: not whether it is a good one."""
CONTENT = ("factual_completeness", "hallucination_rate")
"""The metrics that say whether it is right. The question's language is in neither list: the goal is
the teacher, who may answer in another."""
REPEATS = "answer_repeats"
MANY = 0.5
"""Share of answers that repeat themselves from which nothing is called good."""

Figures = Mapping[str, Mapping[str, FiguresByText]]
"""Metric -> variant -> figures of single texts."""


class AnswerVerdict(NamedTuple):
    """What became of the answers."""

    sentence: str
    tone: Tone
    doubts: tuple[str, ...] = ()
    """What speaks against a lower KL, in short."""


def answer_verdict(report: ReportData, figures: Figures, seed: int) -> AnswerVerdict:
    """Return what became of the answers from baseline to headline, and whether the KL said so.

    The answers are judged by their own metrics alone. A metric counts if the interval of its
    paired change does not hold 0. What speaks against a gain is said with it, and then the tone is
    not good.

    Args:
        report: names the two variants, and has their answers.
        figures: figures of single texts.
        seed: of the intervals.

    Returns:
        An empty sentence where fewer than two variants answered.
    """
    if len(report.answer_variants) < 2:
        return AnswerVerdict("", Tone.NEUTRAL)
    before, after = report.answer_variants
    changes = {}
    for metric in ("kl", *NEARNESS, *CONTENT):
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
        judged = Judgement(sentence, Tone.NEUTRAL, gained=False)
    elif len(texts_after) < MIN_TEXTS:
        sentence = (
            f"Whether `{after}` answers better than `{before}` cannot be told from "
            f"{len(texts_after)} held-out questions; it takes {MIN_TEXTS} or more."
        )
        return AnswerVerdict(sentence, Tone.NEUTRAL)
    else:
        judged = _judged(before, after, changes, figures)
    sentence, tone = judged.sentence, judged.tone
    if kl is not None and kl.beyond_noise() and kl.value < 0 and not judged.gained:
        sentence, tone = f"The lower KL did not make better answers. {sentence}", Tone.BAD
    objections = list(_content_objections(before, after, changes, figures))
    repeats = _repeats(before, after, figures)
    if tone is Tone.GOOD and (objections or (repeats and repeats.speaks_against)):
        tone = Tone.NEUTRAL
    sentences = [sentence, *objections, *([repeats.sentence] if repeats else [])]
    doubts = list(_worse_content(changes, before, after, figures))
    if repeats and repeats.speaks_against:
        doubts.append(repeats.sentence.rstrip("."))
    return AnswerVerdict(" ".join(sentences), tone, tuple(doubts))


def _worse_content(
    changes: Mapping[str, Interval], before: str, after: str, figures: Figures
) -> Iterator[str]:
    """Yield which scores of facts got worse, beyond noise or within it."""
    for metric in CONTENT:
        change = changes.get(metric)
        if change is not None and change.value * metric_named(metric).direction < 0:
            old, new = (f"{_mean(figures[metric][variant]):.2f}" for variant in (before, after))
            if old != new:
                noise = "" if change.beyond_noise() else " (within noise)"
                yield f"{metric_named(metric).title} of `{after}` went from {old} to {new}{noise}"


class Judgement(NamedTuple):
    """What became of answers."""

    sentence: str
    tone: Tone
    gained: bool
    """Whether any metric improved."""


def _judged(
    before: str, after: str, changes: Mapping[str, Interval], figures: Figures
) -> Judgement:
    """Return what became of answers, from metric -> paired change."""
    moved = {metric: change for metric, change in changes.items() if change.beyond_noise()}
    gains = {m for m, c in moved.items() if c.value * metric_named(m).direction > 0}
    subject, others = f"The answers of `{after}` are", f"those of `{before}`"
    if not moved:
        first = dict(list(changes.items())[:1])
        told = f": {_changes(first)}" if first else ""
        sentence = f"{subject} not distinguishable from {others}{told}."
        return Judgement(sentence, Tone.NEUTRAL, gained=False)
    groups = {
        "nearer to the teacher's": [m for m in NEARNESS if m in gains],
        "better": [m for m in CONTENT if m in gains],
        "farther from the teacher's": [m for m in NEARNESS if m in moved and m not in gains],
        "worse": [m for m in CONTENT if m in moved and m not in gains],
    }
    shown = {
        words: ", ".join(_moved(metric, moved[metric], after, figures) for metric in metrics)
        for words, metrics in groups.items()
        if metrics
    }
    first_words, *_ = shown
    if len(shown) == 1:
        sentence = f"{subject} {first_words} than {others}: {shown[first_words]}."
    else:
        first_words, *more = (f"{words} by {metrics}" for words, metrics in shown.items())
        sentence = f"Against {others}, the answers of `{after}` are {first_words}; "
        sentence += f"{'; '.join(more)}."
    losses = moved.keys() - gains
    tone = Tone.NEUTRAL if gains and losses else Tone.GOOD if gains else Tone.BAD
    return Judgement(sentence, tone, gained=bool(gains))


def _moved(metric: str, change: Interval, after: str, figures: Figures) -> str:
    """Return a change in words; that of chrF with the score itself, which is hard to guess."""
    words = _changes({metric: change})
    if metric != "answer_chrf":
        return words
    return f"{words}, to {_mean(figures[metric][after]):.1f} of 100"


def _content_objections(
    before: str, after: str, changes: Mapping[str, Interval], figures: Figures
) -> Iterator[str]:
    """Yield which scores of facts point the wrong way, though within noise.

    Those that got worse beyond noise are in the judgement.
    """
    for metric in CONTENT:
        change = changes.get(metric)
        if change is None or change.beyond_noise():
            continue
        if change.value * metric_named(metric).direction < 0:
            old, new = (f"{_mean(figures[metric][variant]):.2f}" for variant in (before, after))
            if old != new:
                yield (
                    f"But {metric_named(metric).title} went from {old} to {new} "
                    f"({with_interval(change, metric, '+')}, within noise)."
                )


class Repeats(NamedTuple):
    """How many answers repeat themselves."""

    sentence: str
    speaks_against: bool
    """Whether they are more than the teacher's, or many."""


def _repeats(before: str, after: str, figures: Figures) -> Repeats | None:
    """Return how many answers of a variant repeat themselves; None if none does, as far as known.

    The measure sees less than a reader does, so the figures of all stand side by side.

    Runs of earlier versions have no figure of it.
    """
    own = figures.get(REPEATS, {}).get(after)
    teacher = figures.get(teacher_metric(REPEATS), {}).get(after)
    if not own or not teacher or not _count(own):
        return None
    others = f"teacher: {_count(teacher)}"
    if of_baseline := figures[REPEATS].get(before):
        others = f"`{before}`: {_count(of_baseline)}, {others}"
    verb = "repeats itself" if _count(own) == 1 else "repeat themselves"
    share = _mean(own)
    sentence = (
        f"{_count(own)} of {len(own)} answers of `{after}` {verb} ({others}, by this measure)."
    )
    return Repeats(sentence, share > _mean(teacher) or share >= MANY)


def _count(figures: FiguresByText) -> int:
    return round(sum(figure.value for figure in figures.values()))


def _mean(figures: FiguresByText) -> float:
    weights = sum(figure.weight for figure in figures.values())
    return sum(figure.value * figure.weight for figure in figures.values()) / weights


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
        # No figure of these exists where nothing is in an identifiable language.
        if "answer_language_teacher" in self.estimates:
            lines.append(self._share("answer_language_teacher", "In the teacher's language"))
        if "answer_language" in self.estimates:
            title = "In the question's language"
            lines.append(self._share("answer_language", title, "more often", "less often"))
        scores = self._values("answer_chrf", ".1f")
        lines.append(
            f"chrF against the teacher's answers, of 100: {scores}: {self._movement('answer_chrf')}"
        )
        for metric, title in (
            (REPEATS, "Answers that repeat themselves"),
            ("factual_completeness", "Expected facts named"),
            ("hallucination_rate", "Answers with a known error"),
        ):
            if metric in self.estimates:
                lines.append(self._share(metric, title, "better", "worse"))
        return lines

    def _length(self) -> str:
        ratio = self._values("answer_length", ".2f")
        gap = self._values("answer_length_gap", ".2f")
        movement = self._movement("answer_length_gap")
        return f"Length: {ratio} times the teacher's. Length gap (0 is as long): {gap}: {movement}"

    def _share(
        self,
        metric: str,
        title: str,
        improvement: str = "towards the teacher",
        decline: str = "away from the teacher",
    ) -> str:
        """Return a share of both variants and of the teacher, where it is known, in one line."""
        name = teacher_metric(metric)
        of_teacher = self.estimates.get(name) if is_teacher_metric(name) else None
        goal = f" (the teacher {of_teacher[self.before].own.value:.0%})" if of_teacher else ""
        movement = self._movement(metric, improvement, decline)
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
        if change.low == change.high == 0:
            return "no change."
        improves = change.value * metric_named(metric).direction > 0
        words = "no change beyond noise"
        if change.beyond_noise():
            words = improvement if improves else decline
        return f"{words} ({with_interval(change, metric, '+')})."
