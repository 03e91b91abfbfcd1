"""The servers of an engine: started, watched, restarted, and chosen for requests.

One idea: they live on a loop of their own (`LoopThread`), because an engine is used from several and outlives each;
requests meet it at two doors. `entrance` is shut while weights change or the engine sleeps, `ready` while no server
serves.
One trap: a request that is sent again must not wait at the entrance, behind which a change of weights waits for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from leyden.errors import EngineError
from leyden_plugins.engines.servers.http import Http
from leyden_plugins.engines.vllm.doors import Door
from leyden_plugins.engines.vllm.environments import Environment
from leyden_plugins.engines.vllm.flags import Options, Serving, command, environ
from leyden_plugins.engines.vllm.process import Process, free_port
from leyden_plugins.engines.vllm.replica import Replica

MOST_RESTARTS, RESTART_WINDOW_SECONDS = 3, 600.0
WATCH_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""How often servers that are not ours are looked at: shorter than one takes to start."""
SUSPECT_SECONDS = 3.0
"""How long a server that failed a request may still look well: an engine that has died takes a moment to say so."""
REMEMBERED_AFFINITIES = 65_536
NO_SERVER = "no server is ready"
ASLEEP = "asleep"


class Fleet:
    """Every server of one engine."""

    def __init__(
        self,
        options: Options,
        environment: Environment | None,
        serving: Serving,
        *,
        log_folder: Path,
        restore: Callable[[Replica], Awaitable[None]],
    ) -> None:
        """Know the servers; `start` begins.

        Args:
            options: what the engine was asked for.
            environment: where servers are started; `None`: they run already, at `options.urls`.
            serving: what they have in common.
            log_folder: gets what the servers write.
            restore: gives a server that was started again the weights that were published.
        """
        self.entrance, self.ready = Door(), Door()
        self.failure: str | None = None
        """Why nothing more can be asked; set once."""
        self.restarts = 0
        self.is_asleep = False
        """Servers that die meanwhile are left alone: the device is another's."""
        self._options, self._environment, self._serving = options, environment, serving
        self._log_folder, self._restore = log_folder, restore
        self._affinities: OrderedDict[str, Replica] = OrderedDict()
        self._lock = threading.Lock()
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._restarted_at: deque[float] = deque()
        self._watcher: asyncio.Task[None] | None = None
        urls = options.urls or [f"http://127.0.0.1:{free_port()}" for _ in range(options.replicas)]
        self.replicas = [Replica(index=index, http=Http(url)) for index, url in enumerate(urls)]
        self.ready.shut(NO_SERVER)

    # ---- on the loop of its own --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the servers, or find them.

        Raises:
            EngineError: one of them does not come up; its log's last lines are in the message.
        """
        for replica in self.replicas:
            await self._launch(replica)
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas:
                    group.create_task(replica.wait_until_healthy(self._options.start_seconds))
        except* EngineError as errors:
            raise errors.exceptions[0] from None

    def open(self) -> None:
        """Let requests in, and watch the servers from now on."""
        for replica in self.replicas:
            replica.is_ready = True
        self.ready.open(NO_SERVER)
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End the servers that are ours, and all connections."""
        self.fail("the engine was stopped")
        tasks = [task for task in (self._watcher, *self._restarting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(one.process.stop() for one in self.replicas if one.process is not None))
        for replica in self.replicas:
            await replica.http.close()

    async def suspect(self, replica: Replica) -> bool:
        """Look after a server that failed a request; return whether it was down, and so is being started again."""
        until = time.monotonic() + SUSPECT_SECONDS
        while replica.is_ready and time.monotonic() < until:
            if not await replica.is_healthy():
                self._begin_restart(replica)
            else:
                await asyncio.sleep(WATCH_SECONDS)
        return not replica.is_ready

    async def restart(self) -> None:
        """Start every server of ours again.

        Raises:
            EngineError: one of them was given up.
        """
        for replica in self.replicas:
            if replica.process is not None:
                self._begin_restart(replica, has_died=False)
        await self.all_ready()

    async def all_ready(self) -> None:
        """Wait until every server serves.

        Raises:
            EngineError: one of them was given up.
        """
        while not all(replica.is_ready for replica in self.replicas):
            self.check()
            await asyncio.sleep(WATCH_SECONDS)
        self.check()

    def fail(self, reason: str) -> None:
        """Give up: all requests end with this, now and later."""
        self.failure = self.failure or reason
        for replica in self.replicas:
            replica.is_ready = False
        for door in (self.entrance, self.ready):  # whoever waits finds the failure
            door.open_wide()

    async def _launch(self, replica: Replica) -> None:
        if self._environment is None:
            return
        # Another seed a replica and a start: the same one would sample the same answers again.
        seed = self._options.seed + replica.index + len(self.replicas) * self.restarts
        port = int(replica.http.url.rpartition(":")[2])
        replica.process = await asyncio.to_thread(
            Process,
            self._options.python,
            command(self._options, self._environment, self._serving, port=port, seed=seed),
            environ=environ(self._options, self._environment, replica.index),
            log=self._log_folder / f"vllm-{replica.index}.log",
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS if self._environment is None else WATCH_SECONDS)
            if not self.is_asleep:
                await asyncio.gather(*(self._look_at(replica) for replica in self.replicas))

    async def _look_at(self, replica: Replica) -> None:
        # Also where nobody asks it for anything: it would come back without the published weights.
        if replica.is_ready and await replica.is_gone():
            self._begin_restart(replica)

    def _begin_restart(self, replica: Replica, *, has_died: bool = True) -> None:
        if self.failure is not None or not replica.is_ready:
            return
        replica.is_ready = False
        if not any(one.is_ready for one in self.replicas):
            self.ready.shut(NO_SERVER)
        task = asyncio.get_running_loop().create_task(self._start_again(replica, has_died=has_died))
        self._restarting[replica.index] = task

    async def _start_again(self, replica: Replica, *, has_died: bool) -> None:
        wrong: str | None = None
        while True:
            if has_died and self._dies_too_often():
                self.fail(
                    f"vLLM has died more than {MOST_RESTARTS} times in {RESTART_WINDOW_SECONDS / 60:g} minutes; "
                    f"it is not started again. {wrong or replica.last_words()}"
                )
                return
            has_died = True  # a restart that was asked for is no death; one that fails is
            self.restarts += 1
            try:
                if replica.process is not None:
                    await replica.process.stop(grace=0)
                await self._launch(replica)
                await replica.wait_until_healthy(self._options.start_seconds)
                await self._restore(replica)
            except Exception as error:  # it counts as one of the restarts, of which there are few
                wrong = str(error) or repr(error)
                continue
            replica.is_ready = True
            self.ready.open(NO_SERVER)
            return

    def _dies_too_often(self) -> bool:
        now = time.monotonic()
        while self._restarted_at and now - self._restarted_at[0] > RESTART_WINDOW_SECONDS:
            self._restarted_at.popleft()
        self._restarted_at.append(now)
        return len(self._restarted_at) > MOST_RESTARTS

    # ---- on the loops of requests ------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse to go on once the fleet has failed.

        Raises:
            EngineError: says why.
        """
        if self.failure is not None:
            raise EngineError(self.failure)

    async def choose(self, affinity: str | None) -> Replica:
        """Return the server of an affinity, or the least loaded one; waits until there is one.

        Raises:
            EngineError: there will be none.
        """
        while True:
            await self.ready.passed()
            self.check()
            with self._lock:
                known = self._affinities.get(affinity) if affinity is not None else None
                if known is not None and known.is_ready:
                    self._affinities.move_to_end(affinity)  # type: ignore[arg-type]  # it is known
                    return known
                able = [replica for replica in self.replicas if replica.is_ready]
                if able:
                    chosen = min(able, key=lambda one: one.running)
                    if affinity is not None:
                        self._remember(affinity, chosen)
                    return chosen
            await asyncio.sleep(WATCH_SECONDS)  # it went between the door and here

    @contextmanager
    def using(self, replica: Replica) -> Iterator[None]:
        """Count a request."""
        with self._lock:
            replica.running += 1
        try:
            yield
        finally:
            with self._lock:
                replica.running -= 1

    def _remember(self, affinity: str, replica: Replica) -> None:
        self._affinities[affinity] = replica
        if len(self._affinities) > REMEMBERED_AFFINITIES:
            self._affinities.popitem(last=False)


async def on_all(replicas: Sequence[Replica], work: Callable[[Replica], Awaitable[None]]) -> None:
    """Do something on every server at once; all are waited for, and the first error is raised."""
    results = await asyncio.gather(*(work(replica) for replica in replicas), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
