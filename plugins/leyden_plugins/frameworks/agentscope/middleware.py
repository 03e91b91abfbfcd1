"""The explicit form: a middleware in AgentScope's own idiom."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from agentscope.middleware import MiddlewareBase

from leyden import wire
from leyden_plugins.frameworks.agentscope.recorder import RECORDER

logger = logging.getLogger(__name__)


class LeydenMiddleware(MiddlewareBase):
    """Records an agent: `Agent(..., middlewares=[LeydenMiddleware(), *others])`; put it first.

    It patches no class of AgentScope; it does install Leyden's hook into the HTTP clients `httpx` and `httpx2`,
    because only there can a trained role be sent to the gateway. One instance may serve every agent.
    """

    def __init__(self) -> None:
        if not wire.is_installed():
            logger.info(
                "LeydenMiddleware installs Leyden's hook into httpx and httpx2; leyden.uninstrument() undoes it"
            )
            wire.install()

    def on_reply(
        self, agent: Any, input_kwargs: dict[str, Any], next_handler: Callable[..., AsyncGenerator[Any, None]]
    ) -> AsyncGenerator[Any, None]:
        """Record a reply.

        Raises:
            ConcurrentUseError: the agent serves another rollout that is not over.
        """
        return RECORDER.reply(agent, next_handler(**input_kwargs))

    def on_acting(
        self, agent: Any, input_kwargs: dict[str, Any], next_handler: Callable[..., AsyncGenerator[Any, None]]
    ) -> AsyncGenerator[Any, None]:
        """Record a tool call."""
        return RECORDER.act(agent, input_kwargs["tool_call"], next_handler(**input_kwargs))

    async def on_compress_context(
        self, agent: Any, input_kwargs: dict[str, Any], next_handler: Callable[..., Awaitable[None]]
    ) -> None:
        """Let the agent sum up its context in its own name.

        Raises:
            ConcurrentUseError: the agent serves another rollout that is not over.
        """
        await RECORDER.compress(agent, lambda: next_handler(**input_kwargs))
