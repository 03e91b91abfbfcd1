"""Event loops on threads of their own, one for the trainer, one for agents in this process; and work side by side.

The trainer's lets `fit`, `evaluate` and `dev` work the same in scripts, in notebooks and inside a running loop. The
agents' keeps an async agent that blocks from stopping the gateway it waits for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, ParamSpec, TypeVar

Result = TypeVar("Result")
P = ParamSpec("P")

CANCEL_SECONDS = 15.0
"""How long cancelled work may take to stop its processes and close its files."""


async def together(work: Sequence[Coroutine[object, object, Result]]) -> list[Result]:
    """Wait for all; when one raises, end the others first: nothing runs on while its parts are closed."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class DaemonThreads(ThreadPoolExecutor):
    """Starts a daemon thread a call, so that one that hangs holds up neither other calls nor the end of the program.

    A subclass because `set_default_executor` takes nothing else. Python's own pool has 4 threads more than the machine
    has cores: a few abandoned calls would fill it for good, and it waits for them when the program ends.
    """

    def submit(self, fn: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Start `fn` now."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=run, name="leyden-call", daemon=True).start()
        return future


class LoopThread:
    """An event loop that runs on a thread of its own until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(DaemonThreads())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[object, object, Result]) -> Job[Result]:
        """Start a coroutine on the loop."""
        return Job(work, self.loop)

    def close(self) -> None:
        """Stop the loop and its thread; cancels what still runs."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(timeout=10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()


class Job(Generic[Result]):
    """A coroutine on a loop's thread, to be waited for from other threads and loops."""

    def __init__(self, work: Coroutine[object, object, Result], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[Result] | None = None
        self._ended: Future[Result] = Future()
        """Resolves when the coroutine is over, also after it was cancelled."""
        self._ended.set_running_or_notify_cancel()
        loop.call_soon_threadsafe(self._begin, work)

    def result(self) -> Result:
        """Wait for the end and return or raise what came of it."""
        return self._ended.result()

    async def wait(self) -> Result:
        """Do what `result` does on another loop. When its caller is cancelled, so is the job, and its end awaited."""
        try:
            return await asyncio.wrap_future(self._ended)
        except asyncio.CancelledError:
            await asyncio.to_thread(self.cancel)
            raise

    def cancel(self) -> None:
        """Cancel the coroutine and let it put things in order, for a while."""
        if not self._ended.done():
            self._loop.call_soon_threadsafe(self._cancel)
            wait([self._ended], timeout=CANCEL_SECONDS)

    def _begin(self, work: Coroutine[object, object, Result]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _end(self, task: asyncio.Task[Result]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
