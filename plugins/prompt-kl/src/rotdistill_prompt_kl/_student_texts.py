"""What the student answers while it trains, for the teacher to judge (on-policy texts).

Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649, section 3. No
gradient goes through the drawing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.forward.generate import AnsweringModel, AnswerWriter
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.store.hashing import digest

SEEDS = 2**63


def student_answers(
    model: AnsweringModel,
    texts: Mapping[int, Text],
    temperature: float,
    seed: int,
    epoch: int,
    log: Callable[[str], None],
) -> dict[int, tuple[int, ...]]:
    """Return how the student answers the prompts of some texts.

    Args:
        model: the student as it is now.
        texts: texts by their numbers; at least one. An answer is at most as long as the text's own.
        temperature: what logits are divided by before a token is drawn; 0 takes the best token.
        seed: what is drawn follows from it, the epoch and the id of each text.
        epoch: number of the epoch.
        log: takes one line when memory runs out.

    Returns:
        Number of the text -> token ids, in the order of the texts.
    """
    asked = {
        str(k): Asked(
            text.tokens[: text.answer],
            len(text.tokens) - text.answer,
            temperature,
            int(digest(seed, epoch, text.id), 16) % SEEDS,
        )
        for k, text in texts.items()
    }
    writer = AnswerWriter(model, log)
    answers: dict[int, tuple[int, ...]] = {}
    for names in writer.chunks(asked):
        for name, answer in writer.answers({name: asked[name] for name in names}):
            answers[int(name)] = tuple(answer.tokens)
    return {k: answers[k] for k in texts}


def with_answers(
    layout: PackedTexts, answers: Mapping[int, Sequence[int]], ending: str
) -> PackedTexts:
    """Return texts of which some have other answers; their ids have an ending more.

    Args:
        layout: the texts.
        answers: number of a text -> token ids of its answer.
        ending: tells these texts from others with the same prompts.
    """
    texts = list(layout.texts)
    for k, tokens in answers.items():
        text = texts[k]
        new = (*text.tokens[: text.answer], *tokens)
        texts[k] = replace(text, id=f"{text.id}{ending}", tokens=new)
    return PackedTexts(tuple(texts), layout.prefix)
