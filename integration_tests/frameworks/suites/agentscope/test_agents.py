"""Who speaks and what ran: agents, tools, teams, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
from agentscope.agent import Agent, ContextConfig
from agentscope.event import (
    ConfirmResult,
    ExternalExecutionResultEvent,
    RequireExternalExecutionEvent,
    RequireUserConfirmEvent,
    UserConfirmResultEvent,
)
from agentscope.message import Msg, TextBlock, ToolResultBlock, ToolResultState
from agentscope.pipeline import GoalPipeline
from agentscope.tool import FunctionTool
from pydantic import BaseModel

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.agentscope.agents import Denied, agent, calling, fail, said, search, tree
from integration_tests.frameworks.suites.agentscope.conftest import Run
from integration_tests.frameworks.suites.agentscope.server import Endpoint
from leyden import wire
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.agentscope import AgentScopeAdapter
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")


@pytest.mark.parametrize("stream", [False, True])
def test_an_agents_calls_bear_its_name_and_go_where_its_role_is_routed(
    run: Run, user: Endpoint, gateway: Endpoint, stream: bool
) -> None:
    async def episode() -> Recorded:
        writer, checker = (agent(name, user.base_url, stream=stream) for name in ("writer", "checker"))
        with rollout(routing_to(gateway.base_url, "writer")) as recorded:
            answer = await writer.reply(said())
            async for event in checker.reply_stream(answer, yield_final_msg=True):
                last = event
        assert (answer.get_text_content() or "").strip() == "writer speaks"
        assert isinstance(last, Msg)
        return recorded

    recorded = run(episode())
    assert tree(recorded) == [
        "agent writer writer ok < rollout",
        "model_call chat writer ok < writer",
        "agent checker checker ok < rollout",
        "model_call chat checker ok < checker",
    ]
    assert (gateway.roles, user.roles) == (["writer"], ["checker"])
    assert gateway.seen[0].headers["x-leyden-role"] == "writer"
    assert recorded.spans(Kind.AGENT)[0].attributes["gen_ai.agent.name"] == "writer"
    assert recorded.context.declared_roles == {"writer", "checker"}


def test_parallel_tool_calls_are_spans_of_their_agent_and_an_agent_in_a_tool_is_a_span_of_the_tool(
    run: Run, user: Endpoint
) -> None:
    work = calling(("search", {"query": "north"}), ("ask", {"query": "south"}))
    user.script = lambda ask: Say(text="so it is") if ask.role == "expert" else work(ask)

    async def episode() -> Recorded:
        expert = agent("expert", user.base_url)

        async def ask(query: str) -> str:
            """Ask the expert.

            Args:
                query (str): what
            """
            return str((await expert.reply(said())).get_text_content())

        with rollout() as recorded:
            await agent("worker", user.base_url, tools=[search, ask]).reply(said())
        return recorded

    recorded = run(episode())
    assert sorted(tree(recorded)) == [
        "agent expert expert ok < ask",
        "agent worker worker ok < rollout",
        "model_call chat expert ok < expert",
        "model_call chat worker ok < worker",
        "model_call chat worker ok < worker",
        "tool ask worker ok < worker",
        "tool search worker ok < worker",
    ]


def test_a_tool_call_ends_as_agentscope_says_it_did(run: Run, user: Endpoint) -> None:
    user.script = calling(
        ("search", {"query": "north"}), ("fail", {"query": "south"}), ("search", {"wrong": 1}), ("lost", {}), ("no", {})
    )

    async def no() -> str:
        """Refuse."""
        return "never"

    async def episode() -> Recorded:
        worker = agent("worker", user.base_url, tools=[search, fail, Denied(no)])
        with rollout() as recorded:
            await worker.reply(said())
        return recorded

    recorded = run(episode())
    spans = recorded.spans(Kind.TOOL)
    tools = {(span.name, str(span.attributes["gen_ai.tool.call.arguments"])): span for span in spans}
    found, failed, wrong, lost, denied = (
        tools[key]
        for key in (
            ("search", '{"query": "north"}'), ("fail", '{"query": "south"}'), ("search", '{"wrong": 1}'),
            ("lost", "{}"), ("no", "{}"),
        )
    )  # fmt: skip
    assert [span.status for span in (found, failed, wrong, lost, denied)] == [Status.OK, *[Status.ERROR] * 4]
    assert found.attributes["gen_ai.tool.call.result"] == "found north"
    assert str(found.attributes["gen_ai.tool.call.id"]).startswith("call_")
    assert "no south here" in str(failed.error)
    assert "query" in str(wrong.error)
    assert "lost" in str(lost.error)
    assert denied.error == "denied: not you"
    assert denied.attributes["agentscope.tool.state"] == "denied"
    assert {recorded.parent_of(span).name for span in tools.values()} == {"worker"}
    assert len(spans) == 5


def test_a_tool_call_that_the_user_denies_or_runs_is_recorded_when_it_is_answered(run: Run, user: Endpoint) -> None:
    user.script = calling(("search", {"query": "north"}))

    class External(FunctionTool):
        def __init__(self) -> None:
            super().__init__(search)
            self.is_external_tool = True

    async def external() -> Recorded:
        worker = agent("worker", user.base_url, tools=[External()])
        with rollout() as recorded:
            async for event in worker.reply_stream(said()):
                if isinstance(event, RequireExternalExecutionEvent):
                    call = event.tool_calls[0]
            done = ToolResultBlock(
                id=call.id, name="search", output=[TextBlock(text="a result")], state=ToolResultState.SUCCESS
            )
            await worker.reply(ExternalExecutionResultEvent(reply_id=worker.state.reply_id, execution_results=[done]))
        return recorded

    recorded = run(external())
    assert tree(recorded) == [
        "agent worker worker ok < rollout",
        "model_call chat worker ok < worker",
        "agent worker worker ok < rollout",
        "tool search worker ok < worker",
        "model_call chat worker ok < worker",
    ]
    assert recorded.spans(Kind.TOOL)[0].attributes["gen_ai.tool.call.result"] == "a result"

    async def denied() -> Recorded:
        worker = agent("worker", user.base_url, tools=[search])
        worker.state.permission_context.mode = type(worker.state.permission_context.mode).DEFAULT
        with rollout() as recorded:
            async for event in worker.reply_stream(said()):
                if isinstance(event, RequireUserConfirmEvent):
                    call = event.tool_calls[0]
            no = ConfirmResult(confirmed=False, tool_call=call)
            await worker.reply(UserConfirmResultEvent(reply_id=worker.state.reply_id, confirm_results=[no]))
        return recorded

    (tool,) = run(denied()).spans(Kind.TOOL)
    assert (tool.status, tool.attributes["agentscope.tool.state"]) == (Status.ERROR, "denied")


class Verdict(BaseModel):
    good: bool


def test_structured_output_is_asked_for_in_the_agents_name(run: Run, user: Endpoint) -> None:
    user.script = calling(("GenerateStructuredOutput", {"good": True}))

    async def episode() -> Recorded:
        judge = agent("judge", user.base_url)
        with rollout() as recorded:
            answer = await judge.reply(said(), structured_schema=Verdict)
        assert answer.structured_output == {"good": True}
        return recorded

    recorded = run(episode())
    assert {call.role for call in recorded.calls} == {"judge"}
    assert [span.name for span in recorded.spans(Kind.TOOL)] == ["GenerateStructuredOutput"]


def test_an_agent_sums_up_its_context_in_its_own_name_within_a_reply_and_outside(run: Run, user: Endpoint) -> None:
    summary = {
        "task_overview": "a", "current_state": "b", "important_discoveries": "c", "next_steps": "d",
        "context_to_preserve": "e",
    }  # fmt: skip

    def script(ask: Ask) -> Say:
        name = next((tool for tool in ask.tools if "tructured" in tool), None)
        return Say(tool_calls=((name, summary),)) if name else Say(text="word " * 60)

    user.script = script
    small = ContextConfig(trigger_ratio=0.5, reserve_ratio=0.1)

    async def episode() -> Recorded:
        writer = agent("writer", user.base_url)
        writer.context_config = small
        with rollout() as recorded:
            await writer.reply(said())
            writer.model.context_size = 200
            await writer.observe(said("word " * 150))
            await writer.compress_context()
            await writer.observe(said("word " * 150))
            await writer.reply(said())
        return recorded

    recorded = run(episode())
    reply = ["agent writer writer ok < rollout", "model_call chat writer ok < writer"]
    assert tree(recorded) == [*reply, *reply, *reply, "model_call chat writer ok < writer"]
    forced = [bool(seen.body.get("tool_choice")) for seen in user.seen]
    assert forced == [False, True, True, False], "a reply, a summary, a summary within a reply"


def test_a_goal_pipeline_is_its_executor_and_its_verifier(run: Run, user: Endpoint) -> None:
    rounds = iter(["fail", "pass"])

    def script(ask: Ask) -> Say:
        if ask.role == "executor":
            return Say(tool_calls=(("GenerateStructuredOutput", {"report": "did it"}),))
        return Say(tool_calls=(("GenerateStructuredOutput", {"result": next(rounds), "message": "again"}),))

    user.script = script

    async def episode() -> Recorded:
        pipeline = GoalPipeline(agent("executor", user.base_url), agent("verifier", user.base_url))
        with rollout() as recorded:
            events = pipeline.reply_stream(said())
            await anext(events)
            assert recorded.context.declared_roles == {"executor", "verifier"}, "also who has not spoken yet"
            async for _ in events:
                pass
        return recorded

    lines = tree(run(episode()))
    one_round = [
        f"{line.replace('who', who)}"
        for who in ("executor", "verifier")
        for line in (
            "agent who who ok < rollout",
            "model_call chat who ok < who",
            "tool GenerateStructuredOutput who ok < who",
        )
    ]
    assert lines == one_round * 2


def test_agents_made_before_leyden_came_are_seen_and_those_made_under_it_are_left_alone_after(
    run: Run, user: Endpoint, instrumented: AgentScopeAdapter
) -> None:
    async def speakers(*agents: Agent) -> set[str]:
        with rollout() as recorded:
            for each in agents:
                await each.reply(said())
        return {call.role for call in recorded.calls}

    async def episode() -> None:
        instrumented.detach()
        before = agent("before", user.base_url)
        instrumented.attach()
        under = agent("under", user.base_url)
        assert await speakers(before, under) == {"before", "under"}
        instrumented.detach()
        assert await speakers(before, under) == {"main"}

    run(episode())


def test_in_a_deployed_app_roles_are_routed_and_prompts_replaced_without_a_rollout(
    run: Run, user: Endpoint, gateway: Endpoint
) -> None:
    async def episode() -> None:
        await agent("writer", user.base_url).reply(said())
        await agent("checker", user.base_url).reply(said())

    prompts = {"checker": "[[role=checker]] [[rollout=r1]] better"}
    wire.set_default_routing(routing_to(gateway.base_url, "writer", prompts=prompts))
    try:
        run(episode())
    finally:
        wire.set_default_routing(None)
    assert (gateway.roles, user.roles) == (["writer"], ["checker"])
    assert user.seen[0].ask.messages[0]["content"] == prompts["checker"]


def test_where_nobody_listens_nothing_is_added(run: Run, user: Endpoint) -> None:
    async def episode() -> tuple[Any, Any]:
        writer = agent("writer", user.base_url)
        events = writer._reply(said())
        names = events.__qualname__
        async for _ in events:
            pass
        return names, dict(user.seen[0].headers)

    name, headers = run(episode())
    assert name == "Agent._reply"
    assert not [header for header in headers if header.startswith("x-leyden")]
