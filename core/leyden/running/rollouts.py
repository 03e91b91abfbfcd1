"""The life of rollouts: queued, started under a lease, run by the executor, finished or tried again.

Only infrastructure failures are retried. An exception or timeout of the agent ends the rollout with the failure
reward, and the tokens of its completed calls are trained: otherwise the policy would never feel its failures.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from leyden.errors import ConfigurationError, RolloutError, StoreError
from leyden.interfaces import Access, AttemptResult, Executor, Gateway, Outcome, RolloutSpec, Store
from leyden.looping import together
from leyden.ownership import current_owner
from leyden.rewards import total
from leyden.roles import Policy, Route, Routing, routes_for
from leyden.running.group_rewards import GroupRewards
from leyden.spans import Mode, Reward, Rollout, RolloutState

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""How long a started rollout is ours without renewal."""


@dataclass(frozen=True, kw_only=True)
class RolloutRules:
    """What the user decided about rollouts."""

    timeout_seconds: float | None = 300.0
    max_attempts: int = 3
    """Tries after infrastructure failures."""
    failure_reward: float | None = 0.0
    """Total reward of a rollout whose agent raised or timed out; `None` drops it."""
    reward_weights: Mapping[str, float] = field(default_factory=lambda: {"reward": 1.0})
    on_lost_context: str = "error"
    rewards_come_later: bool = False
    """A rollout that succeeds waits for what its group's function gives it."""

    def __post_init__(self) -> None:
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise ConfigurationError(f"timeout_seconds must be above 0 or None, got {self.timeout_seconds!r}")
        if self.max_attempts < 1:
            raise ConfigurationError(f"max_attempts must be at least 1, got {self.max_attempts!r}")
        if self.on_lost_context not in ("error", "pass"):
            raise ConfigurationError(f"on_lost_context is 'error' or 'pass', got {self.on_lost_context!r}")


@dataclass
class Tally:
    """Counts over all rollouts so far, for progress, warnings and the summary."""

    rollouts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By exception type."""
    retries: int = 0
    spoken: Counter[str] = field(default_factory=Counter)
    """Role -> model calls."""
    declared: set[str] = field(default_factory=set)
    last_error: str | None = None
    """The latest failure with its traceback, shown when nothing succeeds."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Who speaks in a rollout, and under which prompts."""

    prompts: dict[str, str]
    routes: tuple[Route, ...]


def spoken_by(routes: Sequence[Route], speakers: Mapping[str, str | None]) -> tuple[Route, ...]:
    """Return the routes with other speakers: policy -> the policy in its place; `None`: its roles' own endpoint."""
    changed: list[Route] = []
    for route in routes:
        speaker = speakers.get(route.model, route.model)
        other = {"kept_roles": ("*",)} if speaker is None else {"model": speaker}
        changed.append(msgspec.structs.replace(route, **other))
    return tuple(changed)


class RolloutRunner:
    """Runs rollouts to their end and writes every step of it to the store."""

    def __init__(
        self,
        *,
        store: Store,
        executor: Executor,
        gateway: Gateway,
        policies: Sequence[Policy],
        rules: RolloutRules,
        observer: Callable[..., None],
        group_rewards: GroupRewards | None = None,
    ) -> None:
        """Wire the parts; `observer(rollout=outcome)` is told of every finished rollout."""
        self.tally = Tally()
        self.prompts: Mapping[str, str] = {}
        """In force: role -> system prompt in place of the agent's own."""
        self.group_rewards = group_rewards
        self._observer = observer
        self._store = store
        self._executor = executor
        self._gateway = gateway
        self._policies = policies
        self._routes: tuple[Route, ...] = routes_for(policies)
        self.reward_weights = rules.reward_weights
        self._rules = rules
        self._owner = current_owner()
        self._leased: dict[str, int] = {}
        """Rollout id -> attempt of those under way."""
        self._renewer: asyncio.Task[None] | None = None
        self._starting: set[asyncio.Future[Mapping[str, int]]] = set()
        """Starts on their way to the store."""

    async def run(
        self,
        rollouts: Sequence[Rollout],
        *,
        versions: Mapping[str, int],
        finished: Callable[[Rollout, AttemptResult], None] | None = None,
        prompts: Mapping[str, str] | None = None,
        speakers: Mapping[str, str | None] | None = None,
    ) -> None:
        """Run these rollouts to a finished state; those that have one already are left alone.

        Where rewards come from a function of the group, groups that are not scored yet are judged before this returns.

        Args:
            rollouts: new or known ones, in whole groups; their ids decide.
            versions: policy -> the version that samples now.
            finished: called as each ends, for progress.
            prompts: role -> system prompt in place of the agent's own; default: those in force.
            speakers: policy -> the policy that speaks for its roles; `None`: the app's own model.

        Raises:
            ConfigurationError: no attempt could succeed, such as one at an API that is not served.
            RewardError: a group's function returned what is no list of rewards.
            RolloutError: workers died too often, another process holds some of these rollouts, or groups could not be
                judged.
            StoreError: the store cannot be written.
        """
        await self._store.add_rollouts(rollouts)
        if self._renewer is None:
            self._renewer = asyncio.get_running_loop().create_task(self._renew_leases())
        by_id = {rollout.rollout_id: rollout for rollout in rollouts}
        scene = Scene(
            prompts=dict(self.prompts if prompts is None else prompts), routes=spoken_by(self._routes, speakers or {})
        )
        waiting = list(by_id)
        while waiting:
            # Shielded: a start that the store has made must be known here, or nobody would ever queue it again.
            starting = asyncio.ensure_future(self._start(waiting, versions))
            self._starting.add(starting)
            starting.add_done_callback(self._starting.discard)
            started = await asyncio.shield(starting)
            again = await together(
                [self._attempt(by_id[rollout_id], attempt, scene, finished) for rollout_id, attempt in started.items()]
            )
            waiting = [rollout_id for rollout_id in again if rollout_id is not None]
        await self._refuse_unfinished(by_id)
        if self.group_rewards is not None:
            await self.group_rewards.score(by_id)

    async def _start(self, rollout_ids: Sequence[str], versions: Mapping[str, int]) -> Mapping[str, int]:
        started = await self._store.start(
            rollout_ids, owner=self._owner, lease_seconds=LEASE_SECONDS, versions=versions
        )
        self._leased.update(started)
        return started

    async def close(self) -> None:
        """Stop renewing leases; queue again what was under way, so that a resume in this process can have it."""
        await asyncio.gather(*self._starting, return_exceptions=True)
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.gather(self._renewer, return_exceptions=True)
            self._renewer = None
        left, self._leased = self._leased, {}
        for rollout_id, attempt in left.items():
            try:
                lost = Outcome(rollout_id=rollout_id, attempt=attempt, state=RolloutState.LOST)
                await self._store.finish([lost])
                await self._store.requeue([rollout_id])
            except StoreError as error:  # it has just ended after all, or the store fails, which is being reported
                log.debug("rollout %s was not queued again: %s", rollout_id, error)

    async def _refuse_unfinished(self, rollout_ids: Container[str]) -> None:
        running = [
            rollout.rollout_id
            for rollout in await self._store.rollouts(state=RolloutState.RUNNING)
            if rollout.rollout_id in rollout_ids
        ]
        if running:
            raise RolloutError(
                f"rollouts {running!r} are held by another run of this process or another one; end it, or wait "
                f"{LEASE_SECONDS:g} seconds, and resume"
            )

    async def _attempt(
        self, rollout: Rollout, attempt: int, scene: Scene, finished: Callable[[Rollout, AttemptResult], None] | None
    ) -> str | None:
        """Run one attempt; return the rollout's id when it must be tried again."""
        result = await self._execute(rollout, attempt, scene)
        if result.infrastructure and result.error_type == ConfigurationError.__name__:
            raise ConfigurationError(f"rollout {rollout.rollout_id!r}: {result.error}")  # no attempt could succeed
        if result.infrastructure and attempt < self._rules.max_attempts:
            self.tally.retries += 1
            lost = Outcome(
                rollout_id=rollout.rollout_id,
                attempt=attempt,
                state=RolloutState.LOST,
                error=result.error,
                error_type=result.error_type,
            )
            await self._store.finish([lost])
            self._leased.pop(rollout.rollout_id, None)
            await self._store.requeue([rollout.rollout_id])
            return rollout.rollout_id
        outcome = self._judge(result)
        await self._store.finish([outcome])
        self._leased.pop(rollout.rollout_id, None)
        self._count(result, outcome)
        if finished is not None:
            finished(rollout, result)
        self._observer(rollout=outcome)
        return None

    async def _execute(self, rollout: Rollout, attempt: int, scene: Scene) -> AttemptResult:
        training = rollout.mode is Mode.TRAIN
        token = self._gateway.admit(
            Access(
                rollout_id=rollout.rollout_id,
                attempt=attempt,
                models={p.name: p.sampling if training else p.eval_sampling for p in self._policies},
                routes=scene.routes,
                timeout_seconds=self._rules.timeout_seconds,
            )
        )
        spec = RolloutSpec(
            rollout_id=rollout.rollout_id,
            attempt=attempt,
            task=rollout.task,
            mode=rollout.mode,
            timeout_seconds=self._rules.timeout_seconds,
            routing=Routing(
                base_url=self._gateway.base_url,
                token=token,
                routes=scene.routes,
                prompts=scene.prompts,
                on_lost_context=self._rules.on_lost_context,
            ),
        )
        try:
            return await self._executor.run(spec)
        finally:
            await self._gateway.revoke(rollout.rollout_id)

    def _judge(self, result: AttemptResult) -> Outcome:
        """Turn a result into the rollout's final state and total reward."""
        state, reward, error, error_type = RolloutState.SUCCEEDED, None, result.error, result.error_type
        if result.timed_out:
            state, reward = RolloutState.TIMED_OUT, self._rules.failure_reward
        elif result.infrastructure or error_type == "RewardError":
            state = RolloutState.FAILED  # no failure reward: the policy is not to blame
        elif error_type is not None:
            state, reward = RolloutState.FAILED, self._rules.failure_reward
        elif not result.no_reward and not self._rules.rewards_come_later:
            reward = self._total(result)
            if reward is None:
                state, error_type, error = RolloutState.FAILED, "NoReward", self._no_reward_text(result)
        return Outcome(
            rollout_id=result.rollout_id,
            attempt=result.attempt,
            state=state,
            reward=reward,
            output=result.output,
            error=error,
            error_type=error_type,
        )

    def _total(self, result: AttemptResult) -> float | None:
        rewards = [
            Reward(rollout_id=result.rollout_id, attempt=result.attempt, name=name, value=value)
            for name, value in (result.rewards or {}).items()
        ]
        return total(rewards, self._rules.reward_weights)

    def _no_reward_text(self, result: AttemptResult) -> str:
        if result.rewards is None:
            return (
                "the agent returned None and emitted no reward for the whole rollout; return a number (or "
                "leyden.NO_REWARD to drop the rollout on purpose), or give the Trainer a reward= function"
            )
        return (
            f"the rewards {dict(result.rewards)!r} lack one of those with a weight: "
            f"{dict(self._rules.reward_weights)!r}; set Trainer(reward_weights=...)"
        )

    def _count(self, result: AttemptResult, outcome: Outcome) -> None:
        self.tally.rollouts += 1
        self.tally.spoken.update(result.spoken_roles)
        self.tally.declared.update(result.declared_roles)
        if outcome.error_type is not None:
            self.tally.failures[outcome.error_type] += 1
            self.tally.last_error = result.traceback or outcome.error

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            if self._leased:
                await self._store.renew(sorted(self._leased), owner=self._owner, lease_seconds=LEASE_SECONDS)


def refuse_rewardless(rollouts: Sequence[Rollout], agent: str) -> None:
    """Stop a run whose first group has no reward at all: a forgotten `return` must not train silently.

    Raises:
        ConfigurationError: names the agent and says what to return.
    """
    if rollouts and all(rollout.error_type in ("NoReward", "RewardError") for rollout in rollouts):
        raise ConfigurationError(f"no rollout of the first group has a reward: {agent}: {rollouts[0].error}")


def refuse_all_failed(rollouts: Sequence[Rollout], tally: Tally) -> None:
    """Stop a run in a step in which nothing succeeded: its store and checkpoint let it go on once that is mended.

    Raises:
        RolloutError: holds the latest failure's traceback.
    """
    if rollouts and all(rollout.error_type is not None for rollout in rollouts):
        kinds = dict(Counter(rollout.error_type for rollout in rollouts))
        raise RolloutError(
            f"all {len(rollouts)} rollouts of step {rollouts[0].step} failed: {kinds!r}. The latest failure:\n"
            f"{tally.last_error}"
        )
