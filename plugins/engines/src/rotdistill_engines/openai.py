"""The engine `openai`: servers that speak OpenAI's completions, such as vLLM and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from rotdistill_core import Cost, CostContext, hookimpl
from rotdistill_core.planning.answering import Outlook, Questions
from rotdistill_core.plugin.engine import Answering, engine

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel


def _plain_url(url: str) -> str:
    """Return a URL without its last slash.

    Raises:
        ValueError: it is no plain address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError('write an address such as "http://localhost:8000/v1"')
    if parts.query or parts.fragment:
        raise ValueError("write a plain address, without ? and #")
    return url.rstrip("/")


@engine
class OpenAi:
    """Let servers answer that speak OpenAI's completions: vLLM, SGLang, llama.cpp, Ollama.

    Prompts are sent as token ids, so the server has to have the teacher's tokenizer; it should have
    its weights. Token ids are asked for; a text alone is encoded again and checked.
    """

    use: Literal["openai"] = "openai"
    urls: Annotated[tuple[Annotated[str, AfterValidator(_plain_url)], ...], Field(min_length=1)]
    """Addresses up to `/v1`. Several share the work, and one may die."""
    model: Annotated[str, Field(min_length=1, max_length=1024)]
    """Name of the model, as the servers know it."""
    key_env: str | None = None
    """Name of the environment variable that holds the key of the servers, in capitals."""
    prompts: Literal["ids", "text"] = "ids"
    """How prompts are sent: as token ids, or as text to servers that take no ids."""
    at_once: PositiveInt = 16
    """Requests at once to each address."""
    timeout: PositiveFloat = 300.0
    """Seconds that an answer may take."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """How often a request or an address is tried again, after pauses that double."""
    body: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """More fields of each request, such as `{ top_k = -1 }`."""
    logistics: ClassVar[frozenset[str]] = frozenset(
        {"urls", "key_env", "at_once", "timeout", "retries"}
    )

    def outlook(self, _: CostContext, questions: Questions, __: Path) -> Outlook:
        """Return that nothing is computed here; what servers take is not known."""
        servers = f"{len(self.urls)} servers" if len(self.urls) > 1 else self.urls[0]
        note = (
            f"{questions.count} prompts and up to {questions.tokens} tokens of answers for "
            f"{servers}, whose time is not counted"
        )
        return Outlook(cost=Cost(), note=note)

    @hookimpl
    def connect(self, model: AnsweringModel, log: Callable[[str], None]) -> Answering:
        """See `HookSpecs.connect`.

        Raises:
            SetupError: the environment variable of the key is not set.
        """
        from rotdistill_engines._servers import Servers  # noqa: PLC0415  loads torch

        return Servers(self, model, log)


@hookimpl
def engines() -> list[type]:
    """Offer the engine."""
    return [OpenAi]
