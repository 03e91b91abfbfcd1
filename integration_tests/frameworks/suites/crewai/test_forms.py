"""The automatic and the explicit form, and what they leave alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import crewai
import pytest
from crewai import LLM, Flow
from crewai.events import CrewKickoffStartedEvent, crewai_event_bus, event_bus
from crewai.events.stream_context import add_stream_sink, reset_stream_sinks
from crewai.flow.flow import start

from integration_tests.frameworks.suites.crewai.crews import agent, asked, crew, llm, search, searching, slowly
from integration_tests.frameworks.suites.crewai.server import Endpoint
from leyden import wire
from leyden.errors import ConcurrentUseError, ConfigurationError
from leyden.spans import Kind, Span, Status
from leyden_plugins.frameworks.crewai import CrewAIAdapter, observe
from leyden_plugins.frameworks.crewai.hooks import Hooks
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def shape(recorded: Recorded) -> list[tuple[str, str, str, str]]:
    """Return kind, name, role and parent's name of every span, in order."""
    spans = sorted(
        (record for record in recorded.records if isinstance(record, Span) and record.parent_id),
        key=lambda span: (span.start_ns, span.name),
    )
    return [(span.kind, span.name, span.role, recorded.parent_of(span).name) for span in spans]


def run_automatic(work: Callable[[], object]) -> Recorded:
    adapter = CrewAIAdapter()
    adapter.attach()
    try:
        with rollout() as recorded:
            work()
    finally:
        adapter.detach()
    return recorded


def test_both_forms_record_the_same_and_together_each_span_once(user: Endpoint) -> None:
    user.script = searching
    model = llm(user.base_url)

    def plain() -> object:
        return crew(agent("worker", model, tools=[search]), agent("critic", model)).kickoff()

    def observed() -> object:
        with observe(), observe():
            return plain()

    wire.install()
    automatic = run_automatic(plain)
    both = run_automatic(observed)
    with rollout() as explicit:
        observed()
    wire.uninstall()
    assert shape(explicit) == shape(automatic) == shape(both)
    assert len(shape(explicit)) == 8


def test_the_explicit_form_patches_nothing_of_crewai_and_installs_the_wire(
    user: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    before = functions()
    caplog.set_level("INFO")
    with rollout() as recorded, observe():
        assert functions() == before
        crew(agent("worker", llm(user.base_url))).kickoff()
    assert wire.is_installed()
    assert "observe() installs" in caplog.text
    wire.uninstall()
    assert [span.role for span in recorded.calls] == ["worker"]


def test_a_cancelled_block_of_the_explicit_form_leaves_nothing_open(user: Endpoint) -> None:
    async def work() -> None:
        with observe():
            await crew(agent("worker", llm(user.base_url))).akickoff()

    async def run() -> None:
        working = asyncio.create_task(work())
        await asked(user)
        working.cancel()
        await working

    user.script = slowly
    with pytest.raises(asyncio.CancelledError), rollout() as recorded:
        asyncio.run(run())
    wire.uninstall()
    assert [(span.name, span.status) for span in recorded.spans(Kind.AGENT)] == [
        ("crew", Status.CANCELLED),
        ("worker", Status.CANCELLED),
    ]


def functions() -> dict[tuple[str, str], object]:
    """Return everything of CrewAI's that could be patched."""
    owners = [crewai.Crew, crewai.Agent, crewai.Task, *crewai.Flow.__mro__, event_bus.CrewAIEventsBus, event_bus]
    return {
        (getattr(owner, "__name__", ""), name): value
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, (FunctionType, classmethod))
    }


def test_detaching_restores_every_function() -> None:
    before = functions()
    adapter = CrewAIAdapter()
    adapter.attach()
    adapter.attach()
    assert functions() != before
    adapter.detach()
    adapter.detach()
    assert functions() == before


def test_a_detached_adapter_below_another_s_patch_is_silent(user: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = CrewAIAdapter()
    adapter.attach()
    ours = event_bus.publish_stream_event
    monkeypatch.setattr(event_bus, "publish_stream_event", lambda source, event: ours(source, event))
    adapter.detach()
    with rollout() as recorded:
        crew(agent("worker", llm(user.base_url))).kickoff()
    assert recorded.spans(Kind.AGENT) == []


def test_a_hook_point_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(event_bus, "publish_stream_event")
    monkeypatch.delattr(crewai.Task, "_execute_task_async")
    with pytest.raises(ConfigurationError, match=r"publish_stream_event.*Task._execute_task_async.*crewai 1\.15"):
        Hooks().install()


def test_a_bus_that_calls_its_sinks_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_bus.CrewAIEventsBus, "_prepare_event", lambda bus, source, event: None)
    with pytest.raises(ConfigurationError, match="a call of publish_stream_event"):
        Hooks().install()


@pytest.mark.usefixtures("instrumented")
def test_outside_of_rollouts_nothing_is_changed(user: Endpoint) -> None:
    output: Any = crew(agent("worker", llm(user.base_url))).kickoff()
    assert output.raw == "worker speaks"
    assert "x-leyden-role" not in str(user.seen[0].body)


@pytest.mark.usefixtures("instrumented")
def test_a_deployed_app_routes_roles_without_a_rollout(user: Endpoint, gateway: Endpoint) -> None:
    user.script = gateway.script = searching
    model = llm(user.base_url)
    routing = routing_to(gateway.base_url, "worker", prompts={"critic": "[[role=critic]] Be short."})
    wire.set_default_routing(routing)
    try:
        crew(agent("worker\n", model, tools=[search]), agent("critic", model)).kickoff()
    finally:
        wire.set_default_routing(None)
    assert (gateway.roles, user.roles) == (["worker", "worker"], ["critic"])
    assert user.seen[0].messages[0] == {"role": "system", "content": "[[role=critic]] Be short."}


def test_the_user_s_listeners_receive_the_same_events(user: Endpoint) -> None:
    def listen() -> tuple[list[str], list[str]]:
        heard: list[str] = []
        sunk: list[str] = []
        with crewai_event_bus.scoped_handlers():
            crewai_event_bus.on(CrewKickoffStartedEvent)(lambda source, event: heard.append(event.type))
            token = add_stream_sink(lambda source, event: sunk.append(event.type))
            with rollout():
                crew(agent("worker", llm(user.base_url), tools=[search])).kickoff()
            reset_stream_sinks(token)
            crewai_event_bus.flush()
        return heard, sorted(sunk)  # tools run at once

    user.script = searching
    plain = listen()
    adapter = CrewAIAdapter()
    adapter.attach()
    try:
        assert listen() == plain
    finally:
        adapter.detach()
    assert plain[0] == ["crew_kickoff_started"]


@pytest.mark.usefixtures("instrumented")
def test_token_counts_of_a_routed_role_never_go_to_the_user_s_provider(gateway: Endpoint, lookups: list[str]) -> None:
    # CrewAI asks OpenAI's own server to count the prompt before each call.
    lookups.clear()
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        crew(agent("worker", LLM(model="openai/gpt-4.1-mini", api_key="user-key", max_retries=0))).kickoff()
    assert lookups == []
    assert [seen.path for seen in gateway.seen] == ["/v1/responses/input_tokens", "/v1/chat/completions"]
    assert [span.role for span in recorded.calls] == ["worker"]


# ---- one crew in two rollouts ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instrumented")
def test_one_crew_in_two_rollouts_at_once_is_refused_with_the_cures(user: Endpoint) -> None:
    shared = crew(agent("worker", llm(user.base_url)), name="house")
    refused: list[Recorded] = []

    async def one(name: str) -> object:
        with rollout(rollout_id=name) as recorded:
            try:
                return await shared.akickoff()
            finally:
                if recorded.context.infrastructure_error is not None:
                    refused.append(recorded)

    async def both() -> list[object]:
        return await asyncio.gather(one("r1"), one("r2"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert str(first) == "worker speaks"
    assert isinstance(second, ConcurrentUseError)
    assert str(second).startswith("'house' runs in rollout 'r1'")
    assert "per_rollout" in str(second)
    assert "house.copy()" in str(second)
    assert [recorded.context.rollout_id for recorded in refused] == ["r2"]
    assert asyncio.run(one("r3")) is not None  # it is free again


@pytest.mark.usefixtures("instrumented")
def test_one_agent_in_two_rollouts_at_once_is_refused(user: Endpoint) -> None:
    shared = agent("worker", llm(user.base_url))

    async def one(name: str) -> object:
        with rollout(rollout_id=name):
            return await crew(shared).akickoff()

    async def both() -> list[object]:
        return await asyncio.gather(one("r1"), one("r2"), return_exceptions=True)

    assert ConcurrentUseError in [type(each) for each in asyncio.run(both())]


@pytest.mark.usefixtures("instrumented")
def test_a_crew_that_has_ended_is_free_while_its_rollout_goes_on(user: Endpoint) -> None:
    shared = crew(agent("worker", llm(user.base_url)))
    with rollout(rollout_id="r1"):
        shared.kickoff()
        with rollout(rollout_id="r2") as recorded:
            shared.kickoff()
    assert [span.role for span in recorded.calls] == ["worker"]


@pytest.mark.usefixtures("instrumented")
def test_one_flow_in_two_rollouts_at_once_is_refused(user: Endpoint) -> None:
    class House(Flow[Any]):
        @start()
        async def work(self) -> str:
            await agent("worker", llm(user.base_url)).kickoff_async("Count.")
            return "done"

    shared = House()

    async def one(name: str) -> object:
        with rollout(rollout_id=name):
            return await shared.kickoff_async()

    async def both() -> list[object]:
        return await asyncio.gather(one("r1"), one("r2"), return_exceptions=True)

    assert sorted(type(each).__name__ for each in asyncio.run(both())) == ["ConcurrentUseError", "str"]


@pytest.mark.usefixtures("instrumented")
def test_copies_of_one_crew_serve_many_rollouts_at_once(user: Endpoint) -> None:
    user.script = searching
    model = llm(user.base_url)
    shared = crew(agent("worker", model, tools=[search]), agent("critic", model))

    async def one(name: str) -> Recorded:
        with rollout(rollout_id=name) as recorded:
            await shared.copy().akickoff(inputs={"name": name})
        return recorded

    async def all_of_them() -> list[Recorded]:
        return await asyncio.gather(*(one(f"r{index}") for index in range(8)))

    for recorded in asyncio.run(all_of_them()):
        assert [span.role for span in recorded.calls] == ["worker", "worker", "critic"]
        assert [recorded.parent_of(span).role for span in recorded.calls] == ["worker", "worker", "critic"]


def test_a_block_outside_of_rollouts_records_nothing(user: Endpoint) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(wire.uninstall)
        stack.enter_context(observe())
        output: Any = crew(agent("worker", llm(user.base_url))).kickoff()
    assert output.raw == "worker speaks"
