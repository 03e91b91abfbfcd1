"""OpenAI Agents SDK: which agent speaks, what tools, handoffs and guardrails ran, how each ended.

Two forms, one record. Automatic: `leyden.instrument()` follows the SDK's own spans, also in runs whose tracing is
disabled. Explicit: `agents.add_trace_processor(LeydenTraceProcessor())`, which patches no class of the SDK and sees
traced runs only. Importing this module does not import the SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.openai_agents.hooks import Hooks
    from leyden_plugins.frameworks.openai_agents.processor import LeydenTraceProcessor


class OpenAIAgentsAdapter:
    """The automatic form."""

    name = "openai-agents"
    module = "agents"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        with extra("openai-agents"):
            from leyden_plugins.frameworks.openai_agents.hooks import Hooks
        hooks = Hooks()
        hooks.install()
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import the processor, and with it the SDK, when it is asked for."""
    if name != "LeydenTraceProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("openai-agents"):
        from leyden_plugins.frameworks.openai_agents.processor import LeydenTraceProcessor
    return LeydenTraceProcessor


__all__ = ["LeydenTraceProcessor", "OpenAIAgentsAdapter"]
