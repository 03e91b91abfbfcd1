"""Carry deltas from whatever samples to the event loop that asked.

One idea: one wake-up of a loop a step, whatever the number of requests: crossing threads costs more than the
tokens of a small model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self
from weakref import ref

from leyden.errors import EngineError
from leyden.interfaces import Delta

Item = Delta | EngineError | None
"""A piece, a failure, or the end."""


class DeltaStream(AsyncIterator[Delta]):
    """The deltas of one generation, in order. Closing it, or dropping it, aborts what still runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.abort: Callable[[], None] | None = None
        """Ends the generation in the sampling thread; `None` once there is nothing to end."""
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._items and not self._is_over:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._is_over:
            raise StopAsyncIteration
        item = self._items.popleft()
        if isinstance(item, Delta):
            return item
        self._is_over = True
        self.abort = None
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        """Abort what still runs; idempotent."""
        self._is_over = True
        self._items.clear()
        if self.abort is not None:
            self.abort()
            self.abort = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __del__(self) -> None:
        # `break` out of `async for` closes nothing; a place in the batch must not be held until max_tokens.
        if self.abort is not None:
            self.abort()

    def put(self, item: Item) -> None:
        """Add an item; called on the loop."""
        if self._is_over:
            return
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def deliver(items: Sequence[tuple[ref[DeltaStream], Item]]) -> None:
    """Put each item into its stream, if anybody still holds it; called on the loop."""
    for held, item in items:
        stream = held()
        if stream is not None:
            stream.put(item)
