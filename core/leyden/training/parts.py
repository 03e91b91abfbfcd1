"""Open the parts of a trainer, in order, and close them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.interfaces import Agent, Engine, Executor, Gateway, GroupReward, Learner, RewardFunction, Store
from leyden.plugins import Plugins
from leyden.roles import Policy
from leyden.running.agents import PerRollout, describe, import_path, load, load_function
from leyden.running.command import Command
from leyden.running.executors import InProcessExecutor
from leyden.running.group_rewards import GroupRewards
from leyden.running.rollouts import RolloutRules, RolloutRunner
from leyden.running.workers import WorkerExecutor
from leyden.spans import Kind, Record, Span
from leyden.sqlite import SQLiteStore
from leyden.training.absent import NoEngine, NoExecutor, NoGateway
from leyden.training.measuring import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What the parts are made of; the same for every opening."""

    agent: Agent | PerRollout | str | None
    """`None`: nothing is to be run."""
    reward: RewardFunction | str | None
    group_reward: GroupReward | None
    policies: Sequence[Policy]
    engine: Engine
    learner: Learner
    plugins: Plugins
    rules: RolloutRules
    workers: int
    concurrency: int
    python: str | None
    seed: int
    exact_continuation: bool
    prompts: Mapping[str, str | None]
    """Role -> the prompt that is in force or to be improved; `None`: the agent's own."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The running parts."""

    store: Store
    engine: Engine
    gateway: Gateway
    learner: Learner
    runner: RolloutRunner
    executor: Executor
    meter: Meter
    most_rollouts: int
    """That run at a time."""


@contextlib.asynccontextmanager
async def opened(blueprint: Blueprint, store_path: Path) -> AsyncIterator[Parts]:
    """Start store, engine, learner, gateway and executor; afterwards stop all but the engine, which is the user's."""
    async with contextlib.AsyncExitStack() as stack:
        store = await SQLiteStore.open(store_path)
        stack.push_async_callback(store.close)
        engine, learner = blueprint.engine, blueprint.learner
        await engine.start(blueprint.policies)
        await asyncio.to_thread(learner.open, blueprint.policies, engine.model, seed=blueprint.seed)
        stack.callback(learner.close)
        meter = Meter(store)
        # Named only where it is wanted, so that a gateway without it serves everybody else.
        options = {"exact_continuation": True} if blueprint.exact_continuation else {}
        gateway: Gateway = (
            NoGateway() if isinstance(engine, NoEngine) else blueprint.plugins.get("gateway", "http")(**options)
        )

        async def heard(records: Sequence[Record]) -> None:
            await meter.record(records)
            # The gateway writes the spans of calls that no wire has seen: of programs, in whatever language.
            calls = [one for one in records if isinstance(one, Span) and one.kind is Kind.MODEL_CALL]
            runner.tally.spoken.update(call.role for call in calls)

        await gateway.start(engine, heard)
        stack.push_async_callback(gateway.stop)
        executor = choose_executor(blueprint)
        await executor.start(meter.record)
        stack.push_async_callback(executor.stop)
        runner = RolloutRunner(
            store=store,
            executor=executor,
            gateway=gateway,
            policies=blueprint.policies,
            rules=blueprint.rules,
            observer=blueprint.plugins.hook.rollout_finished,
            group_rewards=None
            if blueprint.group_reward is None
            else GroupRewards(blueprint.group_reward, store=store, weights=blueprint.rules.reward_weights),
        )
        stack.push_async_callback(runner.close)
        yield Parts(
            store=store,
            engine=engine,
            gateway=gateway,
            learner=learner,
            runner=runner,
            executor=executor,
            meter=meter,
            most_rollouts=blueprint.concurrency * (blueprint.workers if isinstance(executor, WorkerExecutor) else 1),
        )


def choose_executor(blueprint: Blueprint) -> Executor:
    """Return worker processes where the agent can be imported by name, else this process with a line that says so.

    Raises:
        ConfigurationError: another interpreter is to run what only this process has.
    """
    agent, reward = blueprint.agent, blueprint.reward
    if agent is None:
        return NoExecutor()
    agent_path, reward_path = import_path(agent), None if reward is None else import_path(reward)
    is_importable = agent_path is not None and (reward is None or reward_path is not None)
    if blueprint.python is not None:
        names = (agent_path, reward_path)
        if blueprint.workers < 1 or not is_importable or any((name or "").startswith("__main__:") for name in names):
            raise ConfigurationError(
                f"python={blueprint.python!r} runs the agent in worker processes, which import it by name; move it to "
                f"a module, pass Trainer('module:function'), and keep workers at least 1 (it is {blueprint.workers!r})"
            )
    if blueprint.workers > 0 and agent_path is not None and is_importable:
        return WorkerExecutor(
            agent_path,
            is_factory=isinstance(agent, PerRollout),
            reward=reward_path,
            workers=blueprint.workers,
            concurrency=blueprint.concurrency,
            python=blueprint.python,
        )
    if blueprint.workers > 0 and not isinstance(agent, Command):
        log.warning(
            "%s cannot be imported by name (a lambda, a closure, a method or a notebook's function), so the agent runs "
            "in this process; move it to a module for worker processes, or pass workers=0",
            describe(agent if agent_path is None else reward),
        )
    own = load(agent) if isinstance(agent, str) else agent
    scorer = load_function(reward) if isinstance(reward, str) else reward
    return InProcessExecutor(own, reward=scorer, concurrency=blueprint.concurrency)
