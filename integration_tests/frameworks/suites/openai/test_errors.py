"""What goes wrong is recorded for what it is, and the user's code sees what it would have seen without Leyden."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest

import leyden
from leyden import wire
from leyden.errors import DeadlineExceeded, LeydenError, LostContextError
from leyden.spans import Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

TOOLS: list[Any] = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


class Verdict(pydantic.BaseModel):
    """A structured output."""

    score: int


def ask(text: str) -> dict[str, Any]:
    return {"model": "gpt", "messages": [{"role": "user", "content": f"role=writer {text} ."}]}


def client(base_url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="user-key", **{"max_retries": 0, **options})


def refused(base_url: str) -> object:
    return client(base_url).chat.completions.create(**ask("status=400"))


def failing_server(base_url: str) -> object:
    return client(base_url, max_retries=1).chat.completions.create(**ask("status=500*9"))


def cut_stream(base_url: str) -> object:
    chunks: Any = client(base_url).chat.completions.create(**ask("cut"), stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def error_in_stream(base_url: str) -> object:
    return list(client(base_url).chat.completions.create(**ask("fails"), stream=True))


def broken_piece(base_url: str) -> object:
    return list(client(base_url).chat.completions.create(**ask("broken"), stream=True))


def cut_response(base_url: str) -> object:
    with client(base_url).responses.stream(model="gpt", input="role=writer cut .") as events:
        return events.get_final_response()


def error_in_response(base_url: str) -> object:
    return list(client(base_url).responses.create(model="gpt", input="role=writer fails .", stream=True))


def structured_output_that_does_not_fit(base_url: str) -> object:
    parse = getattr(client(base_url).chat.completions, "parse", None) or client(base_url).beta.chat.completions.parse
    return parse(**ask("go"), response_format=Verdict)


def broken_arguments(base_url: str) -> object:
    answer = client(base_url).chat.completions.create(**ask("call=search"), tools=TOOLS)
    calls: Any = answer.choices[0].message.tool_calls
    return json.loads(calls[0].function.arguments + "}")


def timeout(base_url: str) -> object:
    return client(base_url, timeout=0.1).chat.completions.create(**ask("slow=0.5"))


CUT = (Status.INTERRUPTED, "the stream ended before its last event")
FAILED = (Status.ERROR, "the answer says: the server failed")

CASES: list[tuple[Callable[[str], object], list[tuple[Status, str | None]]]] = [
    (refused, [(Status.ERROR, "HTTP 400")]),
    (failing_server, [(Status.ERROR, "HTTP 500")] * 2),
    (cut_stream, [CUT]),
    (error_in_stream, [FAILED]),
    (broken_piece, [(Status.INTERRUPTED, "the reader stopped before its last event")]),
    (cut_response, [CUT]),
    (error_in_response, [FAILED]),
    (structured_output_that_does_not_fit, [(Status.OK, None)]),
    (broken_arguments, [(Status.OK, None)]),
]


def outcome(act: Callable[[str], object], base_url: str) -> str:
    """Return what a call returned or raised, in words."""
    try:
        return f"returned {act(base_url)!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


def statuses(recorded: Recorded) -> list[tuple[Status, str | None]]:
    return [(call.status, call.error) for call in recorded.calls]


@pytest.mark.parametrize("is_routed", [True, False])
@pytest.mark.parametrize(("act", "expected"), CASES, ids=[act.__name__ for act, _ in CASES])
def test_the_user_sees_what_happens_without_leyden_and_the_span_says_what_it_was(
    act: Callable[[str], object],
    expected: list[tuple[Status, str | None]],
    is_routed: bool,
    user_server: FakeOpenAI,
    gateway: FakeOpenAI,
) -> None:
    without = outcome(act, user_server.base_url)
    user_server.clear()
    wire.install()
    try:
        with rollout(routing_to(gateway.base_url, "writer" if is_routed else "other")) as recorded:
            with leyden.role("writer"):
                found = outcome(act, user_server.base_url)
    finally:
        wire.uninstall()
    assert found.replace("model='sql'", "model='gpt'") == without
    assert statuses(recorded) == expected
    assert bool(gateway.seen) is is_routed


def test_the_users_own_timeout_holds_for_roles_that_are_not_routed(
    user_server: FakeOpenAI, gateway: FakeOpenAI, installed: None
) -> None:
    with rollout(routing_to(gateway.base_url, "other")) as recorded:
        with pytest.raises(openai.APITimeoutError, match="timed out"):
            timeout(user_server.base_url)
    (call,) = recorded.calls
    assert call.status is Status.ERROR and "ReadTimeout" in str(call.error)


def test_a_trained_role_may_take_longer_than_the_users_timeout(gateway: FakeOpenAI, installed: None) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        timeout("http://user.invalid/v1")
    assert statuses(recorded) == [(Status.OK, None)]


def test_a_retry_that_succeeds_clears_the_blame(gateway: FakeOpenAI, installed: None) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        client("http://user.invalid/v1", max_retries=2).chat.completions.create(**ask("status=500*2"))
    assert [status for status, _ in statuses(recorded)] == [Status.ERROR, Status.ERROR, Status.OK]
    assert recorded.context.infrastructure_error is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_routed", [True, False])
def test_a_cancelled_call_is_cancelled(
    stream: bool, is_routed: bool, user_server: FakeOpenAI, gateway: FakeOpenAI, installed: None
) -> None:
    async def call() -> None:
        async with openai.AsyncOpenAI(base_url=user_server.base_url, api_key="user-key") as made:
            text = "gated" if stream else "slow=5"
            answer: Any = await made.chat.completions.create(**ask(text), stream=stream)
            async for _ in answer:
                pass

    with rollout(routing_to(gateway.base_url, "main" if is_routed else "other")) as recorded:
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(asyncio.wait_for(call(), 0.5))
    (found,) = recorded.calls
    assert found.status is Status.CANCELLED
    if stream:
        assert found.attributes["gen_ai.output.messages"][0]["content"] == "answer "  # type: ignore[index]


def test_a_reader_that_leaves_a_stream_early_interrupts_it(gateway: FakeOpenAI, installed: None) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        with client("http://user.invalid/v1").chat.completions.create(**ask("gated"), stream=True) as chunks:
            next(iter(chunks))
    assert statuses(recorded) == [(Status.INTERRUPTED, "the reader stopped before its last event")]
    assert recorded.context.infrastructure_error is None


def test_the_deadline_passes_through_the_client(gateway: FakeOpenAI, installed: None) -> None:
    with rollout(routing_to(gateway.base_url), timeout_seconds=0.3):
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1'"):
            client("http://user.invalid/v1", max_retries=5).chat.completions.create(**ask("slow=5"))


def test_what_leyden_refuses_is_the_cause_of_what_the_client_raises(
    gateway: FakeOpenAI, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> object:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, refused, "http://user.invalid/v1")

    with rollout(routing_to(gateway.base_url)):
        with pytest.raises((openai.APIConnectionError, LeydenError)) as raised:
            asyncio.run(main())
    cause: BaseException | None = raised.value
    while cause is not None and not isinstance(cause, LostContextError):
        cause = cause.__cause__
    assert "test_errors.py" in str(cause) and "in refused" in str(cause)
    assert "belongs to no known rollout" in caplog.text
