"""Store finished rollouts from a thread of its own: the app hands them over and goes on.

One idea: a rollout is handed over whole, when it ends, so it is stored whole or counted as dropped; nothing that was
cut in half can be learnt from.
One trap: a forked child inherits everything here but the thread. It begins anew, with a store of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from leyden.errors import StoreError
from leyden.ownership import current_owner
from leyden.recording.finished import Finished, NotRedactedError, Redact, redacted
from leyden.spans import now_ns
from leyden.sqlite import SQLiteStore

log = logging.getLogger(__name__)

MOST_ROLLOUTS_A_BATCH = 256
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 30.0)
"""Waits between tries while the store cannot be written; the last one repeats."""
MOST_STORES = 1000
"""Processes that may record into one folder at a time."""
LOG_SECONDS = 60.0
"""Between two lines of the log about what is dropped."""
DROPPED = "recording/dropped/"
"""Begins the name of a store's note with what one writer has dropped so far, by reason."""

FULL = "the queue was full"
UNWRITABLE = "the store could not be written before the recording was closed"
BAD = "it held what cannot be stored"
NOT_REDACTED = "redact raised an exception"
CLOSED = "it ended after the recording was closed"


class Writer:
    """Takes finished rollouts, at most so many records at a time, and stores them. Thread-safe; never raises."""

    def __init__(self, folder: Path, *, most_records: int, redact: Redact | None = None) -> None:
        self.folder = folder
        self._most_records = most_records
        self._redact = redact
        self._begin()
        _writers.add(self)

    def _begin(self) -> None:
        """Start from nothing: at first, and in a forked child, whose locks may be held by threads it does not have."""
        self.dropped: Counter[str] = Counter()
        """Why rollouts are lost -> how many."""
        self.stored = 0
        """Rollouts."""
        self.failure: str | None = None
        """Why the store cannot be written, while it cannot."""
        self._name = f"{now_ns()}-{os.getpid()}"
        self._changed = threading.Condition()
        self._waiting: deque[Finished] = deque()
        self._size = 0
        """Records that wait or are being stored."""
        self._is_closing = False
        self._gives_up = False
        self._thread: threading.Thread | None = None
        self._logged = -LOG_SECONDS
        self._noted: Counter[str] = Counter()

    def put(self, one: Finished) -> None:
        """Take a rollout, or count it as dropped."""
        with self._changed:
            if self._is_closing:
                self._drop(CLOSED)
            elif self._size + one.size > self._most_records:
                self._drop(FULL)
            else:
                self._waiting.append(one)
                self._size += one.size
                self._changed.notify_all()
                if self._thread is None or not self._thread.is_alive():
                    self._start()

    def drop(self, reason: str) -> None:
        """Count a rollout that is not even handed over."""
        with self._changed:
            self._drop(reason)

    def flush(self, timeout: float) -> bool:
        """Wait until all that was taken is stored; say whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._size == 0, timeout)

    def close(self, timeout: float) -> bool:
        """Store what waits, as far as `timeout` seconds allow, and end; say whether all is stored. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        with self._changed:
            self._gives_up = True
            self._changed.notify_all()
        thread.join(1.0)
        with self._changed:
            return self._size == 0 and not self.dropped[UNWRITABLE]

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="leyden-recording", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending, or has no thread left
            self._drop(UNWRITABLE, len(self._waiting))
            self._waiting.clear()
            self._size = 0
        else:
            self._thread = thread

    def _drop(self, reason: str, count: int = 1) -> None:
        """Count, and say so at most once a minute. The lock is held."""
        self.dropped[reason] += count
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            why = f"; the store: {self.failure}" if self.failure else ""
            log.warning("recording into %s has dropped rollouts so far: %s%s", self.folder, dict(self.dropped), why)

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._store_all())
        finally:
            loop.close()

    async def _store_all(self) -> None:
        store: SQLiteStore | None = None
        tries = 0
        while batch := self._next():
            try:
                store = store or await open_store(self.folder)
                await self._write(store, batch)
                self.failure, tries = None, 0
                self._done(batch)
            except Exception as error:
                if isinstance(error, (StoreError, OSError)):
                    self.failure = str(error)
                    await closed(store)
                    store = None
                    if self._may_try_again(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)]):
                        tries += 1
                        self._again(batch)
                        continue
                    self._lost(batch, UNWRITABLE)
                elif len(batch) > 1:  # one of them is bad: alone, it takes no other with it
                    for one in batch:
                        await self._write_alone(store, one)
                else:
                    self._lost(batch, reason_of(error))
        await closed(store)

    async def _write_alone(self, store: SQLiteStore | None, one: Finished) -> None:
        assert store is not None
        try:
            await self._write(store, [one])
        except Exception as error:
            self._lost([one], reason_of(error))
        else:
            self._done([one])

    async def _write(self, store: SQLiteStore, batch: Sequence[Finished]) -> None:
        if self._redact is not None:
            batch = [redacted(one, self._redact) for one in batch]
        await store.add_rollouts([one.rollout for one in batch])
        names = [one.rollout.rollout_id for one in batch]
        await store.start(names, owner=current_owner(), lease_seconds=3600, versions={})
        await store.add_records([record for one in batch for record in one.records])
        await store.finish([one.outcome for one in batch])
        if self.dropped != self._noted:
            self._noted = self.dropped.copy()
            await store.put_meta(DROPPED + self._name, msgspec.json.encode(dict(self._noted)).decode())

    def _next(self) -> list[Finished]:
        """Wait for rollouts; none once the recording is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_ROLLOUTS_A_BATCH))]

    def _again(self, batch: Sequence[Finished]) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(batch))

    def _done(self, batch: Sequence[Finished]) -> None:
        with self._changed:
            self.stored += len(batch)
            self._forget(batch)

    def _lost(self, batch: Sequence[Finished], reason: str) -> None:
        with self._changed:
            self._drop(reason, len(batch))
            self._forget(batch)

    def _forget(self, batch: Sequence[Finished]) -> None:
        self._size -= sum(one.size for one in batch)
        self._changed.notify_all()

    def _may_try_again(self, seconds: float) -> bool:
        """Wait; say whether it is worth another try."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._gives_up, seconds)


def reason_of(error: Exception) -> str:
    """Return what to count a rollout under that cannot be stored."""
    return NOT_REDACTED if isinstance(error, NotRedactedError) else BAD


async def open_store(folder: Path) -> SQLiteStore:
    """Open the first store of a folder that no other process writes: `store.db`, `store-2.db` and so on.

    Raises:
        StoreError: the folder cannot be written, or a file there is no store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, MOST_STORES + 1):
        path = folder / ("store.db" if number == 1 else f"store-{number}.db")
        try:
            return await SQLiteStore.open(path)
        except StoreError as error:
            if not is_taken(error):
                raise
    raise StoreError(f"{MOST_STORES} processes write into {str(folder)!r} already")


def is_taken(error: StoreError) -> bool:
    """Say whether a store could not be opened because another process writes it."""
    return isinstance(error.__cause__, BlockingIOError)


async def closed(store: SQLiteStore | None) -> None:
    """Close a store, whatever state it is in."""
    if store is not None:
        with contextlib.suppress(Exception):
            await store.close()


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork() -> None:
    for writer in list(_writers):
        writer._begin()


os.register_at_fork(after_in_child=_after_fork)
