"""Who speaks: in every orchestration, awaited and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agent_framework import (
    AgentExecutor,
    AgentResponse,
    AgentResponseUpdate,
    AgentSession,
    BaseAgent,
    Content,
    ContextProvider,
    Executor,
    Message,
    WorkflowBuilder,
    WorkflowContext,
    handler,
    workflow,
)
from agent_framework.orchestrations import (
    ConcurrentBuilder,
    GroupChatBuilder,
    HandoffBuilder,
    MagenticBuilder,
    SequentialBuilder,
)

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.agent_framework.apps import (
    TASK,
    agent,
    calling,
    client,
    run,
    search,
    speakers,
    tree,
)
from integration_tests.frameworks.suites.server import Endpoint
from leyden.spans import Kind
from tests.capture.rollouts import rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

streamed = pytest.mark.parametrize("stream", [False, True], ids=["awaited", "streamed"])


@streamed
def test_an_agent_with_parallel_tools_is_one_span_with_its_calls_and_tools(user: Endpoint, stream: bool) -> None:
    worker = agent(user, "worker", tools=[search])
    user.script = calling("worker", ("search", {"query": "north"}), ("search", {"query": "south"}))
    with rollout() as recorded:
        result = asyncio.run(run(worker, stream=stream))
    assert result.text == "worker speaks"
    call = ("worker", "model_call", "chat user-model", "worker", "ok")
    tool = ("worker", "tool", "search", "worker", "ok")
    assert tree(recorded) == [("rollout", "agent", "worker", "worker", "ok"), call, tool, tool, call]
    tools = [span.attributes for span in recorded.spans(Kind.TOOL)]
    assert {tool["gen_ai.tool.call.result"] for tool in tools} == {"found north", "found south"}
    assert [tool["gen_ai.tool.call.arguments"] for tool in tools] == [{"query": "north"}, {"query": "south"}]
    assert len({tool["gen_ai.tool.call.id"] for tool in tools} - {None}) == 2


@streamed
def test_an_agent_that_speaks_responses_is_routed_like_any_other(
    user: Endpoint, gateway: Endpoint, stream: bool
) -> None:
    critic = agent(user, "critic", responses=True)
    with rollout(routing_to(gateway.base_url, "critic")) as recorded:
        result = asyncio.run(run(critic, stream=stream))
    assert result.text == "critic speaks"
    assert [seen.path for seen in gateway.seen] == ["/v1/responses"]
    assert speakers(recorded) == [("critic", "critic")]


@streamed
def test_only_routed_roles_of_a_sequence_reach_the_gateway(user: Endpoint, gateway: Endpoint, stream: bool) -> None:
    agents = [agent(user, name) for name in ("planner", "worker", "critic")]
    sequence = SequentialBuilder(participants=agents).build()
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        asyncio.run(run(sequence, stream=stream))
    assert (user.roles, gateway.roles) == (["planner", "critic"], ["worker"])
    assert [seen.headers["x-leyden-role"] for seen in gateway.seen] == ["worker"]
    assert speakers(recorded) == [("planner", "planner"), ("worker", "worker"), ("critic", "critic")]
    assert [recorded.parent_of(span).name for span in recorded.spans(Kind.AGENT)[1:]] == ["Sequential"] * 3


@streamed
def test_concurrent_agents_speak_under_their_own_names(user: Endpoint, stream: bool) -> None:
    members = ConcurrentBuilder(participants=[agent(user, name) for name in ("a", "b", "c")]).build()
    with rollout() as recorded:
        asyncio.run(run(members, stream=stream))
    assert sorted(speakers(recorded)) == [("a", "a"), ("b", "b"), ("c", "c")]


@streamed
def test_a_handoff_is_a_span_of_its_source_and_silent_participants_are_declared(user: Endpoint, stream: bool) -> None:
    agents = [agent(user, name) for name in ("triage", "refund", "silent")]
    team = HandoffBuilder(participants=agents).with_start_agent(agents[0]).build()
    user.script = calling("triage", ("handoff_to_refund", {}))
    with rollout() as recorded:
        asyncio.run(run(team, stream=stream))
    (handoff,) = recorded.spans(Kind.HANDOFF)
    assert (handoff.role, handoff.attributes["leyden.handoff.to"]) == ("triage", "refund")
    assert speakers(recorded) == [("triage", "triage"), ("refund", "refund")]
    assert recorded.spans(Kind.TOOL) == []
    assert recorded.context.declared_roles == {"triage", "refund", "silent"}


@streamed
def test_the_agent_that_leads_a_group_chat_speaks_under_its_own_name(user: Endpoint, stream: bool) -> None:
    def script(ask: Ask) -> Say:
        if ask.role != "leader":
            return Say(text=f"{ask.role} speaks")
        ended = any("b speaks" in str(message) for message in ask.messages)
        choice = {"terminate": ended, "reason": "", "next_speaker": None if ended else "b", "final_message": "done"}
        return Say(text=json.dumps(choice))

    user.script = script
    chat = GroupChatBuilder(
        participants=[agent(user, "a"), agent(user, "b")], orchestrator_agent=agent(user, "leader"), max_rounds=3
    ).build()
    with rollout() as recorded:
        asyncio.run(run(chat, stream=stream))
    assert speakers(recorded) == [("leader", "leader"), ("b", "b"), ("leader", "leader")]
    assert {"a", "b"} <= recorded.context.declared_roles


@streamed
def test_a_magentic_manager_speaks_under_its_own_name(user: Endpoint, stream: bool) -> None:
    def script(ask: Ask) -> Say:
        if ask.role != "manager":
            return Say(text="worker speaks")
        if "is_request_satisfied" not in str(ask.messages[-1]):
            return Say(text="facts and plan")
        done = {"reason": "", "answer": "worker speaks" in str(ask.messages)}
        ledger: dict[str, object] = {"is_request_satisfied": done, "next_speaker": {"reason": "", "answer": "worker"}}
        ledger |= {
            "is_in_loop": {"reason": "", "answer": False},
            "is_progress_being_made": {"reason": "", "answer": True},
        }
        ledger["instruction_or_question"] = {"reason": "", "answer": TASK}
        return Say(text=json.dumps(ledger))

    user.script = script
    team = MagenticBuilder(
        participants=[agent(user, "worker")], manager_agent=agent(user, "manager"), max_round_count=4
    ).build()
    with rollout() as recorded:
        asyncio.run(run(team, stream=stream))
    assert user.roles == [call.role for call in recorded.calls]
    assert user.roles.count("worker") == 1 and user.roles.count("manager") == 5
    assert all(role == name for role, name in speakers(recorded))


@streamed
def test_an_agent_used_as_a_tool_hangs_below_the_tool_and_is_declared_before_it_speaks(
    user: Endpoint, stream: bool
) -> None:
    boss = agent(user, "boss", tools=[agent(user, "expert").as_tool(name="ask_expert")])

    async def episode() -> None:
        with rollout() as before:
            await run(boss, stream=stream)
        assert before.context.declared_roles == {"boss", "expert"}
        user.script = calling("boss", ("ask_expert", {"task": TASK}))
        await run(boss, stream=stream)

    with rollout() as recorded:
        asyncio.run(episode())
    assert tree(recorded)[2:5] == [
        ("boss", "tool", "ask_expert", "boss", "ok"),
        ("ask_expert", "agent", "expert", "expert", "ok"),
        ("expert", "model_call", "chat user-model", "expert", "ok"),
    ]


def test_an_unnamed_agent_speaks_as_whoever_is_around_it(user: Endpoint) -> None:
    nobody = agent(user, "main", named=None)
    by_id = agent(user, "given", named=None, id="given")
    in_executor = AgentExecutor(agent(user, "stage", named=None), id="stage")
    stage = WorkflowBuilder(start_executor=in_executor).build()

    async def episode() -> None:
        for each in (nobody, by_id):
            await run(each)
        await run(stage, [Message("user", [TASK])])

    with rollout() as recorded:
        asyncio.run(episode())
    assert user.roles == ["main", "given", "stage"]
    assert [call.role for call in recorded.calls] == user.roles


class Direct(Executor):
    """An executor that calls a model itself."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(id="direct")
        self.client = client(endpoint)

    @handler
    async def work(self, task: str, ctx: WorkflowContext[str, str]) -> None:
        answer = await self.client.get_response([Message("system", ["[[role=direct]]"]), Message("user", [task])])
        await ctx.yield_output(answer.text)


def test_an_executor_that_calls_a_model_itself_speaks_under_its_id(user: Endpoint) -> None:
    flow = WorkflowBuilder(start_executor=Direct(user), name="flow").build()
    with rollout() as recorded:
        asyncio.run(run(flow))
    assert speakers(recorded) == [("direct", "flow")]


class Wrapper(BaseAgent):
    """An agent that the user wrote, with the streams that the framework's own samples return."""

    def __init__(self, inner: Any, *, plain: bool = False) -> None:
        super().__init__(name="wrapper")
        self.inner = inner
        self.plain = plain

    def run(self, messages: Any = None, *, stream: bool = False, **options: Any) -> Any:
        if not stream:
            return self.answer(messages)
        return self.updates(messages) if self.plain else self.inner.run(messages, stream=True)

    async def answer(self, messages: Any) -> AgentResponse[Any]:
        return await self.inner.run(messages)  # type: ignore[no-any-return]  # any agent

    async def updates(self, messages: Any) -> AsyncIterator[AgentResponseUpdate]:
        answer = await self.inner.run(messages)
        yield AgentResponseUpdate(contents=[Content.from_text(answer.text)], role="assistant")


@streamed
def test_an_agent_that_hands_on_the_stream_of_another_is_around_it(user: Endpoint, stream: bool) -> None:
    wrapper = Wrapper(agent(user, "inner"))
    with rollout() as recorded:
        result = asyncio.run(run(wrapper, stream=stream))
    assert result.text == "inner speaks"
    assert tree(recorded)[:2] == [
        ("rollout", "agent", "wrapper", "wrapper", "ok"),
        ("wrapper", "agent", "inner", "inner", "ok"),
    ]
    assert speakers(recorded) == [("inner", "inner")]


def test_an_agent_that_streams_from_a_plain_generator_is_recorded(user: Endpoint) -> None:
    async def episode() -> str:
        updates = Wrapper(agent(user, "inner"), plain=True).run(TASK, stream=True)
        return "".join([update.text async for update in updates])

    with rollout() as recorded:
        assert asyncio.run(episode()) == "inner speaks"
    assert tree(recorded)[0] == ("rollout", "agent", "wrapper", "wrapper", "ok")
    assert speakers(recorded) == [("inner", "inner")]


class Eager(Wrapper):
    """Starts its work before it is awaited."""

    def run(self, messages: Any = None, *, stream: bool = False, **options: Any) -> Any:
        return asyncio.ensure_future(self.answer(messages))

    async def answer(self, messages: Any) -> AgentResponse[Any]:
        chat = client(self.inner)
        answer = await chat.get_response([Message("system", ["[[role=wrapper]]"]), Message("user", [messages])])
        return AgentResponse(messages=answer.messages)


def test_an_agent_that_starts_its_work_in_a_task_keeps_its_role(user: Endpoint) -> None:
    async def episode() -> None:
        await Eager(user).run(TASK)

    with rollout() as recorded:
        asyncio.run(episode())
    assert speakers(recorded) == [("wrapper", "wrapper")]


class Shaped:
    """Looks like an agent to the framework, and is none of its classes."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.id, self.name, self.description = "1", "shaped", "shaped"
        self.client = client(endpoint)

    def create_session(self, **options: Any) -> AgentSession:
        return AgentSession()

    def get_session(self, service_session_id: str, **options: Any) -> AgentSession:
        return AgentSession()

    async def run(self, messages: Any = None, *, stream: bool = False, **options: Any) -> AgentResponse[Any]:
        answer = await self.client.get_response([Message("system", ["[[role=shaped]]"]), *messages])
        return AgentResponse(messages=answer.messages)


def test_what_only_looks_like_an_agent_speaks_under_its_executors_id(user: Endpoint) -> None:
    flow = SequentialBuilder(participants=[Shaped(user)]).build()  # type: ignore[list-item, unused-ignore]  # duck
    with rollout() as recorded:
        asyncio.run(run(flow))
    assert speakers(recorded) == [("shaped", "Sequential")]


@streamed
def test_a_class_of_agents_defined_after_attaching_is_recorded(user: Endpoint, stream: bool) -> None:
    class Late(Wrapper):
        def run(self, messages: Any = None, *, stream: bool = False, **options: Any) -> Any:
            return super().run(messages, stream=stream, **options)

    with rollout() as recorded:
        asyncio.run(run(Late(agent(user, "inner")), stream=stream))
    assert [span.name for span in recorded.spans(Kind.AGENT)] == ["wrapper", "inner"]


@streamed
def test_a_functional_workflow_is_a_span_around_its_agents(user: Endpoint, stream: bool) -> None:
    first, second = agent(user, "first"), agent(user, "second")

    @workflow
    async def pair(task: str) -> str:
        await asyncio.gather(first.run(task), second.run(task))
        return "done"

    with rollout() as recorded:
        asyncio.run(run(pair.build(), stream=stream))
    assert sorted(speakers(recorded)) == [("first", "first"), ("second", "second")]
    assert {recorded.parent_of(span).name for span in recorded.spans(Kind.AGENT)[1:]} == {"pair"}


@streamed
def test_a_workflow_used_as_an_agent_leaves_the_role_to_its_members(user: Endpoint, stream: bool) -> None:
    inner = SequentialBuilder(participants=[agent(user, "a"), agent(user, "main", named=None)]).build()
    team = inner.as_agent(name="team")
    with rollout() as recorded:
        asyncio.run(run(team, stream=stream))
    assert [call.role for call in recorded.calls] == ["a", "main"]
    assert recorded.spans(Kind.AGENT)[0].name == "team"
    assert recorded.context.declared_roles == {"a"}


class Remembering(ContextProvider):
    """Calls a model when a run has ended, as one that summarises does."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__("remembering")
        self.client = client(endpoint)

    async def after_run(self, **given: Any) -> None:
        await self.client.get_response([Message("system", ["[[role=worker]] Sum up."]), Message("user", [TASK])])


@streamed
def test_a_context_provider_that_calls_a_model_after_the_run_speaks_as_its_agent(user: Endpoint, stream: bool) -> None:
    worker = agent(user, "worker", context_providers=[Remembering(user)])
    with rollout() as recorded:
        asyncio.run(run(worker, stream=stream))
    assert speakers(recorded) == [("worker", "worker")] * 2
