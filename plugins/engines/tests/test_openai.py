"""Servers that share prompts, with a stub on real sockets that does all that servers do wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_engines import _servers
from rotdistill_engines.openai import OpenAi

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.errors import RecipeError, RotdistillError, SetupError
from rotdistill_core.forward.answers import KeptAnswers, kept_answers
from rotdistill_core.forward.generate import AnsweringModel
from rotdistill_core.plugin.engine import Asked
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace, pico_folder, pico_output

END = 2
PROMPTS = {f"q{k}": (10, 11, 20 + k) for k in range(12)}
ASKED = {name: Asked(prompt, 4) for name, prompt in PROMPTS.items()}

Reply = dict[str, Any]
Behaviour = Callable[
    ["Stub", int, Mapping[str, Any]], "Reply | bytes | int | tuple[int, str] | None"
]


def right(body: Mapping[str, Any]) -> list[int]:
    """Return what the stub's model answers: two tokens that tell the prompt, and the end."""
    return [body["prompt"][-1] + 20, body["prompt"][-1], END]


def reply(body: Mapping[str, Any], **choice: Any) -> Reply:
    """Return the answer of a server that gives token ids."""
    one = {"index": 0, "finish_reason": "stop", "token_ids": right(body), **choice}
    usage = {"prompt_tokens": len(body["prompt"])}
    return {"model": body["model"], "choices": [one], "usage": usage}


class Stub:
    """A server on a socket; it counts what it was asked and does what it is told."""

    def __init__(self, behave: Behaviour) -> None:
        self.asked: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.behave = behave
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                stub.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == "/v1/completions"
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            last = body["prompt"][-1]
            if isinstance(last, int):
                self.asked[last] += 1
        what = self.behave(self, number, body)
        if what is None:  # hang up
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        status, pause, content = 200, "", b""
        if isinstance(what, tuple):
            status, pause = what
        elif isinstance(what, int):
            status = what
        else:
            content = what if isinstance(what, bytes) else json.dumps(what).encode()
        handler.send_response(status)
        if pause:
            handler.send_header("Retry-After", pause)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Stub]]:
    monkeypatch.setattr(_servers, "FIRST_PAUSE", 0.01)
    stubs: list[Stub] = []

    def start(behave: Behaviour) -> Stub:
        stubs.append(Stub(behave))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pico_folder(tmp_path / "model")


def good(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
    return reply(body)


def options(*urls: str, **more: Any) -> OpenAi:
    settings = {"urls": urls, "model": "m", "retries": 2, "at_once": 4, **more}
    return validator_of(OpenAi).validate_json(json.dumps(settings), strict=True)


def answer(folder: Path, engine: OpenAi, lines: list[str] | None = None) -> KeptAnswers:
    """Let an engine answer all prompts, and keep the answers."""
    model = AnsweringModel(
        folder, open_checkpoint(folder).weights, torch.device("cpu"), torch.float32
    )
    out = pico_output(folder.parent / "runs")

    def connect(model: AnsweringModel, log: Callable[[str], None]) -> Any:
        return engine.connect(model, log if lines is None else lines.append)

    return kept_answers(connect, model, ASKED, out, "s", lambda *_: None)


def expected(names: Iterator[str] | None = None) -> dict[str, list[int]]:
    return {name: right({"prompt": PROMPTS[name]}) for name in names or PROMPTS}


def chunks(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.parent.glob("runs/run/answers/s/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_each_prompt_is_asked_once_by_ids(folder: Path, serve: Callable[..., Stub]) -> None:
    stub = serve(good)
    kept = answer(folder, options(stub.url))
    assert (kept.tokens, kept.made) == (expected(), 12)
    assert {answer.finish for answer in kept.answers.values()} == {"stop"}
    assert set(stub.asked.values()) == {1}
    body = next(body for body in stub.bodies if body["prompt"] == [10, 11, 20])
    wanted = {"model": "m", "max_tokens": 4, "temperature": 0.0, "seed": 0, "top_k": 0}
    assert wanted.items() <= body.items()
    [chunk] = chunks(folder)
    assert chunk["engine"]["model"] == "m"
    assert chunk["engine"]["settings"] == {"model": "m", "prompts": "ids", "body": {}}
    assert answer(folder, options(stub.url)).made == 0
    assert len(stub.bodies) == 12


def hang_up(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | None:
    return None if number % 3 == 0 else reply(body)


def fail(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | int:
    return 500 if number % 3 == 0 else reply(body)


def busy(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | tuple[int, str]:
    return (429, "0.05") if number % 4 == 0 else reply(body)


def torn(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | bytes:
    whole = json.dumps(reply(body)).encode()
    return whole[: len(whole) // 2] if number % 3 == 0 else whole


def twice(_: Stub, number: int, body: Mapping[str, Any]) -> Reply:
    whole = reply(body)
    return {**whole, "choices": whole["choices"] * 2} if number % 3 == 0 else whole


def out_of_order(_: Stub, number: int, body: Mapping[str, Any]) -> Reply:
    time.sleep(0.1 * (number % 4 == 0))
    return reply(body)


def wrong_ids(_: Stub, number: int, body: Mapping[str, Any]) -> Reply:
    return reply(body, token_ids=[10**6]) if number % 3 == 0 else reply(body)


def strange(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | bytes:
    return (b"[]", b"{}", b'"x"', b"")[number // 3 % 4] if number % 3 == 0 else reply(body)


@pytest.mark.parametrize(
    "behave", [hang_up, fail, busy, torn, twice, out_of_order, wrong_ids, strange]
)
def test_every_prompt_is_answered_once_whatever_a_server_does(
    folder: Path, serve: Callable[..., Stub], behave: Behaviour
) -> None:
    kept = answer(folder, options(serve(behave).url, retries=8))
    assert (kept.tokens, kept.made) == (expected(), 12)


def test_a_server_that_hangs_is_asked_again(folder: Path, serve: Callable[..., Stub]) -> None:
    def hang(_: Stub, number: int, body: Mapping[str, Any]) -> Reply:
        time.sleep(0.6 * (number == 0))
        return reply(body)

    kept = answer(folder, options(serve(hang).url, timeout=0.3))
    assert kept.tokens == expected()


def test_a_pause_that_a_server_asks_for_is_kept(folder: Path, serve: Callable[..., Stub]) -> None:
    times: list[float] = []

    def rest(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | tuple[int, str]:
        times.append(time.monotonic())
        return (429, "0.4") if number == 0 else reply(body)

    answer(folder, options(serve(rest).url, at_once=1))
    assert times[1] - times[0] >= 0.4


def test_one_of_two_servers_may_die(folder: Path, serve: Callable[..., Stub]) -> None:
    def die(_: Stub, number: int, body: Mapping[str, Any]) -> Reply | None:
        time.sleep(0.02)
        return reply(body) if number < 3 else None

    def slow(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
        time.sleep(0.1)
        return reply(body)

    dying, living = serve(die), serve(slow)
    lines: list[str] = []
    kept = answer(folder, options(dying.url, living.url, at_once=1), lines)
    assert kept.tokens == expected()
    [line] = lines
    assert f"{dying.url} is given up after 3 failures" in line
    assert len(living.bodies) < 12


def refusal(folder: Path, engine: OpenAi) -> RotdistillError:
    with pytest.raises(SetupError) as caught:
        answer(folder, engine)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_resumed_run_asks_only_for_what_is_missing(
    folder: Path, serve: Callable[..., Stub]
) -> None:
    dying = serve(lambda _, number, body: reply(body) if number < 5 else None)
    problem = str(refusal(folder, options(dying.url, at_once=1)))
    assert "no server is left, and 7 texts are unanswered" in problem
    [chunk] = chunks(folder)
    assert len(chunk["answers"]) == 5
    stub = serve(good)
    kept = answer(folder, options(stub.url))
    assert (kept.tokens, kept.made) == (expected(), 7)
    assert {f"q{last - 20}" for last in stub.asked} == PROMPTS.keys() - chunk["answers"].keys()
    assert len(chunks(folder)) == 2


def test_a_prompt_without_a_usable_answer_is_named_and_the_others_are_kept(
    folder: Path, serve: Callable[..., Stub]
) -> None:
    def broken(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
        return reply(body, token_ids=[-1]) if body["prompt"][-1] == 23 else reply(body)

    stub = serve(broken)
    problem = str(refusal(folder, options(stub.url)))
    assert "the text 'q3' got no usable answer" in problem
    assert "-1 is no token id of the teacher" in problem
    assert stub.asked[23] == 3
    assert len(chunks(folder)[0]["answers"]) == 11
    assert answer(folder, options(serve(good).url)).made == 1


def test_a_prompt_that_a_server_does_not_take_is_not_asked_again(
    folder: Path, serve: Callable[..., Stub]
) -> None:
    stub = serve(lambda _, __, body: 400 if body["prompt"][-1] == 23 else reply(body))
    assert "the text 'q3' got no usable answer" in str(refusal(folder, options(stub.url)))
    assert stub.asked[23] == 1


def other_model(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
    return {**reply(body), "model": "other"}


def more_tokens(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
    return {**reply(body), "usage": {"prompt_tokens": 4}}


def other_text(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
    return reply(body, text="quite another text")


HOPELESS: dict[str, tuple[Behaviour, str]] = {
    "wrong model": (other_model, "answers as the model 'other', and 'm' was asked"),
    "wrong key": (lambda *_: 401, "answers with status 401"),
    "no such path": (lambda *_: 404, r"engine.urls \(they end with /v1\)"),
    "no ids": (lambda *_: 422, 'write engine.prompts = "text"'),
    "tokens of its own": (more_tokens, "it has read 4 tokens, and the prompt has 3"),
    "other tokenizer": (other_text, "the server has another tokenizer than the teacher"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_work_ends_at_once_and_says_what_to_do(
    folder: Path, serve: Callable[..., Stub], name: str
) -> None:
    behave, problem = HOPELESS[name]
    stub = serve(behave)
    with pytest.raises(SetupError, match=problem):
        answer(folder, options(stub.url, at_once=1, retries=0))
    assert chunks(folder) == []


def test_a_server_that_is_not_there_is_named(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    problem = str(refusal(folder, options(url, retries=1)))
    assert "no server is left, and 12 texts are unanswered" in problem
    assert url in problem


def test_answers_as_text_are_encoded_again(folder: Path, serve: Callable[..., Stub]) -> None:
    def text(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
        last = int(body["prompt"].split()[-1].removeprefix("w"))
        ended = last % 2 == 0
        answer = {"text": f"w{last} w1", "finish_reason": "stop" if ended else "length"}
        return {"model": "m", "choices": [answer]}

    kept = answer(folder, options(serve(text).url, prompts="text"))
    tokenizer = AnsweringModel(
        folder, open_checkpoint(folder).weights, torch.device("cpu"), torch.float32
    ).tokenizer
    for name, found in kept.answers.items():
        last = tokenizer.decode([PROMPTS[name][-1]])
        own = tokenizer(f"{last} w1", add_special_tokens=False)["input_ids"]
        ended = int(last.removeprefix("w")) % 2 == 0
        assert list(found.tokens) == [*own, *([END] if ended else [])]
        assert found.finish == ("stop" if ended else "length")


def test_text_that_the_tokenizer_does_not_give_back_is_refused_by_name(
    folder: Path, serve: Callable[..., Stub]
) -> None:
    def text(_: Stub, __: int, body: Mapping[str, Any]) -> Reply:
        return reply(body, token_ids=None, text="☃")

    problem = str(refusal(folder, options(serve(text).url)))
    assert "the teacher's tokenizer does not give back '☃'" in problem


def test_the_key_goes_to_the_server_and_nowhere_else(
    folder: Path, serve: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = serve(good)
    engine = options(stub.url, key_env="PICO_KEY")
    assert "variable PICO_KEY, which engine.key_env names, is not set" in str(
        refusal(folder, engine)
    )
    monkeypatch.setenv("PICO_KEY", "hidden-secret")
    answer(folder, engine)
    assert {headers["Authorization"] for headers in stub.headers} == {"Bearer hidden-secret"}
    for path in (folder.parent / "runs").rglob("*"):
        assert path.is_dir() or b"hidden-secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('urls = [], model = "m"', "urls: "),
        ('model = "m"', "urls: "),
        ('urls = ["localhost:8000"], model = "m"', "write an address such as"),
        ('urls = ["http://me:secret@h/v1"], model = "m"', "a secret has no place"),
        ('urls = ["http://h/v1?key=secret"], model = "m"', "a secret has no place"),
        ('urls = ["http://h/v1?a=b"], model = "m"', "write a plain address, without ?"),
        ('urls = ["http://h/v1"]', "model: "),
        ('urls = ["http://h/v1"], model = "m", key_env = "sk-secret12345"', "the name of"),
        ('urls = ["http://h/v1"], model = "m", key_env = "secret_key"', "in capitals"),
        ('urls = ["http://h/v1"], model = "m", key = "secret"', "a secret has no place"),
        ('urls = ["http://h/v1"], model = "m", timeout = 0', "timeout: "),
    ],
)
def test_wrong_options_are_refused(pico_workspace: PicoWorkspace, table: str, problem: str) -> None:
    step = 'step = [{ use = "chop", layers = 1 }]'
    path = pico_workspace.recipe(step, tables=f'engine = {{ use = "openai", {table} }}')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert problem in str(caught.value)
    for secret in ("secret1", "=secret", ":secret", "secret_key"):
        assert secret not in str(caught.value)


def test_a_run_is_answered_by_a_server(
    pico_workspace: PicoWorkspace, serve: Callable[..., Stub]
) -> None:
    pico_workspace.texts(blurbs=3, questions=3)
    pico_workspace.model()
    stub = serve(good)
    step = 'step = [{ use = "chop", layers = 1 }]'
    table = f'engine = {{ use = "openai", urls = ["{stub.url}"], model = "m" }}'
    recipe = pico_workspace.recipe(step, tables=table)
    outcome = pico_workspace.run(recipe)
    assert len(stub.bodies) == 3
    [chunk] = outcome.folder.glob("answers/teacher-heldout/*.json")
    assert json.loads(chunk.read_text())["engine"]["engine"] == "openai"
    moved = pico_workspace.run(recipe, {"engine.urls": ["http://127.0.0.1:1/v1"]})
    assert moved.folder == outcome.folder


def test_chat_asks_the_server_for_the_teacher(
    pico_workspace: PicoWorkspace, serve: Callable[..., Stub]
) -> None:
    pico_workspace.texts(blurbs=3, questions=1)
    pico_workspace.model()
    stub = serve(good)
    table = f'engine = {{ use = "openai", urls = ["{stub.url}"], model = "m" }}'
    step = 'step = [{ use = "chop", layers = 1 }]'
    pico_workspace.run(pico_workspace.recipe(step, tables=table))
    stub.bodies.clear()
    words = ("chat", "trial", "--teacher", "--tokens", "4", "--json")
    code, out, err = pico_workspace.command(*words, "--prompt", "w3", "--prompt", "w4 w5")
    assert (code, err) == (0, "")
    tokenizer = open_checkpoint(pico_workspace.folder / "model").tokenizer
    first, second = (body["prompt"] for body in stub.bodies)
    answers = [tokenizer.decode(right(body), skip_special_tokens=True) for body in stub.bodies]
    assert [turn["answers"]["teacher"] for turn in json.loads(out)] == answers
    # The second prompt holds the first one, and its answer.
    assert second[: len(first) + 2] == [*first, *right(stub.bodies[0])[:2]]
    assert {body["max_tokens"] for body in stub.bodies} == {4}
    stub.behave = lambda *_: 400
    code, out, err = pico_workspace.command(*words, "--prompt", "w3")
    assert code == 3
    assert "the text 'w3' got no usable answer" in err
    [turn] = json.loads(out)
    assert list(turn["answers"]) == ["full"]


def test_a_plan_counts_what_servers_are_asked_and_nothing_of_the_teacher(
    pico_workspace: PicoWorkspace,
) -> None:
    pico_workspace.texts(blurbs=3, questions=3)
    pico_workspace.model()
    step = 'step = [{ use = "chop", layers = 1 }]'
    urls = '["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]'
    tables = f'engine = {{ use = "openai", urls = {urls}, model = "m" }}'
    recipe = pico_workspace.recipe(step, tables=tables)
    words = ("plan", recipe.name, "--json", "--set", "lessons.count=10")
    words = (*words, "--set", "lessons.from=teacher", "--set", "lessons.general=0")
    _, answers, lessons, *_ = json.loads(pico_workspace.command(*words)[1])["steps"]
    for line, prompts, tokens in ((answers, 3, 12), (lessons, 20, 10 * 64 + 10 * 64)):
        assert (line["use"], line["prompts"], line["answer_tokens"]) == ("openai", prompts, tokens)
        sizes = ("ram_bytes", "disk_bytes", "read_bytes", "traffic_bytes", "seconds")
        assert [line[size] for size in sizes] == [0] * 5
    assert answers["note"] == (
        "3 prompts and up to 12 tokens of answers for 2 servers, whose time is not counted"
    )
    table = ("--set", "engine={ use = 'transformers' }")
    _, answers, lessons, *_ = json.loads(pico_workspace.command(*words, *table)[1])["steps"]
    assert answers["ram_bytes"] > 0 < lessons["read_bytes"]
    assert (answers["note"], answers["prompts"]) == ("", 3)
