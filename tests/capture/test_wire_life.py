"""What outlives a call: connections, loops, processes, failures and rollouts that linger."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import warnings
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import requests

from leyden import context, wire
from leyden.context import RolloutContext, rollout_scope
from leyden.errors import ConcurrentUseError, EngineError
from leyden.spans import Mode, Status
from leyden.wire.recognition import Outgoing, key_of
from leyden.wire.state import WIRE
from tests.capture.clients import KINDS, library_of, send
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI

URL = "http://user.invalid/v1/chat/completions"


@pytest.fixture(autouse=True)
def wired(installed: None) -> None:
    """Every test here runs with the wire."""


def body(text: str = "role=writer", **fields: object) -> bytes:
    return json.dumps({"model": "gpt", "messages": [{"role": "user", "content": text}], **fields}).encode()


async def ask() -> int:
    async with httpx.AsyncClient() as client:
        return (await client.post(URL, content=body())).status_code


class ClosesLate:
    """A client that closes its connection in a task it starts when it is collected, as openai's does."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.me = self

    def __del__(self) -> None:
        asyncio.get_running_loop().call_later(0.05, self.transport.abort)


def test_a_connection_that_was_collected_does_not_deafen_the_one_that_got_its_number() -> None:
    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        number = ours.fileno()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        await asyncio.sleep(0)
        transport.pause_reading()
        ClosesLate(transport)
        del ours, transport, _
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        # The system gives out the lowest free number, and the collection may have freed others.
        pairs = [socket.socketpair()]
        while pairs[-1][0].fileno() < number and pairs[-1][1].fileno() < number:
            pairs.append(socket.socketpair())
        live, other = pairs[-1] if pairs[-1][0].fileno() == number else pairs[-1][::-1]
        assert live.fileno() == number
        reader, writer = await asyncio.open_connection(sock=live)
        await asyncio.sleep(0.1)
        other.send(b"hello")
        heard = await asyncio.wait_for(reader.read(5), 2)
        writer.close()
        for each in (theirs, other, *(end for pair in pairs[:-1] for end in pair)):
            each.close()
        return heard

    assert asyncio.run(run()) == b"hello"


def test_uninstall_gives_asyncio_its_destructor_back() -> None:
    from asyncio import selector_events

    owner: Any = selector_events._SelectorTransport  # type: ignore[attr-defined]
    patched = owner.__del__
    wire.uninstall()
    assert owner.__del__ is patched.__wrapped__


def test_the_client_of_an_ended_loop_is_let_go(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)):
        for _ in range(5):
            assert asyncio.run(ask()) == 200
    library: Any = WIRE.libraries["httpx"]
    assert len(library.async_clients) == 1


def test_uninstall_in_a_running_loop_drops_the_client_of_another(gateway: FakeOpenAI) -> None:
    other = asyncio.new_event_loop()

    async def remove() -> bool:
        wire.uninstall()
        return wire.is_installed()

    with rollout(routing_to(gateway.base_url)):
        assert other.run_until_complete(ask()) == 200
    assert asyncio.run(remove()) is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        other.close()
        gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["httpx", "requests"])
def test_a_forked_child_has_connections_and_locks_of_its_own(kind: str, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)):
        assert send(kind, URL, body()).status == 200
        library: Any = WIRE.libraries[kind]
        with library.lock:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, lambda *_: os._exit(2))
                signal.alarm(10)
                try:
                    os._exit(0 if send(kind, URL, body()).status == 200 else 1)
                finally:
                    os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert send(kind, URL, body()).status == 200
    before, forked, after = (seen.port for seen in gateway.seen)
    assert forked != before
    assert after == before, "the parent's connection still serves it"


def test_the_success_of_one_request_does_not_absolve_another(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        blamed = []
        for text in ("status=500*9 first", "status=500*1 second", "status=500*1 second"):
            send("httpx", URL, body(text))
            blamed.append(recorded.context.infrastructure_error)
    assert isinstance(blamed[2], EngineError)
    assert blamed[2] is blamed[0] is not blamed[1]


@pytest.mark.parametrize("is_first", [True, False])
def test_what_somebody_else_found_wrong_stands_whatever_succeeds(is_first: bool, gateway: FakeOpenAI) -> None:
    mixed = ConcurrentUseError("mixed")
    with rollout(routing_to(gateway.base_url)) as recorded:
        if is_first:
            recorded.context.infrastructure_error = mixed
        send("httpx", URL, body("status=500*1 once"))
        recorded.context.infrastructure_error = mixed if not is_first else recorded.context.infrastructure_error
        assert send("httpx", URL, body("status=500*1 once")).status == 200
    assert recorded.context.infrastructure_error is mixed


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_gateway_is_asked_again(kind: str, gateway: FakeOpenAI) -> None:
    gateway.held, gateway.held_status = 2, 429
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert send(kind, URL, body()).status == 200
    assert recorded.context.infrastructure_error is None


def test_a_gateway_that_stays_busy_is_not_the_agents_fault(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        assert send("httpx", URL, body("status=429")).status == 429
    assert isinstance(recorded.context.infrastructure_error, EngineError)


def test_a_closed_attempt_that_lingers_does_not_hide_the_next_one(gateway: FakeOpenAI) -> None:
    routing = routing_to(gateway.base_url)

    def attempt(number: int) -> RolloutContext:
        return RolloutContext(
            rollout_id="r1", attempt=number, mode=Mode.TRAIN, sink=lambda record: None, routing=routing
        )

    attempts = [attempt(number) for number in range(1, 9)]
    scopes = [rollout_scope(each) for each in attempts]
    for scope in scopes:
        scope.__enter__()
    try:
        for over in attempts[:-1]:
            over.close()
        assert context.active_rollout("r1") is context.rollout_with_token(routing.token) is attempts[-1]
        assert context.active_rollout("r1", "1") is context.rollout_with_token(routing.token, "1") is None
    finally:
        for scope in reversed(scopes):
            scope.__exit__(None, None, None)


def read_into(raw: Any) -> bytes:
    buffer = bytearray(65536)
    found = b""
    while size := raw.readinto(buffer):
        found += bytes(buffer[:size])
    return found


READS: dict[str, Callable[[Any], bytes]] = {
    "iteration": b"".join,
    "readlines": lambda raw: b"".join(raw.readlines()),
    "readline": lambda raw: b"".join(iter(lambda: b"" if raw.closed else raw.readline(), b"")),
    "readinto": read_into,
    "read1": lambda raw: b"".join(iter(raw.read1, b"")),
    "read_chunked": lambda raw: b"".join(raw.read_chunked()),
}


@pytest.mark.parametrize("way", READS)
def test_a_raw_body_is_recorded_however_it_is_read(way: str, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        response = requests.post(URL, data=body(stream=True), stream=True, timeout=10)
        assert b"[DONE]" in READS[way](response.raw)
    (call,) = recorded.calls
    assert call.status is Status.OK
    assert call.attributes["gen_ai.output.messages"][0]["content"].startswith("answer to")  # type: ignore[index]


def test_leaving_a_raw_body_early_is_recorded(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        response = requests.post(URL, data=body("gated .", stream=True), stream=True, timeout=10)
        with response.raw:
            pass
        assert [call.status for call in recorded.calls] == [Status.INTERRUPTED]


def test_the_shared_session_keeps_connections_for_many_threads(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)):
        send("requests", URL, body())
    library: Any = WIRE.libraries["requests"]
    assert library.session.get_adapter(gateway.base_url)._pool_maxsize == 64


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_is_read_whatever_the_case_of_its_scheme(scheme: str) -> None:
    headers = {"authorization": f"{scheme} token:writer:span"}
    key = key_of(Outgoing("POST", "/v1/chat/completions", headers.get, bytes))
    assert (key.token, key.role, key.span_id) == ("token", "writer", "span")


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_of_a_kept_answer_goes_with_its_request(kind: str, gateway: FakeOpenAI) -> None:
    library_of(kind)
    with rollout(routing_to(gateway.base_url)):
        send(kind, "http://user.invalid/v1/responses/resp_1?include=a%20b&starting_after=3", b"", method="GET")
    (seen,) = gateway.seen
    assert (seen.path, seen.query) == ("/v1/responses/resp_1", "include=a%20b&starting_after=3")
