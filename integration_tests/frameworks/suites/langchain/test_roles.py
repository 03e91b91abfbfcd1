"""Which role speaks, in every way of nesting that LangGraph and LangChain offer."""

from __future__ import annotations

import operator
import threading
from typing import Annotated, Any, TypedDict

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import tool
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send

import leyden
from integration_tests.langchain.apps import State, graph_of, model, react_agent, said, search
from integration_tests.langchain.conftest import Run
from leyden.errors import LostContextError
from leyden.spans import Kind
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("instrumented")


def roles(recorded: Recorded) -> list[str]:
    return [span.role for span in recorded.calls]


def check_truth(recorded: Recorded) -> None:
    """Compare every recorded role with the one its prompt names."""
    for span in recorded.calls:
        assert f"role={span.role}" in str(span.attributes["gen_ai.input.messages"])


def go(run: Run, app: Any, value: Any = None) -> Recorded:
    async def episode() -> Recorded:
        with rollout() as recorded:
            await app.ainvoke({"messages": [HumanMessage("go")]} if value is None else value)
        return recorded

    return run(episode())  # type: ignore[no-any-return]  # what `episode` returns


@pytest.mark.parametrize("is_named", [True, False])
def test_an_agent_used_as_a_tool_speaks_under_its_name_or_the_tools(
    run: Run, user_server: FakeOpenAI, is_named: bool
) -> None:
    llm = model(user_server.base_url)
    inner_role = "researcher" if is_named else "ask"
    inner = react_agent(llm, [search], f"role={inner_role} call=search", name=inner_role if is_named else None)

    @tool
    async def ask(query: str) -> str:
        """Ask somebody."""
        return str((await inner.ainvoke({"messages": [HumanMessage(query)]}))["messages"][-1].text)

    recorded = go(run, react_agent(llm, [ask], "role=boss call=ask", name="boss"))
    assert roles(recorded) == ["boss", inner_role, inner_role, "boss"]
    check_truth(recorded)
    (outer_tool, inner_tool) = recorded.spans(Kind.TOOL)
    assert (outer_tool.name, outer_tool.role) == ("ask", "boss")
    assert (inner_tool.name, inner_tool.role) == ("search", inner_role)
    assert inner_tool.attributes["gen_ai.tool.call.id"] == "call_0"


def test_a_supervisor_hands_over_to_its_subgraphs(run: Run, user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)

    @tool
    def transfer_to_bob() -> Command[Any]:
        """Hand over to bob."""
        return Command(goto="bob", graph=Command.PARENT)

    graph = StateGraph(_Messages)
    graph.add_node("alice", react_agent(llm, [transfer_to_bob], "role=alice call=transfer_to_bob", name="alice"))
    graph.add_node("bob", react_agent(llm, [search], "role=bob call=search", name="bob"))
    graph.add_edge(START, "alice")
    recorded = go(run, graph.compile())
    assert roles(recorded) == ["alice", "bob", "bob"]
    check_truth(recorded)
    (handoff,) = [span for span in recorded.spans(Kind.HANDOFF) if recorded.parent_of(span).kind is Kind.TOOL]
    assert handoff.attributes["leyden.handoff.to"] == "bob"
    assert {span.status.value for span in recorded.spans(Kind.AGENT)} == {"ok"}


class _Messages(TypedDict):
    messages: Annotated[list[Any], operator.add]


def test_map_reduce_and_subgraphs_keep_each_nodes_name(run: Run, user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)
    prompt = ChatPromptTemplate.from_messages([("system", "role={role}"), ("human", "{text}")])

    async def mapper(state: State) -> State:
        return {"log": [(await (prompt | llm).ainvoke({"role": "mapper", "text": state["task"]})).text]}

    async def inner(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("inner", "x"))).text]}

    graph = StateGraph(State)
    graph.add_node("mapper", mapper)
    graph.add_node("team", graph_of(inner=inner))
    graph.add_conditional_edges(START, lambda state: [Send("mapper", {"task": str(n)}) for n in range(3)], ["mapper"])
    graph.add_edge("mapper", "team")
    graph.add_edge("team", END)
    recorded = go(run, graph.compile(), {"task": "", "log": []})
    assert roles(recorded) == ["mapper"] * 3 + ["inner"]
    check_truth(recorded)
    assert len({span.parent_id for span in recorded.calls}) == 4


def test_the_functional_api_speaks_under_its_tasks(run: Run, user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)

    @task
    async def drafter(text: str) -> str:
        return (await llm.ainvoke(said("drafter", text))).text

    @entrypoint()
    async def flow(text: str) -> str:
        return await drafter(text)

    recorded = go(run, flow, "x")
    assert roles(recorded) == ["drafter"]


def test_chains_speak_as_main_unless_they_are_named(run: Run, user_server: FakeOpenAI) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "role={role}"), ("human", "hi")]) | model(user_server.base_url)
    assert roles(go(run, chain, {"role": "main"})) == ["main"]
    recorded = go(run, chain.with_config(run_name="summariser"), {"role": "summariser"})
    assert roles(recorded) == ["summariser"]
    assert recorded.parent_of(recorded.calls[0]).name == "summariser"


def test_the_users_own_role_wins(run: Run, user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)
    judge = llm.with_config(metadata={"leyden_role": "judge"})

    async def node(state: State) -> State:
        await judge.ainvoke(said("judge", "x"))
        with leyden.role("inner"):
            await llm.ainvoke(said("inner", "x"))
        await llm.ainvoke(said("node", "x"))
        return {}

    recorded = go(run, graph_of(node=node), {"task": "", "log": []})
    assert roles(recorded) == ["judge", "inner", "node"]
    check_truth(recorded)
    assert recorded.parent_of(recorded.calls[1]).name == "inner"


@pytest.mark.parametrize("is_sync", [True, False])
def test_plain_openai_calls_take_the_role_of_the_node_or_tool_around_them(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, is_sync: bool
) -> None:
    llm = model(user_server.base_url)

    def raw(role: str) -> None:
        with openai.OpenAI(base_url=user_server.base_url, api_key="user-key") as client:
            client.chat.completions.create(
                model="raw", messages=[{"role": "system", "content": f"role={role}"}, {"role": "user", "content": "x"}]
            )

    @tool
    def look_up(query: str) -> str:
        """Look something up."""
        raw("boss")
        return query

    boss = react_agent(llm, [look_up], "role=boss call=look_up", name="boss")

    def node(state: State) -> State:
        raw("node")
        llm.invoke(said("node", "x"))
        raw("node")
        boss.invoke({"messages": [HumanMessage("go")]})
        raw("node")
        return {}

    app = graph_of(node=node)

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url, "node")) as recorded:
            raw("main")
            if is_sync:
                app.invoke({"task": "", "log": []})
            else:
                await app.ainvoke({"task": "", "log": []})
            raw("main")
        return recorded

    recorded = run(episode())
    assert roles(recorded) == ["main", "node", "node", "node", "boss", "boss", "boss", "node", "main"]
    check_truth(recorded)
    parents = [recorded.parent_of(span).name for span in recorded.calls]
    assert parents == ["rollout", "node", "node", "node", "agent", "look_up", "agent", "node", "rollout"]
    assert [seen.true_role for seen in gateway.seen] == ["node"] * 4
    assert all(seen.headers["authorization"] == "Bearer gateway-token" for seen in gateway.seen)


def test_batches_and_parallel_branches_get_a_span_for_each_call(user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)

    def node(state: State) -> State:
        llm.batch([said("node", f"n={number}") for number in range(4)])
        RunnableParallel(left=llm, right=llm).invoke(said("node", "n=both"))
        llm.generate([said("node", f"n=generate{number}") for number in range(3)])
        return {}

    with rollout(routing_to(user_server.base_url, "node")) as recorded:
        graph_of(node=node).invoke({"task": "", "log": []})
    assert roles(recorded) == ["node"] * 9
    texts = {span.span_id: str(span.attributes["gen_ai.input.messages"]) for span in recorded.calls}
    assert len(user_server.seen) == 9
    for seen in user_server.seen:
        assert f"n={seen.marked('n')}'" in texts[seen.headers["x-leyden-span"]]


def test_a_thread_of_the_nodes_own_loses_its_context_unless_threads_are_patched(
    user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    llm = model(user_server.base_url, max_retries=0)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            llm.invoke(said("node", "x"))
        except Exception as error:
            errors.append(error)

    def node(state: State) -> State:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return {}

    with rollout(routing_to(gateway.base_url, "node")):
        graph_of(node=node).invoke({"task": "", "log": []})
    lost: BaseException | None = errors[0]
    while lost is not None and not isinstance(lost, LostContextError):
        lost = lost.__cause__  # SDK and framework wrap what a client raises
    assert len(errors) == 1 and lost is not None
    assert f"{__file__}:" in str(lost) and "in call belongs to no known rollout" in str(lost)
    assert gateway.seen == user_server.seen == []
    leyden.instrument([], threads=True)
    with rollout(routing_to(gateway.base_url, "node")) as recorded:
        graph_of(node=node).invoke({"task": "", "log": []})
    assert roles(recorded) == ["node"]
    assert len(gateway.seen) == 1


def test_silent_nodes_are_declared_when_a_graph_starts(run: Run, user_server: FakeOpenAI) -> None:
    async def first(state: State) -> Command[Any]:
        return Command(goto=END)

    async def silent(state: State) -> State:
        return {}

    graph = StateGraph(State)
    graph.add_node("first", first, destinations=("worker", END))
    graph.add_node("worker", react_agent(model(user_server.base_url), [search], "x", name="worker"))
    graph.add_node("silent", graph_of(deep=silent))
    graph.add_edge(START, "first")
    graph.add_edge("worker", "silent")
    recorded = go(run, graph.compile(), {"task": "", "log": []})
    assert recorded.context.declared_roles >= {"first", "worker", "silent", "deep"}
