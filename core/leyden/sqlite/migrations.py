"""The schema of a SQLite store, as the list of steps that led to it.

One idea: `PRAGMA user_version` counts the steps a file has taken; opening a store takes the missing ones, each
in its own transaction. To change the schema append a step; never edit one that was released.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from leyden.errors import StoreError

APPLICATION_ID = 0x4C45_5944
"""`LEYD` in the file's header: tells a store from other programs' databases."""

Migration = Callable[[sqlite3.Connection], None]


def create_rollouts_and_records(connection: sqlite3.Connection) -> None:
    """Create what rollouts write."""
    connection.execute(
        """
        CREATE TABLE rollouts (
            position INTEGER PRIMARY KEY,      -- order in which they were added
            rollout_id TEXT NOT NULL UNIQUE,
            task BLOB NOT NULL,                -- msgpack
            task_id TEXT NOT NULL,
            group_id TEXT NOT NULL,
            mode TEXT NOT NULL,
            step INTEGER NOT NULL,
            state TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            reward REAL,
            output BLOB NOT NULL,              -- msgpack
            error TEXT,
            error_type TEXT,
            versions BLOB NOT NULL,            -- msgpack, policy -> version
            started_ns INTEGER NOT NULL,
            ended_ns INTEGER NOT NULL,
            schema INTEGER NOT NULL,
            owner TEXT,                        -- JSON, who holds the lease of a running rollout
            lease_until_ns INTEGER
        )
        """
    )
    connection.execute("CREATE INDEX rollouts_of_step ON rollouts (step, mode)")
    connection.execute("CREATE INDEX leases ON rollouts (lease_until_ns) WHERE state = 'running'")
    connection.execute(
        """
        CREATE TABLE records (
            sequence INTEGER PRIMARY KEY,
            rollout_id TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            key TEXT NOT NULL,                 -- its first letter is the type: span, completion, reward
            body BLOB NOT NULL,                -- msgpack
            tokens BLOB                        -- msgpack, the numbers of a completion
        )
        """
    )
    # One index both finds an attempt's records and refuses a second copy of one; a separate key index would
    # cost as much again, and its random order would touch more pages.
    connection.execute("CREATE UNIQUE INDEX records_of_attempt ON records (rollout_id, attempt, key)")


def create_training(connection: sqlite3.Connection) -> None:
    """Create what training writes."""
    connection.execute(
        """
        CREATE TABLE resources (
            position INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            body BLOB NOT NULL,
            UNIQUE (kind, name, version)
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE updates (
            position INTEGER PRIMARY KEY,
            update_id TEXT NOT NULL UNIQUE,
            step INTEGER NOT NULL,
            voided INTEGER NOT NULL,
            body BLOB NOT NULL
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE update_rollouts (
            update_id TEXT NOT NULL,
            policy TEXT NOT NULL,
            rollout_id TEXT NOT NULL,
            voided INTEGER NOT NULL
        )
        """
    )
    # The rule that no rollout counts twice for a policy, kept by the database itself.
    connection.execute("CREATE UNIQUE INDEX counted_once ON update_rollouts (policy, rollout_id) WHERE voided = 0")
    connection.execute("CREATE INDEX rollouts_of_update ON update_rollouts (update_id)")
    connection.execute(
        """
        CREATE TABLE checkpoints (
            position INTEGER PRIMARY KEY,
            checkpoint_id TEXT NOT NULL UNIQUE,
            body BLOB NOT NULL
        )
        """
    )
    connection.execute("CREATE TABLE versions (policy TEXT PRIMARY KEY, issued INTEGER NOT NULL)")
    connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")


MIGRATIONS: Sequence[Migration] = (create_rollouts_and_records, create_training)
"""All steps, oldest first."""


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> None:
    """Take the steps that the file at `path` has not taken; a step that fails leaves the file as it was.

    Raises:
        StoreError: the file has taken more steps than this version knows.
    """
    (done,) = connection.execute("PRAGMA user_version").fetchone()
    refuse_newer(done, path, len(migrations))
    for version in range(done, len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            migrations[version](connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself when the disk was full
                connection.execute("ROLLBACK")
            raise


def refuse_newer(version: int, path: Path, known: int) -> None:
    """Refuse a file that has taken more steps than are known.

    Raises:
        StoreError: it has.
    """
    if version > known:
        raise StoreError(
            f"{str(path)!r} has store schema {version} and this Leyden knows {known}: it was written by a newer "
            "version; upgrade with pip install -U leyden"
        )
