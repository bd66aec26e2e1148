"""Answers of others as tokens of the teacher, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rotdistill_core.plugin.engine import Answer, Asked

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel

BROKEN = "\ufffd"
"""Stands for bytes that are no whole character."""


class UnusableAnswer(Exception):
    """An answer that cannot be taken over; the message says why."""


class AnswerReader:
    """Reads answers as tokens of a model.

    Args:
        model: the model in whose name others answer.
    """

    def __init__(self, model: AnsweringModel) -> None:
        self.model = model
        self.tokenizer: Any = model.tokenizer
        self.rows = model.weights.entries[model.weights.adapter.embedding].shape[0]
        """Number of tokens that the model knows."""

    def of_tokens(self, tokens: Sequence[Any], text: object, ended: bool, asked: Asked) -> Answer:
        """Return an answer that came as token ids.

        Args:
            tokens: the ids.
            text: its text, if that came too.
            ended: whether it ended by itself.
            asked: what was asked.

        Raises:
            UnusableAnswer: they are no ids of the model, or not of this text.
        """
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.rows:
                raise UnusableAnswer(f"{token!r:.40} is no token id of the teacher")
        own = list(tokens)
        if isinstance(text, str) and not self._is_text_of(text, own):
            raise UnusableAnswer(
                f"its token ids are {self.tokenizer.decode(own)!r:.60}, and its text is "
                f"{text!r:.60}: the server has another tokenizer than the teacher"
            )
        return self._ended(own, ended, asked)

    def of_text(self, text: str, ended: bool, asked: Asked) -> Answer:
        """Return an answer that came as text: encoded again, with the end token if it ended.

        Raises:
            UnusableAnswer: the teacher's tokenizer does not give the text back.
        """
        whole = text if ended else text.rstrip(BROKEN)
        tokens = list(self.tokenizer(whole, add_special_tokens=False)["input_ids"])
        if self._decoded(tokens) != whole:
            raise UnusableAnswer(f"the teacher's tokenizer does not give back {whole!r:.80}")
        is_whole = len(tokens) <= asked.max_tokens
        return self._ended(tokens[: asked.max_tokens], ended and is_whole, asked)

    def _ended(self, tokens: list[int], ended: bool, asked: Asked) -> Answer:
        """Return the answer, with the token that ends it."""
        stops = self.model.stops
        first = next((k for k, token in enumerate(tokens) if token in stops), None)
        if first is not None:
            tokens, ended = tokens[: first + 1], True
        elif ended and stops and len(tokens) < asked.max_tokens:
            own = self.tokenizer.eos_token_id
            tokens = [*tokens, own if own in stops else min(stops)]
        if not tokens:
            raise UnusableAnswer("it is empty")
        if len(tokens) > asked.max_tokens:
            raise UnusableAnswer(f"it has {len(tokens)} tokens, and {asked.max_tokens} were asked")
        return Answer(tokens, "stop" if ended else "length")

    def _is_text_of(self, text: str, tokens: Sequence[int]) -> bool:
        """Return whether a text is that of tokens, apart from special tokens and broken ends."""
        found: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found.strip().rstrip(BROKEN) == text.strip().rstrip(BROKEN) or (
            self._decoded(tokens).strip() == text.strip()
        )

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text
