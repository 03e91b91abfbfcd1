"""Keep rollouts, their attempts and leases in the `rollouts` table.

One idea: the row holds only the latest attempt, so "which attempt counts" is one number and an older attempt can
change nothing. One trap: an outcome may arrive after its attempt was given up; it is then kept as an event among
the attempt's records, where `late_records` finds it.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import msgspec

from leyden.errors import RewardError, StoreError
from leyden.interfaces import Outcome, Owner
from leyden.ownership import is_alive
from leyden.roles import MAIN_ROLE
from leyden.spans import (
    FINISHED,
    SCHEMA_VERSION,
    STATE_MOVES,
    Kind,
    Rollout,
    RolloutState,
    Span,
    Status,
    now_ns,
)
from leyden.sqlite.codec import RecordCodec, newer_schema

_COLUMNS = (
    "rollout_id, task, task_id, group_id, mode, step, state, attempt, reward, output, error, error_type, "
    "versions, started_ns, ended_ns, schema"
)


def add(connection: sqlite3.Connection, rollouts: Sequence[Rollout], codec: RecordCodec) -> None:
    """Queue rollouts; one that exists already is left as it is."""
    rows = [
        (
            r.rollout_id, codec.encode(r.task), r.task_id, r.group_id, r.mode, r.step, r.state, r.attempt, r.reward,
            codec.encode(r.output), r.error, r.error_type, codec.encode(r.versions), r.started_ns, r.ended_ns,
            r.schema,
        )
        for r in rollouts
    ]  # fmt: skip
    marks = ",".join("?" * len(_COLUMNS.split(",")))
    connection.executemany(f"INSERT OR IGNORE INTO rollouts ({_COLUMNS}) VALUES ({marks})", rows)


def start(
    connection: sqlite3.Connection,
    rollout_ids: Sequence[str],
    *,
    owner: Owner,
    lease_seconds: float,
    versions: bytes,
) -> Mapping[str, int]:
    """Take the queued ones; return each with its new attempt number."""
    now = now_ns()
    started: dict[str, int] = {}
    for rollout_id in rollout_ids:
        row = connection.execute(
            "UPDATE rollouts SET state = ?, attempt = attempt + 1, owner = ?, lease_until_ns = ?, versions = ?, "
            "started_ns = ?, ended_ns = 0, reward = NULL, error = NULL, error_type = NULL "
            "WHERE rollout_id = ? AND state = ? RETURNING attempt",
            (
                RolloutState.RUNNING, _encode(owner), _lease_end(now, lease_seconds), versions, now, rollout_id,
                RolloutState.QUEUED,
            ),
        ).fetchone()  # fmt: skip
        if row is not None:
            started[rollout_id] = row[0]
    return started


def renew(connection: sqlite3.Connection, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float) -> None:
    """Extend the leases that `owner` holds."""
    until = _lease_end(now_ns(), lease_seconds)
    connection.executemany(
        "UPDATE rollouts SET lease_until_ns = ? WHERE rollout_id = ? AND state = ? AND owner = ?",
        [(until, rollout_id, RolloutState.RUNNING, _encode(owner)) for rollout_id in rollout_ids],
    )


def reclaim(connection: sqlite3.Connection) -> Sequence[tuple[str, int]]:
    """Queue again what ran out of its lease or whose owner died; return (rollout id, lost attempt)."""
    now = now_ns()
    running = connection.execute(
        "SELECT rollout_id, attempt, owner, lease_until_ns FROM rollouts WHERE state = ? ORDER BY position",
        (RolloutState.RUNNING,),
    ).fetchall()
    alive = {text: is_alive(msgspec.json.decode(text, type=Owner)) for text in {row[2] for row in running}}
    lost = [(row[0], row[1]) for row in running if row[3] <= now or not alive[row[2]]]
    # running -> lost -> queued, in one step of the database: nobody can see a lost rollout that is not queued.
    connection.executemany(
        "UPDATE rollouts SET state = ?, owner = NULL, lease_until_ns = NULL WHERE rollout_id = ?",
        [(RolloutState.QUEUED, rollout_id) for rollout_id, _ in lost],
    )
    return lost


def requeue(connection: sqlite3.Connection, rollout_ids: Sequence[str]) -> None:
    """Queue `lost` rollouts again; one that is queued already stays so.

    Raises:
        StoreError: an unknown rollout, or one that is running or finished.
    """
    for rollout_id in rollout_ids:
        state, _ = _state_of(connection, rollout_id)
        if state is RolloutState.QUEUED:
            continue
        if RolloutState.QUEUED not in STATE_MOVES[state]:
            raise StoreError(f"rollout {rollout_id!r} is {state.value!r}; only a lost rollout can be queued again")
        connection.execute("UPDATE rollouts SET state = ? WHERE rollout_id = ?", (RolloutState.QUEUED, rollout_id))


def finish(
    connection: sqlite3.Connection,
    outcomes: Sequence[Outcome],
    codec: RecordCodec,
    keep: Callable[[Span], None],
) -> None:
    """End attempts; hand the outcome of an attempt that was given up to `keep` as an event.

    Raises:
        StoreError: an unknown rollout or attempt, or a move that `STATE_MOVES` does not allow.
        RewardError: a reward that is no finite number.
    """
    for outcome in outcomes:
        _check_outcome(outcome)
        state, attempt = _state_of(connection, outcome.rollout_id)
        if outcome.attempt > attempt:
            raise StoreError(
                f"rollout {outcome.rollout_id!r} has {attempt} attempts, so attempt {outcome.attempt!r} cannot end; "
                "start it first"
            )
        if outcome.attempt < attempt or (state is RolloutState.QUEUED and attempt > 0):
            keep(_late_outcome(outcome))
        elif outcome.state not in STATE_MOVES[state]:
            if outcome.state is not state:  # the same end told twice is no news
                raise StoreError(
                    f"rollout {outcome.rollout_id!r} is {state.value!r} and cannot become {outcome.state.value!r}; "
                    f"allowed: {sorted(move.value for move in STATE_MOVES[state])!r}"
                )
        else:
            _end(connection, outcome, codec)


def score(connection: sqlite3.Connection, group_id: str, totals: Mapping[str, float | None]) -> None:
    """Set the totals of a group's finished rollouts.

    Raises:
        StoreError: an unknown rollout, one of another group, or one that has not finished or has a reward.
        RewardError: a total that is no finite number.
    """
    for rollout in select(connection, {}, list(totals)):
        total = totals[rollout.rollout_id]
        if total is not None and not math.isfinite(total):
            raise RewardError(f"rollout {rollout.rollout_id!r} cannot have the reward {total!r}; give a finite number")
        if rollout.group_id != group_id or rollout.state not in FINISHED or rollout.reward is not None:
            raise StoreError(
                f"rollout {rollout.rollout_id!r} of group {rollout.group_id!r} is {rollout.state.value!r} with reward "
                f"{rollout.reward!r}; score(group_id={group_id!r}) takes that group's finished ones without a reward"
            )
    changed = [
        connection.execute("UPDATE rollouts SET reward = ? WHERE rollout_id = ?", (total, rollout_id)).rowcount
        for rollout_id, total in totals.items()
    ]
    unknown = [name for name, count in zip(totals, changed, strict=True) if not count]
    if unknown:
        raise StoreError(f"there are no rollouts {unknown!r} in this store; add them first")


def select(
    connection: sqlite3.Connection, where: Mapping[str, object], rollout_ids: Sequence[str] | None = None
) -> Sequence[Rollout]:
    """Return rollouts in the order they were added, or those of `rollout_ids` in any order."""
    conditions = [f"{column} = ?" for column in where]
    parameters = list(where.values())
    if rollout_ids is not None:
        conditions.append("rollout_id IN (SELECT value FROM json_each(?))")
        parameters.append(msgspec.json.encode(rollout_ids).decode())
    query = f"SELECT {_COLUMNS} FROM rollouts WHERE {' AND '.join(conditions) or '1'} ORDER BY position"
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return [_rollout(row) for row in cursor.execute(query, parameters).fetchall()]


def _check_outcome(outcome: Outcome) -> None:
    if outcome.state not in FINISHED and outcome.state is not RolloutState.LOST:
        raise StoreError(
            f"rollout {outcome.rollout_id!r} cannot end as {outcome.state!r}; give a finished state or 'lost'"
        )
    if outcome.reward is not None and not math.isfinite(outcome.reward):
        raise RewardError(
            f"rollout {outcome.rollout_id!r} has reward {outcome.reward!r}; a reward is a finite number or None"
        )


def _end(connection: sqlite3.Connection, outcome: Outcome, codec: RecordCodec) -> None:
    clean = codec.redactor.text
    connection.execute(
        "UPDATE rollouts SET state = ?, reward = ?, output = ?, error = ?, error_type = ?, ended_ns = ?, "
        "owner = NULL, lease_until_ns = NULL WHERE rollout_id = ?",
        (
            outcome.state,
            outcome.reward,
            codec.encode(outcome.output),
            None if outcome.error is None else clean(outcome.error.encode("utf-8", "replace").decode()),
            outcome.error_type,
            now_ns(),
            outcome.rollout_id,
        ),
    )


def _late_outcome(outcome: Outcome) -> Span:
    now = now_ns()
    return Span(
        span_id=f"outcome-{outcome.rollout_id}-{outcome.attempt}",
        parent_id=None,
        rollout_id=outcome.rollout_id,
        attempt=outcome.attempt,
        kind=Kind.EVENT,
        name="late_outcome",
        role=MAIN_ROLE,
        start_ns=now,
        end_ns=now,
        status=Status.ABANDONED,
        error=outcome.error,
        attributes={
            "leyden.outcome.state": outcome.state.value,
            "leyden.outcome.reward": outcome.reward,
            "leyden.outcome.output": outcome.output,
            "leyden.outcome.error_type": outcome.error_type,
        },
    )


def _state_of(connection: sqlite3.Connection, rollout_id: str) -> tuple[RolloutState, int]:
    row = connection.execute("SELECT state, attempt FROM rollouts WHERE rollout_id = ?", (rollout_id,)).fetchone()
    if row is None:
        raise StoreError(f"there is no rollout {rollout_id!r} in this store; add it first")
    return RolloutState(row[0]), row[1]


def _rollout(row: sqlite3.Row) -> Rollout:
    fields = {name: row[name] for name in row.keys()}  # noqa: SIM118  # a Row iterates over its values
    for column in ("task", "output", "versions"):
        fields[column] = msgspec.msgpack.decode(fields[column])
    rollout = msgspec.convert(fields, Rollout)
    if rollout.schema > SCHEMA_VERSION:
        raise StoreError(f"rollout {rollout.rollout_id!r}: {newer_schema('rollout', rollout.schema)}")
    return rollout


def _encode(owner: Owner) -> str:
    return msgspec.json.encode(asdict(owner)).decode()


def _lease_end(now: int, lease_seconds: float) -> int:
    return now + int(lease_seconds * 1e9)
