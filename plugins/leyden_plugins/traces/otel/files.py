"""Files of traces: OTLP's JSON (whole, or a request a line, as a collector's file exporter writes) and protobuf.

One trap: a line that was cut by a full disk must not cost the file; it is counted, and the others are read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from leyden.errors import DatasetError
from leyden.extras import extra
from leyden_plugins.traces.otel.spans import decode_json, decode_protobuf

with extra("otel"):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

GZIP = b"\x1f\x8b"


def read_file(path: Path) -> Iterator[ExportTraceServiceRequest | DatasetError]:
    """Yield a file's requests, and for each damaged line why it is left out.

    Raises:
        DatasetError: the file cannot be read, or nothing in it is a request.
    """
    try:
        body = path.read_bytes()
        if body.startswith(GZIP):
            body = gzip.decompress(body)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"cannot read {str(path)!r}: {error}") from error
    if body.lstrip()[:1] not in (b"{", b"["):
        try:
            yield decode_protobuf(body)
        except DatasetError as error:
            raise DatasetError(f"{str(path)!r} is neither OTLP's JSON nor its protobuf: {error}") from error
        return
    try:
        whole = json.loads(body)
    except ValueError:
        yield from _lines(path, body)
        return
    for one in whole if isinstance(whole, list) else [whole]:
        yield decode_json(json.dumps(one))


def _lines(path: Path, body: bytes) -> Iterator[ExportTraceServiceRequest | DatasetError]:
    is_any = False
    for number, line in enumerate(body.splitlines(), 1):
        if line.strip():
            try:
                yield decode_json(line)
                is_any = True
            except DatasetError as error:
                yield DatasetError(f"line {number} of {str(path)!r}: {error}")
    if not is_any:
        raise DatasetError(f"no line of {str(path)!r} is an OTLP trace request")
