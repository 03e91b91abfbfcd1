"""Every HTTP library alike: where requests go, what they carry, how their answers end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from leyden import wire
from leyden.context import role
from leyden.errors import DeadlineExceeded, EngineError, LostContextError
from leyden.spans import Status
from tests.capture.clients import KINDS, library_of, send, transport_error
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

CHAT = "/chat/completions"
KEY = "Bearer user-key"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, installed: None) -> Iterator[str]:
    library_of(request.param)
    yield request.param


def body(text: str = "role=writer tell me a story", **fields: object) -> bytes:
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": text}]
    return json.dumps({"model": "gpt", "messages": messages, **fields}, indent=3).encode()


def only(recorded: Recorded) -> Any:
    (call,) = recorded.calls
    return call


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_unrouted_role_passes_byte_identical_and_is_recorded(
    kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded, role("critic"):
        reply = send(kind, user_server.base_url + CHAT, body(), {"authorization": KEY})
    (seen,) = user_server.seen
    assert (seen.raw, seen.headers["authorization"]) == (body(), KEY)
    assert not [name for name in seen.headers if name.startswith("x-leyden")]
    assert gateway.seen == []
    assert json.loads(reply.content)["model"] == "gpt"
    call = only(recorded)
    assert (call.role, call.status, recorded.parent_of(call).name) == ("critic", Status.OK, "critic")
    (answer,) = call.attributes["gen_ai.output.messages"]
    assert answer["content"] == "answer to rollout=None role=writer"


def test_a_routed_role_goes_to_the_gateway_with_nothing_of_the_users(
    kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    secrets = {"authorization": KEY, "x-api-key": "secret", "cookie": "session=secret", "user-agent": "secret-app"}
    with rollout(routing_to(gateway.base_url, "schreiber/ü")) as recorded, role("schreiber/ü"):
        reply = send(kind, user_server.base_url + CHAT + "?api-version=secret", body(), secrets)
    (seen,) = gateway.seen
    assert user_server.seen == []
    assert seen.body == {**json.loads(body()), "model": "sql"}
    assert {name: value for name, value in seen.headers.items() if name.startswith("x-leyden")} == {
        "x-leyden-model": json.loads(body())["model"],
        "x-leyden-rollout": "r1",
        "x-leyden-attempt": "1",
        "x-leyden-role": "schreiber%2F%C3%BC",
        "x-leyden-span": only(recorded).span_id,
        "x-leyden-parent": only(recorded).parent_id,
        "x-leyden-http-attempt": "0",
    }
    assert seen.headers["authorization"] == "Bearer gateway-token"
    assert "secret" not in json.dumps(seen.headers)
    assert reply.url.startswith(user_server.base_url), "the user's code sees its own address"
    assert "gateway-token" not in str(reply.sent_headers)


@pytest.mark.parametrize("is_routed", [True, False])
def test_a_prompt_replaces_the_system_message_of_its_role(
    kind: str, is_routed: bool, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    routing = routing_to(gateway.base_url, "writer" if is_routed else "other", prompts={"writer": "better"})
    with rollout(routing), role("writer"):
        send(kind, user_server.base_url + CHAT, body(), {"authorization": KEY})
    (seen,) = (gateway if is_routed else user_server).seen
    assert [message["content"] for message in seen.body["messages"]] == ["better", "role=writer tell me a story"]
    assert seen.headers["authorization"] == ("Bearer gateway-token" if is_routed else KEY)


@pytest.mark.parametrize("is_routed", [True, False])
@pytest.mark.parametrize(
    ("mark", "stop_after", "status", "error"),
    [
        ("", None, Status.OK, None),
        ("broken", None, Status.OK, None),
        ("cut", None, Status.INTERRUPTED, "the stream ended before its last event"),
        ("gated", 2, Status.INTERRUPTED, "the reader stopped before its last event"),
        ("fails", None, Status.ERROR, "the answer says: the server failed"),
        ("zipped", None, Status.OK, None),
        ("zipped cut", None, Status.INTERRUPTED, "the stream ended before its last event"),
    ],
)
def test_how_a_stream_ends_is_recorded_with_what_was_said(
    kind: str,
    is_routed: bool,
    mark: str,
    stop_after: int | None,
    status: Status,
    error: str | None,
    user_server: FakeOpenAI,
    gateway: FakeOpenAI,
) -> None:
    with rollout(routing_to(gateway.base_url, "writer" if is_routed else "other")) as recorded, role("writer"):
        sent = body(f"role=writer {mark} .", stream=True)
        reply = send(kind, user_server.base_url + CHAT, sent, stream=True, stop_after=stop_after)
    assert len((gateway if is_routed else user_server).seen) == 1
    call = only(recorded)
    assert (call.status, call.error) == (status, error)
    (answer,) = call.attributes["gen_ai.output.messages"]
    assert str(answer["content"]).startswith("answer ")
    is_whole = status is Status.OK
    assert (answer["content"] == "answer to rollout=None role=writer ") is is_whole
    assert (b"[DONE]" in reply.content) is is_whole
    assert (recorded.context.infrastructure_error is not None) is (is_routed and not is_whole and stop_after is None)


def test_a_compressed_answer_is_read_for_the_record(kind: str, user_server: FakeOpenAI) -> None:
    with rollout() as recorded:
        reply = send(kind, user_server.base_url + CHAT, body("role=main zipped ."))
    assert json.loads(reply.content)["id"] == "chatcmpl-1"
    assert only(recorded).attributes["gen_ai.usage.output_tokens"] == 3


def test_a_request_in_flight_ends_at_the_deadline_whatever_the_users_timeout(kind: str, gateway: FakeOpenAI) -> None:
    start = time.monotonic()
    with rollout(routing_to(gateway.base_url), timeout_seconds=1.0) as recorded:
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1' passed"):
            send(kind, "http://user.invalid" + CHAT, body("slow=5"))
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1' passed"):
            send(kind, "http://user.invalid" + CHAT, body())
    assert time.monotonic() - start < 4
    assert [call.status for call in recorded.calls] == [Status.INTERRUPTED, Status.INTERRUPTED]
    assert len(gateway.seen) == 1


def test_a_stream_that_stalls_ends_at_the_deadline_and_is_nobodys_fault(kind: str, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url), timeout_seconds=0.4) as recorded:
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1' passed"):
            send(kind, "http://user.invalid" + CHAT, body("gated .", stream=True), stream=True)
    assert only(recorded).status is Status.INTERRUPTED
    assert recorded.context.infrastructure_error is None


def test_a_held_request_is_repeated_until_the_gateway_answers(kind: str, gateway: FakeOpenAI) -> None:
    gateway.held = 3
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert send(kind, "http://user.invalid" + CHAT, body()).status == 200
    assert gateway.held == 0
    assert only(recorded).status is Status.OK
    assert recorded.context.infrastructure_error is None


def test_a_refused_connection_is_tried_again_for_a_while(kind: str) -> None:
    port = closed_port()

    def start_late() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as listener:
            connection, _ = listener.accept()
            with connection:
                received = b""
                while not received.endswith(b"}"):
                    received += connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")

    thread = threading.Thread(target=start_late)
    thread.start()
    with rollout(routing_to(f"http://127.0.0.1:{port}/v1")) as recorded:
        assert send(kind, "http://user.invalid" + CHAT, body()).status == 200
    thread.join()
    assert recorded.context.infrastructure_error is None


def test_a_dead_gateway_is_blamed_on_the_infrastructure(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.wire.patience.CONNECT_PATIENCE_SECONDS", 0.2)
    with rollout(routing_to(f"http://127.0.0.1:{closed_port()}/v1")) as recorded:
        with pytest.raises(transport_error(kind)) as raised:
            send(kind, "http://user.invalid" + CHAT, body())
    assert recorded.context.infrastructure_error is raised.value
    assert only(recorded).status is Status.ERROR


def test_an_error_status_reaches_the_user_and_the_record(kind: str, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert send(kind, "http://user.invalid" + CHAT, body("status=500")).status == 500
        assert isinstance(recorded.context.infrastructure_error, EngineError)
        assert send(kind, "http://user.invalid" + CHAT, body("status=500")).status == 200
        assert send(kind, "http://user.invalid" + CHAT, body("status=400")).status == 400
    assert recorded.context.infrastructure_error is None
    assert [(call.status, call.error) for call in recorded.calls] == [
        (Status.ERROR, "HTTP 500"),
        (Status.OK, None),
        (Status.ERROR, "HTTP 400"),
    ]


def test_a_lost_call_is_refused_by_its_line(kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    caught: list[BaseException] = []

    def lose() -> None:
        try:
            send(kind, user_server.base_url + CHAT, body())
        except LostContextError as error:
            caught.append(error)

    with rollout(routing_to(gateway.base_url)):
        thread = threading.Thread(target=lose)
        thread.start()
        thread.join()
    assert "clients.py:" in str(caught[0]) and "belongs to no known rollout" in str(caught[0])
    assert user_server.seen == gateway.seen == []


def test_a_server_that_is_down_falls_back_to_the_apps_own_model(
    kind: str, user_server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = f"http://127.0.0.1:{closed_port()}/v1"
    wire.set_default_routing(routing_to(down, "writer", fallback=True))
    try:
        with role("writer"):
            assert send(kind, user_server.base_url + CHAT, body(), {"authorization": KEY}).status == 200
    finally:
        wire.set_default_routing(None)
    assert user_server.seen[0].headers["authorization"] == KEY


def test_uninstall_restores_the_library(kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    library = library_of(kind)
    owner, name = {"requests": ("Session", "send"), "aiohttp": ("ClientSession", "_request")}.get(
        kind, ("AsyncClient" if kind.endswith("async") else "Client", "send")
    )
    patched = vars(getattr(library, owner))[name]
    wire.uninstall()
    original = vars(getattr(library, owner))[name]
    assert patched is not original and patched.__wrapped__ is original
    with rollout(routing_to(gateway.base_url)):
        send(kind, user_server.base_url + CHAT, body())
    assert len(user_server.seen) == 1
