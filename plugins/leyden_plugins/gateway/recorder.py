"""Hand records on in batches: one write a few milliseconds costs the store less than one a call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from leyden.spans import Record

logger = logging.getLogger(__name__)

Write = Callable[[Sequence[Record]], Awaitable[None]]


class Recorder:
    """Keeps records until they are written. What could not be written stays and is tried again with the next."""

    def __init__(self, write: Write, *, flush_seconds: float = 0.02) -> None:
        self._write = write
        self._flush_seconds = flush_seconds
        self._waiting: list[Record] = []
        self._lock = asyncio.Lock()
        self._timer: asyncio.Task[None] | None = None

    def add(self, records: Sequence[Record]) -> None:
        """Keep records for the next write."""
        self._waiting.extend(records)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().create_task(self._flush_soon())

    async def flush(self) -> None:
        """Return once everything added before has been written.

        Raises:
            Exception: whatever the write raises; the records are kept.
        """
        async with self._lock:
            batch, self._waiting = self._waiting, []
            if not batch:
                return
            try:
                await self._write(batch)
            except BaseException:
                self._waiting = [*batch, *self._waiting]
                raise

    async def _flush_soon(self) -> None:
        await asyncio.sleep(self._flush_seconds)
        self._timer = None
        try:
            await self.flush()
        except Exception:
            logger.exception("records could not be written; they are kept and tried again")
