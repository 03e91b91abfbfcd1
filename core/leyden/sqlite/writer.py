"""Write from one thread, and commit what waited together in one transaction.

One idea: callers hand over work and await a future that resolves after the commit, so "stored" means on disk,
and sixty-four callers share one commit. One trap: every SQLite call gives the interpreter lock away and queues
for it again, so work is written to need few calls, not few rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import StoreError
from leyden.sqlite.file import describe, is_fatal

Work = Callable[[sqlite3.Connection, Sequence[object]], Sequence[object]]
"""Does the jobs' payloads in order; returns one result each, an `Exception` to raise it at that caller."""

_JOBS_PER_COMMIT = 1024


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work
    payload: object
    weight: int
    future: asyncio.Future[object]
    loop: asyncio.AbstractEventLoop


class GroupWriter:
    """Owns the write connection. Neighbouring jobs of one `work` are done in one call."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closing = False
        self._failure: str | None = None
        self._listeners: list[Callable[[], None]] = []
        # A daemon: a program that forgets to close must still end, and what was acknowledged is on disk.
        self._thread = threading.Thread(target=self._run, name="leyden-store-writer", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """What went wrong with the file, once something did; from then on nothing is written."""
        return self._failure

    async def submit(self, work: Work, payload: object, *, weight: int = 1) -> object:
        """Do `work` with `payload` in the next transaction; return its result once that is committed.

        Args:
            weight: how many records this writes, for the report of what was lost.

        Raises:
            StoreError: the store is closed, or its file cannot be written.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        with self._lock:
            if self._is_closing:
                raise StoreError(f"{str(self._path)!r} is closed; open it again to write")
            if self._failure is not None:
                raise StoreError(f"nothing more is stored since a write failed: {self._failure}")
            self._jobs.put(_Job(work, payload, weight, future, loop))
        return await future

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` from the writer's thread after each commit, on failure and at the end."""
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.remove(listener)

    def close(self) -> None:
        """Commit what waits and close the connection; blocks. Idempotent."""
        with self._lock:
            if not self._is_closing:
                self._is_closing = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs, is_open = self._waiting_jobs()
            if jobs:
                _answer(jobs, self._commit(jobs))
            self._notify()
        # The last checkpoint of the write-ahead log may fail on a full disk; the log itself is safe.
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _waiting_jobs(self) -> tuple[list[_Job], bool]:
        """Return what waits, at least one job unless closing, and whether more may come."""
        jobs: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == _JOBS_PER_COMMIT:
                return jobs, True
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, True
        return jobs, False

    def _commit(self, jobs: Sequence[_Job]) -> Sequence[object]:
        """Do all jobs in one transaction; return a result or an exception each."""
        if self._failure is not None:
            return [StoreError(f"nothing more is stored since a write failed: {self._failure}") for _ in jobs]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results: list[object] = []
            for work, group in itertools.groupby(jobs, key=lambda job: job.work):
                results.extend(self._do(work, [job.payload for job in group]))
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            return self._fail(jobs, error)
        return results

    def _do(self, work: Work, payloads: Sequence[object]) -> Sequence[object]:
        """Do one group of jobs; one that raises is undone and fails alone."""
        self._connection.execute("SAVEPOINT work")
        try:
            results = work(self._connection, payloads)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and is_fatal(error):
                raise
            self._connection.execute("ROLLBACK TO work")
            results = [self._named(error)] * len(payloads)
        self._connection.execute("RELEASE work")
        return results

    def _named(self, error: Exception) -> Exception:
        if not isinstance(error, sqlite3.Error):
            return error
        named = StoreError(f"{str(self._path)!r} refused a write: {error}; check the record's fields")
        named.__cause__ = error
        return named

    def _fail(self, jobs: Sequence[_Job], error: sqlite3.Error) -> Sequence[object]:
        if self._connection.in_transaction:  # SQLite has rolled back by itself when the disk was full
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
        reason = describe(self._path, error)
        with self._lock:
            self._failure = reason
        lost = sum(job.weight for job in jobs)
        message = f"{reason}. Not stored: the last {lost} records; everything acknowledged before is safe"
        failures: list[object] = []
        for _ in jobs:
            failure = StoreError(message)
            failure.__cause__ = error
            failures.append(failure)
        return failures

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


def _answer(jobs: Sequence[_Job], results: Sequence[object]) -> None:
    """Resolve the jobs' futures, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[object], object]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_loop.setdefault(job.loop, []).append((job.future, result))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, answers)


def _resolve(answers: Sequence[tuple[asyncio.Future[object], object]]) -> None:
    for future, result in answers:
        if future.done():  # its caller was cancelled
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
