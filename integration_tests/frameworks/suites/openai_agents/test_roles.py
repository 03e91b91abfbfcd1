"""Who speaks: the recorded role of every request is compared with the one in its prompt."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import agents
import pytest
from agents import InputGuardrail, OutputGuardrail, RunConfig, Runner, function_tool, handoff
from openai import OpenAI

from integration_tests.frameworks.apps import openai_agents as contract
from integration_tests.frameworks.scripts.openai_agents import answer
from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.openai_agents.apps import TASK, agent, calling, guarding, only, run, tree
from integration_tests.frameworks.suites.server import Endpoint
from leyden.spans import Kind, Status
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

CONTRACT_TREE = [
    ("rollout", "agent", "planner", "ok"),
    ("planner", "model_call", "chat user-model", "ok"),
    ("planner", "handoff", "handoff to worker", "ok"),
    ("rollout", "agent", "worker", "ok"),
    ("worker", "model_call", "chat user-model", "ok"),
    ("worker", "tool", "search", "ok"),
    ("worker", "tool", "search", "ok"),
    ("worker", "model_call", "chat user-model", "ok"),
    ("rollout", "agent", "critic", "ok"),
    ("critic", "model_call", "chat user-model", "ok"),
    ("rollout", "agent", "worker", "ok"),
    ("worker", "model_call", "chat user-model", "ok"),
    ("rollout", "agent", "critic", "ok"),
    ("critic", "model_call", "chat user-model", "ok"),
]


def call_roles(recorded: Recorded) -> list[str]:
    assert all(recorded.parent_of(call).role == call.role for call in recorded.calls)
    return [call.role for call in recorded.calls]


@pytest.mark.parametrize("mode", contract.MODES)
def test_the_tree_is_the_same_however_the_app_is_run(user: Endpoint, mode: str) -> None:
    user.script = answer
    is_sync = mode.startswith("sync")
    episode: Any = contract.build(user.base_url, stream="stream" in mode, sync=is_sync)
    with rollout() as recorded:
        output = episode(TASK) if is_sync else asyncio.run(episode(TASK))
    assert output == "second draft"
    assert tree(recorded) == CONTRACT_TREE
    assert call_roles(recorded) == user.roles
    assert Counter(user.roles) == contract.CALLS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_twenty_concurrent_episodes_keep_apart(user: Endpoint, stream: bool) -> None:
    user.script = answer
    episode: Any = contract.build(user.base_url, stream=stream, sync=False)

    async def one(number: int) -> Recorded:
        with rollout(rollout_id=f"r{number}") as recorded:
            await episode(f"[[rollout=r{number}]] do it")
        return recorded

    async def all_of_them() -> list[Recorded]:
        return await asyncio.gather(*(one(number) for number in range(20)))

    for number, recorded in enumerate(asyncio.run(all_of_them())):
        assert tree(recorded) == CONTRACT_TREE
        assert call_roles(recorded) == [seen.ask.role for seen in user.seen if seen.ask.rollout == f"r{number}"]
        assert recorded.context.rollout_id == f"r{number}"


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_threads_with_loops_of_their_own_keep_apart(user: Endpoint, mode: str) -> None:
    user.script = answer
    episode: Any = contract.build(user.base_url, stream=False, sync=mode == "sync")

    def one(number: int) -> Recorded:
        with rollout(rollout_id=f"r{number}") as recorded:
            task = f"[[rollout=r{number}]] do it"
            episode(task) if mode == "sync" else asyncio.run(episode(task))
        return recorded

    with ThreadPoolExecutor(8) as pool:
        everything = list(pool.map(lambda number: copy_context().run(one, number), range(8)))
    assert all(tree(recorded) == CONTRACT_TREE for recorded in everything)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("how", ["function", "environment", "run config"])
def test_a_run_without_tracing_gives_the_whole_tree(
    user: Endpoint, monkeypatch: pytest.MonkeyPatch, how: str, stream: bool
) -> None:
    heard = Exporter()
    agents.add_trace_processor(heard)
    user.script = calling("worker", ("lookup", {"key": "a"}))
    worker = agent(user, "worker", tools=[lookup])
    provider: Any = agents.tracing.get_trace_provider()
    if how == "function":
        agents.set_tracing_disabled(True)
    elif how == "environment":
        monkeypatch.setattr(provider, "_manual_disabled", None)
        monkeypatch.setattr(provider, "_env_disabled", None)
        monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    try:
        with rollout() as recorded:
            asyncio.run(run(worker, stream=stream, run_config=RunConfig(tracing_disabled=how == "run config")))
    finally:
        monkeypatch.undo()
        agents.set_tracing_disabled(False)
        agents.set_trace_processors([])
    assert tree(recorded) == [
        ("rollout", "agent", "worker", "ok"),
        ("worker", "model_call", "chat user-model", "ok"),
        ("worker", "tool", "lookup", "ok"),
        ("worker", "model_call", "chat user-model", "ok"),
    ]
    assert heard.spans == []


class Exporter(agents.TracingProcessor):
    """The user's own: counts what it hears."""

    def __init__(self) -> None:
        self.spans: list[str] = []

    def on_trace_start(self, trace: Any) -> None: ...
    def on_trace_end(self, trace: Any) -> None: ...
    def on_span_start(self, span: Any) -> None: ...
    def on_span_end(self, span: Any) -> None:
        self.spans.append(span.span_data.type)

    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


@function_tool
def lookup(key: str) -> dict[str, Any]:
    """Look up a key."""
    time.sleep(0.001)
    return {"found": key}


def test_a_tool_span_says_what_was_asked_and_answered(user: Endpoint) -> None:
    user.script = calling("worker", ("lookup", {"key": "a"}))
    with rollout() as recorded:
        asyncio.run(run(agent(user, "worker", tools=[lookup])))
    tool = only(recorded, Kind.TOOL, "lookup")
    assert tool.attributes.pop("gen_ai.tool.call.id").startswith("call_")  # type: ignore[attr-defined]  # a string
    assert tool.attributes == {
        "gen_ai.tool.name": "lookup",
        "gen_ai.tool.call.arguments": {"key": "a"},
        "gen_ai.tool.call.result": {"found": "a"},
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_agent_used_as_a_tool_speaks_for_itself_below_the_tool(user: Endpoint, stream: bool) -> None:
    ask_helper = ("ask_helper", {"input": "[[rollout=r1]] help"})
    user.script = calling("worker", ask_helper, ask_helper, ("lookup", {"key": "a"}))
    helper = agent(user, "helper", responses=True)
    worker = agent(user, "worker", tools=[helper.as_tool("ask_helper", "Ask."), lookup])
    with rollout() as recorded:
        asyncio.run(run(worker, stream=stream))
    assert call_roles(recorded) == user.roles == ["worker", "helper", "helper", "worker"]
    helpers = [span for span in recorded.spans(Kind.AGENT) if span.name == "helper"]
    tools = {span.span_id for span in recorded.spans(Kind.TOOL) if span.name == "ask_helper"}
    assert {span.parent_id for span in helpers} == tools
    assert len(tools) == 2


def test_agents_run_inside_tools_of_any_kind_speak_for_themselves(user: Endpoint) -> None:
    inner = agent(user, "inner")

    @function_tool
    async def nested() -> str:
        """Run an agent."""
        return str((await Runner.run(inner, TASK)).final_output)

    @function_tool
    def nested_in_a_thread() -> str:
        """Run an agent on a loop of its own."""
        return asyncio.run(run(agent(user, "threaded"))).final_output  # type: ignore[no-any-return]  # text

    @function_tool
    def direct() -> str:
        """Call the endpoint without any agent."""
        client = OpenAI(base_url=user.base_url, api_key="user-key")
        said: Any = [{"role": "system", "content": "[[role=worker]]"}, {"role": "user", "content": TASK}]
        return client.chat.completions.create(model="user-model", messages=said).choices[0].message.content or ""

    user.script = calling("worker", ("nested", {}), ("nested_in_a_thread", {}), ("direct", {}), ("nested", {}))
    worker = agent(user, "worker", tools=[nested, nested_in_a_thread, direct])
    with rollout() as recorded:
        asyncio.run(run(worker))
    assert Counter(call.role for call in recorded.calls) == Counter(user.roles)
    places = Counter((parent, name) for parent, kind, name, _ in tree(recorded) if kind in ("agent", "model_call"))
    assert places["nested", "inner"] == 2
    assert places["nested_in_a_thread", "threaded"] == 1
    assert places["direct", "chat user-model"] == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_guardrail_agents_that_run_beside_the_agent_speak_for_themselves(user: Endpoint, stream: bool) -> None:
    async def slowly(ask: Ask) -> Say:
        await asyncio.sleep(0.02)
        return Say(text=f"{ask.role} speaks")

    user.script = slowly
    before = [InputGuardrail(guarding(user, name), name=f"check {name}") for name in ("judge", "lawyer")]
    after = [OutputGuardrail(guarding(user, "editor"), name="check editor")]
    worker = agent(user, "worker", input_guardrails=before, output_guardrails=after)
    with rollout() as recorded:
        asyncio.run(run(worker, stream=stream))
    assert Counter(call_roles(recorded)) == Counter(user.roles) == Counter(["worker", "judge", "lawyer", "editor"])
    found = tree(recorded)
    for name in ("judge", "lawyer", "editor"):
        assert ("worker", "tool", f"check {name}", "ok") in found
        assert (f"check {name}", "agent", name, "ok") in found
        assert only(recorded, Kind.TOOL, f"check {name}").attributes["openai_agents.guardrail.triggered"] is False


def test_a_call_made_by_a_guardrail_itself_is_not_the_agents(user: Endpoint) -> None:
    async def judge(context: Any, guarded: Any, given: Any) -> Any:
        client = OpenAI(base_url=user.base_url, api_key="user-key")
        said: Any = [{"role": "system", "content": "[[role=judge]]"}, {"role": "user", "content": TASK}]
        client.chat.completions.create(model="user-model", messages=said)
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    with rollout() as recorded:
        asyncio.run(run(agent(user, "worker", input_guardrails=[InputGuardrail(judge)])))
    assert Counter(call.role for call in recorded.calls) == {"worker": 1, "judge": 1}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_a_trained_role_goes_to_the_gateway_and_the_others_stay(
    user: Endpoint, gateway: Endpoint, responses: bool, stream: bool
) -> None:
    user.script = calling("planner", ("transfer_to_worker", {}))
    gateway.script = lambda ask: Say(text=f"{ask.role} was trained")
    worker = agent(user, "worker", responses=responses)
    planner = agent(user, "planner", responses=responses, handoffs=[worker])
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        result = asyncio.run(run(planner, stream=stream))
    assert result.final_output == "worker was trained"
    assert (user.roles, gateway.roles) == (["planner"], ["worker"])
    (seen,) = gateway.seen
    assert seen.headers["x-leyden-role"] == "worker"
    assert seen.headers["x-leyden-span"] == recorded.calls[-1].span_id
    assert "user-key" not in str(seen.headers)
    assert recorded.calls[-1].status is Status.OK


def test_a_prompt_override_replaces_the_instructions(user: Endpoint, gateway: Endpoint) -> None:
    prompts = {"worker": "[[role=worker]] Better.", "critic": "[[role=critic]] Better."}
    with rollout(routing_to(gateway.base_url, "worker", prompts=prompts)):
        asyncio.run(run(agent(user, "worker")))
        asyncio.run(run(agent(user, "critic", responses=True)))
    assert gateway.seen[0].body["messages"][0]["content"] == prompts["worker"]
    assert user.seen[0].body["instructions"] == prompts["critic"]


def test_agents_that_never_speak_are_declared(user: Endpoint) -> None:
    last = agent(user, "last")
    silent = agent(user, "silent", handoffs=[handoff(last)])
    tool_agent = agent(user, "tool agent")
    first = agent(user, "first", handoffs=[silent], tools=[tool_agent.as_tool("ask", "Ask.")])
    with rollout() as recorded:
        asyncio.run(run(first))
    assert recorded.context.declared_roles == {"first", "silent", "last", "tool agent"}
