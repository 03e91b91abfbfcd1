"""What keeps rollouts, records, resources and the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from leyden.spans import Checkpoint, Completion, Mode, Record, Resource, Reward, Rollout, RolloutState, Span, Update


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lease: a dead local owner is told apart from a reused pid."""

    pid: int
    process_start: str
    boot_id: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, for `Store.finish`."""

    rollout_id: str
    attempt: int
    state: RolloutState
    """A finished state, or `LOST`."""
    reward: float | None = None
    output: object = None
    error: str | None = None
    error_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutRecords:
    """All records of one rollout's surviving attempt, in store order."""

    rollout: Rollout
    spans: Sequence[Span]
    completions: Sequence[Completion]
    rewards: Sequence[Reward]


class Store(Protocol):
    """Tasks, rollouts, attempts, records, resources, ledger. Every write is idempotent and returns once it is safe."""

    async def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts; one that exists already is left as it is."""
        ...

    async def start(
        self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float, versions: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Take the queued ones of these rollouts: rollout id -> its new attempt number. Others are left out."""
        ...

    async def renew(self, rollout_ids: Sequence[str], *, owner: Owner, lease_seconds: float) -> None:
        """Extend leases still held by `owner`."""
        ...

    async def reclaim(self) -> Sequence[str]:
        """Mark rollouts whose lease ran out or whose local owner died `lost`, queue them again, return their ids."""
        ...

    async def finish(self, outcomes: Sequence[Outcome]) -> None:
        """End attempts. An outcome of another attempt than the latest is kept as a record and changes no state.

        Raises:
            StoreError: a move that `STATE_MOVES` does not allow.
        """
        ...

    async def requeue(self, rollout_ids: Sequence[str]) -> None:
        """Queue `lost` rollouts for another attempt."""
        ...

    async def score(self, group_id: str, rewards: Sequence[Reward], totals: Mapping[str, float | None]) -> None:
        """Keep a finished group's late rewards and set its rollouts' totals, all or nothing.

        A group that was scored before is left as it is, whatever it was given then.

        Args:
            group_id: of the group.
            rewards: further records of its rollouts.
            totals: rollout id -> reward; `None` for one that stays without.

        Raises:
            StoreError: an unknown rollout, one of another group, or one that has not finished or has a reward.
            RewardError: a reward that is no finite number, or was given before with another value.
        """
        ...

    async def is_scored(self, group_id: str) -> bool:
        """Say whether `score` was called for this group."""
        ...

    async def add_records(self, records: Sequence[Record]) -> None:
        """Store spans, completions and rewards; a key seen before is ignored, unless its reward value differs.

        Raises:
            RewardError: the same (name, target, index) of a rollout with another value.
        """
        ...

    async def rollouts(
        self, *, mode: Mode | None = None, step: int | None = None, state: RolloutState | None = None
    ) -> Sequence[Rollout]:
        """Return rollouts in the order they were added."""
        ...

    async def records(self, rollout_ids: Sequence[str]) -> Sequence[RolloutRecords]:
        """Return the records of the latest attempt of each rollout, in the order asked; unknown ids are an error."""
        ...

    async def late_records(self, rollout_id: str) -> Sequence[Record]:
        """Return records of attempts that are not the latest: kept, never trained."""
        ...

    def stream(self, cursor: int = 0) -> AsyncIterator[tuple[int, Record]]:
        """Yield records with sequence above `cursor` as they arrive; the number resumes a broken stream."""
        ...

    async def put_resources(self, resources: Sequence[Resource]) -> None:
        """Publish resources.

        Raises:
            StoreError: a (kind, name, version) used before with another content.
        """
        ...

    async def resources(self, kind: str | None = None, name: str | None = None) -> Sequence[Resource]: ...

    async def add_updates(self, updates: Sequence[Update]) -> None:
        """Enter updates into the ledger.

        Raises:
            StoreError: a rollout would count twice for one policy among the updates that are not voided.
        """
        ...

    async def updates(self, *, include_voided: bool = False) -> Sequence[Update]: ...

    async def commit_checkpoint(self, checkpoint: Checkpoint) -> None: ...

    async def latest_checkpoint(self) -> Checkpoint | None: ...

    async def void_updates_after(self, step: int) -> Sequence[Update]:
        """Void the ledger's updates with a later step; return them."""
        ...

    async def next_version(self, policy: str) -> int:
        """Issue a version number of `policy` that was never issued before, also after a resume. The first is 1."""
        ...

    async def get_meta(self, key: str) -> str | None: ...

    async def put_meta(self, key: str, value: str) -> None: ...

    async def close(self) -> None: ...
