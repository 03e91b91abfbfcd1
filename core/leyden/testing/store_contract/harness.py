"""What the checks of the store contract have in common."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from leyden.interfaces import Owner, Store
from leyden.ownership import current_owner
from leyden.spans import Checkpoint, RolloutState
from leyden.testing.records import a_rollout

MakeStore = Callable[[], Awaitable[Store]]

WAIT_SECONDS = 20.0
"""Longer than any store needs to deliver a record."""


@asynccontextmanager
async def opened(make_store: MakeStore) -> AsyncIterator[Store]:
    """Open a store and close it again."""
    store = await make_store()
    try:
        yield store
    finally:
        await store.close()


async def running(store: Store, rollout_id: str = "rollout-1", **changes: object) -> None:
    """Add a rollout and start an attempt."""
    await store.add_rollouts([a_rollout(rollout_id, **changes)])
    await start(store, rollout_id)


async def start(
    store: Store, *rollout_ids: str, owner: Owner | None = None, lease_seconds: float = 60.0
) -> dict[str, int]:
    """Start attempts for this process."""
    started = await store.start(
        rollout_ids, owner=owner or current_owner(), lease_seconds=lease_seconds, versions={"policy": 3}
    )
    return dict(started)


async def state_of(store: Store, rollout_id: str = "rollout-1") -> RolloutState:
    """Return where a rollout stands."""
    return next(r.state for r in await store.rollouts() if r.rollout_id == rollout_id)


async def refuses(work: Awaitable[object], kind: type[Exception], *words: str) -> None:
    """Expect `work` to raise `kind` with a message that holds each of `words`."""
    try:
        await work
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"the error should name {missing}: {error}"
    else:
        raise AssertionError(f"{kind.__name__} was expected and nothing was raised")


def dead_owner() -> Owner:
    """Return the owner that stood for a process which has ended."""
    program = "from leyden.ownership import current_owner as o; print(o().pid, o().process_start, sep='|', end='')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pid, process_start = done.stdout.split("|")
    return Owner(pid=int(pid), process_start=process_start, boot_id=current_owner().boot_id)


def unnumbered(record: object) -> object:
    """Return a span or completion as it was before the store numbered it."""
    assert isinstance(record, msgspec.Struct)
    return msgspec.structs.replace(record, sequence=0)


def a_checkpoint(checkpoint_id: str, *, step: int) -> Checkpoint:
    """Return a checkpoint."""
    return Checkpoint(
        checkpoint_id=checkpoint_id, step=step, folder=f"checkpoints/{step}", versions={"policy": step}, created_ns=1
    )
