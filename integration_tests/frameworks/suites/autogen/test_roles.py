"""Who speaks in each kind of team, in each form."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from autogen_agentchat.agents import (
    BaseChatAgent,
    MessageFilterAgent,
    MessageFilterConfig,
    PerSourceFilter,
    SocietyOfMindAgent,
)
from autogen_agentchat.base import Response
from autogen_agentchat.messages import HandoffMessage, TextMessage
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import SingleThreadedAgentRuntime
from autogen_core.models import SystemMessage, UserMessage

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.autogen.conftest import Observe
from integration_tests.frameworks.suites.autogen.server import Endpoint, in_turn
from integration_tests.frameworks.suites.autogen.teams import (
    agent,
    call,
    client,
    counted,
    handoffs,
    run,
    say,
    tree,
    until_done,
)
from leyden.spans import Kind, Status
from tests.capture.rollouts import rollout, routing_to


async def search(query: str) -> str:
    """Search."""
    await asyncio.sleep(0.001)
    return f"found {query}"


def test_each_agent_of_a_round_robin_speaks_under_its_name(
    user: Endpoint, gateway: Endpoint, observed: Observe
) -> None:
    user.script = gateway.script = in_turn(planner=[say("a plan")], critic=[say("DONE")])
    agents = [agent("planner", user.base_url), agent("critic", user.base_url)]
    team = observed(RoundRobinGroupChat(agents, termination_condition=until_done()))
    with rollout(routing_to(gateway.base_url, "critic")) as recorded:
        result = run(lambda: team.run(task="[[rollout=r1]] go"))
    assert result.messages[-1].content == "DONE"
    assert user.roles == ["planner"] and gateway.roles == ["critic"]
    assert [seen.claimed_role for seen in (*user.seen, *gateway.seen)] == [None, "critic"]
    assert tree(recorded) == {
        ("agent", "main", "rollout"),
        ("agent", "planner", "RoundRobinGroupChat"),
        ("agent", "critic", "RoundRobinGroupChat"),
        ("model_call", "planner", "planner"),
        ("model_call", "critic", "critic"),
    }
    assert recorded.context.declared_roles == {"planner", "critic"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_swarm_records_tools_and_handoffs_once(user: Endpoint, observed: Observe, stream: bool) -> None:
    user.script = in_turn(
        planner=[call("transfer_to_worker")], worker=[call("search", "search", query="x"), say("DONE")]
    )
    planner = agent("planner", user.base_url, handoffs=["worker", "user"], model_client_stream=stream)
    worker = agent("worker", user.base_url, tools=[search], max_tool_iterations=3, model_client_stream=stream)
    team = observed(Swarm([planner, worker], termination_condition=until_done()))
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    assert counted(recorded, Kind.MODEL_CALL) == {"planner": 1, "worker": 2}
    assert counted(recorded, Kind.TOOL) == {"transfer_to_worker": 1, "search": 2}
    assert handoffs(recorded) == ["planner->worker"]
    assert recorded.context.declared_roles == {"planner", "worker", "user"}
    for tool in recorded.spans(Kind.TOOL)[1:]:
        assert (recorded.parent_of(tool).name, tool.role, tool.status) == ("worker", "worker", Status.OK)
        assert tool.attributes["gen_ai.tool.call.arguments"] == '{"query": "x"}'
        assert tool.attributes["gen_ai.tool.call.result"] == "found x"
        assert str(tool.attributes["gen_ai.tool.call.id"]).startswith("call_")


@pytest.mark.parametrize("stream", [False, True])
def test_a_selector_speaks_as_its_manager(user: Endpoint, observed: Observe, stream: bool) -> None:
    user.script = in_turn(manager=[say("writer"), say("critic")], writer=[say("text")], critic=[say("DONE")])
    team = observed(
        SelectorGroupChat(
            [agent("writer", user.base_url), agent("critic", user.base_url), agent("silent", user.base_url)],
            model_client=client(user.base_url),
            termination_condition=until_done(),
            model_client_streaming=stream,
        )
    )
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    assert counted(recorded, Kind.MODEL_CALL) == {"SelectorGroupChatManager": 2, "writer": 1, "critic": 1}
    assert recorded.context.declared_roles == {"SelectorGroupChatManager", "writer", "critic", "silent"}
    assert ("model_call", "SelectorGroupChatManager", "SelectorGroupChat") in tree(recorded)


def test_magentic_one_speaks_as_its_orchestrator(user: Endpoint, observed: Observe) -> None:
    ledger = (
        '{"is_request_satisfied": {"reason": "", "answer": %s}, "is_in_loop": {"reason": "", "answer": false}, '
        '"is_progress_being_made": {"reason": "", "answer": true}, "next_speaker": {"reason": "", "answer": "coder"}, '
        '"instruction_or_question": {"reason": "", "answer": "write"}}'
    )
    lines = [say("facts"), say("plan"), say(ledger % "false"), say(ledger % "true"), say("the answer")]
    user.script = in_turn(manager=lines, coder=[say("code")])
    team = observed(MagenticOneGroupChat([agent("coder", user.base_url)], model_client=client(user.base_url)))
    with rollout() as recorded:
        result = run(lambda: team.run(task="go"))
    assert result.messages[-1].content == "the answer"
    assert counted(recorded, Kind.MODEL_CALL) == {"MagenticOneOrchestrator": 5, "coder": 1}


def test_parallel_branches_of_a_graph_keep_their_roles(user: Endpoint, gateway: Endpoint, observed: Observe) -> None:
    left, right, join = (agent(name, user.base_url) for name in ("left", "right", "join"))
    builder = DiGraphBuilder().add_node(left).add_node(right).add_node(join)
    builder.add_edge(left, join).add_edge(right, join)
    team = observed(GraphFlow([left, right, join], builder.build()))
    with rollout(routing_to(gateway.base_url, "right")) as recorded:
        run(lambda: team.run(task="go"))
    assert sorted(user.roles) == ["join", "left"] and gateway.roles == ["right"]
    assert counted(recorded, Kind.AGENT) == {"main": 1, "left": 1, "right": 1, "join": 1}


def test_a_team_in_a_team_keeps_its_roles_and_its_place(user: Endpoint, observed: Observe) -> None:
    user.script = in_turn(a=[say("one")], b=[say("DONE")])
    inner = RoundRobinGroupChat([agent("a", user.base_url)], name="inner", max_turns=1)
    team = observed(RoundRobinGroupChat([inner, agent("b", user.base_url)], termination_condition=until_done()))
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    assert {
        ("agent", "main", "RoundRobinGroupChat"),
        ("agent", "a", "inner"),
        ("agent", "b", "RoundRobinGroupChat"),
    } <= (tree(recorded))


@pytest.mark.parametrize("kind", [AgentTool, TeamTool])
def test_an_agent_that_is_a_tool_hangs_below_the_tool(user: Endpoint, observed: Observe, kind: type) -> None:
    user.script = in_turn(boss=[call("expert", task="[[rollout=r1]] do"), say("DONE")], expert=[say("done")])
    expert = agent("expert", user.base_url)
    tool: Any = AgentTool(expert)
    if kind is TeamTool:
        tool = TeamTool(RoundRobinGroupChat([expert], max_turns=1, name="crowd"), name="expert", description="x")
    boss = observed(agent("boss", user.base_url, tools=[tool], max_tool_iterations=2))
    with rollout() as recorded:
        run(lambda: boss.run(task="go"))
    above = "expert" if kind is AgentTool else "crowd"
    assert ("agent", "expert", above) in tree(recorded) and ("tool", "expert", "boss") in tree(recorded)
    assert counted(recorded, Kind.MODEL_CALL) == {"boss": 2, "expert": 1}
    assert recorded.context.declared_roles == {"boss", "expert"}


def test_a_society_of_mind_and_its_inner_team_speak_apart(user: Endpoint, observed: Observe) -> None:
    user.script = in_turn(manager=[say("in short")], inner=[say("at length")])
    society = SocietyOfMindAgent(
        "society", RoundRobinGroupChat([agent("inner", user.base_url)], max_turns=1), client(user.base_url)
    )
    society = observed(society)
    with rollout() as recorded:
        run(lambda: society.run(task="go"))
    assert counted(recorded, Kind.MODEL_CALL) == {"inner": 1, "society": 1}
    assert ("agent", "inner", "RoundRobinGroupChat") in tree(recorded)
    assert all(span.status is Status.OK for span in recorded.spans(Kind.AGENT))


def test_a_handoff_through_a_filtering_agent_is_recorded_once(user: Endpoint, observed: Observe) -> None:
    user.script = in_turn(planner=[call("transfer_to_worker")], worker=[say("DONE")])
    inner = agent("planner", user.base_url, handoffs=["worker"])
    keep = MessageFilterConfig(per_source=[PerSourceFilter(source="user", position="last", count=1)])
    planner = MessageFilterAgent("planner", inner, keep)
    team = observed(RoundRobinGroupChat([planner, agent("worker", user.base_url)], termination_condition=until_done()))
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    assert handoffs(recorded) == ["planner->worker"]
    assert counted(recorded, Kind.MODEL_CALL) == {"planner": 1, "worker": 1}


def test_an_agent_class_defined_after_the_adapter_is_recorded(user: Endpoint, observed: Observe) -> None:
    class Own(BaseChatAgent):
        """Writes to a model by itself and passes control on."""

        produced_message_types = (TextMessage, HandoffMessage)

        async def on_messages(self, messages: Any, cancellation_token: Any) -> Response:
            prompt = [SystemMessage(content="[[role=own]]"), UserMessage(content="go", source="user")]
            await client(user.base_url).create(prompt)
            return Response(chat_message=HandoffMessage(content="yours", target="b", source=self.name))

        async def on_messages_stream(self, messages: Any, cancellation_token: Any) -> Any:
            yield await self.on_messages(messages, cancellation_token)

        async def on_reset(self, cancellation_token: Any) -> None: ...

    user.script = in_turn(own=[say("one")], b=[say("DONE")])
    team = observed(
        RoundRobinGroupChat([Own("own", "x"), agent("b", user.base_url)], termination_condition=until_done())
    )
    with rollout() as recorded:
        run(lambda: team.run(task="go"))
    assert counted(recorded, Kind.MODEL_CALL) == {"own": 1, "b": 1}
    assert counted(recorded, Kind.AGENT) == {"main": 1, "own": 1, "b": 1}
    assert handoffs(recorded) == ["own->b"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_alone_speaks_under_its_name(user: Endpoint, observed: Observe, stream: bool) -> None:
    lone = observed(agent("lone", user.base_url, model_client_stream=stream))

    async def streamed() -> list[Any]:
        return [each async for each in lone.run_stream(task="go")]

    with rollout() as recorded:
        run(streamed if stream else lambda: lone.run(task="go"))
    assert tree(recorded) == {("agent", "lone", "rollout"), ("model_call", "lone", "lone")}


def test_a_model_call_in_a_sync_tool_belongs_to_the_tool(user: Endpoint, observed: Observe) -> None:
    own = openai.OpenAI(base_url=user.base_url, api_key="user-key")

    def ask(question: str) -> str:
        """Ask a model."""
        messages: Any = [{"role": "user", "content": question}]
        return str(own.chat.completions.create(model="m", messages=messages).choices[0].message.content)

    user.script = in_turn(worker=[call("ask", "ask", question="?"), say("DONE")], manager=[say("yes")])
    worker = observed(agent("worker", user.base_url, tools=[ask], max_tool_iterations=2))
    with rollout() as recorded:
        run(lambda: worker.run(task="go"))
    inside = [span for span in recorded.calls if recorded.parent_of(span).kind is Kind.TOOL]
    assert len(inside) == 2 and {span.role for span in inside} == {"worker"}
    assert len({span.parent_id for span in inside}) == 2


def test_teams_on_a_shared_runtime_keep_apart(user: Endpoint, gateway: Endpoint, observed: Observe) -> None:
    script = in_turn(manager=[say("writer"), say("critic")], writer=[say("text")], critic=[say("DONE")])
    user.script = gateway.script = script
    recorded = {}

    async def one(name: str, runtime: SingleThreadedAgentRuntime) -> None:
        agents = [agent(role, user.base_url) for role in ("writer", "critic", "silent")]
        team = observed(
            SelectorGroupChat(
                agents, model_client=client(user.base_url), termination_condition=until_done(), runtime=runtime
            )
        )
        with rollout(routing_to(gateway.base_url, "critic"), rollout_id=name) as recorded[name]:
            await team.run(task=f"[[rollout={name}]] go")

    async def main() -> None:
        runtime = SingleThreadedAgentRuntime()
        # Started by one rollout, as a lazily made global is: its loop must not carry that rollout on.
        with rollout(rollout_id="first"):
            runtime.start()
        await asyncio.gather(*(one(f"r{index}", runtime) for index in range(8)))
        await runtime.stop_when_idle()
        assert not {"send_message", "publish_message", "_process_send", "_process_publish"} & set(vars(runtime))

    run(main, seconds=20)
    for name, each in recorded.items():
        assert counted(each, Kind.MODEL_CALL) == {"SelectorGroupChatManager": 2, "writer": 1, "critic": 1}, name
    for seen in gateway.seen:
        assert (seen.role, seen.rollout) == (seen.claimed_role, seen.headers["x-leyden-rollout"])
    assert len(gateway.seen) == 8


def test_twenty_episodes_at_once_keep_apart(user: Endpoint, gateway: Endpoint, observed: Observe) -> None:
    user.script = gateway.script = in_turn(
        planner=[call("transfer_to_worker")],
        worker=[Say(tool_calls=(("search", {"query": "a"}), ("search", {"query": "b"}))), say("DONE")],
    )
    recorded = {}

    async def one(index: int) -> None:
        stream = index % 2 == 0
        planner = agent("planner", user.base_url, handoffs=["worker"], model_client_stream=stream)
        worker = agent("worker", user.base_url, tools=[search], max_tool_iterations=2, model_client_stream=stream)
        team = observed(Swarm([planner, worker], termination_condition=until_done()))
        name = f"r{index}"
        with rollout(routing_to(gateway.base_url, "worker"), rollout_id=name) as recorded[name]:
            await team.run(task=f"[[rollout={name}]] go")

    async def main() -> None:
        await asyncio.gather(*map(one, range(20)))

    run(main, seconds=60)
    for each in recorded.values():
        assert counted(each, Kind.MODEL_CALL) == {"planner": 1, "worker": 2}
        assert counted(each, Kind.TOOL) == {"transfer_to_worker": 1, "search": 2}
        assert handoffs(each) == ["planner->worker"]
        assert {span.status for kind in Kind for span in each.spans(kind)} == {Status.OK}
    for seen in gateway.seen:
        assert (seen.role, seen.rollout) == (seen.claimed_role, seen.headers["x-leyden-rollout"])
    assert (len(user.seen), len(gateway.seen)) == (20, 40)
