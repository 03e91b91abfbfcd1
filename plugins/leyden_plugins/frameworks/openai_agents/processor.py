"""The explicit form: a trace processor, registered as the SDK registers any other."""

from __future__ import annotations

import logging
from typing import Any

from agents.tracing import Span, Trace, TracingProcessor

from leyden import wire
from leyden_plugins.frameworks.openai_agents import spans

logger = logging.getLogger(__name__)


class LeydenTraceProcessor(TracingProcessor):
    """Records traced runs: `agents.add_trace_processor(LeydenTraceProcessor())`.

    It patches no class of the SDK; it does install Leyden's hook into the HTTP clients `httpx` and `httpx2`, because
    only there can a trained role be sent to the gateway. Unlike the automatic form it sees nothing of a run whose
    tracing is disabled, and learns neither tool call ids nor timeouts that the SDK turns into a result.
    """

    def __init__(self) -> None:
        if not wire.is_installed():
            logger.info(
                "LeydenTraceProcessor installs Leyden's hook into httpx and httpx2; leyden.uninstrument() undoes it"
            )
            wire.install()

    def on_trace_start(self, trace: Trace) -> None:
        """Take no notice: who speaks is said by spans."""

    def on_trace_end(self, trace: Trace) -> None:
        """Take no notice."""

    def on_span_start(self, span: Span[Any]) -> None:
        """Follow a span; called in the context of the code that it is about."""
        spans.started(span)

    def on_span_end(self, span: Span[Any]) -> None:
        """End what the span is about."""
        spans.finished(span)

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: spans are recorded as they end."""

    def force_flush(self) -> None:
        """Do nothing."""
