"""Rollouts that are stored already: of another run, of a recording, of imported traces; as groups to learn from.

One idea: a folder's stores are read side by side and never written, also while their writers go on, and joined with
the rewards that came afterwards.
One trap: what a run was evaluated on is held out for its successors too, so it is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from leyden import feedback
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, RolloutRecords
from leyden.spans import FINISHED, Mode
from leyden.sqlite import SQLiteStore

LEARNT_FROM = frozenset({Mode.TRAIN, Mode.SEARCH, Mode.RECORDED})
"""Modes of rollouts on tasks that were there to learn from."""


async def groups_of(source: str | Path, *, reward_weights: Mapping[str, float]) -> list[Group]:
    """Return the finished rollouts of a run folder or a store by group, in the order they were planned.

    A recorded rollout, or one with rewards that came afterwards, gets its total from `reward_weights`.

    Raises:
        ConfigurationError: there is no store.
        DatasetError: the file of later rewards cannot be read.
        StoreError: a file is none of Leyden's, or of a newer version.
    """
    found: dict[str, RolloutRecords] = {}
    for path in store_files(source):
        async with await SQLiteStore.open(path, read_only=True) as store:
            rollouts = await store.rollouts()
            wanted = [one.rollout_id for one in rollouts if one.mode in LEARNT_FROM and one.state in FINISHED]
            # A recording that had to open another store in the middle of a batch has written that batch twice.
            new = [name for name in wanted if name not in found]
            found |= {one.rollout.rollout_id: one for one in await store.records(new)}
    by_group: dict[str, list[RolloutRecords]] = {}
    for one in feedback.joined(found.values(), feedback.read(source), reward_weights=reward_weights):
        by_group.setdefault(one.rollout.group_id, []).append(one)
    return [Group(group_id=name, task=group[0].rollout.task, rollouts=group) for name, group in by_group.items()]


def store_files(source: str | Path) -> Sequence[Path]:
    """Return the stores that a path means: itself, or all of a folder, by name.

    Raises:
        ConfigurationError: there is none.
    """
    path = Path(source)
    found = [path] if path.is_file() else sorted(path.glob("*.db"))
    if not found:
        raise ConfigurationError(
            f"source={str(source)!r} is neither a store nor a folder that holds one; give a run's folder, such as "
            "'runs/production'"
        )
    return found
