"""Where requests of any event loop wait for something that another thread does."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future


class Door:
    """Open, or shut for one or more reasons."""

    def __init__(self) -> None:
        self._reasons: set[str] = set()
        self._opening: Future[None] = Future()
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether nobody has to wait."""
        return not self._reasons

    def shut(self, reason: str) -> None:
        """Let everybody wait."""
        with self._lock:
            if not self._reasons:
                self._opening = Future()
            self._reasons.add(reason)

    def open(self, reason: str) -> None:
        """Take one reason away; with the last one, all go on."""
        with self._lock:
            was_shut = bool(self._reasons)
            self._reasons.discard(reason)
            if was_shut and not self._reasons:
                self._opening.set_result(None)

    def open_wide(self) -> None:
        """Take all reasons away."""
        for reason in tuple(self._reasons):
            self.open(reason)

    async def passed(self) -> None:
        """Wait until it is open."""
        while not self.is_open:
            # Shielded: one request that is given up must not take the future from the others.
            await asyncio.shield(asyncio.wrap_future(self._opening))
