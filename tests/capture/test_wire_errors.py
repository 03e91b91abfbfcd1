"""What the wire refuses, retries and blames."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from leyden import wire
from leyden.errors import DeadlineExceeded, EngineError, LostContextError, RolloutError
from leyden.spans import Status
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI


@pytest.fixture(autouse=True)
def wired(installed: None) -> None:
    """Every test here runs with the wire."""


def body(text: str = "role=writer") -> dict[str, object]:
    return {"model": "gpt", "messages": [{"role": "user", "content": text}]}


def call(library: Any, url: str, text: str = "role=writer", path: str = "/chat/completions") -> Any:
    with library.Client() as client:
        return client.post(url + path, json=body(text))


def async_call(library: Any, url: str, text: str = "role=writer") -> Any:
    async def run() -> Any:
        async with library.AsyncClient() as client:
            return await client.post(url + "/chat/completions", json=body(text))

    return asyncio.run(run())


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("send", [call, async_call])
def test_a_request_after_the_deadline_never_leaves(send: Any, library: Any, user_server: FakeOpenAI) -> None:
    with rollout(timeout_seconds=0) as recorded:
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1' passed"):
            send(library, user_server.base_url)
    assert user_server.seen == []
    assert recorded.calls[0].status is Status.INTERRUPTED


@pytest.mark.parametrize("send", [call, async_call])
def test_a_request_in_flight_ends_at_the_deadline_whatever_the_users_timeout(
    send: Any, library: Any, gateway: FakeOpenAI
) -> None:
    start = time.monotonic()
    with rollout(routing_to(gateway.base_url), timeout_seconds=0.3) as recorded:
        with pytest.raises(DeadlineExceeded):
            send(library, "http://user.invalid", "slow=5")
    assert time.monotonic() - start < 3
    assert recorded.context.infrastructure_error is None


@pytest.mark.parametrize("send", [call, async_call])
def test_a_held_request_is_repeated_until_the_gateway_answers(send: Any, library: Any, gateway: FakeOpenAI) -> None:
    gateway.held = 3
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert send(library, "http://user.invalid").status_code == 200
    assert gateway.held == 0
    assert [seen.headers["x-leyden-http-attempt"] for seen in gateway.seen] == ["0"]
    assert recorded.calls[0].status is Status.OK
    assert recorded.context.infrastructure_error is None


def test_a_request_held_to_the_deadline_stops_the_agent(library: Any, gateway: FakeOpenAI) -> None:
    gateway.held = 10_000
    with rollout(routing_to(gateway.base_url), timeout_seconds=0.3):
        with pytest.raises(DeadlineExceeded, match=r"held until|the deadline of rollout"):
            call(library, "http://user.invalid")


@pytest.mark.parametrize("send", [call, async_call])
def test_a_refused_connection_is_tried_again_for_a_while(send: Any, library: Any) -> None:
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
        assert send(library, "http://user.invalid").status_code == 200
    thread.join()
    assert recorded.context.infrastructure_error is None


@pytest.mark.parametrize("send", [call, async_call])
def test_a_dead_gateway_is_blamed_on_the_infrastructure(
    send: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden.wire.patience.CONNECT_PATIENCE_SECONDS", 0.2)
    with rollout(routing_to(f"http://127.0.0.1:{closed_port()}/v1")) as recorded:
        with pytest.raises(library.ConnectError) as raised:
            send(library, "http://user.invalid")
    assert raised.value.request.url.host == "user.invalid"
    assert recorded.context.infrastructure_error is raised.value
    assert recorded.calls[0].status is Status.ERROR


def test_a_server_error_counts_against_the_infrastructure_until_the_same_request_succeeds(
    library: Any, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert call(library, "http://user.invalid", "status=500").status_code == 500
        blamed = [recorded.context.infrastructure_error]
        assert isinstance(blamed[0], EngineError)
        call(library, "http://user.invalid", "another request")
        blamed.append(recorded.context.infrastructure_error)
        assert call(library, "http://user.invalid", "status=500").status_code == 200
        blamed.append(recorded.context.infrastructure_error)
    assert blamed == [blamed[0], blamed[0], None]
    assert [span.status for span in recorded.calls] == [Status.ERROR, Status.OK, Status.OK]


def test_a_client_error_is_the_agents(library: Any, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert call(library, "http://user.invalid", "status=400").status_code == 400
    assert recorded.context.infrastructure_error is None
    assert (recorded.calls[0].status, recorded.calls[0].error) == (Status.ERROR, "HTTP 400")


def test_a_call_that_lost_its_context_is_refused_and_its_line_named(
    library: Any, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    before = wire.lost_calls()
    with rollout(routing_to(gateway.base_url, "nobody")), ThreadPoolExecutor(1) as pool:
        with pytest.raises(LostContextError, match=r"test_wire_errors\.py:\d+ in call belongs to no known rollout"):
            pool.submit(call, library, user_server.base_url).result()
    assert wire.lost_calls() == before + 1
    assert user_server.seen == []
    call(library, user_server.base_url)
    assert len(user_server.seen) == 1, "once no rollout runs, calls are nobody's business"


def test_a_lost_call_may_pass(library: Any, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    routing = routing_to(gateway.base_url, on_lost_context="pass")
    with rollout(routing), ThreadPoolExecutor(1) as pool:
        pool.submit(call, library, user_server.base_url).result()
    assert len(user_server.seen) == 1


def test_work_left_over_from_a_rollout_that_is_over_is_refused(library: Any, gateway: FakeOpenAI) -> None:
    go = threading.Event()

    async def leave_a_thread_behind() -> asyncio.Future[Any]:
        def late() -> Any:
            go.wait(5)
            return call(library, "http://user.invalid")

        with rollout(routing_to(gateway.base_url)):
            return asyncio.ensure_future(asyncio.to_thread(late))

    async def main() -> None:
        task = await leave_a_thread_behind()
        go.set()
        with pytest.raises(RolloutError, match="rollout 'r1', which is over"):
            await task

    asyncio.run(main())
    assert gateway.seen == []
