"""Second attempts and answers of the wrong form: every attempt is a call of its own, and the agent hears the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.tools import tool
from langgraph.errors import GraphRecursionError, NodeTimeoutError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import RetryPolicy
from pydantic import BaseModel, ValidationError

from integration_tests.langchain.apps import State, graph_of, model, said, search
from integration_tests.langchain.conftest import Run
from leyden.spans import Kind, Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("instrumented")

TASK: dict[str, Any] = {"task": "", "log": []}
GO: dict[str, Any] = {"messages": [HumanMessage("go")]}
NOWHERE = "http://user.invalid/v1"
OK, ERROR, CANCELLED = Status.OK, Status.ERROR, Status.CANCELLED


def node_that(act: Callable[[], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def node(state: State) -> State:
        await act()
        return {}

    graph = StateGraph(State)
    graph.add_node("node", node, **options)
    graph.add_edge(START, "node")
    return graph.compile()


def go(
    run: Run, gateway: FakeOpenAI, app: Any, start: Any = None, raises: type[BaseException] | None = None
) -> Recorded:
    """Run an app with every role routed; it may end with an exception that the user knows."""

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            if raises is None:
                await app.ainvoke(start or TASK)
            else:
                with pytest.raises(raises):
                    await app.ainvoke(start or TASK)
        assert recorded.context.infrastructure_error is None
        return recorded

    return run(episode())  # type: ignore[no-any-return]  # what `episode` returns


def statuses(recorded: Recorded, kind: Kind = Kind.MODEL_CALL) -> list[Status]:
    return [span.status for span in recorded.spans(kind)]


def test_a_runnable_that_is_tried_again_makes_a_call_each_time(run: Run, gateway: FakeOpenAI) -> None:
    llm = model(NOWHERE, max_retries=0).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    recorded = go(run, gateway, node_that(lambda: llm.ainvoke(said("node", "status=500*2"))))
    assert statuses(recorded) == [ERROR, ERROR, OK]
    assert [span.role for span in recorded.calls] == ["node"] * 3


def test_a_node_that_is_tried_again_has_a_span_each_time(run: Run, gateway: FakeOpenAI) -> None:
    llm = model(NOWHERE, max_retries=0)
    policy = RetryPolicy(max_attempts=3, initial_interval=0.01, jitter=False, retry_on=openai.InternalServerError)
    app = node_that(lambda: llm.ainvoke(said("node", "status=500*2")), retry_policy=policy)
    recorded = go(run, gateway, app)
    assert statuses(recorded) == [ERROR, ERROR, OK]
    nodes = [span for span in recorded.spans(Kind.AGENT) if span.name == "node"]
    assert [span.status for span in nodes] == [ERROR, ERROR, OK]
    assert [span.parent_id for span in recorded.calls] == [span.span_id for span in nodes]


def test_a_fallback_model_is_a_second_call_of_the_same_role(run: Run, gateway: FakeOpenAI) -> None:
    first, second = model(NOWHERE, max_retries=0), model(NOWHERE, max_retries=0)
    llm = first.bind(stop=["x"]).with_fallbacks([second])
    recorded = go(run, gateway, node_that(lambda: llm.ainvoke(said("node", "status=400*1"))))
    assert statuses(recorded) == [ERROR, OK]
    assert [span.role for span in recorded.calls] == ["node"] * 2
    assert ["stop" in seen.body for seen in gateway.seen] == [True, False]


class Count(BaseModel):
    """How many there are."""

    number: int


@pytest.mark.parametrize(
    ("method", "raises", "status"),
    [("json_schema", ValidationError, ERROR), ("function_calling", None, OK), ("json_mode", OutputParserException, OK)],
)
def test_output_that_does_not_parse_raises_what_it_always_raised(
    run: Run, gateway: FakeOpenAI, method: Any, raises: Any, status: Status
) -> None:
    llm = model(NOWHERE).with_structured_output(Count, method=method)
    recorded = go(run, gateway, node_that(lambda: llm.ainvoke(said("node", "count as json"))), raises=raises)
    # With `json_schema` the SDK parses inside the model call.
    assert statuses(recorded) == [status]
    ended = OK if raises is None else ERROR
    assert set(statuses(recorded, Kind.AGENT)) == {ended}


def test_a_parser_after_the_model_fails_its_node_and_not_the_call(run: Run, gateway: FakeOpenAI) -> None:
    chain = model(NOWHERE) | JsonOutputParser()
    recorded = go(run, gateway, node_that(lambda: chain.ainvoke(said("node", "x"))), raises=OutputParserException)
    assert statuses(recorded) == [OK]
    assert set(statuses(recorded, Kind.AGENT)) == {ERROR}


def test_an_agent_s_response_format_that_does_not_parse(run: Run, gateway: FakeOpenAI) -> None:
    prompt = "role=worker call=Count"
    llm = model(NOWHERE)
    # The fake writes a text where the number belongs; a tool's agent is told so, and asked again.
    tools = create_agent(llm, [], system_prompt=prompt, name="worker", response_format=ToolStrategy(Count))
    recorded = go(run, gateway, tools.with_config(recursion_limit=2), GO, raises=GraphRecursionError)
    assert statuses(recorded) == [OK, OK]
    assert "valid integer" in str(gateway.seen[1].messages), "the model hears what was wrong"
    strict = create_agent(
        llm, [], system_prompt=prompt, name="worker", response_format=ToolStrategy(Count, handle_errors=False)
    )
    recorded = go(run, gateway, strict, GO, raises=StructuredOutputValidationError)
    assert statuses(recorded) == [OK]
    provider = create_agent(llm, [], system_prompt=prompt, name="worker", response_format=ProviderStrategy(Count))
    recorded = go(run, gateway, provider, GO, raises=StructuredOutputValidationError)
    assert statuses(recorded) == [OK]
    assert [span.role for span in recorded.calls] == ["worker"]


@tool
async def fail(query: str) -> str:
    """Fail."""
    raise ValueError("exploded")


def test_a_tool_node_s_errors_are_the_tools(run: Run, gateway: FakeOpenAI) -> None:
    calls = [
        {"name": "search", "args": {"query": "x"}, "id": "1"},
        {"name": "fail", "args": {"query": "x"}, "id": "2"},
        {"name": "search", "args": {"wrong": 1}, "id": "3"},
        {"name": "nobody", "args": {}, "id": "4"},
    ]
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([search, fail], handle_tool_errors=True))
    graph.add_edge(START, "tools")
    app: Any = graph.compile()
    recorded = go(run, gateway, app, {"messages": [AIMessage("", tool_calls=calls)]})
    found = {span.attributes["gen_ai.tool.call.id"]: (span.name, span.status) for span in recorded.spans(Kind.TOOL)}
    assert found["1"] == ("search", OK)
    assert found["2"] == ("fail", ERROR)
    assert found["3"] == ("search", ERROR)
    assert set(statuses(recorded, Kind.AGENT)) == {OK}, "the agent is told, and goes on"
    strict = StateGraph(MessagesState)
    strict.add_node("tools", ToolNode([search, fail], handle_tool_errors=False))
    strict.add_edge(START, "tools")
    recorded = go(run, gateway, strict.compile(), {"messages": [AIMessage("", tool_calls=calls[1:2])]}, ValueError)
    assert statuses(recorded, Kind.TOOL) == [ERROR]


def test_parallel_nodes_end_cancelled_when_one_of_them_fails(run: Run, gateway: FakeOpenAI) -> None:
    llm = model(NOWHERE, max_retries=0)

    async def slow(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("slow", "slow=5"))).text]}

    async def bad(state: State) -> State:
        await asyncio.sleep(0.2)
        raise ValueError("no")

    graph = StateGraph(State)
    graph.add_node("slow", slow)
    graph.add_node("bad", bad)
    graph.add_edge(START, "slow")
    graph.add_edge(START, "bad")
    recorded = go(run, gateway, graph.compile(), raises=ValueError)
    assert statuses(recorded) == [CANCELLED]
    ends = {span.name: span.status for span in recorded.spans(Kind.AGENT)}
    assert (ends["slow"], ends["bad"]) == (CANCELLED, ERROR)


def test_a_node_s_own_timeout_ends_its_call(run: Run, gateway: FakeOpenAI) -> None:
    llm = model(NOWHERE, max_retries=0)
    app = node_that(lambda: llm.ainvoke(said("node", "slow=5")), timeout=0.3)
    recorded = go(run, gateway, app, raises=NodeTimeoutError)
    assert statuses(recorded) == [Status.ABANDONED], "LangChain says nothing of it any more"


def test_reading_half_a_graph_s_stream_leaves_nothing_open(run: Run, gateway: FakeOpenAI) -> None:
    llm = model(NOWHERE)
    first, second = (node_that(lambda: llm.ainvoke(said("node", "x"))) for _ in range(2))
    app = graph_of(first=first, second=second)

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            pieces = app.astream(TASK, stream_mode="updates")
            async for _ in pieces:
                break
            await pieces.aclose()
            assert len(recorded.spans(Kind.AGENT)) == 4, "closed before the rollout ends: two graphs, two nodes"
        return recorded

    recorded = run(episode())
    assert statuses(recorded) == [OK]
