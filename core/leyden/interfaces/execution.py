"""What runs agents, and what hooks their frameworks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from leyden.roles import Routing
from leyden.spans import Mode, Record
from leyden.usage import Usage

Agent = Callable[..., object]
"""An async function, a sync function, or `leyden.per_rollout(factory)`, called with the task."""

RewardFunction = Callable[..., object]
"""(task, output, rollout) -> float | dict[str, float] | None; sync or async."""

GroupReward = Callable[..., object]
"""(task, rollouts of one group) -> one float | dict[str, float] | None a rollout, in order; sync or async.

The rollouts are `RolloutRecords` of those that succeeded and wait; what the agent returned is `rollout.output`.
"""


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """One attempt to run; crosses process borders as JSON."""

    rollout_id: str
    attempt: int
    task: object
    mode: Mode
    timeout_seconds: float | None
    routing: Routing | None


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """What came of an attempt, before the reward policy is applied."""

    rollout_id: str
    attempt: int
    rewards: Mapping[str, float] | None
    """Named rewards from the return value or reward function; `None` when there was none."""
    no_reward: bool = False
    """The agent returned `NO_REWARD`: drop this rollout on purpose."""
    output: object = None
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    timed_out: bool = False
    infrastructure: bool = False
    """The failure is ours (worker lost, engine or gateway down, context lost), so another attempt may be made."""
    spoken_roles: Mapping[str, int] = field(default_factory=dict)
    declared_roles: Sequence[str] = ()
    finished_ns: int = 0


class Executor(Protocol):
    """Runs attempts of the user's agent somewhere, up to its concurrency limit."""

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Get ready; `sink` takes the records of every attempt. Records of an attempt precede its result."""
        ...

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Run one attempt. Never raises for what the agent does: that is in the result."""
        ...

    def usages(self) -> Sequence[Usage]:
        """Return what other processes used so far, one each."""
        ...

    async def stop(self) -> None: ...


class FrameworkAdapter(Protocol):
    """Hooks one framework's own callbacks. Recording never breaks the user's agent: adapters log and go on."""

    name: str
    module: str
    """The top-level package whose import makes this adapter attach."""

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version; names it and the versions that work.
        """
        ...

    def detach(self) -> None:
        """Restore every patched function."""
        ...
