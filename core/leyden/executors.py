"""Run attempts in this process, as coroutines and threads.

Another process is usually faster (`leyden.workers`): this executor shares the interpreter lock with the
gateway, the engine's loop and the learner. It is what lambdas, closures and notebook functions need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from leyden.agents import PerRollout
from leyden.attempts import run_attempt
from leyden.instrumentation import instrument
from leyden.interfaces import Agent, AttemptResult, RewardFunction, RolloutSpec
from leyden.spans import Record
from leyden.usage import Usage


class InProcessExecutor:
    """Coroutines on the trainer's loop, sync agents in threads; `concurrency` at a time."""

    def __init__(
        self, agent: Agent | PerRollout, *, reward: RewardFunction | None = None, concurrency: int = 64
    ) -> None:
        self._agent = agent
        self._reward = reward
        self._slots = asyncio.Semaphore(concurrency)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="leyden-agent")
        self._sink: Callable[[Sequence[Record]], Awaitable[None]] | None = None

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Attach the framework adapters and get ready."""
        instrument()
        self._sink = sink

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Run one attempt; its records reach the sink before this returns."""
        assert self._sink is not None, "start() comes before run()"
        records: list[Record] = []
        async with self._slots:
            result = await run_attempt(
                spec, self._agent, sink=records.append, threads=self._threads, reward=self._reward
            )
        await self._sink(records)
        return result

    def usages(self) -> Sequence[Usage]:
        """Return what other processes used: none."""
        return ()

    async def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
