"""Rewards that come after a rollout has ended: a user's thumb, a refund, a judge, a table.

One idea: they are lines appended to `rewards.jsonl` beside the stores, so any process may add one while the app goes
on recording, and none has to open its store. Whoever reads the rollouts joins them.
One trap: people change their mind. Of several rewards with one name and target the last counts, also over one that
was given while the rollout ran.
"""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError, DatasetError, RewardError
from leyden.interfaces import RolloutRecords
from leyden.rewards import DEFAULT_REWARD, checked, total
from leyden.spans import Mode, Reward, now_ns

FILE = "rewards.jsonl"
COLUMNS = ("rollout_id", "value")
OPTIONAL_COLUMNS = ("name", "role", "span")


class Feedback(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reward that came afterwards; a line of the file."""

    rollout_id: str
    value: float
    name: str = DEFAULT_REWARD
    role: str | None = None
    """Only this role's calls are credited."""
    span: str | None = None
    """Only this model call is."""
    time_ns: int = 0
    """When it came, in nanoseconds since the epoch."""

    @property
    def key(self) -> tuple[object, ...]:
        """Return what it replaces another one by, within a rollout."""
        return self.name, self.role, self.span, 0


def reward(
    rollout_id: str,
    value: float,
    name: str = DEFAULT_REWARD,
    *,
    store: str | Path,
    role: str | None = None,
    span: str | None = None,
) -> None:
    """Attach a reward to a recorded rollout, from any process, at any time after it began.

    Example:
        `leyden.reward(rollout_id, 1.0, store="runs/production")` when a user has clicked a thumb.

    Args:
        rollout_id: as `recording.rollout(...)` named it.
        value: finite.
        name: weighted by `Trainer(reward_weights=...)`.
        store: the folder that is recorded into, or a run's.
        role: credit this role's calls only.
        span: credit this model call only.

    Raises:
        RewardError: not a finite number.
        ConfigurationError: there is no such folder, or it cannot be written.
    """
    number = checked(value, where=f"rollout {rollout_id!r}")
    add(store, [Feedback(rollout_id=rollout_id, value=number, name=name, role=role, span=span, time_ns=now_ns())])


def add(store: str | Path, lines: Sequence[Feedback]) -> None:
    """Append rewards, all or none.

    Raises:
        ConfigurationError: there is no such folder, or it cannot be written.
    """
    folder = folder_of(store)
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is no folder; name the one that is recorded into")
    written = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    try:
        with (folder / FILE).open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = os.fstat(file.fileno()).st_size
            try:
                if file.write(written) != len(written):
                    raise OSError(f"{len(written)} bytes do not fit")
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        raise ConfigurationError(f"cannot write {str(folder / FILE)!r}: {error}") from error


def read(store: str | Path) -> list[Feedback]:
    """Return all rewards that came afterwards, in the order they came; none where there is no file.

    Raises:
        DatasetError: a line is none of ours.
    """
    path = folder_of(store) / FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=Feedback))
        except msgspec.MsgspecError as error:
            raise DatasetError(f"line {number} of {str(path)!r} is no reward: {error}") from error
    return found


def folder_of(store: str | Path) -> Path:
    """Return the folder that a run's path means, be it the folder or the store in it."""
    path = Path(store)
    return path.parent if path.suffix == ".db" else path


def read_table(path: Path) -> list[Feedback]:
    """Read a CSV file with the columns `rollout_id` and `value`, and perhaps `name`, `role` and `span`.

    Raises:
        DatasetError: a column is missing or unknown, or a row is wrong; names the line. Nothing is returned then.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {str(path)!r}: {error}") from error
    rows = csv.DictReader(text.splitlines())
    columns = rows.fieldnames or ()
    missing = [one for one in COLUMNS if one not in columns]
    unknown = [one for one in columns if one not in (*COLUMNS, *OPTIONAL_COLUMNS)]
    if missing or unknown:
        raise DatasetError(
            f"{str(path)!r} has the columns {list(columns)!r}; {list(COLUMNS)!r} are needed, and "
            f"{list(OPTIONAL_COLUMNS)!r} may stand beside them"
        )
    return [_row(path, rows.line_num, row) for row in rows]


def _row(path: Path, line: int, row: Mapping[str | None, object]) -> Feedback:
    where = f"line {line} of {str(path)!r}"
    given = {name: str(row.get(name) or "").strip() for name in (*COLUMNS, *OPTIONAL_COLUMNS)}
    if None in row or not given["rollout_id"]:
        raise DatasetError(f"{where} has {'too many fields' if None in row else 'no rollout_id'}")
    try:
        value = checked(float(given["value"]), where=where)
    except (ValueError, RewardError) as error:
        raise DatasetError(f"{where}: value {given['value']!r} is no finite number") from error
    return Feedback(
        rollout_id=given["rollout_id"],
        value=value,
        name=given["name"] or DEFAULT_REWARD,
        role=given["role"] or None,
        span=given["span"] or None,
        time_ns=now_ns(),
    )


def joined(
    records: Iterable[RolloutRecords], feedback: Iterable[Feedback], *, reward_weights: Mapping[str, float]
) -> list[RolloutRecords]:
    """Return rollouts with the rewards that came afterwards, and the totals of these and of recorded ones."""
    of_rollout: dict[str, dict[tuple[object, ...], Feedback]] = {}
    for one in feedback:
        of_rollout.setdefault(one.rollout_id, {})[one.key] = one
    return [_joined(one, of_rollout.get(one.rollout.rollout_id, {}), reward_weights) for one in records]


def _joined(
    records: RolloutRecords, later: Mapping[tuple[object, ...], Feedback], weights: Mapping[str, float]
) -> RolloutRecords:
    rollout = records.rollout
    if not later and (rollout.reward is not None or rollout.mode is not Mode.RECORDED):
        return records  # a trainer has given its rollouts their totals, or left them without one on purpose
    kept = [one for one in records.rewards if (one.name, one.target_role, one.target_span, one.index) not in later]
    added = [
        Reward(
            rollout_id=rollout.rollout_id,
            attempt=rollout.attempt,
            name=one.name,
            value=one.value,
            target_role=one.role,
            target_span=one.span,
        )
        for one in later.values()
    ]
    rewards = [*kept, *added]
    return replace(records, rollout=msgspec.structs.replace(rollout, reward=total(rewards, weights)), rewards=rewards)
