"""Microsoft Agent Framework: who speaks, what tools ran, who handed over to whom.

Two forms, one record. Automatic: `leyden.instrument()` wraps a few public methods. Explicit:
`Agent(..., middleware=[LeydenMiddleware()])`, which patches no class of the framework.
Importing this module does not import the framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.agent_framework.hooks import Hooks
    from leyden_plugins.frameworks.agent_framework.middleware import LeydenMiddleware


class AgentFrameworkAdapter:
    """The automatic form."""

    name = "agent_framework"
    module = "agent_framework"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        with extra("agent_framework"):
            import agent_framework

        from leyden_plugins.frameworks.agent_framework.hooks import Hooks, check

        check(agent_framework)
        hooks = Hooks()
        hooks.install()
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import the middleware, and with it the framework, when it is asked for."""
    if name != "LeydenMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("agent_framework"):
        from leyden_plugins.frameworks.agent_framework.middleware import LeydenMiddleware
    return LeydenMiddleware


__all__ = ["AgentFrameworkAdapter", "LeydenMiddleware"]
