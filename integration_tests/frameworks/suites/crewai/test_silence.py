"""Nothing leaves a rollout but model calls; outside of rollouts CrewAI's settings are the user's."""

from __future__ import annotations

import os
from typing import Any

import pytest
from crewai.events import crewai_event_bus
from crewai.events.listeners.tracing import utils as tracing
from crewai.telemetry import Telemetry
from crewai.tools import tool
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.crewai.crews import agent, crew, llm
from integration_tests.frameworks.suites.crewai.server import Endpoint, Seen, speak
from leyden_plugins.frameworks.crewai import CrewAIAdapter
from tests.capture.rollouts import rollout, routing_to

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def flushed(sent: list[str]) -> list[str]:
    """Return what was sent since the last time."""
    crewai_event_bus.flush()
    Telemetry().provider.force_flush()
    names = list(sent)
    sent.clear()
    return names


def search_first(seen: Seen) -> Say | int:
    return speak(seen) if seen.results else Say(tool_calls=(("search", {"query": "north"}),))


def test_a_rollout_sends_nothing_but_model_calls(
    user: Endpoint,
    gateway: Endpoint,
    telemetry: list[str],
    lookups: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, answer in {"is_first_execution": True, "has_user_declined_tracing": False}.items():
        monkeypatch.setattr(tracing, name, lambda answer=answer: answer)
    for name in ("CI", "CREWAI_TESTING"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    adapter = CrewAIAdapter()
    adapter.attach()
    flushed(telemetry)
    lookups.clear()
    with rollout(routing_to(gateway.base_url, "worker")):
        crew(agent("worker", llm(user.base_url), verbose=True), verbose=True).kickoff()
        assert not tracing.should_auto_collect_first_time_traces()
    assert flushed(telemetry) == []
    assert lookups == []
    assert dict(os.environ) == before
    assert tracing.should_auto_collect_first_time_traces()
    adapter.detach()


def test_outside_of_rollouts_telemetry_is_as_the_user_set_it(
    user: Endpoint, instrumented: CrewAIAdapter, telemetry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "is_first_execution", lambda: False)
    flushed(telemetry)
    crew(agent("worker", llm(user.base_url))).kickoff()
    assert "Crew Created" in flushed(telemetry)
    monkeypatch.setenv("CREWAI_DISABLE_TELEMETRY", "true")
    crew(agent("worker", llm(user.base_url))).kickoff()
    assert flushed(telemetry) == []


@pytest.mark.usefixtures("instrumented")
def test_the_user_s_own_opentelemetry_goes_on_inside_rollouts(user: Endpoint) -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer: Any = provider.get_tracer("mine")

    @tool("search")
    def traced_search(query: str) -> str:
        """Search the archive."""
        with tracer.start_as_current_span("my search"):
            return "found"

    user.script = search_first
    with rollout():
        crew(agent("worker", llm(user.base_url), tools=[traced_search])).kickoff()
    assert [span.name for span in kept.get_finished_spans()] == ["my search"]
