"""Every way to read a graph as it runs: the same pieces as without Leyden, and the same record."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.graph import START, StateGraph

from integration_tests.langchain.apps import State, model, said, team
from integration_tests.langchain.conftest import Run
from leyden_plugins.frameworks.langchain import LangChainAdapter
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

TASK: dict[str, Any] = {"task": "rollout=r1", "log": []}
CALLS = ["planner", "worker", "worker", "critic"]
MODES = ["values", "updates", "messages", "custom", "debug", "tasks"]


async def read(app: Any, way: str) -> Counter[str]:
    """Read a graph to its end; count the kinds of pieces."""
    if way == "v1" or way == "v2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Counter([event["event"] async for event in app.astream_events(TASK, version=way)])
    if way == "v3":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = await app.astream_events(TASK, version="v3")
        return Counter([str(event["method"]) async for event in stream])
    options: dict[str, Any] = {"subgraphs": True} if way == "subgraphs" else {}
    modes = MODES if way == "subgraphs" else [way]
    return Counter([str(piece[-2]) async for piece in app.astream(TASK, stream_mode=modes, **options)])


def read_sync(app: Any, way: str) -> Counter[str]:
    if way == "v3":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Counter([str(event["method"]) for event in app.stream_events(TASK, version="v3")])
    return Counter([str(piece[-2]) for piece in app.stream(TASK, stream_mode=[way])])


@pytest.mark.parametrize("way", [*MODES, "subgraphs", "v1", "v2", "v3"])
@pytest.mark.usefixtures("instrumented")
def test_every_stream_of_a_graph_names_who_speaks_and_gives_what_it_gave(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, way: str, instrumented: LangChainAdapter
) -> None:
    app = team(user_server.base_url)

    async def episode() -> tuple[Recorded, Counter[str]]:
        with rollout(routing_to(gateway.base_url, "worker", "critic")) as recorded:
            pieces = await read(app, way)
        return recorded, pieces

    recorded, pieces = run(episode())
    assert [span.role for span in recorded.calls] == CALLS
    assert [seen.true_role for seen in gateway.seen] == CALLS[1:]
    assert {span.status.value for span in recorded.records} == {"ok"}
    instrumented.detach()
    # How a text is cut into pieces is the network's choice.
    assert set(run(read(app, way))) == set(pieces)
    if way not in ("v1", "v2", "v3", "messages", "subgraphs"):
        assert run(read(app, way)) == pieces


@pytest.mark.parametrize("way", ["values", "messages", "v3"])
@pytest.mark.usefixtures("instrumented")
def test_sync_streams_do_the_same(user_server: FakeOpenAI, gateway: FakeOpenAI, way: str) -> None:
    app = team(user_server.base_url, is_sync=True)
    with rollout(routing_to(gateway.base_url, "worker", "critic")) as recorded:
        assert read_sync(app, way)
    assert [span.role for span in recorded.calls] == CALLS
    assert [seen.true_role for seen in gateway.seen] == CALLS[1:]


@pytest.mark.usefixtures("instrumented")
def test_a_model_s_own_v3_stream_is_its_nodes_call(run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    llm = model(user_server.base_url)

    async def node(state: State) -> State:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = await llm.astream_events(said("node", "x"), version="v3")
            text = "".join([piece async for piece in stream.text])
            again = "".join(llm.stream_events([HumanMessage("role=node")], version="v3").text)
        return {"log": [text, again]}

    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    app: Any = graph.compile()

    async def episode() -> Recorded:
        with rollout(routing_to(gateway.base_url)) as recorded:
            log = (await app.ainvoke({"task": "", "log": []}))["log"]
            assert all("role=node" in text for text in log)
        return recorded

    recorded = run(episode())
    assert [(span.role, span.status.value) for span in recorded.calls] == [("node", "ok")] * 2
    assert [seen.headers["x-leyden-span"] for seen in gateway.seen] == [span.span_id for span in recorded.calls]
    assert recorded.context.infrastructure_error is None
