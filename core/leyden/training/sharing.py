"""Engine and learner on one device: each leaves it to the other while that one works.

One idea: whoever is about to work asks for its turn; for an engine that does not sleep this does nothing.
"""

from __future__ import annotations

import asyncio

from leyden.errors import ConfigurationError
from leyden.interfaces import Engine, Learner, ReleasesMemory, Sleeps


class Turns:
    """Whose turn on the device it is; the engine's at first."""

    def __init__(self, engine: Engine, learner: Learner) -> None:
        self._engine = engine if isinstance(engine, Sleeps) and engine.sleeps else None
        self._learner = learner
        self._is_asleep = False

    async def learner(self) -> None:
        """Put the engine to sleep; nobody may be sampling."""
        if self._engine is not None and not self._is_asleep:
            await self._engine.sleep()
            self._is_asleep = True

    async def engine(self) -> None:
        """Free what the learner has cached, and wake the engine."""
        if self._engine is not None and self._is_asleep:
            if isinstance(self._learner, ReleasesMemory):
                await asyncio.to_thread(self._learner.release_memory)
            await self._engine.wake()
            self._is_asleep = False


def check_turns(engine: Engine, max_staleness: int) -> None:
    """Refuse an engine that is to sleep while it samples.

    Raises:
        ConfigurationError: sampling and learning go on side by side.
    """
    if max_staleness > 0 and isinstance(engine, Sleeps) and engine.sleeps:
        raise ConfigurationError(
            f"max_staleness={max_staleness!r} samples while the learner works, and this engine is to sleep then "
            "(sleep=True); give each a device of its own, or use max_staleness=0"
        )
