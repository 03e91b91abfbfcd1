"""Open, lock and describe the file of a SQLite store.

One idea: one process writes, any number read; the writer holds an advisory lock on `<file>.lock`, which the
system drops when the process dies, however it dies. One trap: SQLite's errors name no file, so every one of them
is translated here before it leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import msgspec

from leyden.errors import StoreError
from leyden.interfaces import Owner
from leyden.ownership import current_owner
from leyden.sqlite.migrations import APPLICATION_ID, MIGRATIONS, migrate, refuse_newer

Synchronous = Literal["normal", "full"]
"""`normal`: a killed process loses nothing, a power cut may lose the last seconds. `full`: neither does."""

_OLDEST_SQLITE = (3, 35, 0)  # the first with RETURNING
_WAL_BYTES_KEPT = 64 * 2**20
_FATAL = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
}


class WriterLock:
    """The right to write a store, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @classmethod
    def take(cls, store: Path) -> WriterLock:
        """Lock `store` for this process.

        Raises:
            StoreError: another process holds it, or the folder cannot be written.
        """
        path = store.with_name(store.name + ".lock")
        try:
            lock = cls(path)
        except OSError as error:
            raise StoreError(f"cannot write {str(path)!r}: {error.strerror}; check the folder") from error
        try:
            fcntl.flock(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = lock._holder()
            lock.release()
            raise StoreError(
                f"{str(store)!r} is open for writing by {holder}; stop that run first, or open it with "
                "read_only=True to look at it"
            ) from error
        os.ftruncate(lock._descriptor, 0)
        os.pwrite(lock._descriptor, msgspec.json.encode(asdict(current_owner())), 0)
        return lock

    def release(self) -> None:
        """Give the right back. Idempotent."""
        # The lock file stays: removing it would let two processes lock two files of one name.
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _holder(self) -> str:
        try:
            owner = msgspec.json.decode(os.pread(self._descriptor, 4096, 0), type=Owner)
        except msgspec.MsgspecError:
            return "another process"
        return "this process" if owner == current_owner() else f"process {owner.pid}"


def open_for_writing(path: Path, synchronous: Synchronous) -> sqlite3.Connection:
    """Open or create the store at `path` and bring its schema up to date; the caller holds the lock.

    Raises:
        StoreError: the file is no store, is damaged, or was written by a newer version.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreError(
            f"this Python has SQLite {sqlite3.sqlite_version} and a store needs "
            f"{'.'.join(map(str, _OLDEST_SQLITE))} or later; use a newer Python build"
        )
    with translated(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            _refuse_foreign(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
            migrate(connection, path, MIGRATIONS)
        except BaseException:
            connection.close()
            raise
    return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open the store at `path` so that nothing can be written through the connection.

    Raises:
        StoreError: there is no file, or it is no store of this version.
    """
    if not path.is_file():
        raise StoreError(f"there is no store at {str(path)!r}; give the file that a run wrote")
    with translated(path):
        uri = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            _refuse_foreign(connection, path)
            _refuse_other_version(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def is_fatal(error: sqlite3.Error) -> bool:
    """Say whether the file, not the statement, is at fault, so that nothing more can be written."""
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _FATAL


def describe(path: Path, error: sqlite3.Error) -> str:
    """Say what is wrong with the file at `path`, and what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{str(path)!r} is damaged or no Leyden store ({error}); restore a copy or name another file"
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB"
        return f"cannot write {str(path)!r}: {error} (free on that disk: {free}); make room, then resume the run"
    return f"cannot use {str(path)!r}: {error}; check that the file and its folder can be read and written"


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors inside the block into `StoreError` that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(describe(path, error)) from error


def _refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id == APPLICATION_ID:
        return
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id or tables:
        raise StoreError(f"{str(path)!r} is a database of another program, not a Leyden store; name another file")


def _refuse_other_version(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    refuse_newer(version, path, len(MIGRATIONS))
    if version < len(MIGRATIONS):
        raise StoreError(
            f"{str(path)!r} has store schema {version} and this Leyden reads {len(MIGRATIONS)}; open it once for "
            "writing to bring it up to date"
        )
