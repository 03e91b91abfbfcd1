"""The wire: one hook in the HTTP client, below every SDK and framework.

patches.py   what is patched, and which requests are taken
calls.py     one model call: its span, its request to the gateway, its deadline and patience
clients.py   Leyden's own clients, which have nothing of the user's
"""

from leyden.wire.patches import (
    default_routing,
    install,
    is_installed,
    is_routed,
    lost_calls,
    set_default_routing,
    uninstall,
)

__all__ = [
    "default_routing",
    "install",
    "is_installed",
    "is_routed",
    "lost_calls",
    "set_default_routing",
    "uninstall",
]
