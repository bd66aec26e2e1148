"""Several servers that share prompts: threads take them from one queue, and one server may die."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2

from rotdistill_core.errors import SetupError
from rotdistill_core.plugin.engine import Answer, Asked, settings_of
from rotdistill_engines._reading import AnswerReader, UnusableAnswer

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel
    from rotdistill_engines.openai import OpenAi

FIRST_PAUSE = 0.5
"""Seconds before the first repetition; each further pause is twice as long."""
LONGEST_PAUSE = 60.0
BUSY = 429
HOPELESS = 3
"""A server that refuses so many prompts before its first answer takes none."""
WRONG_PROMPT = (400, 413, 422)
"""Statuses of a server that does not take one prompt."""
NO_LIMITS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
NO_PENALTIES = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""Servers have such settings of their own, which would change what the model answers."""
ASK_FOR_IDS = {"return_token_ids": True, "return_tokens": True}
"""vLLM and SGLang know the first, llama.cpp the second; others ignore what they do not know."""


class Unanswered(Exception):
    """A request that may be repeated; the message says what happened."""

    def __init__(self, problem: str, pause: float = 0.0, is_of_server: bool = True) -> None:
        super().__init__(problem)
        self.pause = pause
        """Seconds that the server asks to wait."""
        self.is_of_server = is_of_server
        """Whether the server failed, and not just this answer."""


class Refused(Exception):
    """A prompt that a server does not take."""


@dataclass
class Server:
    """One address, and how it has done."""

    url: str
    failures: int = 0
    """Failures one after the other; several requests that fail together count once."""
    resume_at: float = 0.0
    """When it may be asked again."""
    has_answered: bool = False
    refused: int = 0
    """Prompts that it did not take."""
    is_dead: bool = False
    last_problem: str = ""
    lock: Lock = field(default_factory=Lock)


class Outcome(NamedTuple):
    """What became of one prompt: an answer, or why there is none."""

    name: str
    answer: Answer | None
    problem: str = ""


class Servers:
    """Servers that answer in the teacher's name; see `Answering`.

    Args:
        options: the engine.
        model: the teacher.
        log: takes one line when a server dies.

    Raises:
        SetupError: the environment variable of the key is not set.
    """

    def __init__(self, options: OpenAi, model: AnsweringModel, log: Callable[[str], None]) -> None:
        self.options = options
        self.log = log
        self.reader = AnswerReader(model)
        self.at_once = 0
        self.about: dict[str, Any] = {
            "engine": "openai",
            "version": version("rotdistill-engines"),
            "model": options.model,
            "settings": {k: v for k, v in settings_of(options).items() if k != "use"},
            "servers": [],
        }
        self._headers = _headers(options.key_env)
        self._servers = [Server(url) for url in options.urls]
        self._stop = Event()
        self._fatal: list[SetupError] = []

    def chunks(self, _: Mapping[str, Asked]) -> None:
        """Return None: each answer stands for itself."""

    def answers(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
        """Yield answers as they come.

        Raises:
            SetupError: prompts are refused, or all servers are dead; it names the prompts.
        """
        self._stop.clear()
        jobs: Queue[tuple[str, Asked, int]] = Queue()
        for name, each in asked.items():
            jobs.put((name, each, 0))
        outcomes: Queue[Outcome] = Queue()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(self.options.timeout, connect=min(10.0, self.options.timeout))
        with httpx2.Client(headers=self._headers, timeout=timeout, limits=limits) as client:
            threads = [
                Thread(target=self._work, args=(server, client, jobs, outcomes), daemon=True)
                for server in self._servers
                if not server.is_dead
                for _ in range(min(self.options.at_once, len(asked)))
            ]
            for thread in threads:
                thread.start()
            try:
                yield from self._collected(asked, threads, outcomes)
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join(timeout=1.0)

    def _collected(
        self, asked: Mapping[str, Asked], threads: list[Thread], outcomes: Queue[Outcome]
    ) -> Iterator[tuple[str, Answer]]:
        """Yield what threads answer, until every prompt has an outcome."""
        waiting = set(asked)
        problems: dict[str, str] = {}
        while waiting:
            with suppress(Empty):
                name, answer, problem = outcomes.get(timeout=0.05)
                waiting.discard(name)
                if answer is None:
                    problems[name] = problem
                else:
                    yield name, answer
                continue
            if self._fatal:
                raise self._fatal[0]
            if not any(thread.is_alive() for thread in threads) and outcomes.empty():
                raise self._all_dead(waiting)
        if problems:
            name, problem = next(iter(problems.items()))
            more = f", and {len(problems) - 1} more texts" if len(problems) > 1 else ""
            raise SetupError(
                f"engine openai: the text {name!r}{more} got no usable answer: {problem}. The "
                "other answers are kept; run again to ask for these alone."
            )

    def _all_dead(self, waiting: set[str]) -> SetupError:
        told = "; ".join(f"{server.url}: {server.last_problem}" for server in self._servers)
        return SetupError(
            f"engine openai: no server is left, and {len(waiting)} texts are unanswered, "
            f"{min(waiting)!r} among them. {told}. What was answered is kept; start a server and "
            "run again."
        )

    def _work(
        self,
        server: Server,
        client: httpx2.Client,
        jobs: Queue[tuple[str, Asked, int]],
        outcomes: Queue[Outcome],
    ) -> None:
        """Ask a server for one prompt after the other; a thread's work."""
        while not self._stop.is_set() and not server.is_dead:
            if time.monotonic() < server.resume_at:
                self._stop.wait(0.02)
                continue
            try:
                name, asked, tries = jobs.get(timeout=0.05)
            except Empty:
                continue
            try:
                answer = self._ask(server, client, asked)
            except Unanswered as problem:
                self._failed(server, problem)
                charged = tries + (not problem.is_of_server or server.has_answered)
                if charged > self.options.retries:
                    outcomes.put(Outcome(name, None, f"{server.url}: {problem}"))
                else:
                    jobs.put((name, asked, charged))
            except Refused as problem:
                self._refused(server, str(problem))
                outcomes.put(Outcome(name, None, f"{server.url}: {problem}"))
            except SetupError as error:
                self._fatal.append(error)
                self._stop.set()
            else:
                server.failures = 0
                server.has_answered = True
                outcomes.put(Outcome(name, answer))

    def _failed(self, server: Server, problem: Unanswered) -> None:
        """Note that a request failed; the server rests, or is given up."""
        if not problem.is_of_server:
            return
        with server.lock:
            if time.monotonic() < server.resume_at or server.is_dead:
                return  # it failed together with another request
            server.failures += 1
            server.last_problem = str(problem)
            if server.failures > self.options.retries:
                server.is_dead = True
                self.log(
                    f"engine openai: {server.url} is given up after {server.failures} failures one "
                    f"after the other ({problem}); other addresses take its work, if there are any."
                )
                return
            # S311: chance keeps clients from asking again all at once; it is no secret.
            pause = FIRST_PAUSE * 2 ** (server.failures - 1) * random.uniform(0.5, 1.5)  # noqa: S311
            server.resume_at = time.monotonic() + min(max(pause, problem.pause), LONGEST_PAUSE)

    def _refused(self, server: Server, problem: str) -> None:
        """Stop everything if a server has taken no prompt at all: then the recipe is wrong."""
        server.refused += 1
        if not server.has_answered and server.refused >= HOPELESS:
            self._fatal.append(
                SetupError(
                    f"engine openai: {server.url} takes no prompt: {problem}. If it takes no token "
                    'ids, write engine.prompts = "text"; if it does not know a field, look at '
                    "engine.body."
                )
            )
            self._stop.set()

    def _ask(self, server: Server, client: httpx2.Client, asked: Asked) -> Answer:
        """Return the answer of a server to one prompt.

        Raises:
            Unanswered: it may be asked again.
            Refused: it does not take this prompt.
            SetupError: it does not know the model, or the key.
        """
        try:
            response = client.post(f"{server.url}/completions", json=self._body(asked))
        except httpx2.TransportError as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        if status == BUSY or status >= 500:
            raise Unanswered(f"status {status}", _pause_of(response))
        if status in WRONG_PROMPT:
            raise Refused(f"status {status}: {response.text:.200}")
        if status != 200:
            raise SetupError(
                f"engine openai: {server.url} answers with status {status}: {response.text:.200}. "
                "Check engine.urls (they end with /v1), engine.model and the key in the variable "
                "that engine.key_env names."
            )
        try:
            content = json.loads(response.content)
        except ValueError as error:
            raise Unanswered("its answer is no whole JSON document") from error
        return self._read(server, content, asked)

    def _body(self, asked: Asked) -> dict[str, Any]:
        prompt: list[int] | str = list(asked.prompt)
        if self.options.prompts == "text":
            prompt = self._prompt_text(asked)
        return {
            "model": self.options.model,
            "prompt": prompt,
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "seed": asked.seed,
            "n": 1,
            "stream": False,
            **NO_LIMITS,
            **NO_PENALTIES,
            **ASK_FOR_IDS,
            **self.options.body,
        }

    def _prompt_text(self, asked: Asked) -> str:
        """Return the text of a prompt.

        Raises:
            Refused: it does not become the same tokens again.
        """
        tokenizer = self.reader.tokenizer
        text: str = tokenizer.decode(list(asked.prompt), clean_up_tokenization_spaces=False)
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != list(asked.prompt):
            raise Refused('its prompt has other tokens as text; write engine.prompts = "ids"')
        return text

    def _read(self, server: Server, content: Any, asked: Asked) -> Answer:
        """Return the answer in a document.

        Raises:
            Unanswered: it is not one answer to this prompt, by tokens of the teacher.
            SetupError: another model wrote it.
        """
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) and model != self.options.model:
            raise SetupError(
                f"engine openai: {server.url} answers as the model {model!r:.200}, and "
                f"{self.options.model!r} was asked. Serve the teacher there, or write its name as "
                "engine.model."
            )
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Unanswered("it did not give one answer", is_of_server=False)
        choice = choices[0]
        self._note(content)
        _require_whole_prompt(content, choice, asked)
        text, ended = choice.get("text"), choice.get("finish_reason") == "stop"
        tokens = choice.get("token_ids") or choice.get("tokens") or content.get("tokens")
        try:
            if isinstance(tokens, list):
                return self.reader.of_tokens(tokens, text, ended, asked)
            if isinstance(text, str):
                return self.reader.of_text(text, ended, asked)
        except UnusableAnswer as error:
            raise Unanswered(str(error), is_of_server=False) from error
        raise Unanswered("it gave neither text nor token ids", is_of_server=False)

    def _note(self, content: Mapping[str, Any]) -> None:
        """Keep what a server says of itself."""
        fingerprint = content.get("system_fingerprint")
        if isinstance(fingerprint, str) and fingerprint not in self.about["servers"]:
            self.about["servers"].append(fingerprint[:100])


def _headers(key_env: str | None) -> dict[str, str]:
    """Return the headers of a request.

    Raises:
        SetupError: the environment variable is not set.
    """
    if key_env is None:
        return {}
    key = os.environ.get(key_env)
    if not key:
        raise SetupError(
            f"engine openai: the environment variable {key_env}, which engine.key_env names, is "
            f"not set. Put the key of the server there: export {key_env}=..."
        )
    return {"Authorization": f"Bearer {key}"}


def _pause_of(response: httpx2.Response) -> float:
    """Return the seconds that a server asks to wait; 0 if it does not, or names a date."""
    with suppress(ValueError):
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    return 0.0


def _require_whole_prompt(
    content: Mapping[str, Any], choice: Mapping[str, Any], asked: Asked
) -> None:
    """Check that the server has read the prompt as it was sent.

    Raises:
        Refused: it has read other tokens, as when it puts a token before each text.
    """
    read = choice.get("prompt_token_ids")
    if isinstance(read, list) and read != list(asked.prompt):
        raise Refused("it has read other tokens than the prompt's")
    usage = content.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if isinstance(count, int) and count != len(asked.prompt):
        raise Refused(
            f"it has read {count} tokens, and the prompt has {len(asked.prompt)}: it puts tokens "
            "of its own before it, or cuts it"
        )
