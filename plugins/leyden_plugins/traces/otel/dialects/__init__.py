"""What instrumentations call things: one module a dialect, each a function from a span to a `Reading`."""

from leyden_plugins.traces.otel.dialects.genai import read_genai
from leyden_plugins.traces.otel.dialects.langfuse import read_langfuse
from leyden_plugins.traces.otel.dialects.openinference import read_openinference
from leyden_plugins.traces.otel.dialects.reading import Reading
from leyden_plugins.traces.otel.dialects.traceloop import read_traceloop
from leyden_plugins.traces.otel.spans import RawSpan

DIALECTS = (read_genai, read_openinference, read_traceloop, read_langfuse)
"""In order: where several speak on one span, the first that says a thing is heard."""


def read(span: RawSpan) -> Reading:
    """Return what all dialects make of a span."""
    found = Reading()
    for dialect in DIALECTS:
        found.add(dialect(span))
    return found


__all__ = ["DIALECTS", "Reading", "read"]
