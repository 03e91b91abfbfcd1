"""The wire: one hook in the HTTP client, below every SDK and framework.

patches.py       install and remove it; state.py is what holds for the process
recognition.py   which requests are taken, and who makes them
protocols.py     the protocols that carry model calls
calls.py         one model call: its span, its request to the gateway, its deadline
patience.py      when a request to the gateway is sent again
reading.py       what a model answered, from JSON or a stream; answers.py has a reader for each protocol
*_family.py      one HTTP library each: its hook, and Leyden's own clients made with it
transports.py    keep collected connections from deafening live ones
"""

from leyden.wire.patches import install, is_installed, uninstall
from leyden.wire.state import default_routing, is_routed, lost_calls, set_default_routing

__all__ = [
    "default_routing",
    "install",
    "is_installed",
    "is_routed",
    "lost_calls",
    "set_default_routing",
    "uninstall",
]
