"""The two forms, what they leave untouched, and that everything is put back."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import agent_framework
import pytest
from agent_framework import Agent, BaseAgent, Executor, FunctionTool, Workflow, WorkflowContext, agent_middleware
from agent_framework.observability import disable_instrumentation, enable_instrumentation
from agent_framework.orchestrations import HandoffBuilder, SequentialBuilder
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from integration_tests.frameworks.suites.agent_framework.apps import TASK, agent, calling, run, search, speakers, tree
from integration_tests.frameworks.suites.server import Endpoint
from leyden import wire
from leyden.errors import ConfigurationError
from leyden.spans import Kind
from leyden_plugins.frameworks.agent_framework import AgentFrameworkAdapter, LeydenMiddleware
from tests.capture.rollouts import rollout, routing_to

streamed = pytest.mark.parametrize("stream", [False, True], ids=["awaited", "streamed"])

PATCHED = (
    (Agent, "run"),
    (agent_framework.RawAgent, "run"),
    (agent_framework.AgentMiddlewareLayer, "run"),
    (BaseAgent, "__init__"),
    (Executor, "execute"),
    (FunctionTool, "invoke"),
    (Workflow, "run"),
    (WorkflowContext, "add_event"),
)


@pytest.fixture
def explicit() -> Iterator[None]:
    """Take away what the explicit form installs."""
    yield
    wire.uninstall()


def middleware() -> list[Any]:
    return [LeydenMiddleware()]


@streamed
@pytest.mark.usefixtures("explicit")
def test_the_explicit_form_records_agents_tools_and_nested_agents_and_routes(
    user: Endpoint, gateway: Endpoint, stream: bool
) -> None:
    before = [vars(owner)[name] for owner, name in PATCHED]
    expert = agent(user, "expert", middleware=middleware())
    boss = agent(user, "boss", tools=[search, expert.as_tool(name="ask_expert")], middleware=middleware())
    user.script = calling("boss", ("search", {"query": "x"}), ("ask_expert", {"task": TASK}))
    with rollout(routing_to(gateway.base_url, "expert")) as recorded:
        result = asyncio.run(run(boss, stream=stream))
    assert result.text == "boss speaks"
    assert (user.roles, gateway.roles) == (["boss", "boss"], ["expert"])
    assert sorted(tree(recorded)) == [
        ("ask_expert", "agent", "expert", "expert", "ok"),
        ("boss", "model_call", "chat user-model", "boss", "ok"),
        ("boss", "model_call", "chat user-model", "boss", "ok"),
        ("boss", "tool", "ask_expert", "boss", "ok"),
        ("boss", "tool", "search", "boss", "ok"),
        ("expert", "model_call", "chat user-model", "expert", "ok"),
        ("rollout", "agent", "boss", "boss", "ok"),
    ]
    found = next(span for span in recorded.spans(Kind.TOOL) if span.name == "search").attributes
    assert found["gen_ai.tool.call.result"] == "found x" and found["gen_ai.tool.call.id"]
    assert [vars(owner)[name] for owner, name in PATCHED] == before, "no class of the framework is patched"


@streamed
@pytest.mark.usefixtures("explicit")
def test_the_explicit_form_records_handoffs_and_failing_tools(user: Endpoint, stream: bool) -> None:
    def broken() -> str:
        """Fail."""
        raise RuntimeError("exploded")

    triage = agent(user, "triage", middleware=middleware())
    refund = agent(user, "refund", middleware=middleware(), tools=[broken])
    team = HandoffBuilder(participants=[triage, refund]).with_start_agent(triage).build()
    user.script = lambda ask: calling("triage" if ask.role == "triage" else "refund", *script[ask.role])(ask)
    script: dict[str, Any] = {"triage": [("handoff_to_refund", {})], "refund": [("broken", {})]}
    with rollout() as recorded:
        asyncio.run(run(team, stream=stream))
    (handoff,) = recorded.spans(Kind.HANDOFF)
    assert (handoff.role, handoff.attributes["leyden.handoff.to"]) == ("triage", "refund")
    assert [(span.name, span.error) for span in recorded.spans(Kind.TOOL)] == [("broken", "RuntimeError: exploded")]
    assert speakers(recorded) == [("triage", "triage"), ("refund", "refund"), ("refund", "refund")]


@streamed
@pytest.mark.usefixtures("instrumented")
def test_both_forms_together_give_each_span_once(user: Endpoint, stream: bool) -> None:
    triage = agent(user, "triage", middleware=middleware())
    refund = agent(user, "refund", middleware=middleware(), tools=[search])
    team = HandoffBuilder(participants=[triage, refund]).with_start_agent(triage).build()
    user.script = lambda ask: calling(ask.role, *script[ask.role])(ask)
    script: dict[str, Any] = {"triage": [("handoff_to_refund", {})], "refund": [("search", {"query": "x"})]}
    with rollout() as recorded:
        asyncio.run(run(team, stream=stream))
    names = [(span.kind, span.name) for span in recorded.records if span.kind is not Kind.MODEL_CALL]  # type: ignore[union-attr]
    assert sorted(names) == [
        (Kind.AGENT, "Handoff"),
        (Kind.AGENT, "refund"),
        (Kind.AGENT, "triage"),
        (Kind.HANDOFF, "handoff to refund"),
        (Kind.ROLLOUT, "rollout"),
        (Kind.TOOL, "search"),
    ]


@pytest.mark.usefixtures("explicit")
def test_the_same_middleware_on_agent_and_run_counts_once(user: Endpoint) -> None:
    worker = agent(user, "worker", middleware=middleware(), tools=[search])
    user.script = calling("worker", ("search", {"query": "x"}))
    with rollout() as recorded:
        asyncio.run(run(worker, middleware=middleware()))
    assert len(recorded.spans(Kind.AGENT)) == len(recorded.spans(Kind.TOOL)) == 1


@pytest.mark.usefixtures("explicit")
def test_the_explicit_form_says_that_it_installs_the_wire(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LeydenMiddleware()
    assert "httpx" in caplog.text and wire.is_installed()


def test_detaching_restores_every_function_also_of_agents_defined_meanwhile() -> None:
    class Early(BaseAgent):
        def run(self, messages: Any = None, **options: Any) -> Any: ...

    before = [vars(owner)[name] for owner, name in (*PATCHED, (Early, "run"))]
    adapter = AgentFrameworkAdapter()
    adapter.attach()
    adapter.attach()

    class Late(BaseAgent):
        def run(self, messages: Any = None, **options: Any) -> Any: ...

    late = vars(Late)["run"]
    Late(name="late")
    assert vars(Late)["run"] is not late
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(PATCHED, before, strict=False))
    adapter.detach()
    adapter.detach()
    assert [vars(owner)[name] for owner, name in (*PATCHED, (Early, "run"))] == before
    assert vars(Late)["run"] is late


@pytest.mark.usefixtures("instrumented")
def test_without_a_rollout_the_framework_gets_back_exactly_its_own_objects(user: Endpoint) -> None:
    async def episode() -> list[type]:
        updates = agent(user, "worker").run(TASK, stream=True)
        await updates.get_final_response()
        return [type(updates)]

    assert asyncio.run(episode()) == [agent_framework.ResponseStream]
    assert "tools" in inspect.signature(Agent.run).parameters, "executors look at it"


@pytest.mark.usefixtures("instrumented")
def test_a_deployed_app_is_routed_by_role_without_a_rollout(user: Endpoint, gateway: Endpoint) -> None:
    team = SequentialBuilder(participants=[agent(user, "planner"), agent(user, "worker")]).build()
    wire.set_default_routing(routing_to(gateway.base_url, "worker"))
    try:
        asyncio.run(run(team))
    finally:
        wire.set_default_routing(None)
    assert (user.roles, gateway.roles) == (["planner"], ["worker"])


@pytest.mark.usefixtures("instrumented")
def test_a_prompt_is_set_for_one_role_alone(user: Endpoint) -> None:
    routing = routing_to(user.base_url, "nobody", prompts={"worker": "[[role=worker]] Tuned."})
    team = SequentialBuilder(participants=[agent(user, "planner"), agent(user, "worker")]).build()
    with rollout(routing):
        asyncio.run(run(team))
    assert [seen.body["messages"][0]["content"] for seen in user.seen] == [
        "[[role=planner]] Work.",
        "[[role=worker]] Tuned.",
    ]


def test_a_missing_hook_point_is_named_with_the_versions_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FunctionTool, "invoke")
    with pytest.raises(ConfigurationError, match=r"no FunctionTool\.invoke .* agent-framework-core 1\.23"):
        AgentFrameworkAdapter().attach()


def test_the_frameworks_own_telemetry_gives_the_same_spans(user: Endpoint) -> None:
    exporter = exported()
    enable_instrumentation()
    user.script = calling("worker", ("search", {"query": "x"}))

    def spans(stream: bool) -> list[tuple[str, str, str]]:
        exporter.clear()
        team = SequentialBuilder(participants=[agent(user, "worker", tools=[search]), agent(user, "critic")]).build()
        with rollout():
            asyncio.run(run(team, stream=stream))
        found = exporter.get_finished_spans()
        names = {span.context.span_id: span.name for span in found if span.context}
        return sorted(
            (span.name, names.get(span.parent.span_id, "") if span.parent else "", span.status.status_code.name)
            for span in found
        )

    adapter = AgentFrameworkAdapter()
    try:
        before = [spans(stream) for stream in (False, True)]
        adapter.attach()
        after = [spans(stream) for stream in (False, True)]
    finally:
        adapter.detach()
        disable_instrumentation()
    assert before == after
    assert all({"invoke_agent worker", "execute_tool search"} <= {name for name, _, _ in each} for each in before)


def exported() -> InMemorySpanExporter:
    """Return what keeps the spans of OpenTelemetry; a process has one provider."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.mark.usefixtures("instrumented")
def test_the_users_own_middleware_still_runs_once(user: Endpoint) -> None:
    ran: list[str] = []

    @agent_middleware
    async def own(given: Any, call_next: Any) -> None:
        ran.append(given.agent.name)
        await call_next()

    with rollout() as recorded:
        asyncio.run(run(agent(user, "worker", middleware=[own])))
    assert ran == ["worker"]
    assert speakers(recorded) == [("worker", "worker")]
