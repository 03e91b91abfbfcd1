"""Send rollouts to a collector, or to whatever speaks OTLP over HTTP: Phoenix, Langfuse, Jaeger."""

from __future__ import annotations

import contextlib
import gzip
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from leyden.errors import ConfigurationError, EngineError
from leyden.extras import extra
from leyden.interfaces import RolloutRecords
from leyden_plugins.traces.otel.ours import to_otlp

with extra("otel"):
    import httpx
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )

SPANS_A_REQUEST = 500
WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
MOST_WAIT_SECONDS = 60.0
RETRIED = frozenset({429, 502, 503, 504})
"""What OTLP says to send again."""
TIMEOUT_SECONDS = 60.0


def batches(records: Iterable[RolloutRecords], spans: int = SPANS_A_REQUEST) -> Iterator[ExportTraceServiceRequest]:
    """Yield requests of whole rollouts, of about so many spans."""
    waiting: list[RolloutRecords] = []
    count = 0
    for one in records:
        waiting.append(one)
        count += 1 + len(one.spans)
        if count >= spans:
            yield to_otlp(waiting)
            waiting, count = [], 0
    if waiting:
        yield to_otlp(waiting)


def send(
    records: Iterable[RolloutRecords],
    to: str,
    *,
    headers: Mapping[str, str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Send rollouts; return how many spans were accepted.

    Args:
        records: of the rollouts.
        to: the whole address, such as `http://127.0.0.1:6006/v1/traces`.
        headers: keys and the like.
        sleep: waits before a request is sent again.

    Raises:
        ConfigurationError: the address is none, or the server refuses what it is sent.
        EngineError: the server does not answer, or stays busy.
    """
    if not to.startswith(("http://", "https://")):
        raise ConfigurationError(f"--to {to!r} must be a whole address, such as 'http://127.0.0.1:6006/v1/traces'")
    accepted = 0
    with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
        for request in batches(records):
            accepted += _sent(client, to, request, dict(headers or {}), sleep)
    return accepted


def _sent(
    client: httpx.Client,
    to: str,
    request: ExportTraceServiceRequest,
    headers: Mapping[str, str],
    sleep: Callable[[float], None],
) -> int:
    body = gzip.compress(request.SerializeToString(), compresslevel=3)
    given = {**headers, "content-type": "application/x-protobuf", "content-encoding": "gzip"}
    count = sum(len(scoped.spans) for group in request.resource_spans for scoped in group.scope_spans)
    problem = ""
    for wait in (*WAITS_SECONDS, None):
        try:
            response = client.post(to, content=body, headers=given)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
            asked = None
        else:
            if response.is_success:
                return count - _rejected(response)
            problem = f"HTTP {response.status_code} {response.text[:200]!r}"
            if response.status_code not in RETRIED:
                raise ConfigurationError(f"{to!r} refuses spans: {problem}; check the address and its headers")
            asked = _retry_after(response)
        if wait is not None:
            sleep(min(wait if asked is None else asked, MOST_WAIT_SECONDS))
    raise EngineError(f"{to!r} took no spans in {len(WAITS_SECONDS) + 1} tries: {problem}")


def _rejected(response: httpx.Response) -> int:
    if "protobuf" not in response.headers.get("content-type", ""):
        return 0
    with contextlib.suppress(Exception):  # an answer that cannot be read says nothing against the spans
        return int(ExportTraceServiceResponse.FromString(response.content).partial_success.rejected_spans)
    return 0


def _retry_after(response: httpx.Response) -> float | None:
    told = response.headers.get("retry-after", "")
    return float(told) if told.isascii() and told.isdigit() else None
