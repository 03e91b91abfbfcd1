"""AgentScope 2.x: who speaks, what tools ran, which member a team's leader turned to.

Two forms, one record. Automatic: `leyden.instrument()` wraps four methods of `Agent`, so that agents made before and
after are seen alike. Explicit: `Agent(..., middlewares=[LeydenMiddleware()])`, which patches no class of the framework.
Importing this module does not import AgentScope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.agentscope.hooks import Hooks
    from leyden_plugins.frameworks.agentscope.middleware import LeydenMiddleware


class AgentScopeAdapter:
    """The automatic form."""

    name = "agentscope"
    module = "agentscope"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        from leyden_plugins.frameworks.agentscope.hooks import Hooks

        hooks = Hooks()
        with extra("agentscope"):
            hooks.install()
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import the middleware, and with it AgentScope, when it is asked for.

    Raises:
        ConfigurationError: this is AgentScope 1.x, which has no middleware.
    """
    if name != "LeydenMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from leyden_plugins.frameworks.agentscope.hooks import agent_class

    with extra("agentscope"):
        agent_class()
        from leyden_plugins.frameworks.agentscope.middleware import LeydenMiddleware
    return LeydenMiddleware


__all__ = ["AgentScopeAdapter", "LeydenMiddleware"]
