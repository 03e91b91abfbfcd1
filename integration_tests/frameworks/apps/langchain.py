"""A user's LangGraph app: a planner hands over to a worker with tools, and a critic sends the work back once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal, TypedDict

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from openai import DefaultAsyncHttpxClient
from pydantic import SecretStr

MODES = ("async", "async-stream", "sync", "sync-stream")
SHARED = True
CALLS = {"planner": 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2}
HANDOFFS = {"planner->worker": 1}

PLANNER = "[[role=planner]] You plan how to answer a question."
WORKER = "[[role=worker]] You follow the plan and answer the question."
CRITIC = "[[role=critic]] You say APPROVE, or REVISE and why."


class State(TypedDict, total=False):
    task: str
    plan: str
    draft: str
    verdict: str


@tool("search")
async def search(query: str) -> str:
    """Search the archive."""
    await asyncio.sleep(0.002)
    return f"found {query}"


@tool("search")
def search_sync(query: str) -> str:
    """Search the archive."""
    time.sleep(0.002)
    return f"found {query}"


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the app as one function of the task."""
    llm = ChatOpenAI(
        model="user-model",
        base_url=base_url,
        api_key=SecretStr("user-key"),
        max_retries=1,
        streaming=stream,
        # Otherwise all models of a process share one client, which works on one event loop only.
        http_async_client=DefaultAsyncHttpxClient(),
    )
    used: BaseTool = search_sync if sync else search
    agent: Any = create_agent(llm, [used], system_prompt=WORKER, name="worker")
    graph = sync_graph(llm, agent) if sync else async_graph(llm, agent)

    async def episode(task: str) -> object:
        return (await graph.ainvoke({"task": task}))["draft"]

    def sync_episode(task: str) -> object:
        return graph.invoke({"task": task})["draft"]

    return sync_episode if sync else episode


def async_graph(llm: ChatOpenAI, agent: Any) -> Any:
    """Compile the graph of coroutines."""

    async def planner(state: State) -> Command[Literal["worker"]]:
        plan = await llm.ainvoke([SystemMessage(PLANNER), HumanMessage(state["task"])])
        return Command(goto="worker", update={"plan": plan.text})

    async def worker(state: State) -> State:
        result = await agent.ainvoke({"messages": [HumanMessage(request(state))]})
        return {"draft": result["messages"][-1].text}

    async def critic(state: State) -> State:
        verdict = await llm.ainvoke([SystemMessage(CRITIC), HumanMessage(f"{state['task']}\n{state['draft']}")])
        return {"verdict": verdict.text}

    return compiled(planner, worker, critic)


def sync_graph(llm: ChatOpenAI, agent: Any) -> Any:
    """Compile the graph of plain functions."""

    def planner(state: State) -> Command[Literal["worker"]]:
        plan = llm.invoke([SystemMessage(PLANNER), HumanMessage(state["task"])])
        return Command(goto="worker", update={"plan": plan.text})

    def worker(state: State) -> State:
        result = agent.invoke({"messages": [HumanMessage(request(state))]})
        return {"draft": result["messages"][-1].text}

    def critic(state: State) -> State:
        verdict = llm.invoke([SystemMessage(CRITIC), HumanMessage(f"{state['task']}\n{state['draft']}")])
        return {"verdict": verdict.text}

    return compiled(planner, worker, critic)


def request(state: State) -> str:
    """Return what the worker is asked: the task and the plan, later also its draft and the critic's verdict."""
    return "\n".join(state[key] for key in ("task", "plan", "draft", "verdict") if key in state)  # type: ignore[literal-required]


def compiled(planner: Any, worker: Any, critic: Any) -> Any:
    """Connect the three: the critic sends the work back until it is content."""
    graph = StateGraph(State)
    graph.add_node("planner", planner)
    graph.add_node("worker", worker)
    graph.add_node("critic", critic)
    graph.add_edge(START, "planner")
    graph.add_edge("worker", "critic")
    graph.add_conditional_edges(
        "critic", lambda state: "worker" if "REVISE" in state["verdict"] else END, ["worker", END]
    )
    return graph.compile()
