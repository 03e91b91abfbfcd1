"""Clients that leave, rollouts that end, weights that change: calls that do not run their course."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import msgspec
import pytest

from leyden.errors import RolloutError
from leyden.spans import Completion, Status
from leyden.testing.fakes import FakeEngine
from leyden_plugins.gateway import HttpGateway
from tests.gateway.builders import (
    CHAT,
    BlockedEngine,
    OpenEngine,
    Running,
    access,
    ask,
    asynchronous,
    events,
    named,
    running,
    until,
)


def slow(text: str = "x" * 4000) -> FakeEngine:
    """Return an engine that takes about ten seconds to answer."""
    return FakeEngine(text, tokens_per_delta=4, delta_seconds=0.01)


async def start_and_leave(here: Running, token: str, *, stream: bool) -> None:
    """Send a request on a connection of its own and drop it in the middle of the generation."""
    port = int(here.gateway.base_url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = msgspec.json.encode(ask(stream=stream))
    head = [f"POST {CHAT} HTTP/1.1", "host: x", f"authorization: Bearer {token}", f"content-length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in named().items()]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    await until(lambda: bool(here.engine.log and here.engine.log[0].token_ids))
    await until(lambda: len(here.engine.log[0].token_ids[0]) > 8)
    if stream:
        assert b"200 OK" in await reader.readuntil(b"\r\n")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine_and_leaves_an_interrupted_record(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(slow()) as here:
            token = here.gateway.admit(access())
            await start_and_leave(here, token, stream=stream)
            await until(lambda: here.engine.running == 0)
            assert here.engine.log[0].aborted
            (completion,) = await here.completions()
            assert (completion.status, completion.delivered) == (Status.INTERRUPTED, False)
            assert "client went away" in str(completion.error)
            sampled = here.engine.log[0].token_ids[0]
            assert completion.choices[0].token_ids == sampled[: len(completion.choices[0].token_ids)]
            assert 0 < len(completion.choices[0].token_ids) < 4000
            assert completion.choices[0].finish_reason == "interrupted"

    scenario()


@asynchronous
async def test_the_deltas_of_a_call_that_is_cut_are_closed() -> None:
    engine = OpenEngine()
    async with running(engine) as here:
        token = here.gateway.admit(access())
        call = asyncio.create_task(here.post(token, ask(), named()))
        await until(lambda: engine.deltas.asked == 2)
        (completion,) = await here.completions()
        assert engine.deltas.closed == 1
        assert completion.choices[0].token_ids == [120]
        assert (await call).status_code == 401


@asynchronous
async def test_a_client_that_leaves_while_it_sends_its_body_is_recorded() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        port = int(here.gateway.base_url.split(":")[2].split("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n".encode())
        writer.write(b"content-length: 100\r\n\r\n{")
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: bool(here.records))
        (completion,) = await here.completions()
        assert (completion.status, completion.delivered) == (Status.INTERRUPTED, False)


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_a_rollout_cuts_its_calls_short_and_no_others(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(slow("y" * 400)) as here:
            ending, going = here.gateway.admit(access("r1")), here.gateway.admit(access("r2"))
            cut = asyncio.create_task(here.post(ending, ask(stream=stream), named()))
            other = asyncio.create_task(here.post(going, ask(), named(rollout="r2")))
            await until(lambda: sum(bool(one.token_ids[0]) for one in here.engine.log if one.token_ids) == 2)
            (completion,) = await here.completions("r1")
            assert (completion.status, completion.delivered) == (Status.INTERRUPTED, False)
            response = await cut
            if stream:
                assert events(response)[-1]["error"]["message"] == "the rollout is over"
            else:
                assert response.status_code == 401
            assert (await other).status_code == 200
            (finished,) = await here.completions("r2")
            assert finished.delivered

    scenario()


@asynchronous
async def test_a_call_longer_than_the_rollouts_time_is_cut() -> None:
    async with running(slow()) as here:
        token = here.gateway.admit(access(timeout_seconds=0.2))
        assert (await here.post(token, ask(), named())).status_code == 504
        assert here.engine.log[0].aborted
        (completion,) = await here.completions()
        assert completion.status is Status.INTERRUPTED
        assert "0.2 seconds" in str(completion.error)


@asynchronous
async def test_holding_waits_for_calls_in_flight_and_keeps_new_ones_back() -> None:
    async with running(FakeEngine("z" * 100, delta_seconds=0.01)) as here:
        token = here.gateway.admit(access())
        before = [asyncio.create_task(here.post(token, ask(), named(span=f"b{number}"))) for number in range(3)]
        await until(lambda: here.engine.running == 3)
        holding = asyncio.create_task(here.gateway.hold())
        await asyncio.sleep(0)
        after = [
            asyncio.create_task(here.post(token, ask(stream=number == 0), named(span=f"a{number}")))
            for number in range(3)
        ]
        await holding
        assert here.engine.running == 0
        assert [(await one).status_code for one in before] == [200, 200, 200]
        await asyncio.sleep(0.1)
        assert len(here.engine.log) == 3
        here.gateway.release()
        assert [(await one).status_code for one in after] == [200, 200, 200]
        assert {one.delivered for one in await here.completions()} == {True}
        assert len(here.engine.log) == 6


@asynchronous
async def test_a_request_that_waits_inside_the_engine_counts_as_in_flight() -> None:
    engine = BlockedEngine()
    async with running(engine) as here:
        token = here.gateway.admit(access())
        call = asyncio.create_task(here.post(token, ask()))
        await until(lambda: engine.waiting == 1)
        holding = asyncio.create_task(here.gateway.hold())
        await asyncio.sleep(0.05)
        assert not holding.done()
        engine.go.set()
        await holding
        assert (await call).status_code == 200


@asynchronous
async def test_an_idle_gateway_holds_at_once_and_twice_is_as_good_as_once() -> None:
    async with running() as here:
        await here.gateway.hold()
        await here.gateway.hold()
        here.gateway.release()
        token = here.gateway.admit(access())
        assert (await here.post(token, ask())).status_code == 200


@asynchronous
async def test_a_call_held_too_long_is_told_to_come_back() -> None:
    async with running(hold_seconds=0.1) as here:
        token = here.gateway.admit(access())
        await here.gateway.hold()
        response = await here.post(token, ask(), named())
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        here.gateway.release()
        assert (await here.post(token, ask(), named())).status_code == 200
        refused, answered = await here.completions()
        assert (refused.status, refused.http_attempt, refused.choices) == (Status.ERROR, 0, [])
        assert (answered.status, answered.http_attempt) == (Status.OK, 1)


async def heard_while_held(here: Running, token: str, body: object, *, comments: int) -> bytes:
    """Release the gateway once a held stream has got so many comments; return all that was heard."""
    heard = b""
    async with here.client.stream("POST", CHAT, json=body, headers=here.headers(token, **named())) as response:
        assert response.status_code == 200
        async for part in response.aiter_bytes():
            heard += part
            if heard.count(b": waiting for new weights") >= comments:
                here.gateway.release()
    return heard


@asynchronous
async def test_a_held_stream_is_kept_alive_with_comments() -> None:
    async with running(hold_seconds=0.01, keep_alive_seconds=0.05) as here:
        token = here.gateway.admit(access())
        await here.gateway.hold()
        heard = await heard_while_held(here, token, ask(stream=True), comments=2)
        assert heard.startswith(b": ")
        assert events(heard)[-1] == "[DONE]"
        (completion,) = await here.completions()
        assert completion.delivered


@asynchronous
async def test_a_refusal_after_a_held_stream_has_begun_is_an_event() -> None:
    async with running(keep_alive_seconds=0.02) as here:
        token = here.gateway.admit(access())
        await here.gateway.hold()
        here.engine.failure = ZeroDivisionError("oops")
        heard = await heard_while_held(here, token, ask(stream=True, model="sql"), comments=1)
        assert events(heard)[-1]["error"]["code"] == "engine_failed"


@asynchronous
async def test_a_client_that_leaves_while_it_is_held_does_not_reach_the_engine() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        await here.gateway.hold()
        with pytest.raises(httpx.ReadTimeout):
            await here.client.post(
                CHAT, json=ask(), headers=here.headers(token, **named()), timeout=httpx.Timeout(5, read=0.1)
            )
        await until(lambda: bool(here.records))
        here.gateway.release()
        (completion,) = await here.completions()
        assert completion.status is Status.INTERRUPTED
        assert here.engine.log == []


@asynchronous
async def test_a_rollout_that_ends_while_its_call_is_held_is_answered() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        await here.gateway.hold()
        call = asyncio.create_task(here.post(token, ask(), named()))
        await asyncio.sleep(0.1)
        (completion,) = await here.completions()
        assert completion.status is Status.INTERRUPTED
        assert (await call).status_code == 401


@asynchronous
async def test_too_many_calls_at_once_are_sent_away() -> None:
    engine = BlockedEngine()
    async with running(engine, calls=2) as here:
        token = here.gateway.admit(access())
        calls = [asyncio.create_task(here.post(token, ask())) for _ in range(2)]
        await until(lambda: engine.waiting == 2)
        refused = await here.post(token, ask())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        engine.go.set()
        assert [(await one).status_code for one in calls] == [200, 200]
        assert len(await here.completions()) == 3


@asynchronous
async def test_stopping_ends_and_records_every_call() -> None:
    async with running(slow()) as here:
        token = here.gateway.admit(access())
        call = asyncio.create_task(here.post(token, ask(), named()))
        await until(lambda: here.engine.running == 1)
        await here.gateway.stop()
        assert (await call).status_code == 503
        assert here.engine.running == 0
        (completion,) = [one for one in here.records if isinstance(one, Completion)]
        assert completion.status is Status.INTERRUPTED
        await here.gateway.stop()


@asynchronous
async def test_a_gateway_that_is_not_running_says_so() -> None:
    with pytest.raises(RolloutError, match="call start first"):
        await HttpGateway().hold()
