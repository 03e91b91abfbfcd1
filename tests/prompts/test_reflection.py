"""Asking the model that rewrites prompts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from leyden.errors import ConfigurationError
from leyden.wire.state import is_below_the_wire
from leyden_plugins.algorithms.prompt import Reflection
from leyden_plugins.algorithms.prompt.reflection import Message, Reflector, asked
from leyden_plugins.chat.endpoint import Answer
from tests.prompts.desk import Desk

QUESTION = [{"role": "user", "content": "Improve this."}]


class Server:
    """An endpoint that answers `statuses` and then 200, and numbers its answers."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.base_url = ""


@contextmanager
def serving() -> Iterator[Server]:
    found = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            found.keys.append(self.headers.get("authorization"))
            status = found.statuses.pop(0) if found.statuses else 200
            text = f"answer {len(found.bodies)}"
            usage = {"prompt_tokens": 11, "completion_tokens": 7}
            content = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


def reflector(ask: Any, desk: Desk, **options: Any) -> Reflector:
    return Reflector(ask, desk, prefix="p", **{"most_calls": None, **options})  # type: ignore[arg-type]


def test_any_openai_compatible_endpoint_can_reflect_and_says_what_it_cost() -> None:
    desk = Desk()
    with serving() as server:
        model = Reflection("m", base_url=server.base_url, api_key="a-key", options={"max_tokens": 9})
        one = reflector(model, desk)
        answers = asyncio.run(one.answers([QUESTION, QUESTION]))
    assert sorted(map(str, answers)) == ["answer 1", "answer 2"], "an equal question is asked anew"
    assert server.bodies[0] == {"model": "m", "messages": QUESTION, "temperature": 1.0, "max_tokens": 9}
    assert server.keys == ["Bearer a-key"] * 2
    assert (one.spent.calls, one.spent.prompt_tokens, one.spent.completion_tokens) == (2, 22, 14)
    again = reflector(model, desk)
    assert asyncio.run(again.answers([QUESTION, QUESTION])) == answers, "from the store, each in its place"
    assert again.spent == one.spent
    assert "a-key" not in repr(model)


def test_a_temperature_that_a_model_refuses_can_be_left_out() -> None:
    with serving() as server:
        asyncio.run(asked(Reflection("m", base_url=server.base_url, api_key_env=None, temperature=None), QUESTION))
    assert server.bodies == [{"model": "m", "messages": QUESTION}]
    assert server.keys == [None]


def test_a_busy_endpoint_is_asked_again_and_one_that_refuses_is_not() -> None:
    desk = Desk()
    with serving() as server:
        model = Reflection("m", base_url=server.base_url, api_key_env=None)
        model._endpoint.pause_seconds = 0.01
        server.statuses = [503, 429]
        assert asyncio.run(reflector(model, desk).answers([QUESTION])) == ["answer 3"]
        server.statuses = [401]
        with pytest.raises(ConfigurationError, match=r"the reflection model at .* refused 'm': HTTP 401"):
            asyncio.run(reflector(model, Desk()).answers([QUESTION]))


def test_a_missing_key_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="no 'OPENAI_API_KEY' for the reflection model"):
        Reflection("gpt-5")


class Callable:
    async def __call__(self, messages: Sequence[Message]) -> str:
        return f"async {is_below_the_wire()}"


def test_any_function_can_reflect_sync_or_async_and_nothing_of_it_is_recorded() -> None:
    async def coroutine(messages: Sequence[Message]) -> str:
        return f"async {is_below_the_wire()}"

    def function(messages: Sequence[Message]) -> str:
        assert threading.current_thread() is not threading.main_thread(), "the loop goes on meanwhile"
        return f"sync {is_below_the_wire()}"

    assert asyncio.run(asked(coroutine, QUESTION)) == Answer("async True")
    assert asyncio.run(asked(Callable(), QUESTION)) == Answer("async True")
    assert asyncio.run(asked(lambda messages: coroutine(messages), QUESTION)) == Answer("async True")
    assert asyncio.run(asked(function, QUESTION)) == Answer("sync True")


def test_what_is_no_text_is_a_failure_and_so_is_nothing() -> None:
    desk = Desk()
    found = reflector(lambda messages: None if "a" in messages[0]["content"] else "  ", desk)
    questions = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert asyncio.run(found.answers(questions)) == [None, None]
    assert found.spent.errors == 2
    assert any("returned None, not a text" in line for line in desk.told)
    assert any("it answered nothing" in line for line in desk.told)
