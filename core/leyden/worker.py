"""Run attempts in a worker process: the worker's side.

One event loop for the process's whole life (langchain-openai breaks on a second), one thread that reads the
pipe. Records of an attempt are sent before its result.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import msgspec

from leyden import agents
from leyden.attempts import run_attempt
from leyden.instrumentation import instrument
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.spans import Record
from leyden.usage import Usage, usage

FLUSH_SECONDS = 0.02
"""Records and results are gathered this long and cross the pipe in one message."""


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know at start."""

    agent: str
    is_factory: bool
    reward: str | None
    concurrency: int


class ToWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A message from the trainer."""

    run: RolloutSpec | None = None
    stop: bool = False


class FromWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A message to the trainer."""

    is_ready: bool = False
    records: list[Record] = []
    results: list[AttemptResult] = []
    usage: Usage | None = None
    fatal: str | None = None
    """Why the worker cannot start, with its traceback."""


def is_worker() -> bool:
    """Say whether this process was started to run attempts."""
    return _in_worker


_in_worker = False


def worker_main(pipe: Connection, setup: WorkerSetup) -> None:
    """Be the worker process."""
    global _in_worker
    _in_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides what Ctrl-C means
    encode = msgspec.msgpack.Encoder().encode
    try:
        instrument()
        agent = agents.load(setup.agent, is_factory=setup.is_factory)
        reward = None if setup.reward is None else agents.load(setup.reward)
    except BaseException:
        text = f"a worker process could not import the agent {setup.agent!r}:\n{traceback.format_exc()}"
        pipe.send_bytes(encode(FromWorker(fatal=text)))
        return
    asyncio.run(_Worker(pipe, setup, agent, reward).serve())
    pipe.close()
    os._exit(0)  # abandoned agent threads must not keep the process alive


class _Worker:
    def __init__(self, pipe: Connection, setup: WorkerSetup, agent: object, reward: object) -> None:
        self._pipe = pipe
        self._agent = agent
        self._reward = reward
        self._encode = msgspec.msgpack.Encoder().encode
        self._threads = ThreadPoolExecutor(setup.concurrency, thread_name_prefix="leyden-agent")
        self._records: deque[Record] = deque()
        self._results: list[AttemptResult] = []
        self._flush_handle: asyncio.TimerHandle | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="leyden-pipe", daemon=True).start()
        self._pipe.send_bytes(self._encode(FromWorker(is_ready=True, usage=usage())))
        await self._stopped.wait()
        for job in self._jobs:
            job.cancel()
        self._flush()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        decoder = msgspec.msgpack.Decoder(ToWorker)
        try:
            while True:
                message = decoder.decode(self._pipe.recv_bytes())
                if message.stop or message.run is None:
                    break
                loop.call_soon_threadsafe(self._begin, message.run)
        except (EOFError, OSError):
            pass  # the trainer is gone: end, its lease on these attempts is reclaimed
        loop.call_soon_threadsafe(self._stopped.set)

    def _begin(self, spec: RolloutSpec) -> None:
        job = asyncio.get_running_loop().create_task(self._run(spec))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _run(self, spec: RolloutSpec) -> None:
        result = await run_attempt(
            spec,
            self._agent,  # type: ignore[arg-type]  # load() and check_agent() vouch for it
            sink=self._records.append,
            threads=self._threads,
            reward=self._reward,  # type: ignore[arg-type]  # as above
        )
        self._results.append(result)
        if self._flush_handle is None:
            self._flush_handle = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        records = [self._records.popleft() for _ in range(len(self._records))]  # agent threads append meanwhile
        results, self._results = self._results, []
        self._pipe.send_bytes(self._encode(FromWorker(records=records, results=results, usage=usage())))
