"""asyncio's transports: one that the garbage collector took must not be closed again.

Some clients close their connections when they are collected, in a task that they start then. The transports of such
connections are often collected in the same pass (anyio pauses reading on idle ones, so no selector keeps them).
`_SelectorTransport.__del__` closes the socket but does not mark the transport as closed, and the `abort()` of that
task then removes the reader of a descriptor that belongs to a new connection by now, which hears nothing from then on.
One idea: a transport that was collected is closed, and says so. One trap: class and attributes are private to
asyncio, so a Python that has others is left as it is.
"""

from __future__ import annotations

import functools
import logging
from asyncio import selector_events
from typing import Any

from leyden.wire.state import WIRE

logger = logging.getLogger(__name__)

NEEDED = {"_sock", "_closing", "_conn_lost"}


def patch() -> None:
    """Mark transports that are collected with an open socket as closed, while the wire is installed."""
    # This goes once the oldest Python that Leyden supports marks them itself.
    transport: Any = getattr(selector_events, "_SelectorTransport", None)
    original = vars(transport).get("__del__") if transport else None
    if original is None or not set(transport.__init__.__code__.co_names) >= NEEDED:
        logger.debug("this Python's asyncio has no _SelectorTransport that Leyden knows; collected ones stay unmarked")
        return

    @functools.wraps(original)
    def collected(self: Any) -> None:
        is_open = WIRE.is_installed and self._sock is not None
        original(self)
        if is_open:
            self._closing = True
            self._conn_lost += 1

    WIRE.patches.replace(transport, "__del__", collected)
