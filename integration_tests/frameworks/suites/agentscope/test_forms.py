"""The automatic and the explicit form: one record, whoever else listens; and what they refuse."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import agentscope
import agentscope.agent
import agentscope.pipeline
import pytest
from agentscope.agent import Agent
from agentscope.middleware import TracingMiddleware
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from integration_tests.frameworks.apps import agentscope as app
from integration_tests.frameworks.scripts.agentscope import answer
from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.agentscope.agents import Denied, agent, fail, said, search, tree
from integration_tests.frameworks.suites.agentscope.conftest import Run
from integration_tests.frameworks.suites.agentscope.server import Endpoint
from leyden import wire
from leyden.errors import ConfigurationError
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.agentscope import AgentScopeAdapter, LeydenMiddleware
from tests.capture.rollouts import Recorded, rollout, routing_to


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """What the user's own tracing gets."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def script(ask: Ask) -> Say:
    """Use tools that work, fail, are denied or unknown, then be done."""
    if any(message.get("role") == "tool" for message in ask.messages):
        return Say(text="done")
    calls = (("search", {"query": "a"}), ("fail", {"query": "b"}), ("no", {}), ("lost", {}))
    return Say(tool_calls=calls if ask.role == "worker" else ())


def record(run: Run, user: Endpoint, *middlewares: Any) -> list[str]:
    """Let two agents work, and one of them sum up; return the tree."""
    user.script = script

    async def no() -> str:
        """Refuse."""
        return "never"

    async def episode() -> Recorded:
        given = [*middlewares, TracingMiddleware()]
        worker = agent("worker", user.base_url, tools=[search, fail, Denied(no)], middlewares=given)
        critic = agent("critic", user.base_url, middlewares=given, stream=True)
        with rollout() as recorded:
            await critic.reply(await worker.reply(said()))
            await critic.compress_context()
        return recorded

    return tree(run(episode()))


def test_both_forms_record_the_same_once_and_the_users_tracing_gets_what_it_got(
    run: Run, user: Endpoint, exporter: InMemorySpanExporter
) -> None:
    def heard() -> Counter[tuple[str, str]]:
        spans, names = exporter.get_finished_spans(), {}
        names = {span.context.span_id: span.name for span in spans}
        exporter.clear()
        return Counter((span.name, names.get(span.parent.span_id, "-") if span.parent else "-") for span in spans)

    adapter = AgentScopeAdapter()
    exporter.clear()
    record(run, user)
    alone = heard()
    assert sum(alone.values()) >= 5, "the user's tracing is on"
    patched = dict(vars(Agent))
    explicit, heard_explicit = record(run, user, LeydenMiddleware()), heard()
    assert dict(vars(Agent)) == patched, "the explicit form patches no class"
    adapter.attach()
    automatic, heard_automatic = record(run, user), heard()
    both, heard_both = record(run, user, LeydenMiddleware()), heard()
    adapter.detach()
    wire.uninstall()
    assert explicit == automatic == both
    assert sorted(explicit) == sorted(
        [
            "agent worker worker ok < rollout",
            "model_call chat worker ok < worker",
            "tool search worker ok < worker",
            "tool fail worker error < worker",
            "tool no worker error < worker",
            "tool lost worker error < worker",
            "model_call chat worker ok < worker",
            "agent critic critic ok < rollout",
            "model_call chat critic ok < critic",
            "agent critic critic ok < rollout",
        ]
    )
    assert alone == heard_explicit == heard_automatic == heard_both


def test_detach_restores_every_function_and_may_be_repeated() -> None:
    classes = [Agent, *(vars(agentscope.pipeline).get(name) for name in ("GoalPipeline", "TeamPipeline"))]
    before = [dict(vars(each)) for each in classes if each]
    adapter = AgentScopeAdapter()
    adapter.attach()
    adapter.attach()
    changed = {name for name in before[0] if vars(Agent)[name] is not before[0][name]}
    assert changed == {"_reply", "_acting", "compress_context", "observe"}
    adapter.detach()
    adapter.detach()
    assert [dict(vars(each)) for each in classes if each] == before


def test_agentscope_1_is_refused_with_the_versions_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(agentscope.agent, "Agent")
    monkeypatch.setattr(agentscope, "__version__", "1.0.21")
    with pytest.raises(ConfigurationError, match=r"agentscope 1\.0\.21 has no Agent .* known to work: .*2\.0\.10"):
        AgentScopeAdapter().attach()
    with pytest.raises(ConfigurationError, match=r"1\.0\.21"):
        from leyden_plugins.frameworks import agentscope as package

        _ = package.LeydenMiddleware


def test_a_hook_point_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Agent, "_acting")
    with pytest.raises(ConfigurationError, match=r"has no Agent\._acting"):
        AgentScopeAdapter().attach()
    assert not hasattr(vars(Agent)["_reply"], "__wrapped__")


def check(recorded: Recorded, rollout_id: str) -> None:
    """Compare one episode's record with what the app says of itself."""
    assert Counter(call.role for call in recorded.calls) == app.CALLS
    assert Counter(span.name for span in recorded.spans(Kind.TOOL)) == app.TOOLS
    handoffs = Counter(f"{span.role}->{span.attributes['leyden.handoff.to']}" for span in recorded.spans(Kind.HANDOFF))
    assert handoffs == app.HANDOFFS
    for call in recorded.calls:
        parent = recorded.parent_of(call)
        assert (parent.kind, parent.role) == (Kind.AGENT, call.role)
    assert {record.rollout_id for record in recorded.records} == {rollout_id}
    assert {span.status for kind in Kind for span in recorded.spans(kind)} == {Status.OK}


async def play(user: Endpoint, gateway: Endpoint, rollout_id: str, stream: bool) -> None:
    episode: Any = app.build(user.base_url, stream=stream, sync=False)
    with rollout(routing_to(gateway.base_url, "worker", "critic"), rollout_id) as recorded:
        assert (await episode(f"[[rollout={rollout_id}]] do it")).strip() == "second draft"
    check(recorded, rollout_id)


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize("stream", [False, True])
def test_many_episodes_at_once_are_kept_apart(run: Run, user: Endpoint, gateway: Endpoint, stream: bool) -> None:
    user.script = gateway.script = answer

    async def episodes() -> None:
        await asyncio.gather(*(play(user, gateway, f"r{index}", stream) for index in range(16)))

    run(episodes())
    assert_truth(user, gateway, 16)


@pytest.mark.usefixtures("instrumented")
def test_episodes_in_threads_with_loops_of_their_own_are_kept_apart(user: Endpoint, gateway: Endpoint) -> None:
    user.script = gateway.script = answer
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            asyncio.run(play(user, gateway, f"r{index}", bool(index % 2)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_truth(user, gateway, 6)


def assert_truth(user: Endpoint, gateway: Endpoint, episodes: int) -> None:
    """Compare what the prompts say with what the headers claim, and where each role went."""
    assert Counter(user.roles) == {"planner": app.CALLS["planner"] * episodes}
    assert Counter(gateway.roles) == {role: app.CALLS[role] * episodes for role in ("worker", "critic")}
    for seen in gateway.seen:
        claimed = (seen.headers["x-leyden-role"], seen.headers["x-leyden-rollout"])
        assert claimed == (seen.ask.role, seen.ask.rollout)
