"""From files of traces to a run folder that training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from leyden.errors import DatasetError
from leyden.interfaces import RolloutRecords
from leyden.spans import Kind
from leyden.sqlite import SQLiteStore
from leyden_plugins.traces.otel.assembling import Rules, assemble
from leyden_plugins.traces.otel.collecting import Collector
from leyden_plugins.traces.otel.files import read_file
from leyden_plugins.traces.otel.ours import is_ours
from leyden_plugins.traces.otel.spans import RawSpan, read_request
from leyden_plugins.traces.otel.storing import open_store, put, stored_ids

ROLLOUTS_A_WRITE = 256


async def import_files(files: Sequence[Path], out: Path, rules: Rules) -> Counter[str]:
    """Read files of traces into a folder's store; return what was noticed, all in words.

    A file may hold parts of traces; what belongs together is put together over all files.

    Raises:
        DatasetError: a file is none, or holds no spans.
        StoreError: the store cannot be written.
    """
    noticed: Counter[str] = Counter()
    collector = Collector(quiet_seconds=0, rootless_seconds=0, most_spans=0)
    for path in files:
        for request in read_file(path):
            if isinstance(request, DatasetError):
                noticed[f"damaged lines left out, such as {request!s:.200}"] += 1
                continue
            decoded = read_request(request)
            collector.add(decoded.spans, offset=0, now=0.0)
            for reason in decoded.refused:
                noticed[f"left out: {reason}"] += 1
    traces = collector.all()
    if not traces:
        raise DatasetError(f"there are no spans in {[str(path) for path in files]!r}")
    noticed["spans that came twice"] += collector.duplicates
    async with await open_store(out) as store:
        stored = await stored_ids(store)
        noticed += await store_traces(store, [list(one.spans.values()) for one in traces], rules, stored=stored)
    return noticed


async def store_traces(
    store: SQLiteStore, traces: Iterable[Sequence[RawSpan]], rules: Rules, *, stored: set[str]
) -> Counter[str]:
    """Assemble traces and store them; a damaged export of ours is counted and left out.

    Raises:
        StoreError: the store cannot be written.
    """
    noticed: Counter[str] = Counter()
    ready: list[RolloutRecords] = []
    for spans in traces:
        try:
            roles = await known_roles(store, spans[0].trace_id) if spans[0].trace_id in stored else {}
            assembled = assemble(spans, rules, known_roles=roles)
        except DatasetError as error:
            noticed[f"traces left out: {error}"] += 1
            continue
        if not (roles or is_ours(spans) or any(one.kind is Kind.MODEL_CALL for one in assembled.records.spans)):
            noticed["traces without a model call, left out"] += 1
            continue
        if roles:  # what is late says nothing of the whole
            noticed["spans that came when their trace was stored already, or again"] += len(spans)
        else:
            noticed += assembled.noticed
        ready.append(assembled.records)
        if len(ready) == ROLLOUTS_A_WRITE:
            noticed += await put(store, ready, stored=stored)
            ready = []
    return noticed + await put(store, ready, stored=stored)


async def known_roles(store: SQLiteStore, rollout_id: str) -> Mapping[str, str]:
    """Return span id -> role of what is stored of a trace."""
    (records,) = await store.records([rollout_id])
    return {one.span_id: one.role for one in records.spans}
