"""Checkpointers: every rollout has threads of its own, and everything inside it finds them under the user's name."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from integration_tests.langchain.apps import State
from integration_tests.langchain.conftest import Run
from leyden_plugins.frameworks.langchain import LeydenCallbackHandler
from tests.capture.rollouts import rollout

THREAD: dict[str, Any] = {"configurable": {"thread_id": "t", "user_id": "u"}}


def counting(saver: Any = None, *, name: str = "count", of: Any = None) -> Any:
    """A graph whose state grows by a word each time; `of` is what its node does."""

    def node(state: State) -> State:
        return {"log": [of(state) if of else "again"]}

    graph = StateGraph(State)
    graph.add_node(name, node)
    graph.add_edge(START, name)
    return graph.compile(checkpointer=saver)


def log_of(state: Any) -> list[str]:
    return list(state.get("log", []))


@pytest.mark.usefixtures("instrumented")
def test_rollouts_that_use_one_thread_id_at_once_do_not_see_each_other(run: Run) -> None:
    app, given = counting(InMemorySaver()), copy.deepcopy(THREAD)

    async def episode(rollout_id: str) -> list[str]:
        with rollout(rollout_id=rollout_id):
            await app.ainvoke({"log": [rollout_id]}, given)
            await asyncio.sleep(0)
            app.invoke({"log": ["more"]}, given)
            async for _ in app.astream({"log": ["most"]}, config=given):
                pass
            return log_of((await app.aget_state(given)).values)

    async def group() -> list[list[str]]:
        return await asyncio.gather(*(episode(f"r{number}") for number in range(3)))

    assert run(group()) == [[f"r{number}", "again", "more", "again", "most", "again"] for number in range(3)]
    assert given == THREAD
    assert app.get_state(given).values == {}, "outside any rollout the thread is the user's own"


@pytest.mark.usefixtures("instrumented")
def test_a_second_attempt_finds_nothing_of_the_first() -> None:
    app = counting(InMemorySaver())
    for _ in range(2):
        with rollout():
            assert log_of(app.invoke({"log": []}, THREAD)) == ["again"]


@pytest.mark.parametrize("is_sync", [True, False], ids=["sync", "async"])
@pytest.mark.usefixtures("instrumented")
def test_resuming_reading_and_changing_state_finds_the_same_thread(run: Run, is_sync: bool) -> None:
    inner = counting(name="ask", of=lambda state: interrupt("ok?"))
    graph = StateGraph(State)
    graph.add_node("inner", inner)
    graph.add_edge(START, "inner")
    app: Any = graph.compile(checkpointer=InMemorySaver())

    def sync_episode() -> None:
        app.invoke({"log": ["first"]}, THREAD)
        paused = app.get_state(THREAD, subgraphs=True)
        assert [task.interrupts[0].value for task in paused.tasks[0].state.tasks] == ["ok?"]
        assert log_of(app.get_state(paused.tasks[0].state.config).values) == ["first"]
        assert log_of(app.invoke(Command(resume="yes"), THREAD)) == ["first", "first", "yes"]
        changed = app.update_state(THREAD, {"log": ["changed"]})
        assert log_of(app.get_state(changed).values)[-1] == "changed"
        history = list(app.get_state_history(THREAD, limit=10))
        assert history[0].config == changed
        # The config of a snapshot names the rollout's thread already.
        assert log_of(app.invoke(None, history[0].config))[-1] == "changed"

    async def episode() -> None:
        await app.ainvoke({"log": ["first"]}, THREAD)
        paused = await app.aget_state(THREAD, subgraphs=True)
        assert [task.interrupts[0].value for task in paused.tasks[0].state.tasks] == ["ok?"]
        assert log_of((await app.aget_state(paused.tasks[0].state.config)).values) == ["first"]
        assert log_of(await app.ainvoke(Command(resume="yes"), THREAD)) == ["first", "first", "yes"]
        changed = await app.aupdate_state(THREAD, {"log": ["changed"]})
        assert log_of((await app.aget_state(changed)).values)[-1] == "changed"
        history = [state async for state in app.aget_state_history(THREAD, limit=10)]
        assert history[0].config == changed
        assert log_of(await app.ainvoke(None, history[0].config))[-1] == "changed"

    async def either() -> None:
        with rollout():
            if is_sync:
                sync_episode()
            else:
                await episode()

    run(either())


@pytest.mark.usefixtures("instrumented")
def test_a_thread_id_that_is_bound_or_inherited_is_the_rollouts_own_too() -> None:
    app = counting(InMemorySaver())
    bound = app.with_config(configurable={"thread_id": "t"})
    heard: list[Any] = []

    def call(value: Any, config: RunnableConfig) -> Any:
        return log_of(inherits.invoke({"log": []}))

    def listen(state: State, config: RunnableConfig) -> State:
        heard.append(config["configurable"]["user_id"])
        return {"log": ["again"]}

    graph = StateGraph(State)
    graph.add_node("listen", listen)
    graph.add_edge(START, "listen")
    inherits: Any = graph.compile(checkpointer=InMemorySaver())
    chain = RunnableLambda(call)
    for rollout_id in ("r1", "r2"):
        with rollout(rollout_id=rollout_id):
            assert log_of(bound.invoke({"log": []})) == ["again"]
            assert log_of(bound.get_state({}).values) == ["again"]
            assert chain.invoke(None, THREAD) == ["again"]  # type: ignore[arg-type]  # a plain dict
    assert heard == ["u", "u"], "what else is inherited stays"


@pytest.mark.usefixtures("instrumented")
def test_a_graph_that_a_node_calls_has_the_threads_of_its_rollout() -> None:
    inner = counting(InMemorySaver())
    outer = counting(InMemorySaver(), of=lambda state: "|".join(log_of(inner.invoke({"log": []}, THREAD))))
    for rollout_id in ("r1", "r2"):
        with rollout(rollout_id=rollout_id):
            assert log_of(outer.invoke({"log": []}, THREAD)) == ["again"]
            assert log_of(outer.invoke({"log": []}, THREAD)) == ["again", "again|again"]


@pytest.mark.usefixtures("instrumented")
def test_the_functional_api_remembers_within_a_rollout_only() -> None:
    @entrypoint(checkpointer=InMemorySaver())
    def flow(text: str, *, previous: str | None = None) -> str:
        return (previous or "") + text

    config: Any = THREAD
    for rollout_id in ("r1", "r2"):
        with rollout(rollout_id=rollout_id):
            assert flow.invoke("a", config) == "a"
            assert flow.invoke("b", config) == "ab"


def thread_seen(app: Any) -> str:
    seen: list[str] = []

    def node(state: State, config: RunnableConfig) -> State:
        seen.append(config["configurable"]["thread_id"])
        return {}

    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.compile(checkpointer=app).invoke({}, THREAD)  # type: ignore[call-overload]  # plain dicts
    return seen[0]


def test_only_graphs_with_a_checkpointer_in_a_rollout_with_hooks_see_another_thread_id(request: Any) -> None:
    LeydenCallbackHandler()
    with rollout():
        assert thread_seen(InMemorySaver()) == "t", "the explicit form patches nothing"
    request.getfixturevalue("instrumented")
    with rollout() as recorded:
        assert thread_seen(None) == "t"
        assert thread_seen(InMemorySaver()) == f"t@r1.1.{recorded.context.root_id}"
    assert thread_seen(InMemorySaver()) == "t"
