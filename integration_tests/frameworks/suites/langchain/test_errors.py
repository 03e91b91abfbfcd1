"""How runs that go wrong are recorded: errors, cancellation, cut streams, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from integration_tests.langchain.apps import State, graph_of, model, react_agent, said, search
from integration_tests.langchain.conftest import Run
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Status
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

pytestmark = pytest.mark.usefixtures("instrumented")

TASK = {"task": "", "log": []}


def node_that(act: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def node(state: State) -> State:
        await act()
        return {}

    return graph_of(node=node)


def statuses(recorded: Recorded, kind: Kind = Kind.MODEL_CALL) -> list[Status]:
    return [span.status for span in recorded.spans(kind)]


def test_a_failed_model_call_fails_its_node_and_graph(run: Run, gateway: FakeOpenAI) -> None:
    llm = model("http://user.invalid/v1", max_retries=0)
    app = node_that(lambda: llm.ainvoke(said("node", "status=400")))

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            with pytest.raises(openai.BadRequestError, match="told to fail"):
                await app.ainvoke(TASK)
        return recorded

    recorded = run(episode())
    assert statuses(recorded) == [Status.ERROR]
    assert statuses(recorded, Kind.AGENT) == [Status.ERROR, Status.ERROR]
    assert "Error code: 400" in str(recorded.calls[0].error)


def test_the_clients_retries_are_attempts_of_one_call(run: Run, gateway: FakeOpenAI) -> None:
    llm = model("http://user.invalid/v1", max_retries=2)

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            await node_that(lambda: llm.ainvoke(said("node", "status=500*2"))).ainvoke(TASK)
        return recorded

    recorded = run(episode())
    (call,) = recorded.calls
    assert call.status is Status.OK
    assert [seen.headers["x-leyden-http-attempt"] for seen in gateway.seen] == ["0", "1", "2"]
    assert {seen.headers["x-leyden-span"] for seen in gateway.seen} == {call.span_id}
    assert recorded.context.infrastructure_error is None


def test_a_cancelled_call_is_closed_with_its_node(run: Run, gateway: FakeOpenAI) -> None:
    llm = model("http://user.invalid/v1")
    app = node_that(lambda: llm.ainvoke(said("node", "slow=5")))

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            with pytest.raises(TimeoutError, match=r"^$"):
                await asyncio.wait_for(app.ainvoke(TASK), 0.3)
            assert recorded.calls, "closed by its node, not by the end of the rollout"
        return recorded

    recorded = run(episode())
    assert statuses(recorded) == [Status.CANCELLED]
    assert statuses(recorded, Kind.AGENT) == [Status.CANCELLED, Status.CANCELLED]


def test_a_stream_cut_on_the_way_is_interrupted_although_langchain_takes_it_for_whole(
    run: Run, gateway: FakeOpenAI
) -> None:
    llm = model("http://user.invalid/v1")

    async def read(text: str, stop: bool = False) -> None:
        pieces: AsyncIterator[Any] = llm.astream(said("node", text))
        async for piece in pieces:
            if stop and piece.text:
                break
        await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def episode(text: str, stop: bool = False) -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            await node_that(lambda: read(text, stop)).ainvoke(TASK)
        return recorded

    assert statuses(run(episode("whole"))) == [Status.OK]
    assert statuses(run(episode("please cut here"))) == [Status.INTERRUPTED]
    assert statuses(run(episode("whole", stop=True))) == [Status.INTERRUPTED]


def test_tool_errors_are_recorded_whether_or_not_the_agent_hears_of_them(run: Run, user_server: FakeOpenAI) -> None:
    @tool
    async def loud(query: str) -> str:
        """Fail."""
        raise ValueError("exploded")

    @tool
    async def soft(query: str) -> str:
        """Fail softly."""
        raise ToolException("sorry")

    soft.handle_tool_error = True
    llm = model(user_server.base_url)

    async def episode(used: Any) -> Recorded:
        agent = react_agent(llm, [used], f"role=worker call={used.name}", name="worker")
        with rollout() as recorded:
            try:
                await agent.ainvoke({"messages": [HumanMessage("go")]})
            except ValueError:
                assert used is loud
        return recorded

    for used, text in ((loud, "exploded"), (soft, "sorry")):
        recorded = run(episode(used))
        (span,) = recorded.spans(Kind.TOOL)
        assert span.status is Status.ERROR
        assert text in str(span.error)


def test_an_interrupt_is_no_error(run: Run) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("ok?")]}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    app: Any = graph.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}

    async def episode() -> Recorded:
        with rollout() as recorded:
            await app.ainvoke(TASK, thread)
            assert (await app.ainvoke(Command(resume="yes"), thread))["log"] == ["yes"]
        return recorded

    assert set(statuses(run(episode()), Kind.AGENT)) == {Status.OK}


def test_the_deadline_stops_an_agent_that_swallows_every_exception(run: Run, gateway: FakeOpenAI) -> None:
    llm = model("http://user.invalid/v1", max_retries=5)

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                await llm.ainvoke(said("node", "slow=0.1"))

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url), timeout_seconds=0.4) as recorded:
            with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1'"):
                await node_that(stubborn).ainvoke(TASK)
        return recorded

    recorded = run(episode())
    assert recorded.calls[-1].status is Status.INTERRUPTED
    assert recorded.context.infrastructure_error is None


def test_what_the_recorder_raises_never_reaches_the_agent(
    run: Run, user_server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("recorder is broken")

    monkeypatch.setattr("leyden_plugins.frameworks.langchain.handler.answer_attributes", broken)
    monkeypatch.setattr("leyden_plugins.frameworks.langchain.handler.record_handoff", broken)

    async def episode() -> Recorded:
        agent = react_agent(model(user_server.base_url), [search], "role=worker call=search", name="worker")
        with rollout() as recorded:
            result = await agent.ainvoke({"messages": [HumanMessage("go")]})
            assert "role=worker" in result["messages"][-1].text
        return recorded

    assert statuses(run(episode())) == [Status.OK, Status.OK]
