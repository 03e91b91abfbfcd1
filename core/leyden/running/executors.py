"""Run attempts in this process, as coroutines and threads, on an event loop of their own.

Another process is usually faster (`leyden.running.workers`): this executor shares the interpreter lock with the
gateway, the engine's loop and the learner. It is what lambdas, closures and notebook functions need.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence

from leyden.instrumentation import instrument
from leyden.interfaces import Agent, AttemptResult, RewardFunction, RolloutSpec
from leyden.looping import LoopThread
from leyden.running.agents import PerRollout
from leyden.running.attempts import run_attempt
from leyden.spans import Record
from leyden.usage import Usage


@functools.cache
def agents_loop() -> LoopThread:
    """Return the one loop of this process on which agents run.

    Not the trainer's: an async agent that blocks would wait for a gateway that its own waiting stops. Never closed:
    clients that live as long as the process (langchain-openai's) break on a second loop.
    """
    return LoopThread("leyden-agents")


class InProcessExecutor:
    """Coroutines on the agents' loop, sync agents in threads; `concurrency` at a time."""

    def __init__(
        self, agent: Agent | PerRollout, *, reward: RewardFunction | None = None, concurrency: int = 64
    ) -> None:
        self._agent = agent
        self._reward = reward
        self._slots = asyncio.Semaphore(concurrency)
        self._sink: Callable[[Sequence[Record]], Awaitable[None]] | None = None

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Attach the framework adapters and get ready."""
        instrument()
        self._sink = sink

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Run one attempt; its records reach the sink before this returns."""
        assert self._sink is not None, "start() comes before run()"
        records: list[Record] = []
        own = dataclasses.replace(spec, task=copy.deepcopy(spec.task))  # the agent may change it, as in a worker
        async with self._slots:
            attempt = run_attempt(own, self._agent, sink=records.append, reward=self._reward)
            result = await agents_loop().submit(attempt).wait()
        await self._sink(records)
        return result

    def usages(self) -> Sequence[Usage]:
        """Return what other processes used: none."""
        return ()

    async def stop(self) -> None:
        """Free nothing: the loop is the process's."""
