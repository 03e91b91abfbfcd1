"""The default store: one SQLite file, written by one thread of one process, read by any number.

One idea: a write returns once its transaction is committed, and transactions are shared by all that waited.
`kill -9` loses at most what no call has returned for. One trap: the writing process holds a lock for as long as
the store is open; look at a running store with `read_only=True`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from leyden.errors import RewardError, StoreError
from leyden.interfaces import Outcome, Owner, RolloutRecords
from leyden.redaction import Redactor
from leyden.spans import (
    Checkpoint,
    Completion,
    Mode,
    Record,
    Resource,
    Reward,
    Rollout,
    RolloutState,
    Span,
    Update,
)
from leyden.sqlite import ledger
from leyden.sqlite import rollouts as rollout_rows
from leyden.sqlite.codec import EncodedRecord, RecordCodec
from leyden.sqlite.file import Synchronous, WriterLock, open_for_reading, open_for_writing, translated
from leyden.sqlite.records import RecordReader, RecordWriter
from leyden.sqlite.writer import GroupWriter

_T = TypeVar("_T")

_STREAM_BATCH = 512
_FOREIGN_COMMIT_SECONDS = 0.5
"""How often a read-only store looks for commits of the writing process: SQLite cannot wake another process."""


class _WriteSide(NamedTuple):
    """What only the writing process has."""

    lock: WriterLock
    records: RecordWriter
    group: GroupWriter

    @classmethod
    def open(cls, path: Path, synchronous: Synchronous, codec: RecordCodec) -> _WriteSide:
        lock = WriterLock.take(path)
        try:
            connection = open_for_writing(path, synchronous)
        except BaseException:
            lock.release()
            raise
        return cls(lock, RecordWriter(connection, codec), GroupWriter(connection, path))

    def close(self) -> None:
        self.group.close()
        self.lock.release()


class SQLiteStore:
    """A `Store` in one SQLite file. Get one with `await SQLiteStore.open(path)`; `close` it, or use `async with`."""

    def __init__(self, path: Path, *, read_only: bool, synchronous: Synchronous, redactor: Redactor) -> None:
        """Open the file; blocks. `open` does the same off the event loop."""
        self.path = path
        self.redactor = redactor
        """Takes keys out of all that is stored; tell it of exact secrets with `add_secret`."""
        self._codec = RecordCodec(redactor)
        self._write_side = None if read_only else _WriteSide.open(path, synchronous, self._codec)
        try:
            self._read_connection = open_for_reading(path)
        except BaseException:
            if self._write_side is not None:
                self._write_side.close()
            raise
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="leyden-store-reader")
        self._record_reader = RecordReader(self._read_connection, self._codec)
        self._is_closed = False
        self._closing = threading.Lock()

    @classmethod
    async def open(
        cls,
        path: str | Path,
        *,
        read_only: bool = False,
        synchronous: Synchronous = "normal",
        redactor: Redactor | None = None,
    ) -> SQLiteStore:
        """Open the store at `path`; unless `read_only`, create it, or bring its schema up to date.

        Args:
            redactor: takes secrets out of all that is stored; by default one that knows the environment's keys.

        Raises:
            StoreError: another process writes it, or the file is damaged, foreign or of a newer version.
        """
        opened = functools.partial(
            cls,
            Path(path),
            read_only=read_only,
            synchronous=synchronous,
            redactor=redactor or Redactor.from_environment(),
        )
        return await asyncio.to_thread(opened)

    async def __aenter__(self) -> SQLiteStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- rollouts

    async def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts; one that exists already is left as it is."""
        await self._write(lambda c: rollout_rows.add(c, rollouts, self._codec))

    async def start(
        self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float, versions: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Take the queued ones of these rollouts: rollout id -> its new attempt number. Others are left out."""
        encoded = self._codec.encode(dict(versions))
        return await self._write(
            lambda c: rollout_rows.start(c, rollout_ids, owner=owner, lease_seconds=lease_seconds, versions=encoded)
        )

    async def renew(self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float) -> None:
        """Extend leases still held by `owner`."""
        await self._write(lambda c: rollout_rows.renew(c, rollout_ids, owner=owner, lease_seconds=lease_seconds))

    async def reclaim(self) -> Sequence[str]:
        """Mark rollouts whose lease ran out or whose local owner died `lost`, queue them again, return their ids."""

        writer = self._writing()

        def work(connection: sqlite3.Connection) -> Sequence[str]:
            lost = rollout_rows.reclaim(connection)
            for rollout_id, attempt in lost:
                writer.records.forget(rollout_id, attempt)
            return [rollout_id for rollout_id, _ in lost]

        return await self._write(work)

    async def finish(self, outcomes: Sequence[Outcome]) -> None:
        """End attempts. An outcome of a given-up attempt is kept as an event and changes no state; all or none.

        Raises:
            StoreError: a move that `STATE_MOVES` does not allow.
            RewardError: a reward that is no finite number.
        """

        writer = self._writing()

        def work(connection: sqlite3.Connection) -> None:
            late: list[Span] = []
            rollout_rows.finish(connection, outcomes, self._codec, late.append)
            writer.records.insert(connection, [[self._codec.encode_record(span) for span in late]])
            for outcome in outcomes:
                writer.records.forget(outcome.rollout_id, outcome.attempt)

        await self._write(work)

    async def requeue(self, rollout_ids: Sequence[str]) -> None:
        """Queue `lost` rollouts for another attempt.

        Raises:
            StoreError: an unknown rollout, or one that is running or finished.
        """
        await self._write(lambda c: rollout_rows.requeue(c, rollout_ids))

    async def score(self, group_id: str, rewards: Sequence[Reward], totals: Mapping[str, float | None]) -> None:
        """Keep a finished group's late rewards and set its rollouts' totals, once and all or nothing.

        Raises:
            StoreError: an unknown rollout, one of another group, or one that has not finished or has a reward.
            RewardError: a reward that is no finite number, or was given before with another value.
        """
        writer = self._writing()
        encoded = [self._codec.encode_record(reward) for reward in rewards]

        def work(connection: sqlite3.Connection) -> None:
            if ledger.get_meta(connection, _scored_key(group_id)) is not None:
                return
            rollout_rows.score(connection, group_id, totals)
            [refused] = writer.records.insert(connection, [encoded])
            if isinstance(refused, RewardError):
                raise refused
            ledger.put_meta(connection, _scored_key(group_id), "1")

        await self._write(work)

    async def is_scored(self, group_id: str) -> bool:
        """Say whether `score` was called for this group."""
        return await self.get_meta(_scored_key(group_id)) is not None

    async def rollouts(
        self, *, mode: Mode | None = None, step: int | None = None, state: RolloutState | None = None
    ) -> Sequence[Rollout]:
        """Return rollouts in the order they were added."""
        asked = {"mode": mode, "step": step, "state": state}
        where = {column: value for column, value in asked.items() if value is not None}
        return await self._read(lambda c: rollout_rows.select(c, where))

    # ---- records

    async def add_records(self, records: Sequence[Record]) -> None:
        """Store spans, completions and rewards; a key seen before is ignored, unless its reward value differs.

        A refused reward costs only itself: the other records of the call are stored.

        Raises:
            RewardError: a reward that is no finite number, or was given before with another value.
            StoreError: a record of a newer schema or an unknown type; then nothing of the call is stored.
        """
        writer = self._writing()
        refused: RewardError | None = None
        encoded: list[EncodedRecord] = []
        for record in records:
            try:
                encoded.append(self._codec.encode_record(record))
            except RewardError as error:
                refused = refused or error
        if encoded:
            await writer.group.submit(writer.records.insert, encoded, weight=len(encoded))
        if refused is not None:
            raise refused

    async def records(self, rollout_ids: Sequence[str]) -> Sequence[RolloutRecords]:
        """Return the records of the latest attempt of each rollout, in the order asked.

        Raises:
            StoreError: an unknown rollout.
        """

        def read(connection: sqlite3.Connection) -> Sequence[RolloutRecords]:
            rollouts = self._known_rollouts(connection, rollout_ids)
            records = self._record_reader.of_rollouts(list(rollouts))
            return [_gathered(rollouts[asked], records[asked]) for asked in rollout_ids]

        return await self._read(read)

    async def late_records(self, rollout_id: str) -> Sequence[Record]:
        """Return records of attempts that are not the latest: kept, never trained.

        Raises:
            StoreError: an unknown rollout.
        """

        def read(connection: sqlite3.Connection) -> Sequence[Record]:
            self._known_rollouts(connection, [rollout_id])
            return self._record_reader.of_rollouts([rollout_id], is_late=True)[rollout_id]

        return await self._read(read)

    async def stream(self, cursor: int = 0) -> AsyncIterator[tuple[int, Record]]:
        """Yield records with sequence above `cursor` as they arrive, until the store is closed.

        Raises:
            StoreError: the file can no longer be written, so nothing more will arrive.
        """
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()

        def wake_up() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake.set)

        with self._listening(wake_up):
            while not self._is_closed:
                wake.clear()
                batch = await self._read(functools.partial(self._records_after, cursor))
                for cursor, record in batch:  # the cursor moves on with what was yielded
                    yield cursor, record
                if not batch:
                    await self._next_commit(wake)

    # ---- training

    async def put_resources(self, resources: Sequence[Resource]) -> None:
        """Publish resources.

        Raises:
            StoreError: a (kind, name, version) used before with another content.
        """
        await self._write(lambda c: ledger.put_resources(c, resources, self._codec))

    async def resources(self, kind: str | None = None, name: str | None = None) -> Sequence[Resource]:
        """Return resources in the order they were published."""
        return await self._read(lambda c: ledger.resources(c, kind, name))

    async def add_updates(self, updates: Sequence[Update]) -> None:
        """Enter updates into the ledger, all or none.

        Raises:
            StoreError: a rollout would count twice for one policy among the updates that are not voided.
        """
        await self._write(lambda c: ledger.add_updates(c, updates, self._codec))

    async def updates(self, *, include_voided: bool = False) -> Sequence[Update]:
        """Return updates in the order they were entered."""
        return await self._read(lambda c: ledger.updates(c, include_voided=include_voided))

    async def commit_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Enter a checkpoint whose folder is written whole.

        Raises:
            StoreError: its id was used before for another one.
        """
        await self._write(lambda c: ledger.commit_checkpoint(c, checkpoint, self._codec))

    async def latest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint committed last."""
        return await self._read(ledger.latest_checkpoint)

    async def void_updates_after(self, step: int) -> Sequence[Update]:
        """Void the ledger's updates with a later step; return those that were not void before."""
        return await self._write(lambda c: ledger.void_updates_after(c, step))

    async def next_version(self, policy: str) -> int:
        """Issue a version number of `policy` that was never issued before, also after a resume. The first is 1."""
        return await self._write(lambda c: ledger.next_version(c, policy))

    async def get_meta(self, key: str) -> str | None:
        """Return the value put last under `key`."""
        return await self._read(lambda c: ledger.get_meta(c, key))

    async def put_meta(self, key: str, value: str) -> None:
        """Put `value` under `key`."""
        await self._write(lambda c: ledger.put_meta(c, key, self.redactor.text(value)))

    async def close(self) -> None:
        """Commit what waits, close the file and give the lock back. Idempotent."""
        self._is_closed = True
        await asyncio.to_thread(self._close)

    # ---- machinery

    def _close(self) -> None:
        with self._closing:
            # The writer last: only a connection that may write can fold the log into the file when it goes.
            self._reader.shutdown(wait=True)
            self._read_connection.close()
            if self._write_side is not None:
                self._write_side.close()

    def _writing(self) -> _WriteSide:
        if self._write_side is None:
            raise StoreError(f"{str(self.path)!r} was opened with read_only=True; open it without to write")
        return self._write_side

    async def _write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return cast(_T, await self._writing().group.submit(lambda connection, _: [work(connection)], None))

    async def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._is_closed:
            raise StoreError(f"{str(self.path)!r} is closed; open it again to read")

        def read() -> _T:
            with translated(self.path):
                return work(self._read_connection)

        return await asyncio.get_running_loop().run_in_executor(self._reader, read)

    def _records_after(self, cursor: int, _: sqlite3.Connection) -> list[tuple[int, Record]]:
        return self._record_reader.after(cursor, _STREAM_BATCH)

    def _known_rollouts(self, connection: sqlite3.Connection, rollout_ids: Sequence[str]) -> Mapping[str, Rollout]:
        found = {r.rollout_id: r for r in rollout_rows.select(connection, {}, rollout_ids)}
        unknown = sorted(set(rollout_ids) - set(found))
        if unknown:
            raise StoreError(f"there are no rollouts {unknown!r} in {str(self.path)!r}; check the ids")
        return found

    @contextlib.contextmanager
    def _listening(self, listener: Callable[[], None]) -> Iterator[None]:
        if self._write_side is None:
            yield
            return
        group = self._write_side.group
        group.listen(listener)
        try:
            yield
        finally:
            group.unlisten(listener)

    async def _next_commit(self, wake: asyncio.Event) -> None:
        if self._write_side is None:
            await asyncio.sleep(_FOREIGN_COMMIT_SECONDS)
        elif self._write_side.group.failure is not None:
            raise StoreError(f"no more records will arrive since a write failed: {self._write_side.group.failure}")
        else:
            await wake.wait()


def _scored_key(group_id: str) -> str:
    return f"scored/{group_id}"


def _gathered(rollout: Rollout, records: Sequence[Record]) -> RolloutRecords:
    return RolloutRecords(
        rollout=rollout,
        spans=[r for r in records if isinstance(r, Span)],
        completions=[r for r in records if isinstance(r, Completion)],
        rewards=[r for r in records if isinstance(r, Reward)],
    )
