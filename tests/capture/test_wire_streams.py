"""Streams pass through unbuffered, and how they end is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from leyden.context import role
from leyden.errors import DeadlineExceeded
from leyden.spans import Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI


def body(text: str = "role=writer tell me a long story please") -> dict[str, object]:
    return {"model": "gpt", "stream": True, "messages": [{"role": "user", "content": text}]}


def read(library: Any, url: str, content: object, *, is_async: bool, stop_after: int | None = None) -> list[str]:
    """Return the lines of a stream, or the first ones."""
    lines: list[str] = []

    async def run() -> None:
        async with library.AsyncClient() as client:
            async with client.stream("POST", url + "/chat/completions", json=content) as response:
                async for line in response.aiter_lines():
                    lines.append(line)
                    if stop_after is not None and len(lines) >= stop_after:
                        break

    if is_async:
        asyncio.run(run())
        return lines
    with library.Client() as client, client.stream("POST", url + "/chat/completions", json=content) as response:
        for line in response.iter_lines():
            lines.append(line)
            if stop_after is not None and len(lines) >= stop_after:
                break
    return lines


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[True, False], ids=["routed", "unrouted"])
def scene(
    request: pytest.FixtureRequest, user_server: FakeOpenAI, gateway: FakeOpenAI, installed: None
) -> tuple[Any, FakeOpenAI]:
    """A routing, and the server that answers under it."""
    routing = routing_to(gateway.base_url, "writer" if request.param else "other")
    return routing, gateway if request.param else user_server


def only_call(recorded: Recorded) -> tuple[Status, str | None]:
    (call,) = recorded.calls
    return call.status, call.error


def test_a_stream_read_to_its_end_is_ok(
    library: Any, is_async: bool, scene: tuple[Any, FakeOpenAI], user_server: FakeOpenAI
) -> None:
    routing, server = scene
    with rollout(routing) as recorded, role("writer"):
        lines = read(library, user_server.base_url, body(), is_async=is_async)
    assert lines[-2] == "data: [DONE]"
    assert len(server.seen) == 1
    assert only_call(recorded) == (Status.OK, None)


def test_a_stream_cut_by_the_server_is_interrupted(
    library: Any, is_async: bool, scene: tuple[Any, FakeOpenAI], user_server: FakeOpenAI
) -> None:
    with rollout(scene[0]) as recorded, role("writer"):
        read(library, user_server.base_url, body("please cut here"), is_async=is_async)
    assert only_call(recorded) == (Status.INTERRUPTED, "the stream ended before its last event")


def test_a_stream_closed_early_by_the_reader_is_interrupted(
    library: Any, is_async: bool, scene: tuple[Any, FakeOpenAI], user_server: FakeOpenAI
) -> None:
    with rollout(scene[0]) as recorded, role("writer"):
        read(library, user_server.base_url, body(), is_async=is_async, stop_after=3)
    assert only_call(recorded) == (Status.INTERRUPTED, "the reader stopped before its last event")
    assert recorded.context.infrastructure_error is None


@pytest.mark.parametrize(
    ("path", "ending"), [("/chat/completions", '"finish_reason": "stop"'), ("/messages", '"type": "message_delta"')]
)
def test_a_reader_cancelled_when_it_knows_why_the_answer_ended_has_the_whole_answer(
    library: Any, scene: tuple[Any, FakeOpenAI], user_server: FakeOpenAI, path: str, ending: str
) -> None:
    lines: list[str] = []
    content = body("role=writer it lingers") | {"max_tokens": 9}

    async def reader() -> None:
        async with library.AsyncClient() as client:
            async with client.stream("POST", user_server.base_url + path, json=content) as response:
                async for line in response.aiter_lines():
                    lines.append(line)

    async def run() -> None:
        task = asyncio.create_task(reader())
        async with asyncio.timeout(10):
            while not any(ending in line for line in lines):
                await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with rollout(scene[0]) as recorded, role("writer"):
        asyncio.run(run())
    assert only_call(recorded) == (Status.OK, None)
    (message,) = recorded.calls[0].attributes["gen_ai.output.messages"]  # type: ignore[misc]
    assert str(message["content"]).startswith("answer to")


def test_pieces_arrive_before_the_rest_is_made(
    library: Any, scene: tuple[Any, FakeOpenAI], user_server: FakeOpenAI
) -> None:
    routing, server = scene
    url = user_server.base_url + "/chat/completions"
    with rollout(routing), role("writer"), library.Client(timeout=5) as client:
        with client.stream("POST", url, json=body("gated")) as response:
            lines = response.iter_lines()
            first = [next(lines) for _ in range(3)]
            server.go_on.set()
            rest = list(lines)
    assert '"answer "' in first[2]
    assert rest[-2] == "data: [DONE]"


def test_a_stream_stops_at_the_deadline(library: Any, is_async: bool, gateway: FakeOpenAI, installed: None) -> None:
    with rollout(routing_to(gateway.base_url), timeout_seconds=30) as recorded:
        recorded.context.deadline = None if recorded.context.deadline is None else recorded.context.deadline - 30 + 0.05
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1'"):
            read(library, "http://user.invalid", body("slow=0.04 " + "a " * 9), is_async=is_async)
            read(library, "http://user.invalid", body("slow=0.04 " + "b " * 9), is_async=is_async)
    assert recorded.calls[-1].status is Status.INTERRUPTED
