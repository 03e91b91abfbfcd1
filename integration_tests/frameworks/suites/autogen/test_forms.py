"""The two forms: what they change, what they leave alone, what they refuse."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.base import ChatAgent
from autogen_agentchat.teams import BaseGroupChat, RoundRobinGroupChat, SelectorGroupChat, Swarm
from autogen_agentchat.tools import AgentTool
from autogen_core import EVENT_LOGGER_NAME, SingleThreadedAgentRuntime
from autogen_core.tools import FunctionTool
from opentelemetry import trace

from integration_tests.frameworks.suites.autogen.conftest import Observe, attached
from integration_tests.frameworks.suites.autogen.server import Endpoint, in_turn
from integration_tests.frameworks.suites.autogen.teams import (
    agent,
    call,
    client,
    counted,
    handoffs,
    run,
    say,
    until_done,
)
from leyden import context, wire
from leyden.errors import ConcurrentUseError, ConfigurationError
from leyden.spans import Kind
from leyden_plugins.frameworks.autogen import AutoGenAdapter, observe
from leyden_plugins.frameworks.autogen.hooks import subclasses
from leyden_plugins.frameworks.autogen.work import CLAIMS
from tests.capture.rollouts import rollout, routing_to


def search(query: str) -> str:
    """Search."""
    return f"found {query}"


def swarm(base_url: str) -> Swarm:
    planner = agent("planner", base_url, handoffs=["worker"])
    worker = agent("worker", base_url, tools=[search], max_tool_iterations=2)
    return Swarm([planner, worker], termination_condition=until_done())


def everything_patched() -> dict[tuple[type, str], object]:
    """Return every function that the automatic form might replace."""
    owners = [ChatAgent, *subclasses(ChatAgent), BaseGroupChat, FunctionTool, SingleThreadedAgentRuntime]
    return {(owner, name): value for owner in owners for name, value in vars(owner).items() if callable(value)}


def test_detaching_restores_every_function() -> None:
    before = everything_patched()
    with attached():
        during = everything_patched()
    changed = {(owner.__name__, name) for (owner, name), value in before.items() if during[owner, name] is not value}
    assert {
        ("AssistantAgent", "on_messages_stream"),
        ("AssistantAgent", "_execute_tool_call"),
        ("BaseGroupChat", "run_stream"),
        ("FunctionTool", "run"),
    } <= changed
    assert everything_patched() == before


def test_a_detached_adapter_records_nothing(user: Endpoint) -> None:
    user.script = in_turn(a=[say("x")])
    with attached():
        lone = agent("a", user.base_url)
    with rollout() as recorded:
        run(lambda: lone.run(task="go"))
    assert recorded.spans(Kind.AGENT) == []


def test_the_explicit_form_patches_no_class(user: Endpoint) -> None:
    before = everything_patched()
    team = swarm(user.base_url)
    assert observe(team) is team
    assert everything_patched() == before
    wire.uninstall()


def test_the_explicit_form_twice_records_once(user: Endpoint) -> None:
    user.script = in_turn(planner=[call("transfer_to_worker")], worker=[call("search", query="x"), say("DONE")])
    team = observe(observe(swarm(user.base_url)))
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    wire.uninstall()
    assert counted(recorded, Kind.AGENT) == {"main": 1, "planner": 1, "worker": 1}
    assert counted(recorded, Kind.TOOL) == {"transfer_to_worker": 1, "search": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_both_forms_together_record_once(user: Endpoint, automatic: AutoGenAdapter, stream: bool) -> None:
    runtime = SingleThreadedAgentRuntime()
    planner = agent("planner", user.base_url, handoffs=["worker"], model_client_stream=stream)
    tools = [AgentTool(agent("expert", user.base_url, model_client_stream=stream))]
    worker = agent("worker", user.base_url, tools=tools, max_tool_iterations=2, model_client_stream=stream)
    team = observe(Swarm([planner, worker], termination_condition=until_done(), runtime=runtime))

    async def main() -> None:
        runtime.start()
        await team.run(task="go")
        await runtime.stop()

    user.script = in_turn(
        planner=[call("transfer_to_worker")], worker=[call("expert", task="do"), say("DONE")], expert=[say("done")]
    )
    with rollout() as recorded:
        run(main)
    assert counted(recorded, Kind.AGENT) == {"main": 1, "planner": 1, "worker": 1, "expert": 1}
    assert counted(recorded, Kind.TOOL) == {"transfer_to_worker": 1, "expert": 1}
    assert counted(recorded, Kind.MODEL_CALL) == {"planner": 1, "worker": 2, "expert": 1}
    assert handoffs(recorded) == ["planner->worker"]


def test_a_deep_copy_of_an_observed_agent_is_observed_as_itself(user: Endpoint) -> None:
    class Plain(BaseChatAgent):
        produced_message_types = ()

        async def on_messages(self, messages: Any, cancellation_token: Any) -> Any:
            return self

        async def on_reset(self, cancellation_token: Any) -> None: ...

    original = observe(Plain("a", "x"))
    twin = copy.deepcopy(original)
    with rollout():
        assert run(lambda: twin.on_messages([], None)) is twin
    wire.uninstall()


def test_observing_anything_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="observe takes an agent or a team of AutoGen, got 'team'"):
        observe("team")  # type: ignore[type-var]  # what the test is about


def test_observed_objects_still_dump_their_configuration(user: Endpoint) -> None:
    plain, team = swarm(user.base_url), observe(swarm(user.base_url))
    wire.uninstall()
    assert team.dump_component().provider == plain.dump_component().provider


def test_a_missing_hook_point_is_named(monkeypatch: pytest.MonkeyPatch, user: Endpoint) -> None:
    monkeypatch.delattr(AssistantAgent, "_execute_tool_call")
    with pytest.raises(ConfigurationError, match=r"AssistantAgent\._execute_tool_call.*autogen-agentchat.*0\.7\.5"):
        AutoGenAdapter().attach()
    with pytest.raises(ConfigurationError, match=r"AssistantAgent\._execute_tool_call"):
        observe(agent("a", user.base_url))


def test_a_changed_parameter_is_a_missing_hook_point(monkeypatch: pytest.MonkeyPatch) -> None:
    async def publish_message(self: object, message: object) -> None: ...

    monkeypatch.setattr(SingleThreadedAgentRuntime, "publish_message", publish_message)
    with pytest.raises(ConfigurationError, match=r"SingleThreadedAgentRuntime\.publish_message\(message_id\)"):
        AutoGenAdapter().attach()


def test_importing_the_adapter_imports_no_autogen() -> None:
    code = (
        "import sys, leyden_plugins.frameworks.autogen as adapter; adapter.AutoGenAdapter(); "
        "sys.exit(any(name.startswith('autogen') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- no rollout, and deployed apps ---------------------------------------------------------------------------------


def test_without_a_rollout_requests_and_arguments_are_the_users_own(user: Endpoint, automatic: AutoGenAdapter) -> None:
    user.script = in_turn(planner=[call("transfer_to_worker")], worker=[call("search", query="x"), say("DONE")])
    stream = swarm(user.base_url).run_stream(task="go")
    # The original's own generator: not even a layer is added.
    assert stream.__name__ == "run_stream" and stream.ag_code.co_filename.endswith("_base_group_chat.py")

    async def main() -> list[Any]:
        return [each async for each in stream]

    run(main)
    assert not any(name.startswith("x-leyden") for seen in user.seen for name in seen.headers)


def test_a_deployed_app_is_rerouted_by_role_without_spans(user: Endpoint, gateway: Endpoint, observed: Observe) -> None:
    user.script = gateway.script = in_turn(
        planner=[call("transfer_to_worker")], worker=[call("search", query="x"), say("DONE")]
    )
    wire.set_default_routing(routing_to(gateway.base_url, "worker", prompts={"worker": "[[role=worker]] better"}))
    try:
        team = observed(swarm(user.base_url))
        run(lambda: team.run(task="go"))
        assert context.current() is None
    finally:
        wire.set_default_routing(None)
    assert user.roles == ["planner"] and gateway.roles == ["worker", "worker"]
    assert "better" in gateway.seen[0].text


def test_a_selectors_prompt_cannot_be_replaced(user: Endpoint, observed: Observe) -> None:
    agents = [agent("a", user.base_url), agent("b", user.base_url)]
    team = observed(SelectorGroupChat(agents, model_client=client(user.base_url)))
    routing = routing_to(user.base_url, "a", prompts={"SelectorGroupChatManager": "choose"})
    with rollout(routing):
        with pytest.raises(ConfigurationError, match="selector_prompt="):
            run(lambda: team.run(task="go"))


# ---- state and concurrency -----------------------------------------------------------------------------------------


async def overlapping(team: Any, other: Any) -> list[Any]:
    """Run two teams or agents in two rollouts that are open at the same time."""

    async def one(subject: Any, name: str, pause: float) -> Any:
        await asyncio.sleep(pause)
        with rollout(rollout_id=name):
            result = await subject.run(task="go")
            await asyncio.sleep(0.1)
            return result

    return await asyncio.gather(one(team, "r1", 0), one(other, "r2", 0.05), return_exceptions=True)


def test_a_team_in_two_rollouts_at_once_is_refused_with_the_cure(user: Endpoint, observed: Observe) -> None:
    team = observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=1))
    first, second = run(lambda: overlapping(team, team))
    assert not isinstance(first, BaseException)
    assert isinstance(second, ConcurrentUseError) and "leyden.per_rollout" in str(second) and "'r1'" in str(second)


def test_an_agent_shared_by_two_teams_is_refused_though_its_calls_do_not_overlap(
    user: Endpoint, observed: Observe
) -> None:
    shared = agent("shared", user.base_url)
    teams = [observed(RoundRobinGroupChat([shared], max_turns=1)) for _ in range(2)]
    first, second = run(lambda: overlapping(*teams))
    assert not isinstance(first, BaseException)
    assert isinstance(second, ConcurrentUseError) and "'shared' runs in rollout 'r1'" in str(second)


def test_a_lone_agent_in_two_rollouts_at_once_is_refused(user: Endpoint, observed: Observe) -> None:
    lone = observed(agent("lone", user.base_url))
    _, second = run(lambda: overlapping(lone, lone))
    assert isinstance(second, ConcurrentUseError)


def test_one_rollout_after_another_may_use_a_team_which_remembers(user: Endpoint, observed: Observe) -> None:
    team = observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=1))

    async def main() -> None:
        for name in ("r1", "r2", "r3"):
            if name == "r3":
                await team.reset()
            with rollout(rollout_id=name):
                await team.run(task=f"task {name}")

    run(main)
    assert [len(seen.messages) for seen in user.seen] == [2, 4, 2]


def test_what_ended_rollouts_used_is_not_kept(user: Endpoint, observed: Observe) -> None:
    teams = [observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=1))]

    async def main() -> None:
        for index in range(5):
            with rollout(rollout_id=f"r{index}"):
                await teams[0].run(task="go")

    run(main)
    assert len(CLAIMS.exclusive._users[id(teams[0])]) == 1
    gone = weakref.ref(teams.pop())
    gc.collect()
    assert gone() is None


# ---- the user's own observers --------------------------------------------------------------------------------------


class Events(logging.Handler):
    """A user's handler of AutoGen's event log."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kinds.append(type(record.msg).__name__)


@pytest.fixture
def events() -> Iterator[Events]:
    events, log = Events(), logging.getLogger(EVENT_LOGGER_NAME)
    level = log.level
    log.addHandler(events)
    log.setLevel(logging.INFO)
    yield events
    log.removeHandler(events)
    log.setLevel(level)


def test_the_event_log_keeps_its_events(user: Endpoint, observed: Observe, events: Events) -> None:
    lines: dict[str, Any] = {
        "planner": [call("transfer_to_worker")],
        "worker": [call("search", query="x"), say("DONE")],
    }
    plain, team = swarm(user.base_url), observed(swarm(user.base_url))
    user.script = in_turn(**lines)
    run(lambda: plain.run(task="go"))
    before, events.kinds = events.kinds, []
    user.script = in_turn(**lines)
    with rollout():
        run(lambda: team.run(task="go"))
    assert sorted(events.kinds) == sorted(before)
    assert before.count("LLMCallEvent") == 3 and before.count("ToolCallEvent") == 2


class Tracer(trace.NoOpTracer):
    """A user's tracer: notes the names of what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def start_span(self, name: str, *args: Any, **options: Any) -> trace.Span:
        self.names.append(name)
        return super().start_span(name, *args, **options)

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, *args: Any, **options: Any) -> Iterator[trace.Span]:
        self.names.append(name)
        yield trace.INVALID_SPAN


def test_opentelemetry_keeps_its_spans(user: Endpoint, observed: Observe, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    provider = trace.NoOpTracerProvider()
    monkeypatch.setattr(provider, "get_tracer", lambda *args, **options: tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    names = []
    for observer in (lambda team: team, observed):
        lines: dict[str, Any] = {
            "planner": [call("transfer_to_worker")],
            "worker": [call("search", query="x"), say("DONE")],
        }
        user.script = in_turn(**lines)
        team = observer(swarm(user.base_url))
        tracer.names = []
        with rollout():
            run(lambda team=team: team.run(task="go"))
        names.append(sorted(tracer.names))
    assert "invoke_agent planner" in names[0] and "execute_tool search" in names[0]
    assert names[0] == names[1]
