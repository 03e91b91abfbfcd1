"""The receiver: what senders are answered, and what its folder holds afterwards."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from leyden.errors import StoreError
from leyden.interfaces import RolloutRecords
from leyden.spans import Record
from leyden.sqlite import SQLiteStore
from leyden_plugins.traces.otel import Receiver, Rules
from leyden_plugins.traces.otel.collecting import Collector
from leyden_plugins.traces.otel.spans import RawSpan, encode_json
from tests.traces.builders import TRACE, a_call, a_raw, a_request, number

AGENT = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "writer"}
PROTOBUF = {"content-type": "application/x-protobuf"}
OTHER = "0af7651916cd43dd8448eb211c80319d"


@asynccontextmanager
async def receiving(out: Path, **options: object) -> AsyncIterator[tuple[Receiver, httpx.AsyncClient]]:
    receiver = Receiver(out, Rules(), **options)  # type: ignore[arg-type]
    async with receiver.app.router.lifespan_context(receiver.app):
        transport = httpx.ASGITransport(app=receiver.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://leyden") as client:
            yield receiver, client


async def post(client: httpx.AsyncClient, *spans: RawSpan) -> httpx.Response:
    return await client.post("/v1/traces", content=a_request(*spans).SerializeToString(), headers=PROTOBUF)


async def stored(out: Path) -> Sequence[RolloutRecords]:
    async with await SQLiteStore.open(out / "store.db", read_only=True) as store:
        return await store.records([one.rollout_id for one in await store.rollouts()])


def received(out: Path, *requests: Sequence[RawSpan]) -> Sequence[RolloutRecords]:
    async def all_of_it() -> Sequence[RolloutRecords]:
        async with receiving(out) as (_, client):
            for spans in requests:
                assert (await post(client, *spans)).status_code == 200
        return await stored(out)

    return asyncio.run(all_of_it())


def answered(out: Path, content: bytes, headers: dict[str, str], **options: object) -> tuple[httpx.Response, Receiver]:
    async def once() -> tuple[httpx.Response, Receiver]:
        async with receiving(out, **options) as (receiver, client):
            return await client.post("/v1/traces", content=content, headers=headers), receiver

    return asyncio.run(once())


@pytest.mark.parametrize("form", ["protobuf", "json", "gzip"])
def test_a_request_is_stored_in_every_form_that_senders_use(tmp_path: Path, form: str) -> None:
    request = a_request(a_call(1))
    content = request.SerializeToString()
    headers = dict(PROTOBUF)
    if form == "json":
        content, headers = encode_json(request).encode(), {"content-type": "application/json; charset=utf-8"}
    if form == "gzip":
        content, headers = gzip.compress(content), {**PROTOBUF, "content-encoding": "gzip"}
    response, _ = answered(tmp_path, content, headers)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(headers["content-type"].partition(";")[0])
    (records,) = asyncio.run(stored(tmp_path))
    assert records.rollout.rollout_id == TRACE
    assert records.spans[0].attributes["gen_ai.output.messages"] == [{"role": "assistant", "content": "fine"}]


def test_a_trace_split_over_requests_out_of_order_and_twice_is_one_rollout(tmp_path: Path) -> None:
    root, agent, call = a_raw(1), a_raw(2, 1, attributes=AGENT), a_call(3, 2)
    (records,) = received(tmp_path, [call], [agent, call], [root], [root])
    assert [(one.span_id, one.role) for one in records.spans] == [
        (number(1), "main"),
        (number(2), "writer"),
        (number(3), "writer"),
    ]


def test_traces_that_share_a_request_are_rollouts_of_their_own(tmp_path: Path) -> None:
    found = received(tmp_path, [a_call(1), a_call(1, trace=OTHER)])
    assert sorted(one.rollout.rollout_id for one in found) == [TRACE, OTHER]


def test_spans_that_come_when_their_trace_is_stored_are_added_under_their_role(tmp_path: Path) -> None:
    async def story() -> tuple[Sequence[RolloutRecords], Receiver]:
        async with receiving(tmp_path) as (receiver, client):
            await post(client, a_raw(1), a_raw(2, 1, attributes=AGENT), a_call(3, 2))
            await receiver.flush()
            await post(client, a_call(4, 2, said="late"))
        return await stored(tmp_path), receiver

    (records,), receiver = asyncio.run(story())
    assert {one.span_id: one.role for one in records.spans}[number(4)] == "writer"
    assert receiver.noticed["spans that came when their trace was stored already, or again"] == 1
    assert receiver.noticed["traces"] == 1


def killed_after(out: Path, *spans: RawSpan) -> None:
    """Answer a request, and end with nothing stored of it."""

    async def story() -> None:
        async with receiving(out) as (receiver, client):
            assert (await post(client, *spans)).status_code == 200
            receiver._collector.all()  # what is in memory is gone

    asyncio.run(story())


def test_what_was_answered_survives_kills_and_a_line_that_was_cut(tmp_path: Path) -> None:
    killed_after(tmp_path, a_call(1))
    assert asyncio.run(stored(tmp_path)) == []
    with (tmp_path / "received.jsonl").open("a") as journal:
        journal.write('{"resourceSpans": [{"sco')
    killed_after(tmp_path, a_call(1, trace=OTHER))
    assert sorted(one.rollout.rollout_id for one in received(tmp_path)) == [TRACE, OTHER]


def test_a_journal_that_was_deleted_is_begun_anew(tmp_path: Path) -> None:
    received(tmp_path, [a_call(1)])
    (tmp_path / "received.jsonl").unlink()
    killed_after(tmp_path, a_call(1, trace=OTHER))
    assert len(received(tmp_path)) == 2


def test_a_store_that_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with receiving(tmp_path) as (receiver, client):
            await post(client, a_call(1))
            with monkeypatch.context() as patch:
                patch.setattr(SQLiteStore, "add_records", refuse)
                await receiver.flush()
            assert receiver.noticed["traces"] == 0

    async def refuse(store: SQLiteStore, records: object) -> None:
        raise StoreError("the disk is full")

    asyncio.run(story())
    (records,) = asyncio.run(stored(tmp_path))
    assert records.rollout.rollout_id == TRACE


def test_an_end_while_traces_are_being_stored_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = asyncio.Event()
    original = SQLiteStore.add_records

    async def slow(store: SQLiteStore, records: Sequence[Record]) -> None:
        entered.set()
        await asyncio.sleep(0.05)
        await original(store, records)

    async def story() -> None:
        monkeypatch.setattr(SQLiteStore, "add_records", slow)
        async with receiving(tmp_path, quiet_seconds=0.0) as (_, client):
            await post(client, a_call(1))
            await asyncio.wait_for(entered.wait(), 10)

    asyncio.run(story())
    assert len(asyncio.run(stored(tmp_path))) == 1


def test_a_receiver_that_starts_again_reads_only_what_is_not_stored(tmp_path: Path) -> None:
    received(tmp_path, [a_call(1)])

    async def again() -> Receiver:
        async with receiving(tmp_path) as (receiver, _):
            return receiver

    assert asyncio.run(again()).noticed == {}


def test_spans_without_valid_ids_are_refused_alone_and_the_sender_is_told(tmp_path: Path) -> None:
    request = a_request(a_call(1), a_call(2, 1))
    request.resource_spans[0].scope_spans[0].spans[1].trace_id = b"short"
    response, receiver = answered(tmp_path, request.SerializeToString(), PROTOBUF)
    told = ExportTraceServiceResponse.FromString(response.content).partial_success
    assert (response.status_code, told.rejected_spans) == (200, 1)
    assert "'span 2'" in told.error_message
    assert receiver.noticed["left out: span 'span 2' has no valid trace id and span id"] == 1
    (records,) = asyncio.run(stored(tmp_path))
    assert len(records.spans) == 1


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"\xff\xff", PROTOBUF, 400),
        (b"{", {"content-type": "application/json"}, 400),
        (b"[1]", {"content-type": "application/json"}, 400),
        (
            b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}',
            {"content-type": "application/json"},
            400,
        ),
        (b"no gzip", {**PROTOBUF, "content-encoding": "gzip"}, 400),
        (gzip.compress(b"x" * 100)[:-4], {**PROTOBUF, "content-encoding": "gzip"}, 400),
        (b"", {**PROTOBUF, "content-encoding": "br"}, 400),
        (b"", {"content-type": "text/plain"}, 415),
        (b"x" * 2000, PROTOBUF, 413),
        (gzip.compress(b"x" * 2000), {**PROTOBUF, "content-encoding": "gzip"}, 413),
    ],
    ids=[
        "no protobuf",
        "cut JSON",
        "no object",
        "no trace id",
        "no gzip",
        "cut gzip",
        "another encoding",
        "another type",
        "large",
        "large unpacked",
    ],  # gzip holds the time
)
def test_what_is_no_request_is_refused_with_a_reason(
    tmp_path: Path, content: bytes, headers: dict[str, str], status: int
) -> None:
    response, _ = answered(tmp_path, content, headers, most_bytes=1000)
    assert response.status_code == status
    if headers.get("content-type") == PROTOBUF["content-type"]:
        assert response.content[:3] == b"\x08\x03\x12", "google.rpc.Status with INVALID_ARGUMENT"
        assert response.content[3] == len(response.content) - 4
    else:
        assert json.loads(response.content)["message"]
    assert asyncio.run(stored(tmp_path)) == []


@pytest.mark.parametrize(("given", "status"), [("Bearer right", 200), ("Bearer wrong", 401), ("right", 401), ("", 401)])
def test_a_token_is_asked_for(tmp_path: Path, given: str, status: int) -> None:
    headers = {**PROTOBUF, "authorization": given}
    response, _ = answered(tmp_path, a_request(a_call(1)).SerializeToString(), headers, token="right")
    assert response.status_code == status
    assert len(asyncio.run(stored(tmp_path))) == (status == 200)


def collector(most_spans: int = 100) -> Collector:
    return Collector(quiet_seconds=5, rootless_seconds=60, most_spans=most_spans)


def test_a_trace_is_due_when_its_root_has_come_and_nothing_has_for_a_while() -> None:
    one = collector()
    one.add([a_call(2, 1)], offset=0, now=0.0)
    assert one.due(10.0) == []
    one.add([a_raw(1)], offset=9, now=10.0)
    assert one.due(14.0) == []
    (trace,) = one.due(15.0)
    assert (trace.offset, len(trace.spans)) == (0, 2)
    assert one.all() == []


def test_a_trace_whose_root_never_comes_is_due_in_the_end() -> None:
    one = collector()
    one.add([a_call(2, 1)], offset=0, now=0.0)
    assert len(one.due(60.0)) == 1


def test_too_many_spans_make_the_quietest_trace_due() -> None:
    one = collector(most_spans=2)
    one.add([a_call(2, 1), a_call(3, 1)], offset=0, now=0.0)
    one.add([a_call(2, 1, trace=OTHER)], offset=5, now=1.0)
    assert [each.trace_id for each in one.due(1.0)] == [TRACE]
    assert one.first_offset(99) == 5


def test_a_trace_that_is_due_is_taken_once_however_many_spans_there_are() -> None:
    one = collector(most_spans=1)
    one.add([a_raw(1)], offset=0, now=0.0)
    one.add([a_call(2, 1, trace=OTHER), a_call(3, 1, trace=OTHER)], offset=5, now=6.0)
    assert [each.trace_id for each in one.due(6.0)] == [TRACE, OTHER]


def test_traces_that_could_not_be_stored_are_kept_with_what_came_meanwhile() -> None:
    one = collector()
    one.add([a_raw(1)], offset=3, now=0.0)
    taken = one.all()
    one.add([a_call(2, 1)], offset=7, now=1.0)
    one.put_back(taken)
    (trace,) = one.all()
    assert (trace.offset, set(trace.spans)) == (3, {number(1), number(2)})


def test_a_span_that_has_ended_replaces_its_beginning() -> None:
    one = collector()
    one.add([a_call(1, end_ns=0), a_call(1), a_call(1, end_ns=0)], offset=0, now=0.0)
    (trace,) = one.all()
    assert trace.spans[number(1)].end_ns > 0
    assert one.duplicates == 2
