"""LangChain and LangGraph: who speaks, what tools ran, how each run ended.

Two forms, one record. Automatic: `leyden.instrument()` registers the handler with LangChain's own configure
hook. Explicit: `config={"callbacks": [LeydenCallbackHandler()]}`, which patches no class of the framework.
Importing this module imports neither LangChain nor LangGraph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.extras import extra

if TYPE_CHECKING:
    from leyden_plugins.frameworks.langchain.handler import LeydenCallbackHandler
    from leyden_plugins.frameworks.langchain.hooks import Hooks


class LangChainAdapter:
    """The automatic form."""

    name = "langchain"
    module = "langchain_core"

    def __init__(self) -> None:
        self.hooks: Hooks | None = None

    def attach(self) -> None:
        """Install the hooks; idempotent.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        if self.hooks is not None:
            return
        with extra("langchain"):
            from leyden_plugins.frameworks.langchain.hooks import Hooks
        hooks = Hooks()
        try:
            hooks.install()
        except BaseException:
            hooks.remove()
            raise
        self.hooks = hooks

    def detach(self) -> None:
        """Restore every patched function; idempotent."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None


def __getattr__(name: str) -> object:
    """Import the handler, and with it LangChain, when it is asked for."""
    if name != "LeydenCallbackHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("langchain"):
        from leyden_plugins.frameworks.langchain.handler import LeydenCallbackHandler
    return LeydenCallbackHandler


__all__ = ["LangChainAdapter", "LeydenCallbackHandler"]
