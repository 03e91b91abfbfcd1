"""Keep what training writes: resources, the update ledger, checkpoints, version numbers, settings.

One idea: the database itself refuses to count a rollout twice (a unique index over updates that are not voided),
so a mistake in the resume logic is an error, never a biased gradient.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from leyden.errors import StoreError
from leyden.spans import Checkpoint, Resource, Update
from leyden.sqlite.codec import RecordCodec


def put_resources(connection: sqlite3.Connection, resources: Sequence[Resource], codec: RecordCodec) -> None:
    """Publish resources.

    Raises:
        StoreError: a (kind, name, version) used before with another location or content.
    """
    for resource in resources:
        body = codec.encode(resource)
        key = (resource.kind, resource.name, resource.version)
        row = connection.execute(
            "SELECT body FROM resources WHERE kind = ? AND name = ? AND version = ?", key
        ).fetchone()
        if row is None:
            connection.execute("INSERT INTO resources (kind, name, version, body) VALUES (?,?,?,?)", (*key, body))
            continue
        old, new = (msgspec.msgpack.decode(known, type=Resource) for known in (row[0], body))
        if (old.location, old.content) != (new.location, new.content):
            raise StoreError(
                f"version {resource.version!r} of {resource.kind} {resource.name!r} was published before with another "
                "content; a version is never reused: take a new one from next_version"
            )


def resources(connection: sqlite3.Connection, kind: str | None, name: str | None) -> Sequence[Resource]:
    """Return resources in the order they were published."""
    rows = connection.execute(
        "SELECT body FROM resources WHERE kind = coalesce(?, kind) AND name = coalesce(?, name) ORDER BY position",
        (kind, name),
    ).fetchall()
    return [msgspec.msgpack.decode(row[0], type=Resource) for row in rows]


def add_updates(connection: sqlite3.Connection, updates: Sequence[Update], codec: RecordCodec) -> None:
    """Enter updates into the ledger.

    Raises:
        StoreError: a rollout would count twice for one policy, or an update id is reused.
    """
    for update in updates:
        body = codec.encode(update)
        row = connection.execute("SELECT body FROM updates WHERE update_id = ?", (update.update_id,)).fetchone()
        if row is not None:
            _refuse_other_update(msgspec.msgpack.decode(row[0], type=Update), update)
            continue
        connection.execute(
            "INSERT INTO updates (update_id, step, voided, body) VALUES (?,?,?,?)",
            (update.update_id, update.step, update.voided, body),
        )
        try:
            connection.executemany(
                "INSERT INTO update_rollouts VALUES (?,?,?,?)",
                [(update.update_id, update.policy, rollout, update.voided) for rollout in update.rollout_ids],
            )
        except sqlite3.IntegrityError as error:
            raise StoreError(_counted_twice(connection, update)) from error


def updates(connection: sqlite3.Connection, *, include_voided: bool) -> Sequence[Update]:
    """Return updates in the order they were entered."""
    rows = connection.execute(
        "SELECT body, voided FROM updates WHERE voided <= ? ORDER BY position", (include_voided,)
    ).fetchall()
    return [_update(*row) for row in rows]


def void_updates_after(connection: sqlite3.Connection, step: int) -> Sequence[Update]:
    """Void the updates with a later step; return those that were not void before."""
    rows = connection.execute(
        "SELECT body, 1 FROM updates WHERE step > ? AND voided = 0 ORDER BY position", (step,)
    ).fetchall()
    connection.execute(
        "UPDATE update_rollouts SET voided = 1 WHERE update_id IN "
        "(SELECT update_id FROM updates WHERE step > ? AND voided = 0)",
        (step,),
    )
    connection.execute("UPDATE updates SET voided = 1 WHERE step > ?", (step,))
    return [_update(*row) for row in rows]


def commit_checkpoint(connection: sqlite3.Connection, checkpoint: Checkpoint, codec: RecordCodec) -> None:
    """Enter a checkpoint.

    Raises:
        StoreError: its id was used before for another one.
    """
    row = connection.execute(
        "SELECT body FROM checkpoints WHERE checkpoint_id = ?", (checkpoint.checkpoint_id,)
    ).fetchone()
    if row is None:
        connection.execute(
            "INSERT INTO checkpoints (checkpoint_id, body) VALUES (?,?)",
            (checkpoint.checkpoint_id, codec.encode(checkpoint)),
        )
    elif msgspec.msgpack.decode(row[0], type=Checkpoint) != checkpoint:
        raise StoreError(f"checkpoint id {checkpoint.checkpoint_id!r} was used before; give each checkpoint its own")


def latest_checkpoint(connection: sqlite3.Connection) -> Checkpoint | None:
    """Return the checkpoint committed last."""
    row = connection.execute("SELECT body FROM checkpoints ORDER BY position DESC LIMIT 1").fetchone()
    return None if row is None else msgspec.msgpack.decode(row[0], type=Checkpoint)


def next_version(connection: sqlite3.Connection, policy: str) -> int:
    """Issue a version number of `policy` that was never issued before."""
    (version,) = connection.execute(
        "INSERT INTO versions VALUES (?, 1) ON CONFLICT DO UPDATE SET issued = issued + 1 RETURNING issued",
        (policy,),
    ).fetchone()
    return int(version)


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """Return the value put last under `key`."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def put_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Put `value` under `key`."""
    connection.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value))


def _update(body: bytes, voided: int) -> Update:
    return msgspec.structs.replace(msgspec.msgpack.decode(body, type=Update), voided=bool(voided))


def _refuse_other_update(known: Update, update: Update) -> None:
    same = ("policy", "step", "version", "rollout_ids", "replayed_ids")
    if any(getattr(known, name) != getattr(update, name) for name in same):
        raise StoreError(
            f"update id {update.update_id!r} is in the ledger with another content; give each update its own id"
        )


def _counted_twice(connection: sqlite3.Connection, update: Update) -> str:
    rows = connection.execute(
        "SELECT rollout_id, update_id FROM update_rollouts WHERE policy = ? AND voided = 0 AND update_id != ? "
        "AND rollout_id IN (SELECT value FROM json_each(?))",
        (update.policy, update.update_id, msgspec.json.encode(update.rollout_ids).decode()),
    ).fetchall()
    where = f"already counted by update {rows[0][1]!r}" if rows else "named twice in this one"
    named = sorted({row[0] for row in rows} or {r for r in update.rollout_ids if update.rollout_ids.count(r) > 1})
    return (
        f"update {update.update_id!r} of policy {update.policy!r} would count rollouts twice: {named!r} are {where}; "
        "void the earlier update, or leave them out"
    )
