"""Put assembled traces into a run folder's store, so that everything that reads runs reads them.

One idea: records first, the rollout last, so a rollout that is there is whole; a trace that is stored already
only gets what is new of it, so an import may be repeated, also after a kill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError, RewardError
from leyden.interfaces import RolloutRecords
from leyden.spans import FINISHED, Rollout, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import STORE


async def open_store(folder: Path) -> SQLiteStore:
    """Open a folder's store, made where there is none.

    Raises:
        ConfigurationError: the folder cannot be made.
        StoreError: another process writes it, or it is no store.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make the folder {str(folder)!r}: {error}") from error
    return await SQLiteStore.open(folder / STORE)


async def put(store: SQLiteStore, found: Sequence[RolloutRecords], *, stored: set[str]) -> Counter[str]:
    """Store rollouts with all their records; return what was noticed.

    Args:
        store: open for writing.
        found: assembled traces.
        stored: ids of the rollouts that the store holds; those of `found` are added.

    Raises:
        StoreError: the store cannot be written.
    """
    noticed: Counter[str] = Counter()
    for one in found:
        try:
            await store.add_records([*one.spans, *one.completions, *one.rewards])
        except RewardError:
            noticed["evaluations that are stored with another value, which stands"] += 1
        noticed["spans"] += len(one.spans)
    new = [_finished(one.rollout, store) for one in found if one.rollout.rollout_id not in stored]
    await store.add_rollouts(new)
    stored.update(one.rollout_id for one in new)
    noticed["traces"] += len(new)
    noticed["traces that were stored before, which only get new spans"] += len(found) - len(new)
    for rollout in new:
        noticed[f"traces that {rollout.state.value}"] += 1
    return +noticed


def _finished(rollout: Rollout, store: SQLiteStore) -> Rollout:
    """Return a rollout as it ended; one of ours that was still running when it was exported has failed for us."""
    if rollout.state not in FINISHED:
        said = f"it was {rollout.state.value} when it was exported"
        rollout = msgspec.structs.replace(rollout, state=RolloutState.FAILED, error=said)
    clean = None if rollout.error is None else store.redactor.text(rollout.error)
    return msgspec.structs.replace(rollout, error=clean)


async def stored_ids(store: SQLiteStore) -> set[str]:
    """Return the ids of the rollouts that a store holds."""
    return {one.rollout_id for one in await store.rollouts()}
