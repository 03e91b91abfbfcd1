# ruff: noqa: E402  # the environment must be set before CrewAI is imported
from __future__ import annotations

import os

# CrewAI decides about its telemetry when it is imported: on, as users have it, and to a sender that keeps everything.
for name in ("CREWAI_DISABLE_TELEMETRY", "CREWAI_DISABLE_TRACKING", "OTEL_SDK_DISABLED", "CREWAI_TRACING_ENABLED"):
    os.environ.pop(name, None)
os.environ["OPENAI_API_KEY"] = "user-key"

import logging
import socket
from collections.abc import Iterator
from typing import Any

import crewai  # noqa: F401  # most of the suite's time
import pytest
from crewai.telemetry import Telemetry
from opentelemetry.sdk.trace.export import SpanExportResult

from integration_tests.frameworks.suites.crewai.server import Endpoint, serving, speak
from leyden import wire
from leyden_plugins.frameworks.crewai import CrewAIAdapter


@pytest.fixture(scope="session")
def endpoints() -> Iterator[tuple[Endpoint, Endpoint]]:
    logging.getLogger("crewai").setLevel(logging.ERROR)
    with serving() as user, serving() as gateway:
        yield user, gateway


@pytest.fixture
def user(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """The endpoint that the user's own client points at."""
    return fresh(endpoints[0])


@pytest.fixture
def gateway(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    """Where routed roles go."""
    return fresh(endpoints[1])


def fresh(endpoint: Endpoint) -> Endpoint:
    endpoint.seen.clear()
    endpoint.script = speak
    return endpoint


@pytest.fixture
def instrumented() -> Iterator[CrewAIAdapter]:
    """The automatic form, for one test."""
    wire.install()
    adapter = CrewAIAdapter()
    adapter.attach()
    yield adapter
    adapter.detach()
    wire.uninstall()


@pytest.fixture(scope="session", autouse=True)
def telemetry() -> Iterator[list[str]]:
    """Names of the spans that CrewAI would have sent to its makers."""
    sent: list[str] = []

    def export(spans: Any) -> SpanExportResult:
        sent.extend(span.name for span in spans)
        return SpanExportResult.SUCCESS

    patch = pytest.MonkeyPatch()
    patch.setattr(Telemetry()._exporter, "export", export)
    yield sent
    Telemetry().provider.force_flush()
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def lookups() -> Iterator[list[str]]:
    """Names of other machines that anything asked for."""
    asked: list[str] = []
    look = socket.getaddrinfo

    def watched(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (None, "localhost", "127.0.0.1"):
            asked.append(str(host))
            raise OSError(f"{host} is not to be asked for")
        return look(host, *args, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "getaddrinfo", watched)
    yield asked
    patch.undo()
