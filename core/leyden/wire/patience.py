"""When a routed request is sent again: while its gateway starts, restarts or holds requests.

One idea: what would make the user's own client retry is Leyden's to wait for, up to the rollout's deadline.
"""

from __future__ import annotations

import functools
import logging
import random
import time

from leyden.errors import DeadlineExceeded, EngineError
from leyden.wire.calls import ModelCall

logger = logging.getLogger(__name__)

HELD = {503: "new weights or no engine", 429: "too many calls at once"}
"""Status -> why the gateway asks to come again; with `Retry-After` it is no answer."""

PATIENCE_SECONDS = 600.0
"""How long a held request is repeated when the rollout has no deadline."""

CONNECT_PATIENCE_SECONDS = 5.0
"""How long a refused connection is tried again: a server that starts or restarts needs a moment."""

CONNECT_TIMEOUT_SECONDS = 10.0


class Patience:
    """When and how long to wait before a routed request is sent again."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        now = time.monotonic()
        left = call.seconds_left()
        self.give_up = now + (PATIENCE_SECONDS if left is None else left)
        self.give_up_connecting = min(self.give_up, now + CONNECT_PATIENCE_SECONDS)
        self.pause = 0.05

    def after_failure(self, error: Exception, *, is_refused: bool, is_late: bool) -> float:
        """Return how long to wait before a request that failed is sent again.

        Args:
            error: what the library raised.
            is_refused: no connection was made, so nothing was sent.
            is_late: it took longer than it may.

        Raises:
            DeadlineExceeded: it failed because the rollout has no time left.
            Exception: `error`, when repeating would not help.
        """
        if is_late:
            try:
                self.call.check_deadline()
            except DeadlineExceeded as late:
                raise late from error
        falls_back = self.call.routing is not None and self.call.routing.fallback
        self.pause = min(self.pause * 2, 1.0)
        pause = self.bounded(self.pause * random.uniform(0.5, 1.0), self.give_up_connecting)
        if not is_refused or falls_back or pause is None:
            raise error
        return pause

    def after_answer(self, status_code: int, retry_after: str | None) -> float | None:
        """Return how long the gateway holds requests, or `None` when it has answered.

        Raises:
            DeadlineExceeded: the hold outlasts the rollout.
        """
        if status_code not in HELD or retry_after is None:
            return None
        call = self.call
        # Until it is answered after all; a rollout that ends without it is not the agent's failure.
        why = f"{status_code}, {HELD[status_code]}"
        call.blame(EngineError(f"the gateway did not answer role {call.role!r}: {why}"))
        try:
            seconds = max(float(retry_after), 0.05)
        except ValueError:
            seconds = 1.0
        pause = self.bounded(seconds * random.uniform(0.5, 1.5), self.give_up)
        if pause is None and call.seconds_left() is not None:
            raise DeadlineExceeded(f"requests of role {call.role!r} were held until its rollout's deadline")
        return pause

    def bounded(self, seconds: float, until: float) -> float | None:
        """Return `seconds`, or `None` when they would end after `until`."""
        return seconds if time.monotonic() + seconds < until else None


def timeouts(call: ModelCall) -> tuple[float, float | None]:
    """Return how long a routed request may connect and wait, in seconds; it may last until the deadline.

    Raises:
        DeadlineExceeded: the deadline has passed.
    """
    call.check_deadline()
    left = call.seconds_left()
    return (CONNECT_TIMEOUT_SECONDS if left is None else min(left, CONNECT_TIMEOUT_SECONDS)), left


def falls_back(call: ModelCall, error: Exception) -> bool:
    """Say whether a deployed app's own model answers instead, and say so in the log once a server."""
    if call.route is None or call.routing is None or not call.routing.fallback:
        return False
    warn_of_fallback(call.routing.base_url, type(error).__name__)
    return True


@functools.cache
def warn_of_fallback(base_url: str, reason: str) -> None:
    """Log that a server does not answer."""
    logger.warning("%s cannot be reached (%s); the app's own model answers instead (fallback=True)", base_url, reason)
