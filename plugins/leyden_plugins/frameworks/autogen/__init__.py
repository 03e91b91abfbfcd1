"""AutoGen AgentChat: who speaks, what tools ran, who handed over to whom.

Two forms, one record. Automatic: `leyden.instrument()` hooks the classes of agents and teams. Explicit:
`team = observe(team)`, which hooks only the objects it is given. Importing this module does not import AutoGen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.autogen.hooks import Hooks
    from leyden_plugins.frameworks.autogen.observing import observe


class AutoGenAdapter:
    """The automatic form."""

    name = "autogen"
    module = "autogen_agentchat"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        with extra("autogen"):
            from leyden_plugins.frameworks.autogen.hooks import Hooks
        hooks = Hooks()
        hooks.install()
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import `observe`, and with it AutoGen, when it is asked for."""
    if name != "observe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("autogen"):
        from leyden_plugins.frameworks.autogen.observing import observe
    return observe


__all__ = ["AutoGenAdapter", "observe"]
