"""An OTLP/HTTP receiver: apps send their spans here, as to any collector, and a run folder comes out.

One idea: a request is written to a journal before it is answered, in the form of a collector's file exporter; the
store is made from it. So a kill loses nothing, and the journal can be imported again under other rules.
One trap: exporters send a request again when no answer came, so spans arrive twice as a matter of course.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from leyden.errors import DatasetError, StoreError
from leyden.extras import extra
from leyden.sqlite import SQLiteStore
from leyden_plugins.traces.otel.assembling import Rules
from leyden_plugins.traces.otel.collecting import Collector
from leyden_plugins.traces.otel.importing import store_traces
from leyden_plugins.traces.otel.spans import Decoded, decode_json, decode_protobuf, encode_json, read_request
from leyden_plugins.traces.otel.storing import open_store, stored_ids

with extra("otel"):
    from google.protobuf import json_format
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

log = logging.getLogger(__name__)

JOURNAL = "received.jsonl"
STORED_TO = "traces/stored_to"
"""Note in the store: up to which byte of the journal every span is stored."""
PROTOBUF, JSON = "application/x-protobuf", "application/json"
TICK_SECONDS = 0.5
INVALID_ARGUMENT, UNAVAILABLE, UNAUTHENTICATED = 3, 14, 16
"""Codes of `google.rpc.Status`, which the body of a refusal is."""


class TooLargeError(DatasetError):
    """A request is larger than it may be."""


class Receiver:
    """Takes spans over HTTP and stores their traces. `app` is an ASGI application."""

    def __init__(
        self,
        out: Path,
        rules: Rules,
        *,
        token: str | None = None,
        quiet_seconds: float = 5.0,
        rootless_seconds: float = 300.0,
        most_spans: int = 200_000,
        most_bytes: int = 64 * 2**20,
    ) -> None:
        """Prepare; nothing is opened before `app` starts.

        Args:
            out: folder to make or go on with.
            rules: of the user.
            token: what senders must give as bearer.
            quiet_seconds: a trace whose root has come is stored when nothing came for so long.
            rootless_seconds: likewise, of a trace whose root has not come.
            most_spans: that are held in memory; above, the traces that are quiet longest are stored.
            most_bytes: of a request, unpacked.
        """
        self.out = out
        self.noticed: Counter[str] = Counter()
        """What happened so far, in words."""
        self._rules = rules
        self._token = token
        self._most_bytes = most_bytes
        self._collector = Collector(
            quiet_seconds=quiet_seconds, rootless_seconds=rootless_seconds, most_spans=most_spans
        )
        self._stored: set[str] = set()
        self._store: SQLiteStore | None = None
        self._journal: BinaryIO | None = None
        self.app = Starlette(routes=[Route("/v1/traces", self._post, methods=["POST"])], lifespan=self._lifespan)

    # ---- its life

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._store = await open_store(self.out)
        try:
            self._stored = await stored_ids(self._store)
            self._journal = (self.out / JOURNAL).open("ab+")
            await self._replay()
            ending = asyncio.Event()
            ticking = asyncio.create_task(self._tick(ending))
            try:
                yield
            finally:
                ending.set()  # never cancelled: traces that are being stored are nowhere else in memory
                await ticking
                await self.flush()
        finally:
            if self._journal is not None:
                self._journal.close()
            await self._store.close()

    async def _replay(self) -> None:
        """Take from the journal what was received but not stored."""
        assert self._journal is not None and self._store is not None
        begin = int(await self._store.get_meta(STORED_TO) or 0)
        end = self._journal.seek(0, 2)
        if begin > end:  # the journal was deleted
            begin = 0
            await self._store.put_meta(STORED_TO, "0")
        offset = self._journal.seek(begin)
        for line in self._journal:
            try:
                self._collector.add(read_request(decode_json(line)).spans, offset=offset, now=time.monotonic())
            except DatasetError:  # the last line, which a kill has cut; its sender was never answered
                self.noticed["damaged lines of the journal"] += 1
            offset += len(line)
        if offset and not line_is_whole(self._journal, end):
            self._journal.write(b"\n")

    async def _tick(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), TICK_SECONDS)
            await self._settle(is_last=False)

    async def flush(self) -> None:
        """Store every trace, whether it is over or not."""
        await self._settle(is_last=True)

    async def _settle(self, *, is_last: bool) -> None:
        assert self._store is not None and self._journal is not None
        traces = self._collector.all() if is_last else self._collector.due(time.monotonic())
        if not traces:
            return
        try:
            spans = [list(one.spans.values()) for one in traces]
            self.noticed += await store_traces(self._store, spans, self._rules, stored=self._stored)
            await self._store.put_meta(STORED_TO, str(self._collector.first_offset(self._journal.seek(0, 2))))
        except StoreError as error:
            log.error("traces could not be stored and will be tried again: %s", error)
            self._collector.put_back(traces)

    # ---- requests

    async def _post(self, request: Request) -> Response:
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self._token is not None and not is_bearer(request.headers.get("authorization", ""), self._token):
            return refusal(401, UNAUTHENTICATED, "give the receiver's token as bearer", given)
        if given not in (PROTOBUF, JSON):
            return refusal(415, INVALID_ARGUMENT, f"content-type {given!r} must be {PROTOBUF} or {JSON}", JSON)
        try:
            body = await self._body(request)
            message = decode_protobuf(body) if given == PROTOBUF else decode_json(body)
            decoded = read_request(message)
        except TooLargeError as error:
            return refusal(413, INVALID_ARGUMENT, str(error), given)
        except DatasetError as error:
            return refusal(400, INVALID_ARGUMENT, str(error), given)
        try:
            self._take(message, decoded)
        except OSError as error:
            return refusal(503, UNAVAILABLE, f"the journal cannot be written: {error}", given)
        return answer(decoded, given)

    async def _body(self, request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", ""):
            raise DatasetError(f"content-encoding {encoding!r} is unknown; send gzip or none")
        pieces: list[bytes] = []
        size = 0
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if size > self._most_bytes:
                raise TooLargeError(f"a request may have {self._most_bytes} bytes; send smaller batches")
        body = b"".join(pieces)
        return unpacked(body, self._most_bytes) if encoding == "gzip" else body

    def _take(self, message: ExportTraceServiceRequest, decoded: Decoded) -> None:
        assert self._journal is not None
        for reason in decoded.refused:
            self.noticed[f"left out: {reason}"] += 1
        if not decoded.spans:
            return
        offset = self._journal.seek(0, 2)
        try:
            self._journal.write(encode_json(message).encode() + b"\n")
            self._journal.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._journal.truncate(offset)
            raise
        self._collector.add(decoded.spans, offset=offset, now=time.monotonic())


def line_is_whole(journal: BinaryIO, end: int) -> bool:
    """Say whether a file's last line has its end."""
    journal.seek(max(0, end - 1))
    return journal.read(1) in (b"\n", b"")


def is_bearer(header: str, token: str) -> bool:
    """Say whether an Authorization header holds the token."""
    kind, _, value = header.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(value.strip().encode(), token.encode())


def unpacked(body: bytes, most: int) -> bytes:
    """Unpack gzip, never more than `most` bytes of it.

    Raises:
        TooLargeError: it is more.
        DatasetError: it is no gzip.
    """
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise DatasetError(f"its body is no gzip: {error}") from error
    if len(found) > most:
        raise TooLargeError(f"a request may have {most} bytes unpacked; send smaller batches")
    if not unpacker.eof:
        raise DatasetError("its gzip is cut")
    return found


def answer(decoded: Decoded, content_type: str) -> Response:
    """Accept a request, and say what of it was left out."""
    response = ExportTraceServiceResponse()
    if decoded.refused:
        response.partial_success.rejected_spans = len(decoded.refused)
        response.partial_success.error_message = decoded.refused[0]
    content = response.SerializeToString() if content_type == PROTOBUF else json_format.MessageToJson(response).encode()
    return Response(content, media_type=content_type)


def refusal(status: int, code: int, message: str, content_type: str) -> Response:
    """Answer with a `google.rpc.Status`; written by hand, because its package is no dependency else."""
    if content_type != PROTOBUF:
        return Response(json.dumps({"code": code, "message": message}), status, media_type=JSON)
    text = message.encode()[:127]  # a length below 128 is one byte
    return Response(bytes([0x08, code, 0x12, len(text)]) + text, status, media_type=PROTOBUF)
