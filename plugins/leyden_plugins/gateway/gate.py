"""Hold calls back while weights change, and know when none is being generated."""

from __future__ import annotations

import asyncio


class Gate:
    """Calls go through one by one; a held gate lets none start."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0

    async def hold(self) -> None:
        """Close the gate; return when every call that went through has left."""
        self._open.clear()
        await self._idle.wait()

    def release(self) -> None:
        """Open the gate."""
        self._open.set()

    def enter(self) -> bool:
        """Go through; False when the gate is held. Whoever went through calls `leave` once."""
        if not self._open.is_set():
            return False
        self._running += 1
        self._idle.clear()
        return True

    def leave(self) -> None:
        """Report that the engine has no more work for this call."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()

    async def wait(self, seconds: float) -> None:
        """Wait until the gate opens, at most `seconds`. It may be held again by the time this returns."""
        try:
            async with asyncio.timeout(seconds):
                await self._open.wait()
        except TimeoutError:
            return
