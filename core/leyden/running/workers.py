"""Run attempts in worker processes: the trainer's side.

Workers start by spawn and import the agent by `module:qualname`; tasks, records and results cross a pipe as
MessagePack, nothing of the user's is pickled. A worker that dies fails its attempts as infrastructure, and a
new one takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec

from leyden.errors import ConfigurationError, RolloutError
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.running.foreign import ForeignProcess, greeting, interpreter
from leyden.running.worker import FromWorker, ToWorker, WorkerSetup, worker_main
from leyden.spans import Record, now_ns
from leyden.usage import Usage

log = logging.getLogger(__name__)

GUARD_HINT = (
    "If your script is not guarded, put the code that starts training below\n"
    '    if __name__ == "__main__":\n'
    "because a worker imports the script to find the agent."
)
FOREIGN_HINT = "If it has no Leyden, install it there: {} -m pip install leyden and the framework's extra."
UNUSED = Usage(cpu_seconds=0.0, peak_memory_bytes=0)
MAX_RESTARTS = 3
"""How often a worker may die before the run stops: a crash that comes back is not bad luck."""


class _Worker:
    """One worker process and the attempts it holds."""

    def __init__(
        self,
        setup: WorkerSetup,
        loop: asyncio.AbstractEventLoop,
        records: asyncio.Queue[list[Record]],
        before: Usage = UNUSED,
        python: str | None = None,
    ) -> None:
        """Start the process; `before` is what the dead ones used whose place it takes."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: SpawnProcess | ForeignProcess
        if python is None:
            self.process = context.Process(target=worker_main, args=(theirs, setup), daemon=True, name="leyden-worker")
        else:
            self.process = ForeignProcess(python, theirs)
            self._pipe.send_bytes(greeting(setup))
        self._hint = GUARD_HINT if python is None else FOREIGN_HINT.format(python)
        self.ready: asyncio.Future[None] = loop.create_future()
        self._before = before
        self._usage = UNUSED
        self.pending: dict[tuple[str, int], asyncio.Future[AttemptResult]] = {}
        self.is_dead = False
        self._loop = loop
        self._records = records
        self._send_lock = threading.Lock()
        self.process.start()
        theirs.close()
        threading.Thread(target=self._read, name="leyden-worker-reader", daemon=True).start()

    @property
    def usage(self) -> Usage:
        """What this place used so far: the seconds of all its processes, the memory of the largest."""
        return Usage(
            cpu_seconds=self._before.cpu_seconds + self._usage.cpu_seconds,
            peak_memory_bytes=max(self._before.peak_memory_bytes, self._usage.peak_memory_bytes),
        )

    def send(self, message: ToWorker) -> None:
        with self._send_lock:
            self._pipe.send_bytes(msgspec.msgpack.encode(message))

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromWorker)
        try:
            while True:
                message = decoder.decode(self._pipe.recv_bytes())
                self._loop.call_soon_threadsafe(self._take, message)
        except (EOFError, OSError):
            log.debug("worker %s closed its pipe", self.process.pid)
        except Exception:
            log.exception("worker %s sent what cannot be read, so it is ended", self.process.pid)
            self.process.kill()
        self.process.join(timeout=5)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._died)

    def _take(self, message: FromWorker) -> None:
        if message.usage is not None:
            self._usage = message.usage
        if message.fatal is not None and not self.ready.done():
            self.ready.set_exception(ConfigurationError(message.fatal))
        elif message.is_ready and not self.ready.done():
            self.ready.set_result(None)
        if message.records:
            self._records.put_nowait(list(message.records))
        for result in message.results:
            future = self.pending.pop((result.rollout_id, result.attempt), None)
            if future is not None and not future.done():
                future.set_result(result)

    def _died(self) -> None:
        self.is_dead = True
        text = f"worker process {self.process.pid} ended with exit code {self.process.exitcode}"
        if not self.ready.done():
            self.ready.set_exception(ConfigurationError(f"{text} before it was ready. {self._hint}"))
        for (rollout_id, attempt), future in self.pending.items():
            if not future.done():
                future.set_result(_lost(rollout_id, attempt, text))
        self.pending.clear()

    async def stop(self) -> None:
        if self.process.is_alive():
            try:
                self.send(ToWorker(stop=True))
            except OSError:
                log.debug("worker %s closed its pipe first", self.process.pid)
            await asyncio.to_thread(self.process.join, 10)
            if self.process.is_alive():
                self.process.kill()
                await asyncio.to_thread(self.process.join, 5)
        self._pipe.close()


class WorkerExecutor:
    """Attempts in `workers` processes, each running `concurrency` of them at a time on one event loop."""

    def __init__(
        self,
        agent: str,
        *,
        is_factory: bool = False,
        reward: str | None = None,
        workers: int = 1,
        concurrency: int = 64,
        python: str | os.PathLike[str] | None = None,
    ) -> None:
        """Name what the workers import.

        Args:
            agent: `module:qualname` of the agent.
            is_factory: the agent is a factory, called once a rollout.
            reward: `module:qualname` of the reward function.
            workers: processes.
            concurrency: attempts at a time in each.
            python: the interpreter of another environment; `None` takes this one.

        Raises:
            ConfigurationError: a count below 1, or no such interpreter.
        """
        if workers < 1 or concurrency < 1:
            raise ConfigurationError(f"workers={workers!r} and concurrency={concurrency!r} must be at least 1")
        self._setup = WorkerSetup(agent=agent, is_factory=is_factory, reward=reward, concurrency=concurrency)
        self._python = None if python is None else interpreter(python)
        self._count = workers
        self._slots = asyncio.Semaphore(workers * concurrency)
        self._workers: list[_Worker] = []
        self._restarts = 0
        self._records: asyncio.Queue[list[Record]] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Start the processes and wait until each has imported the agent.

        Raises:
            ConfigurationError: the agent cannot be imported; holds the worker's traceback.
        """
        loop = asyncio.get_running_loop()
        self._pump = loop.create_task(self._pump_records(sink))
        self._workers = [self._worker(loop) for _ in range(self._count)]
        try:
            await asyncio.gather(*(worker.ready for worker in self._workers))
        except ConfigurationError:
            await self.stop()
            raise

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Run one attempt on the least busy worker; its records reach the sink before this returns."""
        async with self._slots:
            worker = min(await self._living(), key=lambda worker: len(worker.pending))
            future: asyncio.Future[AttemptResult] = asyncio.get_running_loop().create_future()
            worker.pending[spec.rollout_id, spec.attempt] = future
            try:
                worker.send(ToWorker(run=spec))
            except OSError as error:
                worker.pending.pop((spec.rollout_id, spec.attempt), None)
                return _lost(spec.rollout_id, spec.attempt, f"could not reach a worker: {error}")
            result = await future
        await self._records.join()
        return result

    def usages(self) -> Sequence[Usage]:
        """Return what each worker used, with the processes that died in its place."""
        return [worker.usage for worker in self._workers]

    async def stop(self) -> None:
        """End the workers and hand over their last records."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        if self._pump is not None:
            await self._records.join()
            self._pump.cancel()

    def _worker(self, loop: asyncio.AbstractEventLoop, before: Usage = UNUSED) -> _Worker:
        return _Worker(self._setup, loop, self._records, before, self._python)

    async def _living(self) -> list[_Worker]:
        for index, worker in enumerate(self._workers):
            if worker.is_dead:
                self._restarts += 1
                if self._restarts > MAX_RESTARTS:
                    raise RolloutError(
                        f"worker processes died {self._restarts} times (last exit code {worker.process.exitcode}); "
                        "a negative code is a signal: -9 usually means that the machine ran out of memory"
                    )
                log.warning("a worker process died (exit code %s); starting another", worker.process.exitcode)
                self._workers[index] = self._worker(asyncio.get_running_loop(), worker.usage)
                await self._workers[index].ready
        return self._workers

    async def _pump_records(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        while True:
            batches = [await self._records.get()]
            while not self._records.empty():
                batches.append(self._records.get_nowait())
            try:
                await sink([record for batch in batches for record in batch])
            except Exception:
                log.exception("the store refused %d records", sum(map(len, batches)))
            finally:
                for _ in batches:
                    self._records.task_done()


def _lost(rollout_id: str, attempt: int, error: str) -> AttemptResult:
    return AttemptResult(
        rollout_id=rollout_id,
        attempt=attempt,
        rewards=None,
        error=error,
        error_type="WorkerLost",
        infrastructure=True,
        finished_ns=now_ns(),
    )


__all__ = ["GUARD_HINT", "Connection", "WorkerExecutor"]
