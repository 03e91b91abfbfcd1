"""OpenTelemetry: traces in (`Receiver`, `import_files`), rollouts out (`to_otlp`, `send`)."""

from leyden_plugins.traces.otel.assembling import Rules, assemble
from leyden_plugins.traces.otel.importing import import_files
from leyden_plugins.traces.otel.ours import to_otlp
from leyden_plugins.traces.otel.receiving import Receiver
from leyden_plugins.traces.otel.sending import send

__all__ = ["Receiver", "Rules", "assemble", "import_files", "send", "to_otlp"]
