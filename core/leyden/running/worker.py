"""Run attempts in a worker process: the worker's side.

One event loop for the process's whole life (langchain-openai breaks on a second), one thread that reads the
pipe. Records of an attempt are sent before its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec

from leyden.instrumentation import instrument
from leyden.interfaces import Agent, AttemptResult, RewardFunction, RolloutSpec
from leyden.looping import DaemonThreads
from leyden.redaction import Redactor
from leyden.running import agents
from leyden.running.agents import PerRollout
from leyden.running.attempts import run_attempt
from leyden.spans import Record
from leyden.usage import Usage, usage

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.02
"""Records and results are gathered this long and cross the pipe in one message."""


STOP_SECONDS = 4.0
"""How long cancelled attempts may take when the worker stops."""


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
    try:
        instrument()
        agent = agents.load(setup.agent, is_factory=setup.is_factory)
        reward = None if setup.reward is None else agents.load_function(setup.reward)
    except BaseException:
        text = f"a worker process could not import the agent {setup.agent!r}:\n{traceback.format_exc()}"
        pipe.send_bytes(encode(FromWorker(fatal=text)))
        return
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_default_executor(DaemonThreads())
    loop.run_until_complete(_Worker(pipe, agent, reward).serve())
    pipe.close()
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # what abandoned agents still do must not keep the process alive


class _Worker:
    def __init__(self, pipe: Connection, agent: Agent | PerRollout, reward: RewardFunction | None) -> None:
        self._pipe = pipe
        self._agent = agent
        self._reward = reward
        self._records: deque[Record] = deque()
        self._results: list[AttemptResult] = []
        self._flush_handle: asyncio.TimerHandle | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="leyden-pipe", daemon=True).start()
        self._pipe.send_bytes(encode(FromWorker(is_ready=True, usage=usage())))
        await self._stopped.wait()
        for job in self._jobs:
            job.cancel()
        if self._jobs:  # programs that agents have started need a moment to be ended
            await asyncio.wait(self._jobs, timeout=STOP_SECONDS)
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
            self._agent,
            sink=self._records.append,
            reward=self._reward,
        )
        self._results.append(result)
        if self._flush_handle is None:
            self._flush_handle = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        records = [self._records.popleft() for _ in range(len(self._records))]  # agent threads append meanwhile
        results, self._results = self._results, []
        try:
            self._pipe.send_bytes(encoded(records, results))
        except OSError:
            pass  # the trainer is gone, and `_read` has seen it
        except BaseException:
            log.exception("a worker process cannot hand over its results, so it ends")
            os._exit(1)  # the trainer then counts these attempts as lost, where it would wait for ever


encode = msgspec.msgpack.Encoder(enc_hook=repr).encode
"""What MessagePack does not know (an attribute may be any object) crosses as its `repr`."""


def encoded(records: Sequence[Record], results: Sequence[AttemptResult]) -> bytes:
    """Return the message of these, cleaned of what a pipe cannot carry."""
    try:
        return encode(FromWorker(records=list(records), results=list(results), usage=usage()))
    except (TypeError, ValueError, OverflowError, RecursionError):
        # Integers beyond 64 bits, lone surrogates, values that hold themselves; the store would clean them too.
        plain = {"records": records, "results": [vars(result) for result in results], "usage": usage()}
        return encode(Redactor().clean(plain))
