"""CrewAI: who speaks, what tools ran, which agent was given work, how each run ended.

Two forms, one record. Automatic: `leyden.instrument()` listens where CrewAI publishes its events. Explicit:
`with observe(): crew.kickoff()`, which patches nothing of the framework. Importing this module imports no CrewAI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.crewai.hooks import Hooks
    from leyden_plugins.frameworks.crewai.observing import observe


class CrewAIAdapter:
    """The automatic form."""

    name = "crewai"
    module = "crewai"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        with extra("crewai"):
            from leyden_plugins.frameworks.crewai.hooks import Hooks
        hooks = Hooks()
        hooks.install()
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import `observe`, and with it CrewAI, when it is asked for."""
    if name != "observe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("crewai"):
        from leyden_plugins.frameworks.crewai.observing import observe
    return observe


__all__ = ["CrewAIAdapter", "observe"]
