"""All protocols that come with the gateway."""

from __future__ import annotations

from leyden_plugins.gateway.dialects import Dialect
from leyden_plugins.gateway.dialects.chat import ChatDialect
from leyden_plugins.gateway.dialects.completions import CompletionsDialect
from leyden_plugins.gateway.dialects.messages import MessagesDialect
from leyden_plugins.gateway.dialects.responses import ResponsesDialect

DIALECTS: tuple[Dialect, ...] = (ChatDialect(), CompletionsDialect(), ResponsesDialect(), MessagesDialect())
"""They keep nothing between requests, so all gateways share them."""
